"""Canalization: a gradient that narrows, next to one that narrows by nature; the local checks."""

from __future__ import annotations

import math
import random
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import pytest

from plarv_processors.detectors.canalization import Canalization
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import LOCAL_CHECKS, StepEvent, Verdict

ALL_OK = tuple(0 for _ in LOCAL_CHECKS)


def critical(check: str) -> Tuple[int, ...]:
    return tuple(2 if name == check else 0 for name in LOCAL_CHECKS)


Row = Tuple[int, Optional[float], Optional[float]]  # step, L1, L2


def run_of(
    steps: int, participation: Callable[[int], float], noise: float = 0.05, every: int = 1
) -> List[Row]:
    """A gradient of that participation and of any size."""
    random_ = random.Random(1)
    rows: List[Row] = []
    for step in range(steps):
        l2 = math.exp(random_.gauss(0.0, 0.5))
        share = participation(step) * math.exp(random_.gauss(0.0, noise))
        measured = step % every == 0
        rows.append((step, math.sqrt(share) * l2 if measured else None, l2 if measured else None))
    return rows


def falling_at(start: int, factor: float, until: int = 10**9) -> Callable[[int], float]:
    return lambda step: 1e6 / (factor if start <= step < until else 1.0)


def replay(
    rows: Iterable[Row],
    detector: Optional[Canalization] = None,
    reports: Optional[Dict[int, Tuple[int, ...]]] = None,
) -> List[Verdict]:
    detector = detector or Canalization()
    found: List[Verdict] = []
    for record, (step, l1, l2) in enumerate(rows):
        levels = (reports or {}).get(step)
        event = StepEvent(
            "run", "s", record, 0, step, grad_l1_norm=l1, grad_l2_norm=l2, local_levels=levels
        )
        found.extend(detector.update(event))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5, 1.0])
def test_a_steady_gradient_is_silent(noise: float, every: int) -> None:
    assert replay(run_of(4000, lambda _: 1e6, noise, every)) == []


DECLINES: Dict[str, Callable[[int], float]] = {
    "root": lambda step: 1e6 / math.sqrt(step + 1),
    "inverse": lambda step: 1e6 / (step + 1),
    "early transient": lambda step: 1e6 * (0.03 + math.exp(-step / 30)),
    "slow transient": lambda step: 1e6 * (0.01 + math.exp(-step / 200)),
}


@pytest.mark.parametrize("noise", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("decline", DECLINES)
def test_a_gradient_that_narrows_by_nature_is_silent(decline: str, noise: float) -> None:
    assert replay(run_of(5000, DECLINES[decline], noise)) == []


def test_a_fall_of_five_times_warns_after_twenty_values_and_resolves() -> None:
    assert marks(replay(run_of(1500, falling_at(1000, 5.0, until=1200)))) == [
        (1019, "narrowed", "warn", "opened"),
        (1209, "narrowed", "ok", "resolved"),
    ]


def test_a_fall_of_twenty_times_is_critical() -> None:
    found = replay(run_of(1200, falling_at(1000, 20.0)))
    assert marks(found) == [(1019, "narrowed", "critical", "opened")]
    assert found[0].onset_step == 1000


def test_a_fall_that_deepens_escalates() -> None:
    def two_falls(step: int) -> float:
        return 1e6 * (1.0 if step < 1000 else 0.2 if step < 1100 else 0.01)

    assert marks(replay(run_of(1300, two_falls))) == [
        (1019, "narrowed", "warn", "opened"),
        (1119, "narrowed", "critical", "escalated"),
    ]


def test_values_every_few_steps_need_fewer_of_them() -> None:
    found = replay(run_of(4000, falling_at(3000, 5.0), every=20))
    assert marks(found) == [(3200, "narrowed", "warn", "opened")]


def test_single_narrow_gradients_are_silent() -> None:
    assert replay(run_of(3000, lambda step: 1e6 / (50.0 if step % 15 == 0 else 1.0))) == []


def test_a_level_that_stays_is_the_new_normal() -> None:
    found = marks(replay(run_of(3000, falling_at(1000, 20.0))))
    assert found[1] == (1519, "narrowed", "ok", "resolved")
    assert len(found) == 2


@pytest.mark.parametrize("check", ["representation_collapse", "attention_collapse"])
def test_a_local_check_that_stays_critical_warns(check: str) -> None:
    reports = {step: critical(check) if 300 <= step < 400 else ALL_OK for step in range(0, 800, 10)}
    assert marks(replay(run_of(800, lambda _: 1e6), reports=reports)) == [
        (340, check, "warn", "opened"),
        (490, check, "ok", "resolved"),
    ]


def test_a_local_check_is_heard_without_any_norm() -> None:
    rows: List[Row] = [(step, None, None) for step in range(100)]
    reports = dict.fromkeys(range(0, 100, 10), critical("attention_collapse"))
    assert marks(replay(rows, reports=reports)) == [(40, "attention_collapse", "warn", "opened")]


@pytest.mark.parametrize("local_from", [900, 1100])
def test_the_fall_and_a_local_check_together_are_critical(local_from: int) -> None:
    reports = dict.fromkeys(range(local_from, 1300, 10), critical("representation_collapse"))
    found = marks(replay(run_of(1300, falling_at(1000, 5.0)), reports=reports))
    assert [mark[1:] for mark in found] == [
        ("representation_collapse" if local_from < 1000 else "narrowed", "warn", "opened"),
        ("confirmed", "critical", "escalated"),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, None])
def test_unusable_input_leaves_no_trace(bad: Optional[float]) -> None:
    detector, clean = Canalization(), Canalization()
    rows = run_of(300, falling_at(200, 20.0))
    mixed: List[Row] = []
    for step, l1, l2 in rows:
        mixed += [(step, bad, l2), (step, l1, bad), (step, l1, l2)]
    assert marks(replay(mixed, detector)) == marks(replay(rows, clean)) != []
    assert dump(detector) == dump(clean)


@pytest.mark.parametrize("cut", [30, 700, 1010, 1019, 1030, 1205])
def test_a_snapshot_changes_nothing(cut: int) -> None:
    rows = run_of(1400, falling_at(1000, 5.0, until=1200))
    before, after = Canalization(), Canalization()
    found = replay(rows[:cut], before)
    restore(after, unpack(pack(dump(before))))
    assert found + replay(rows[cut:], after) == replay(rows)


def test_the_evidence_redoes_the_decision() -> None:
    found = replay(run_of(1200, falling_at(1000, 20.0)))[0]
    evidence = found.evidence
    participation = (evidence["grad_l1_norm"] / evidence["grad_l2_norm"]) ** 2
    assert participation == pytest.approx(evidence["participation"])
    z = math.log(evidence["median"] / participation) / evidence["scale"]
    assert z == pytest.approx(found.score)
    assert found.score >= found.threshold


@pytest.mark.parametrize(
    "setting", [{"min_history": 4}, {"fall_ratio": 1.0}, {"sparse_points": 30}, {"thin": 0}]
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Canalization.Config(**setting)  # type: ignore[arg-type]
