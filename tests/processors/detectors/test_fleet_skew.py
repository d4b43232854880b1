"""FleetSkew: slow ranks, slow runs, replicas that disagree, failing hardware."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import pytest
from tests.processors.streams import joined

from plarv_processors.detectors.fleet_skew import FleetSkew
from plarv_schemas.events import LOCAL_CHECKS, StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"
BROKEN = tuple(2 if check == "hardware_integrity" else 0 for check in LOCAL_CHECKS)
SOUND = tuple(0 for _ in LOCAL_CHECKS)

Change = Callable[[StepEvent], StepEvent]  # of one rank's event


def same(part: StepEvent) -> StepEvent:
    return part


def fleet(ranks: int, steps: int, change: Change = same, seed: int = 0) -> List[StepEvent]:
    chance = random.Random(seed)
    events: List[StepEvent] = []
    for step in range(steps):
        grad = math.exp(chance.gauss(0.0, 0.3))
        parts = [
            StepEvent(
                "run", f"s{rank}", step, rank, step, world_size=ranks,
                grad_norm=grad,
                step_time_ms=100.0 * math.exp(chance.gauss(0.0, 0.05)),
                forward_ms=30.0 * math.exp(chance.gauss(0.0, 0.05)),
            )
            for rank in range(ranks)
        ]  # fmt: skip
        events.append(joined([change(part) for part in parts]))
    return events


def single(times: Iterable[float]) -> List[StepEvent]:
    return [
        StepEvent("run", "s", step, 0, step, step_time_ms=time) for step, time in enumerate(times)
    ]


def read(events: Iterable[StepEvent], detector: Optional[FleetSkew] = None) -> List[Verdict]:
    detector = detector or FleetSkew()
    return [found for event in events for found in detector.update(event)]


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, Optional[int], str, str]]:
    return [(one.step, one.kind, one.rank, one.level, one.state) for one in found]


def times(part: StepEvent, **factors: float) -> StepEvent:
    return part._replace(**{name: getattr(part, name) * by for name, by in factors.items()})


# One rank is slow.


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_straggler_is_named_after_three_reports_and_resolves(ranks: int) -> None:
    def slow(part: StepEvent) -> StepEvent:
        late = part.rank == 1 and 100 <= part.step < 300
        return times(part, step_time_ms=1.3) if late else part

    found = read(fleet(ranks, 500, slow))
    assert [(one.kind, one.rank, one.level, one.state) for one in found] == [
        ("straggler", 1, "warn", "opened"),
        ("straggler", 1, "ok", "resolved"),
    ]
    assert 100 <= found[0].onset_step <= 120
    assert 140 <= found[0].step <= 170
    assert found[0].score == pytest.approx(1.3, abs=0.06)
    assert found[0].message.startswith("rank 1 takes")
    assert 300 < found[1].step < 370


def test_where_steps_end_together_the_forward_time_shows_who_is_late() -> None:
    def slow(part: StepEvent) -> StepEvent:
        part = part._replace(step_time_ms=130.0)  # all wait for the last
        return times(part, forward_ms=1.5) if part.rank == 3 else part

    found = read(fleet(4, 200, slow))
    assert [(one.kind, one.rank) for one in found] == [("straggler", 3)]


def test_a_forward_pass_that_is_longer_by_next_to_nothing_is_silent() -> None:
    def slow(part: StepEvent) -> StepEvent:
        part = part._replace(forward_ms=2.0)
        return times(part, forward_ms=1.5) if part.rank == 3 else part

    assert not read(fleet(4, 200, slow))


def test_noise_of_a_tenth_and_a_natural_skew_of_a_twentieth_are_silent() -> None:
    chance = random.Random(5)

    def noisy(part: StepEvent) -> StepEvent:
        factor = math.exp(chance.gauss(0.0, 0.1)) * (1.05 if part.rank == 0 else 1.0)
        return times(part, step_time_ms=factor)

    assert not read(fleet(8, 1_000, noisy))


def test_a_rank_that_is_silent_now_and_then_is_still_compared() -> None:
    def slow(part: StepEvent) -> StepEvent:
        return times(part, step_time_ms=1.4) if part.rank == 2 else part

    events = [
        joined([part for part in event.parts if part.rank != event.step % 5])
        for event in fleet(4, 300, slow)
    ]
    assert [(one.kind, one.rank) for one in read(events)] == [("straggler", 2)]


# The run is slow.


def test_a_run_that_slows_down_warns_after_48_steps_and_resolves() -> None:
    chance = random.Random(1)
    found = read(
        single(
            (250.0 if 504 <= step < 800 else 200.0) * math.exp(chance.gauss(0.0, 0.03))
            for step in range(1_200)
        )
    )
    assert [(one.kind, one.rank, one.state) for one in found] == [
        ("slowdown", None, "opened"),
        ("slowdown", None, "resolved"),
    ]
    assert found[0].onset_step == 503
    assert found[0].step == 551
    assert 800 < found[1].step <= 832


def test_a_pace_that_stays_becomes_the_usual_one() -> None:
    found = read(single([100.0] * 200 + [150.0] * 2_000))
    assert [one.state for one in found] == ["opened", "resolved"]
    assert found[1].message == "150 ms is now the run's usual step"


def test_warm_up_evaluation_and_checkpoint_steps_do_not_count() -> None:
    def time(step: int) -> float:
        if step < 8:
            return 60_000.0
        return 5_000.0 if step % 20 == 0 else 900.0 if step % 3 == 0 else 100.0

    assert not read(single(time(step) for step in range(2_000)))


def test_a_larger_batch_may_take_longer() -> None:
    events = [
        event._replace(batch_size=64 if event.step >= 504 else 32)
        for event in single([100.0] * 504 + [190.0] * 500)
    ]
    assert not read(events)
    same_batch = [event._replace(batch_size=32) for event in events]
    assert [one.kind for one in read(same_batch)] == ["slowdown"]


def test_times_that_are_no_times_are_passed_over() -> None:
    odd = [0.0, -5.0, math.nan, math.inf]
    assert not read(single(odd[step % 4] for step in range(200)))


def test_healthy_public_runs_have_no_slowdown() -> None:
    index = PUBLIC_RUNS / "index.json"
    if not index.exists():
        pytest.skip("needs the public runs beside the checkout")
    checked = 0
    for entry in json.loads(index.read_text()):
        if entry["label"] != "healthy" or "step_ms" not in entry["other_columns"]:
            continue
        with (PUBLIC_RUNS / entry["file"]).open(newline="") as file:
            given = [row["step_ms"] for row in csv.DictReader(file)]
        usual = [float(time) for time in given if time]
        assert not read(single(usual)), entry["run_id"]
        checked += 1
        if len(usual) >= 200:
            half = len(usual) // 2
            slower = [*usual[:half], *[1.25 * time for time in usual[half:]]]
            assert read(single(slower)), f"{entry['run_id']} at four fifths of its speed"
    assert checked > 15


# Replicas disagree.


def odd_gradient(rank: int, *at: int) -> Change:
    def change(part: StepEvent) -> StepEvent:
        return times(part, grad_norm=1.02) if part.rank == rank and part.step in at else part

    return change


def test_replicas_that_disagree_twice_are_critical_and_the_odd_one_is_named() -> None:
    found = read(fleet(4, 300, odd_gradient(2, *range(100, 104))))
    assert marks(found)[:2] == [
        (100, "replica_mismatch", 2, "warn", "opened"),
        (101, "replica_disagreement", 2, "critical", "escalated"),
    ]
    assert [one.state for one in found] == ["opened", "escalated", "resolved"]
    assert found[2].step == 203
    assert "rank 2" in found[0].message


def test_one_step_of_disagreement_only_warns() -> None:
    found = read(fleet(4, 300, odd_gradient(1, 100)))
    assert [(one.level, one.state) for one in found] == [("warn", "opened"), ("ok", "resolved")]


def test_of_two_ranks_none_can_be_called_the_odd_one() -> None:
    found = read(fleet(2, 200, odd_gradient(1, 100, 101)))
    assert [one.rank for one in found] == [None, None]
    assert found[1].kind == "replica_disagreement"


def test_local_gradient_norms_that_differ_by_design_are_silent() -> None:
    chance = random.Random(2)

    def sharded(part: StepEvent) -> StepEvent:
        return times(part, grad_norm=math.exp(chance.gauss(0.0, 0.2)))

    assert not read(fleet(4, 400, sharded))


def test_rounding_of_the_size_seen_in_the_first_steps_is_agreement() -> None:
    chance = random.Random(2)

    def rounded(part: StepEvent) -> StepEvent:
        return times(part, grad_norm=1.0 + 4e-4 * chance.random())

    assert not read(fleet(4, 1_000, rounded))


def test_norms_that_are_missing_zero_or_not_finite_say_nothing() -> None:
    def odd(part: StepEvent) -> StepEvent:
        if part.step % 2:
            return part._replace(grad_norm=0.0)
        return part._replace(grad_norm=(None, math.nan, math.inf)[part.rank]) if part.rank else part

    assert not read(fleet(3, 300, odd))


# Hardware.


def report(rank: int, at: int, levels: Tuple[int, ...] = BROKEN) -> Change:
    def change(part: StepEvent) -> StepEvent:
        if part.step % 10:
            return part
        ill = part.rank == rank and part.step == at
        return part._replace(local_levels=levels if ill else SOUND)

    return change


def with_worst_levels(events: List[StepEvent]) -> List[StepEvent]:
    return [
        event._replace(local_levels=max(part.local_levels or () for part in event.parts) or None)
        for event in events
    ]


def test_a_critical_hardware_check_is_critical_until_three_sound_reports() -> None:
    found = read(with_worst_levels(fleet(4, 200, report(3, 100))))
    assert marks(found) == [
        (100, "hardware", 3, "critical", "opened"),
        (130, "hardware", 3, "ok", "resolved"),
    ]


def test_a_run_of_one_rank_has_its_hardware_checked_too() -> None:
    events = [
        event._replace(local_levels=BROKEN if event.step == 20 else None)
        for event in single([100.0] * 30)
    ]
    assert marks(read(events)) == [(20, "hardware", 0, "critical", "opened")]


@pytest.mark.parametrize("levels", [(), (2, 2, 2), SOUND])
def test_other_checks_and_short_reports_are_not_hardware(levels: Tuple[int, ...]) -> None:
    events = [event._replace(local_levels=levels) for event in single([100.0] * 30)]
    assert not read(events)


# One at a time.


def test_a_graver_fault_of_the_same_rank_escalates_and_of_another_comes_first() -> None:
    def both(odd: int) -> Change:
        def change(part: StepEvent) -> StepEvent:
            if part.rank == 2:
                part = times(part, step_time_ms=1.5)
            if part.rank == odd and part.step in (200, 201):
                part = times(part, grad_norm=2.0)
            return part

        return change

    assert [(one.kind, one.rank, one.state) for one in read(fleet(4, 210, both(2)))] == [
        ("straggler", 2, "opened"),
        ("replica_mismatch", 2, "escalated"),
        ("replica_disagreement", 2, "escalated"),
    ]
    assert [(one.kind, one.rank, one.state) for one in read(fleet(4, 210, both(1)))] == [
        ("straggler", 2, "opened"),
        ("straggler", 2, "resolved"),
        ("replica_mismatch", 1, "opened"),
        ("replica_disagreement", 1, "escalated"),
    ]


def test_a_straggler_explains_the_slowdown_that_it_causes() -> None:
    def slow(part: StepEvent) -> StepEvent:
        return times(part, step_time_ms=1.5) if part.rank == 2 and part.step >= 200 else part

    assert {one.kind for one in read(fleet(4, 500, slow))} == {"straggler"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": -1},
        {"straggler_ratio": 1.0},
        {"adopt_reports": 1},
        {"share_above": 1.5},
        {"agreement": 0.5},
        {"calm_steps": 0},
        {"forward_excess": math.nan},
    ],
)
def test_a_config_of_nonsense_is_rejected(wrong: Dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FleetSkew.Config(**wrong)
