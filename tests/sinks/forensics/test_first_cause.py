from __future__ import annotations

import json
import math
import random
from typing import Any, Dict, List, Tuple

import pytest
from tests.processors.logs import log_of
from tests.processors.streams import FAULTY, HEALTHY

from plarv_processors.engine import Engine
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_sinks.forensics.clues import find_clues
from plarv_sinks.forensics.first_cause import FirstCause, first_cause


def asked(log: List[Event]) -> FirstCause:
    verdicts, actions = judged(log)
    return first_cause(iter(log), verdicts, actions)


def judged(log: List[Event]) -> Tuple[List[Verdict], List[Action]]:
    engine = Engine()
    found = [record for event in log for record in engine.fold(event)]
    verdicts = [record for record in found if isinstance(record, Verdict)]
    return verdicts, [record for record in found if isinstance(record, Action)]


def steps(count: int, change: Any = None, session: str = "s", first: int = 0) -> List[Event]:
    """A steady run; ``change(step, columns)`` puts a fault in."""
    chance = random.Random(session)
    events: List[Event] = []
    for record in range(count):
        columns: Dict[str, Any] = {
            "loss": 2.0 * math.exp(chance.gauss(0.0, 0.02)),
            "grad_norm": math.exp(chance.gauss(0.0, 0.1)),
            "current_lr": 1e-3,
        }
        step = first + record
        if change is not None:
            change(step, columns)
        events.append(StepEvent("run", session, record, 0, step, **columns))
    return events


# Of rising_by_design a detector warns, as its own test says.
@pytest.mark.parametrize("name", [name for name in HEALTHY if name != "rising_by_design"])
def test_a_run_that_nothing_is_wrong_with_has_no_cause(name: str) -> None:
    found = asked(log_of(name))
    assert found.verdict is None
    assert found.ranking == ()
    assert found.sentence.startswith("Nothing was found wrong in ")


STARTS = {
    "dead": 500,
    "spike": 600,
    "divergence": 500,
    "explosion": 600,
    "collapse": 500,
    "corruption": 600,
    "narrowing": 600,
    "repeated_batch": 200,
    "straggler": 200,
    "disagreement": 200,
    "oscillation": 600,
}


@pytest.mark.parametrize("name", STARTS)
def test_the_fault_of_a_labelled_stream_is_its_first_cause(name: str) -> None:
    found = asked(log_of(name))
    assert found.verdict is not None
    # A loss that climbs by 1% a step leaves its window before it leaves its best level.
    right = {FAULTY[name][0], *(["loss_spike"] if name == "divergence" else [])}
    assert found.verdict.detector in right
    assert found.step is not None
    assert abs(found.step - STARTS[name]) <= 60
    assert found.rank == {"straggler": 2, "disagreement": 1, "dead": 0}.get(name)
    assert sum(suspect.score for suspect in found.ranking) == pytest.approx(1.0)


def test_a_learning_rate_that_rose_comes_before_what_it_did_to_the_loss() -> None:
    def change(step: int, columns: Dict[str, Any]) -> None:
        if step >= 300:
            columns["current_lr"] = 3e-2
        if step >= 304:
            columns["loss"] *= 1.2 ** min(20, step - 303)
            columns["grad_norm"] *= 1.4 ** min(20, step - 303)

    found = asked(steps(400, change))
    assert found.step == 300
    assert found.clues
    assert "the learning rate rose from 0.001 to 0.03 (x30)" in found.sentence
    assert found.ranking[0].verdict.onset_step > 300


def test_a_warm_up_and_a_schedule_are_no_rise_of_the_learning_rate() -> None:
    def change(step: int, columns: Dict[str, Any]) -> None:
        done = max(0, step - 40) / 960
        columns["current_lr"] = (
            1e-3 * min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * done))
        )

    assert find_clues(steps(1000, change))[1].clues == []


def test_the_rank_that_lost_its_loss_first_is_named_among_four() -> None:
    log: List[Event] = []
    for step in range(200):
        for rank in range(4):
            gone = step > 150 or (step == 150 and rank == 2)
            loss = math.nan if gone else 2.0 + 0.01 * ((step + rank) % 5)
            log.append(StepEvent("run", f"s{rank}", step, rank, step, world_size=4, loss=loss))
    found = asked(log)
    assert (found.step, found.rank) == (150, 2)


def test_a_rank_whose_loss_leaves_the_others_is_a_clue() -> None:
    log = four_ranks(lambda step, rank: 9.0 if rank == 1 and step >= 120 else 1.0)
    clues = [clue for clue in find_clues(log)[1].clues if clue.kind == "odd_rank"]
    assert [(clue.step, clue.rank) for clue in clues] == [(120, 1)]


def test_a_rank_that_stops_sending_is_a_clue_even_if_nobody_said_so() -> None:
    log = [
        event
        for event in four_ranks(lambda step, rank: 1.0)
        if event.rank != 3 or event.record < 50
    ]
    clues = [clue for clue in find_clues(log)[1].clues if clue.kind == "rank_silent"]
    assert [(clue.step, clue.rank) for clue in clues] == [(50, 3)]


def four_ranks(factor: Any) -> List[Event]:
    chance = random.Random(4)
    return [
        StepEvent(
            "run",
            f"s{rank}",
            step,
            rank,
            step,
            world_size=4,
            loss=2.0 * factor(step, rank) * math.exp(chance.gauss(0.0, 0.1)),
        )
        for step in range(200)
        for rank in range(4)
    ]


def test_the_attempt_that_first_went_wrong_for_good_is_the_one_that_is_judged() -> None:
    def spike(step: int, columns: Dict[str, Any]) -> None:
        if step == 100:
            columns["loss"] = 20.0  # comes and goes

    def death(step: int, columns: Dict[str, Any]) -> None:
        if step >= 300:
            columns["loss"] = math.nan

    log = [*steps(200, spike, "a"), *steps(200, death, "b", first=150)]
    log += steps(200, spike, "c", first=250)
    found = asked(log)
    assert (found.attempt, found.step) == (2, 300)
    assert found.verdict is not None
    assert found.verdict.detector == "non_finite"


def test_a_warning_that_passed_is_told_as_one() -> None:
    def change(step: int, columns: Dict[str, Any]) -> None:
        if step == 150:
            columns["loss"] = 20.0

    found = asked(steps(240, change))
    assert found.step == 150
    assert not found.lasted
    assert found.sentence.startswith("Nothing wrong lasted; the first warning is of step 150, ")


def test_thousands_of_warnings_hide_no_grave_verdict() -> None:
    def found_at(n: int, level: Any, detector: str, kind: str) -> Verdict:
        return Verdict(
            "run", 1, None, n, n, detector, kind, level, "opened", n, 9.0, 8.0, {}, "m", "v"
        )

    verdicts = [found_at(n, "warn", "loss_spike", "transient") for n in range(3000)]
    verdicts.append(found_at(3000, "critical", "non_finite", "dead"))
    told = first_cause(steps(3010), verdicts, [])
    assert any(suspect.verdict.detector == "non_finite" for suspect in told.ranking)
    assert told.verdict is not None


def test_a_restart_right_before_the_onset_is_among_the_reasons() -> None:
    def death(step: int, columns: Dict[str, Any]) -> None:
        if step >= 210:
            columns["loss"] = math.nan

    found = asked([*steps(200, None, "a"), *steps(200, death, "b", first=190)])
    assert [clue.kind for clue in found.clues if clue.kind == "restart"]
    assert any("attempt 2 began at step 190" in reason for reason in found.ranking[0].reasons)


def test_layers_of_the_local_report_are_named() -> None:
    from plarv_schemas.events import LOCAL_CHECKS

    levels = tuple(2 for _ in LOCAL_CHECKS)

    def change(step: int, columns: Dict[str, Any]) -> None:
        if step >= 300:
            columns["grad_norm"] *= 1e-6
            columns.update(local_levels=levels, local_layers=("block.3", "block.4"))

    found = asked(steps(500, change))
    assert found.layers == ("block.3", "block.4")
    assert "block.3" in found.sentence


def test_what_cannot_be_judged_is_said_and_nothing_raises() -> None:
    assert asked([]).verdict is None
    ended = ControlEvent("run", "s", 3, 0, "session_finished", data={"status": "failed"})
    found = asked([*steps(3), ended])
    assert "though the run ended as failed at step 2" in found.sentence


def test_hostile_values_are_read_over() -> None:
    odd = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 5e-324]
    chance = random.Random(1)
    log: List[Event] = [
        StepEvent(
            "run",
            f"s{rank}",
            step,
            rank,
            chance.choice([step, step, 1 << 62, 0]),
            world_size=chance.choice([3, 3, None, 0, -1]),
            loss=chance.choice(odd),
            grad_norm=chance.choice(odd),
            current_lr=chance.choice(odd),
        )
        for step in range(300)
        for rank in range(3)
    ]
    found = asked(log)
    json.dumps(found.to_dict(), allow_nan=False)


def test_it_shows_itself_as_html_and_as_json_with_all_text_escaped() -> None:
    found = asked(log_of("dead"))
    nasty = found._replace(sentence="<script>alert(1)</script>")
    assert "<script>" not in nasty._repr_html_()
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["step"] == 500
    assert told["ranking"][0]["reasons"]


@pytest.mark.slow
def test_most_faults_put_into_small_trainings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="trains small networks")
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import first_cause as benchmark  # type: ignore[import-not-found, unused-ignore]

    faults = ("stuck_loader", "dying_relu", "label_noise", "lr_jump")
    answers = [benchmark.answer_to(fault, 100 + seed) for seed, fault in enumerate(faults, 1)]
    wrong = [answer for answer in answers if answer.wrong]
    assert len(wrong) <= 1, wrong
    assert not benchmark.answer_to("healthy", 100).wrong
