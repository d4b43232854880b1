"""GradientCollapse: gradients that vanish, zeros that mean something else, blocked layers."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import pytest

from plarv_processors.detectors.gradient_collapse import GradientCollapse
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import LOCAL_CHECKS, StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"
ALL_OK = tuple(0 for _ in LOCAL_CHECKS)
BLOCKED = tuple(
    2 if check in ("activation_sparsity", "gradient_flow") else 0 for check in LOCAL_CHECKS
)

Row = Tuple[int, Optional[float], Optional[float], Optional[float]]  # step, loss, gradient, lr


def run_of(
    steps: int,
    gradient: Callable[[int, float], float],
    *,
    stride: int = 1,
    loss: Optional[Callable[[int, float], float]] = None,
) -> List[Row]:
    """A run whose gradient and loss are functions of the row's index and of a noise around 0."""
    noise = random.Random(1)
    rows: List[Row] = []
    for index in range(steps):
        value = (
            3.0 + 7.0 * math.exp(-index / 100) + noise.gauss(0.0, 0.05)
            if loss is None
            else loss(index, noise.gauss(0.0, 1.0))
        )
        rows.append((index * stride, value, gradient(index, noise.gauss(0.0, 0.2)), 1e-3))
    return rows


def normal(_: int, noise: float) -> float:
    return math.exp(noise)


def vanishing_at(start: int, level: float = 1e-5) -> Callable[[int, float], float]:
    return lambda index, noise: (level if index >= start else 1.0) * math.exp(noise)


def replay(
    rows: Iterable[Row],
    detector: Optional[GradientCollapse] = None,
    reports: Optional[Dict[int, Tuple[int, ...]]] = None,
) -> List[Verdict]:
    detector = detector or GradientCollapse()
    found: List[Verdict] = []
    for record, (step, loss, grad, lr) in enumerate(rows):
        levels = (reports or {}).get(step)
        event = StepEvent(
            "run", "s", record, 0, step,
            loss=loss, grad_norm=grad, current_lr=lr, local_levels=levels,
        )  # fmt: skip
        found.extend(detector.update(event))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


def test_a_healthy_run_is_silent() -> None:
    assert replay(run_of(2000, normal)) == []


def test_a_vanished_gradient_is_critical_after_fifty_points() -> None:
    found = replay(run_of(600, vanishing_at(400)))
    assert marks(found) == [(449, "vanished", "critical", "opened")]
    assert found[0].onset_step == 400


def test_a_sparse_log_needs_fewer_points() -> None:
    found = replay(run_of(100, vanishing_at(60), stride=100))
    assert marks(found) == [(6700, "vanished", "critical", "opened")]


def test_zeros_after_gradients_are_a_collapse() -> None:
    found = replay(run_of(600, vanishing_at(400, 0.0)))
    assert marks(found) == [(449, "vanished", "critical", "opened")]


def test_zeros_from_the_start_were_not_computed() -> None:
    assert replay(run_of(600, vanishing_at(0, 0.0))) == []


@pytest.mark.parametrize("every", [2, 10, 100])
def test_zeros_between_measured_gradients_are_silent(every: int) -> None:
    def measured(index: int, noise: float) -> float:
        return math.exp(noise) if index % every == 0 else 0.0

    assert replay(run_of(60 * every, measured)) == []


def test_zeros_at_a_learning_rate_of_zero_are_silent() -> None:
    rows = run_of(600, vanishing_at(400, 0.0))
    assert replay([(step, loss, grad, lr if grad else 0.0) for step, loss, grad, lr in rows]) == []


def test_policy_steps_without_advantage_are_silent() -> None:
    rows = run_of(600, vanishing_at(400, 0.0))
    assert replay([(step, loss if grad else 0.0, grad, lr) for step, loss, grad, lr in rows]) == []


def test_a_model_that_solved_its_task_is_silent() -> None:
    def solved(index: int, _: float) -> float:
        return 5.0 if index < 400 else 1e-4

    assert replay(run_of(600, vanishing_at(400), loss=solved)) == []


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95, 0.99])
def test_full_batch_descent_that_converges_to_a_floor_is_silent(rate: float) -> None:
    rows: List[Row] = [
        (step, 1.0 + 5.0 * rate ** (2 * step), 3.0 * rate**step + 1e-12, 0.1)
        for step in range(2000)
    ]
    assert replay(rows) == []


def test_a_second_order_optimizer_that_converges_at_once_is_silent() -> None:
    rows: List[Row] = [(step, 1.0 + 5.0 * 0.95**step, 0.95**step, 1.0) for step in range(100)]
    rows += [(step, 1.0, 1e-8, 1.0) for step in range(100, 300)]
    assert replay(rows) == []


def test_a_loss_on_its_floor_whose_batches_still_differ_is_no_convergence() -> None:
    found = replay(run_of(900, vanishing_at(800)))
    assert [one.level for one in found] == ["critical"]


def test_a_gradient_that_declines_slowly_is_silent() -> None:
    def decline(index: int, noise: float) -> float:
        return (1e-5 + math.exp(-index / 60)) * math.exp(noise)

    assert replay(run_of(2000, decline)) == []


def test_without_a_loss_it_only_warns() -> None:
    rows = [(step, None, grad, lr) for step, _, grad, lr in run_of(600, vanishing_at(400))]
    assert marks(replay(rows)) == [(449, "vanished", "warn", "opened")]


def test_gradients_that_come_back_resolve_it() -> None:
    def dip(index: int, noise: float) -> float:
        return (1e-6 if 400 <= index < 480 else 1.0) * math.exp(noise)

    assert marks(replay(run_of(700, dip))) == [
        (449, "vanished", "critical", "opened"),
        (489, "vanished", "ok", "resolved"),
    ]


def test_layers_without_gradient_warn_and_become_critical_with_the_norm() -> None:
    def fading(index: int, noise: float) -> float:
        return (0.02 if index >= 600 else 1.0) * math.exp(noise)

    reports = {step: BLOCKED if 400 <= step < 900 else ALL_OK for step in range(0, 1300, 20)}
    assert marks(replay(run_of(1300, fading), reports=reports)) == [
        (480, "blocked_layers", "warn", "opened"),
        (600, "blocked_layers", "critical", "escalated"),
        (1080, "blocked_layers", "ok", "resolved"),
    ]


def only(check: str) -> Tuple[int, ...]:
    return tuple(2 if name == check else 0 for name in LOCAL_CHECKS)


def test_dead_activations_alone_are_silent() -> None:
    reports = dict.fromkeys(range(0, 600, 10), only("activation_sparsity"))
    assert replay(run_of(600, normal), reports=reports) == []


def test_layers_without_gradient_warn_alone_once_the_norm_is_known() -> None:
    reports = dict.fromkeys(range(0, 600, 10), only("gradient_flow"))
    assert marks(replay(run_of(600, normal), reports=reports)) == [
        (60, "blocked_layers", "warn", "opened")
    ]
    unknown = [(step, loss, None, lr) for step, loss, _, lr in run_of(600, normal)]
    assert replay(unknown, reports=reports) == []


def test_a_flow_check_that_fires_on_an_explosion_is_no_blockage() -> None:
    def exploding(index: int, noise: float) -> float:
        return (1e3 if index >= 300 else 1.0) * math.exp(noise)

    reports = dict.fromkeys(range(300, 330), only("gradient_flow"))
    assert replay(run_of(330, exploding), reports=reports) == []


def test_the_verdict_names_the_worst_layers_and_the_checks_score() -> None:
    detector = GradientCollapse()
    found: List[Verdict] = []
    for step, loss, grad, _ in run_of(100, normal):
        ill = step >= 60
        event = StepEvent(
            "run", "s", step, 0, step, loss=loss, grad_norm=grad,
            local_levels=only("gradient_flow") if ill else ALL_OK,
            local_scores=(12.5,) * len(LOCAL_CHECKS),
            local_layers=("h.3.mlp", "h.2.mlp") if ill else (),
        )  # fmt: skip
        found.extend(detector.update(event))
    (verdict,) = found
    assert verdict.message.endswith("(layers h.3.mlp, h.2.mlp)")
    assert verdict.evidence["local_score"] == 12.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, None])
def test_unusable_input_leaves_no_trace(bad: Optional[float]) -> None:
    detector, clean = GradientCollapse(), GradientCollapse()
    rows = run_of(200, vanishing_at(120))
    unusable = math.nan if bad == -1.0 else bad  # a negative loss is a loss
    mixed: List[Row] = []
    for row in rows:
        mixed += [row, (row[0], unusable, bad, row[3])]
    assert marks(replay(mixed, detector)) == marks(replay(rows, clean))
    assert dump(detector) == dump(clean)


def test_scaling_the_loss_by_a_power_of_two_changes_no_decision() -> None:
    rows = run_of(700, vanishing_at(400))
    scaled = [(step, loss and loss * 2.0**15, grad, lr) for step, loss, grad, lr in rows]
    assert marks(replay(rows)) == marks(replay(scaled)) != []


@pytest.mark.parametrize("cut", [15, 405, 449, 450, 485])
def test_a_snapshot_changes_nothing(cut: int) -> None:
    rows = run_of(700, lambda i, noise: (1e-6 if 400 <= i < 480 else 1.0) * math.exp(noise))
    before, after = GradientCollapse(), GradientCollapse()
    found = replay(rows[:cut], before)
    restore(after, unpack(pack(dump(before))))
    assert found + replay(rows[cut:], after) == replay(rows)


@pytest.mark.parametrize(
    "setting", [{"min_history": 4}, {"ratio": 0.5}, {"sparse_points": 90}, {"thin": 0}]
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        GradientCollapse.Config(**setting)  # type: ignore[arg-type]


@pytest.mark.skipif(not PUBLIC_RUNS.is_dir(), reason="the public runs lie beside the checkout")
def test_no_public_run_is_accused() -> None:
    accused: List[str] = []
    for run in json.loads((PUBLIC_RUNS / "index.json").read_text()):
        with (PUBLIC_RUNS / run["file"]).open() as lines:
            rows: List[Row] = [
                (
                    int(float(row["step"])),
                    float(row["loss"]) if row["loss"] else None,
                    float(row["grad_norm"]) if row["grad_norm"] else None,
                    float(row["lr"]) if row["lr"] else None,
                )
                for row in csv.DictReader(lines)
            ]
        accused += [run["run_id"]] if replay(rows) else []
    assert accused == []
