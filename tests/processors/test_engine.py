from __future__ import annotations

import random
from typing import ClassVar, List, Tuple

import pytest
from tests.processors.logs import log_of, names

from plarv_processors.detectors.detector import Scope
from plarv_processors.detectors.loss_spike import LossSpike
from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Action, Event, StepEvent, Verdict


def fold_all(engine: Engine, log: List[Event]) -> List[object]:
    return [record for event in log for record in engine.fold(event)]


@pytest.mark.parametrize("name", ["spike", "dead", "straggler", "fleet", "with_samples"])
def test_the_same_log_gives_the_same_records(name: str) -> None:
    log = log_of(name)
    assert fold_all(Engine(), log) == fold_all(Engine(), log)


@pytest.mark.parametrize("name", names)
def test_a_snapshot_at_any_place_changes_nothing(name: str) -> None:
    log = log_of(name, steps=500)
    straight = Engine()
    expected = fold_all(straight, log)
    chance = random.Random(name)
    engine = Engine()
    found: List[object] = []
    for event in log:
        found.extend(engine.fold(event))
        if chance.random() < 0.02:
            saved = engine.snapshot()
            engine = Engine()
            engine.restore(saved)
    assert found == expected
    assert engine.snapshot() == straight.snapshot()


def test_duplicates_and_what_was_sent_again_change_nothing() -> None:
    log = log_of("spike")
    expected = fold_all(Engine(), log)
    chance = random.Random(1)
    again: List[Event] = []
    for place, event in enumerate(log):
        again.append(event)
        if chance.random() < 0.05:  # a shipper that was not answered sends its last messages again
            again.extend(log[max(0, place - chance.randrange(20)) : place + 1])
    engine = Engine()
    assert fold_all(engine, again) == expected
    assert engine.duplicates == len(again) - len(log)
    assert engine.ordinal == len(log) - 1


def test_records_carry_attempt_and_ordinal_and_ids_are_of_what_they_are_about() -> None:
    records = fold_all(Engine(), log_of("spike"))
    verdicts = [record for record in records if isinstance(record, Verdict)]
    actions = [record for record in records if isinstance(record, Action)]
    assert verdicts
    assert actions
    assert all(found.attempt == 1 and found.ordinal > 0 for found in verdicts)
    assert all(action.sessions == (("session-0", 0),) for action in actions)
    ids = [found.id for found in verdicts]
    assert len(set(ids)) == len(ids)
    assert {name for action in actions for name in action.verdict_ids} <= set(ids)
    assert [Verdict.from_dict(found.to_dict()) for found in verdicts] == verdicts
    assert [Action.from_dict(action.to_dict()) for action in actions] == actions


class Fragile:
    """Raises at step 5."""

    name: ClassVar[str] = "fragile"
    scope: ClassVar[Scope] = "run"
    version = "fragile-1"
    calls = 0

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        type(self).calls += 1
        if event.step == 5:
            raise KeyError("lost")
        return ()


def test_a_detector_that_raises_is_off_from_there_and_the_others_go_on() -> None:
    Fragile.calls = 0
    engine = Engine(EngineConfig(detectors=(Fragile, LossSpike)))
    records = fold_all(engine, log_of("spike"))
    assert Fragile.calls == 6
    assert engine.faults == {"fragile": "KeyError: 'lost'"}
    assert records == fold_all(Engine(EngineConfig(detectors=(LossSpike,))), log_of("spike"))


def test_a_detector_that_is_off_stays_off_over_a_snapshot() -> None:
    Fragile.calls = 0
    config = EngineConfig(detectors=(Fragile,))
    engine = Engine(config)
    log = log_of("spike")
    fold_all(engine, log[:100])
    again = Engine(config)
    again.restore(engine.snapshot())
    fold_all(again, log[100:])
    assert Fragile.calls == 6


def test_a_new_attempt_is_judged_by_fresh_detectors() -> None:
    log = log_of("spike")
    second = [event._replace(session="second") for event in log]
    records = fold_all(Engine(), log + second)
    first_half = [r for r in records if isinstance(r, Verdict) and r.attempt == 1]
    other_half = [r for r in records if isinstance(r, Verdict) and r.attempt == 2]
    assert [(r.step, r.kind, r.state) for r in first_half] == [
        (r.step, r.kind, r.state) for r in other_half
    ]


def test_a_snapshot_of_another_configuration_is_refused() -> None:
    engine = Engine(EngineConfig(detectors=(LossSpike,)))
    with pytest.raises(ValueError, match="another engine configuration"):
        Engine().restore(engine.snapshot())


@pytest.mark.parametrize("name", ["language_model", "loss_only", "fleet", "with_samples", "sparse"])
def test_nothing_is_done_about_a_healthy_run(name: str) -> None:
    records = fold_all(Engine(), log_of(name))
    assert [r.kind for r in records if isinstance(r, Action)] == ["RESUME"]
