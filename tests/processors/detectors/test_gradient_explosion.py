"""GradientExplosion: what opens it, what confirms it, and the traps that must stay silent."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

import pytest

from plarv_processors.detectors.gradient_explosion import GradientExplosion
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import LOCAL_CHECKS, StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"
FLOW_CRITICAL = tuple(2 if check == "gradient_flow" else 0 for check in LOCAL_CHECKS)
ALL_OK = tuple(0 for _ in LOCAL_CHECKS)

Row = Tuple[int, Optional[float], Optional[float]]  # step, loss, gradient


def healthy(steps: int, stride: int = 1, seed: int = 1) -> List[Row]:
    noise = random.Random(seed)
    return [
        (
            index * stride,
            2.0 + 6.0 * math.exp(-index / 30) + noise.gauss(0.0, 0.03),
            math.exp(noise.gauss(0.0, 0.2)),
        )
        for index in range(steps)
    ]


def replay(
    rows: Iterable[Row],
    detector: Optional[GradientExplosion] = None,
    reports: Optional[Dict[int, Tuple[int, ...]]] = None,
) -> List[Verdict]:
    detector = detector or GradientExplosion()
    found: List[Verdict] = []
    for record, (step, loss, grad) in enumerate(rows):
        levels = (reports or {}).get(step)
        event = StepEvent(
            "run", "s", record, 0, step, loss=loss, grad_norm=grad, local_levels=levels
        )
        found.extend(detector.update(event))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


def with_gradients(rows: List[Row], gradients: Dict[int, float]) -> List[Row]:
    return [(step, loss, gradients.get(step, grad)) for step, loss, grad in rows]


def with_losses(rows: List[Row], losses: Dict[int, float]) -> List[Row]:
    return [(step, losses.get(step, loss), grad) for step, loss, grad in rows]


def test_a_healthy_run_is_silent() -> None:
    assert replay(healthy(3000)) == []


def test_an_isolated_jump_at_a_normal_loss_warns_and_resolves() -> None:
    rows = with_gradients(healthy(300), {200: 1500.0})
    assert marks(replay(rows)) == [
        (200, "gradient_only", "warn", "opened"),
        (210, "gradient_only", "ok", "resolved"),
    ]


def test_a_jump_with_a_doubled_loss_is_confirmed_at_once() -> None:
    rows = with_losses(with_gradients(healthy(300), {200: 50.0}), {200: 5.0})
    assert marks(replay(rows))[0] == (200, "confirmed", "critical", "opened")


def test_one_bad_batch_that_lifts_gradient_and_loss_for_a_step_confirms_nothing() -> None:
    rows = with_losses(with_gradients(healthy(300), {200: 50.0}), {200: 2.9})
    assert {one.level for one in replay(rows)} == {"warn", "ok"}


def test_a_loss_that_stays_high_with_the_gradient_confirms() -> None:
    high = range(200, 204)
    rows = with_gradients(healthy(300), {step: 50.0 + step for step in high})
    rows = with_losses(rows, dict.fromkeys(high, 3.0))
    assert marks(replay(rows))[:2] == [
        (200, "gradient_only", "warn", "opened"),
        (201, "confirmed", "critical", "escalated"),
    ]


def test_a_gradient_that_leads_the_loss_by_four_steps_is_warned_of_first() -> None:
    rows = with_gradients(healthy(300), {200 + lead: 20.0 * 4**lead for lead in range(6)})
    rows = with_losses(rows, {204: 5.1, 205: 5.0})
    found = marks(replay(rows))
    assert found[0] == (200, "gradient_only", "warn", "opened")
    assert found[1] == (204, "confirmed", "critical", "escalated")


def test_a_level_that_stays_high_alone_is_sustained_and_then_adopted() -> None:
    rows: List[Row] = [
        (step, loss, (grad or 0.0) * (30.0 if step >= 200 else 1.0))
        for step, loss, grad in healthy(700)
    ]
    assert marks(replay(rows)) == [
        (200, "gradient_only", "warn", "opened"),
        (220, "sustained", "warn", "escalated"),
        (500, "sustained", "ok", "resolved"),
    ]


def test_a_local_gradient_check_that_turned_critical_confirms() -> None:
    rows = with_gradients(healthy(300), {200: 50.0})
    found = replay(rows, reports={150: ALL_OK, 202: FLOW_CRITICAL})
    assert marks(found)[1] == (202, "confirmed", "critical", "escalated")
    assert found[1].evidence["local_critical"] == 1.0


def test_a_local_check_that_was_critical_all_along_confirms_nothing() -> None:
    rows = with_gradients(healthy(300), {200: 50.0})
    found = replay(rows, reports=dict.fromkeys(range(0, 300, 5), FLOW_CRITICAL))
    assert "critical" not in {one.level for one in found}


def test_the_first_steps_need_a_loss_that_explodes_too() -> None:
    grads = [8.5, 8.6, 9.0, 8.0, 8.8, 9.0]
    start: List[Row] = [(step, 0.34, grad) for step, grad in enumerate(grads)]
    found = replay([*start, (6, 50.0, 900.0)])
    assert marks(found) == [(6, "confirmed", "critical", "opened")]
    assert found[0].score >= found[0].threshold == 30.0
    assert replay([*start, (6, 0.35, 900.0)]) == []


@pytest.mark.parametrize("unread", [0.0, -1.0, math.nan, math.inf, None])
def test_a_gradient_that_was_not_computed_leaves_no_trace(unread: Optional[float]) -> None:
    detector, clean = GradientExplosion(), GradientExplosion()
    rows = [(step, None, grad) for step, _, grad in healthy(100)]
    holes: List[Row] = [(step, None, unread) for step, _, _ in rows]
    mixed = [row for pair in zip(rows, holes) for row in pair]
    assert replay(mixed, detector) == replay(rows, clean) == []
    assert dump(detector) == dump(clean)


def test_a_stale_gradient_of_skipped_steps_is_read_once() -> None:
    detector = GradientExplosion()
    replay(healthy(100), detector)
    rows: List[Row] = [(100 + index, 2.1, 464441.887) for index in range(40)]
    assert marks(replay(rows, detector)) == [(100, "gradient_only", "warn", "opened")]


def test_a_log_that_turns_sparse_after_its_first_steps_starts_anew() -> None:
    dense = healthy(100)
    sparse = [(100 + 500 * i, 2.0, 12.0 * math.exp(0.2 * math.sin(i))) for i in range(1, 100)]
    assert replay([*dense, *sparse]) == []


def test_one_hole_in_the_log_keeps_the_past() -> None:
    rows = with_gradients([row for row in healthy(400) if not 150 <= row[0] < 180], {200: 1500.0})
    assert marks(replay(rows))[0] == (200, "gradient_only", "warn", "opened")


def test_jumps_of_a_loss_that_is_solved_support_nothing() -> None:
    noise = random.Random(2)
    rows: List[Row] = [(0, 0.5, 1.0)]
    for step in range(1, 300):
        rows.append((step, 1e-8 * noise.uniform(0.9, 1.1), 1e-4 * noise.uniform(0.7, 1.3)))
    rows += [(300 + i, 1e-6, 5e-3 + 1e-5 * i) for i in range(5)]
    assert {one.level for one in replay(rows)} == {"warn"}


def test_a_loss_that_is_not_positive_confirms_only_by_staying_high() -> None:
    noise = random.Random(3)
    rows: List[Row] = [
        (i, noise.gauss(0.0, 0.02), math.exp(noise.gauss(0, 0.2))) for i in range(200)
    ]
    rows += [(200 + i, 5.0, 60.0 + i) for i in range(3)]
    assert marks(replay(rows)) == [
        (200, "gradient_only", "warn", "opened"),
        (201, "confirmed", "critical", "escalated"),
    ]


def test_scaling_the_loss_by_a_power_of_two_changes_no_decision() -> None:
    rows = with_gradients(healthy(400), {step: 50.0 + step for step in (200, 201, 300)})
    rows = with_losses(rows, {200: 3.1, 201: 3.2, 300: 9.0})
    scaled = [(step, loss and loss * 2.0**-20, grad) for step, loss, grad in rows]
    assert marks(replay(rows)) == marks(replay(scaled))
    assert "critical" in {one.level for one in replay(rows)}


@pytest.mark.parametrize("cut", [10, 150, 200, 203, 230])
def test_a_snapshot_changes_nothing(cut: int) -> None:
    rows = with_gradients(healthy(300), {200: 90.0, 201: 95.0, 240: 80.0})
    before, after = GradientExplosion(), GradientExplosion()
    found = replay(rows[:cut], before)
    restore(after, unpack(pack(dump(before))))
    assert found + replay(rows[cut:], after) == replay(rows)


def test_the_evidence_redoes_the_decision() -> None:
    found = replay(with_gradients(healthy(300), {200: 1500.0}))[0]
    z = math.log(found.evidence["grad_norm"] / found.evidence["median"]) / found.evidence["scale"]
    assert z == pytest.approx(found.score)
    assert found.score >= found.threshold
    assert "1500" in found.message


@pytest.mark.parametrize(
    "setting",
    [{"min_history": 4}, {"jump_z": 3.0}, {"jump_ratio": 1.0}, {"proof_ratio": 1.0}],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        GradientExplosion.Config(**setting)  # type: ignore[arg-type]


def number(cell: Optional[str]) -> Optional[float]:
    return float(cell) if cell else None


def public_run(path: Path) -> Iterator[Row]:
    with path.open() as lines:
        for row in csv.DictReader(lines):
            yield int(float(row["step"])), number(row["loss"]), number(row["grad_norm"])


@pytest.mark.skipif(not PUBLIC_RUNS.is_dir(), reason="the public runs lie beside the checkout")
def test_public_runs_that_die_are_caught_and_healthy_ones_are_not_accused() -> None:
    accused: List[str] = []
    missed: List[str] = []
    for run in json.loads((PUBLIC_RUNS / "index.json").read_text()):
        if run["label"] not in ("healthy", "nan", "spike", "restart_jump"):
            continue
        found = replay(public_run(PUBLIC_RUNS / run["file"]))
        critical = [one.step for one in found if one.level == "critical"]
        if run["label"] == "healthy":
            accused += [run["run_id"]] if critical else []
        elif not critical or (run["label"] == "nan" and critical[0] >= run["failure_step"]):
            missed.append(run["run_id"])
    assert (accused, missed) == ([], [])
