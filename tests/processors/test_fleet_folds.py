"""Twelve folds of a detector each and one of the policy say what one engine says."""

from __future__ import annotations

import random
from typing import Dict, Iterator, List, Sequence, Tuple, Type, cast

import pytest
from tests.processors.logs import log_of, names

from plarv_processors.detector_fold import DetectorFold
from plarv_processors.detectors import BUILTIN
from plarv_processors.detectors.detector import Detector, fingerprint
from plarv_processors.engine import Engine, EngineConfig
from plarv_processors.event_batch import EventBatch
from plarv_processors.policy import Policy
from plarv_processors.policy_fold import PolicyFold
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict

Found = Tuple[List[Verdict], List[Action]]


class Raises:
    """A detector that raises at its fiftieth event."""

    name = "raises"
    scope = "rank"

    def __init__(self) -> None:
        self.version = fingerprint(self.name, Policy.Config())
        self.seen = 0

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        self.seen += 1
        if self.seen == 50:
            raise RuntimeError("fifty")
        return ()


RAISES: Type[Detector] = cast(Type[Detector], Raises)


def by_one_engine(
    events: Sequence[Event],
    classes: Tuple[Type[Detector], ...] = BUILTIN,
    left_out: Tuple[str, int] = ("", 0),
) -> Found:
    engine = Engine(EngineConfig(detectors=classes))
    if left_out[0]:
        engine.leave_out(*left_out)
    found: Found = ([], [])
    for event in events:
        for record in engine.fold(event):
            if isinstance(record, Verdict):
                found[0].append(record)
            else:
                found[1].append(record)
    return found


def split(events: Sequence[Event], chance: random.Random) -> Iterator[Sequence[Event]]:
    at = 0
    while at < len(events):
        size = chance.choice((1, 1, 2, 7, 64))
        yield events[at : at + size]
        at += size


def by_a_fleet(
    events: Sequence[Event],
    seed: int,
    classes: Tuple[Type[Detector], ...] = BUILTIN,
    left_out: Tuple[str, int] = ("", 0),
) -> Found:
    """Each detector for itself, over packings and restarts of its own; the policy last."""
    chance = random.Random(seed)
    verdicts: Dict[int, List[Verdict]] = {}
    for cls in classes:
        fold = DetectorFold(cls)
        for chunk in split(events, chance):
            if cls.name == left_out[0] and fold.ordinal >= left_out[1]:
                fold.leave_out()
            for found in fold.fold(EventBatch(chunk)):
                verdicts.setdefault(found.ordinal, []).append(found)
            if chance.random() < 0.1:
                state, fold = fold.snapshot(), DetectorFold(cls)
                fold.restore(state)
    policy = PolicyFold()
    actions: List[Action] = []
    for chunk in split(events, chance):
        actions += policy.fold(EventBatch(chunk), verdicts)
        if chance.random() < 0.1:
            state, policy = policy.snapshot(), PolicyFold()
            policy.restore(state)
    return [found for at in sorted(verdicts) for found in verdicts[at]], actions


def attempts_of(name: str) -> List[Event]:
    """A run of three attempts: begun anew, gone on after its end, and gone back."""
    first = log_of(name, steps=None)
    log = list(first)
    again = [event._replace(session=event.session.replace("session", "again")) for event in first]
    log += again
    late: List[Event] = []
    for event in again[-3:]:
        late.append(event._replace(record=event.record + 100_000))
    log += late
    log += [event._replace(record=event.record + 200_000) for event in again[: len(again) // 2]]
    return log


@pytest.mark.parametrize("name", names)
def test_the_fleet_finds_what_the_engine_finds(name: str) -> None:
    log = log_of(name)
    assert by_a_fleet(log, seed=1) == by_one_engine(log)


@pytest.mark.parametrize("name", ["divergence", "spike", "straggler", "disagreement", "dead"])
def test_the_fleet_finds_the_same_over_attempts_ends_and_duplicates(name: str) -> None:
    log = attempts_of(name)
    chance = random.Random(3)
    log = [copy for event in log for copy in [event] * chance.choice((1, 1, 1, 2))]
    expected = by_one_engine(log)
    assert len({found.attempt for found in expected[0]}) > 1
    assert by_a_fleet(log, seed=2) == expected


def test_a_detector_that_raises_is_off_at_the_same_place() -> None:
    log = log_of("spike")
    classes = (*BUILTIN, RAISES)
    assert by_a_fleet(log, seed=4, classes=classes) == by_one_engine(log, classes)
    fold = DetectorFold(RAISES)
    fold.fold(EventBatch(log))
    assert fold.is_off
    assert fold.fault == "RuntimeError: fifty"


def test_a_detector_that_hung_is_left_out_of_both_after_the_same_ordinal() -> None:
    log = log_of("divergence")
    found = next(v for v in by_one_engine(log)[0] if v.detector == "loss_divergence")
    before, after = found.ordinal - 1, found.ordinal
    for last in (before, after):
        expected = by_one_engine(log, left_out=("loss_divergence", last))
        has = [v for v in expected[0] if v.detector == "loss_divergence"]
        assert (found in has) is (last >= found.ordinal)
        fold = _one_by_one(log, "loss_divergence", last)
        assert fold == [v for v in expected[0] if v.detector == "loss_divergence"]


def _one_by_one(events: Sequence[Event], name: str, last: int) -> List[Verdict]:
    fold = DetectorFold(next(cls for cls in BUILTIN if cls.name == name))
    found: List[Verdict] = []
    for event in events:
        if fold.ordinal >= last:
            fold.leave_out()
        found += fold.fold(EventBatch([event]))
    return found


def test_a_run_that_ended_keeps_little_and_goes_on_anew() -> None:
    log = log_of("divergence")
    fold = DetectorFold(BUILTIN[2])
    policy = PolicyFold()
    for event in log:
        fold.fold(EventBatch([event]))
        policy.fold(EventBatch([event]), {})
    assert fold.ended
    assert policy.ended
    assert fold.detector is None
    assert len(fold.snapshot()) < 500
    assert len(policy.snapshot()) < 3000
    step = next(event for event in reversed(log) if isinstance(event, StepEvent))
    fold.fold(EventBatch([step._replace(record=step.record + 100)]))
    assert not fold.ended


def test_a_rank_that_is_silent_for_long_ends_its_run() -> None:
    log = [event for event in log_of("spike") if getattr(event, "kind", "") != "session_finished"]
    silent = ControlEvent(
        "run", "0123456789abcdef", 0, None, "rank_silent", data={"session": "session-0"}
    )
    fold = DetectorFold(BUILTIN[0])
    fold.fold(EventBatch(log))
    assert not fold.ended
    fold.fold(EventBatch([silent]))
    assert fold.ended
    last = log[-1]
    assert isinstance(last, StepEvent)
    more = [last._replace(record=last.record + n, step=last.step + n) for n in range(1, 40)]
    whole = [*log, silent, *more]
    assert by_a_fleet(whole, seed=5) == by_one_engine(whole)
