"""OptimizerCorruption: updates against lr and gradient, with simulated and real optimizers."""

from __future__ import annotations

import math
import random
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import pytest

from plarv_processors.detectors.optimizer_corruption import OptimizerCorruption
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import LOCAL_CHECKS, StepEvent, Verdict

ALL_OK = tuple(0 for _ in LOCAL_CHECKS)
SICK = tuple(2 if check == "optimizer_health" else 0 for check in LOCAL_CHECKS)

Row = Tuple[int, Optional[float], Optional[float], Optional[float]]  # step, gradient, lr, update
Factor = Callable[[int], float]


def schedule(step: int, steps: int = 1000) -> float:
    """Warm-up over 50 steps, then a cosine to 0."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def constant(_: int) -> float:
    return 1.0


def from_step(start: int, factor: float) -> Factor:
    return lambda step: factor if step >= start else 1.0


def adam(steps: int, factor: Factor = constant, noise: float = 0.05, every: int = 1) -> List[Row]:
    """Updates of about 50 lr whatever the gradient, times the fault's factor."""
    random_ = random.Random(1)
    rows: List[Row] = []
    for step in range(steps):
        lr = 1e-3 * schedule(step, steps)
        grad = math.exp(random_.gauss(0.0, 0.3) - step / 500)
        update = lr * 50.0 * math.exp(random_.gauss(0.0, noise)) * factor(step)
        rows.append((step, grad, lr, update if step % every == 0 else None))
    return rows


def momentum(
    steps: int,
    factor: Factor = constant,
    gradient: Factor = constant,
    lr_of: Callable[[int], float] = lambda step: 0.1 * schedule(step),
    lr_inside: bool = False,
) -> Iterator[Row]:
    """SGD with momentum 0.9; the learning rate multiplies the buffer, or goes into it."""
    random_ = random.Random(2)
    buffer = 0.0
    for step in range(steps):
        lr = lr_of(step)
        grad = gradient(step) * math.exp(random_.gauss(0.0, 0.15))
        buffer = 0.9 * buffer + grad * (lr if lr_inside else 1.0)
        yield (step, grad, lr, buffer * (1.0 if lr_inside else lr) * factor(step))


def replay(
    rows: Iterable[Row],
    detector: Optional[OptimizerCorruption] = None,
    reports: Optional[Dict[int, Tuple[int, ...]]] = None,
) -> List[Verdict]:
    detector = detector or OptimizerCorruption()
    found: List[Verdict] = []
    for record, (step, grad, lr, update) in enumerate(rows):
        levels = (reports or {}).get(step)
        event = StepEvent(
            "run", "s", record, 0, step,
            grad_norm=grad, current_lr=lr, update_norm=update, local_levels=levels,
        )  # fmt: skip
        found.extend(detector.update(event))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
def test_adam_under_warm_up_and_cosine_is_silent(noise: float, every: int) -> None:
    assert replay(adam(3000, noise=noise, every=every)) == []


def test_sgd_with_momentum_is_silent() -> None:
    assert replay(momentum(1000)) == []


@pytest.mark.parametrize("lr_inside", [False, True])
def test_steps_of_the_learning_rate_are_silent(lr_inside: bool) -> None:
    def steps_down(step: int) -> float:
        return 0.1 * 0.1 ** (step // 400)

    assert replay(momentum(800, lr_of=steps_down, lr_inside=lr_inside)) == []


def test_warm_restarts_are_silent() -> None:
    assert replay(momentum(900, lr_of=lambda step: 0.1 * schedule(step % 150, 150))) == []


@pytest.mark.parametrize("level", [0.05, 20.0])
def test_a_gradient_of_another_size_is_silent_under_either_law(level: float) -> None:
    assert replay(momentum(800, gradient=from_step(500, level))) == []
    rows = [
        (step, (grad or 0.0) * from_step(500, level)(step), lr, update)
        for step, grad, lr, update in adam(800)
    ]
    assert replay(rows) == []


def test_one_update_out_of_line_is_silent() -> None:
    assert replay(adam(600, lambda step: 30.0 if step in (200, 300, 301) else 1.0)) == []


@pytest.mark.parametrize("factor", [0.1, 0.25, 4.0])
def test_poisoned_moments_are_found_after_five_updates(factor: float) -> None:
    assert marks(replay(adam(1000, from_step(300, factor))))[0] == (
        304, "poisoned_moments", "warn", "opened",
    )  # fmt: skip


def test_poisoned_moments_are_found_when_updates_are_measured_rarely() -> None:
    found = replay(adam(1000, from_step(300, 0.1), every=5))
    assert marks(found)[0] == (320, "poisoned_moments", "warn", "opened")
    assert found[0].onset_step == 300


def test_a_severe_fault_that_lasts_is_critical_and_finally_adopted() -> None:
    assert marks(replay(adam(1000, from_step(300, 0.02)))) == [
        (304, "poisoned_moments", "warn", "opened"),
        (319, "poisoned_moments", "critical", "escalated"),
        (504, "poisoned_moments", "ok", "resolved"),
    ]


def test_a_momentum_buffer_that_swallowed_a_spike_is_found_until_it_has_forgotten() -> None:
    spike = from_step(10**9, 1.0)
    rows = list(momentum(700, gradient=lambda step: 1000.0 if step == 400 else spike(step)))
    found = marks(replay(rows))
    assert found[0] == (404, "poisoned_moments", "warn", "opened")
    assert found[-1][1:] == ("poisoned_moments", "ok", "resolved")


def test_doubled_updates_only_warn() -> None:
    assert marks(replay(adam(450, from_step(300, 2.2)))) == [
        (311, "doubled_update", "warn", "opened")
    ]


def test_updates_somewhat_smaller_are_a_new_normal() -> None:
    assert replay(adam(1000, from_step(300, 0.5))) == []


def test_skipped_updates_warn_and_become_critical() -> None:
    assert marks(replay(adam(500, from_step(300, 0.0)))) == [
        (304, "skipped_update", "warn", "opened"),
        (349, "skipped_update", "critical", "escalated"),
    ]


def test_an_optimizer_that_never_moves_a_weight_is_critical() -> None:
    assert marks(replay(adam(500, from_step(0, 0.0)))) == [
        (49, "skipped_update", "critical", "opened")
    ]


def test_skipped_updates_that_end_resolve() -> None:
    rows = adam(600, lambda step: 0.0 if 300 <= step < 320 else 1.0)
    assert marks(replay(rows)) == [
        (304, "skipped_update", "warn", "opened"),
        (329, "skipped_update", "ok", "resolved"),
    ]


def test_a_loss_scalers_skips_are_silent() -> None:
    rows = [
        (step, math.inf if step % 100 < 8 else grad, lr, 0.0 if step % 100 < 8 else update)
        for step, grad, lr, update in adam(1000)
    ]
    assert replay(rows) == []


def test_accumulation_logged_by_micro_step_is_silent() -> None:
    assert replay(adam(2000, lambda step: 1.0 if step % 8 == 0 else 0.0)) == []


def test_a_learning_rate_of_zero_or_next_to_it_is_silent() -> None:
    rows = adam(600, from_step(300, 0.0))
    assert replay([(s, g, 0.0 if s >= 300 else lr, u) for s, g, lr, u in rows]) == []
    assert replay([(s, g, 1e-7 if s >= 300 else lr, u) for s, g, lr, u in rows]) == []


def test_the_local_check_confirms_an_open_fault() -> None:
    found = replay(adam(450, from_step(300, 4.0)), reports={290: ALL_OK, 310: SICK})
    assert marks(found) == [
        (304, "poisoned_moments", "warn", "opened"),
        (310, "confirmed", "critical", "escalated"),
    ]


def test_the_local_check_makes_two_broken_updates_enough() -> None:
    found = replay(adam(450, from_step(300, 4.0)), reports={299: SICK})
    assert marks(found) == [(301, "confirmed", "critical", "opened")]


def test_the_local_check_alone_warns_after_five_reports() -> None:
    reports = {step: SICK if 300 <= step < 400 else ALL_OK for step in range(0, 800, 10)}
    assert marks(replay(adam(800), reports=reports)) == [
        (340, "local_only", "warn", "opened"),
        (490, "local_only", "ok", "resolved"),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, None])
def test_unusable_input_leaves_no_trace(bad: Optional[float]) -> None:
    detector, clean = OptimizerCorruption(), OptimizerCorruption()
    rows = adam(400, from_step(300, 5.0))
    mixed: List[Row] = []
    for step, grad, lr, update in rows:
        mixed += [(step, grad, lr, bad), (step, grad, bad, update), (step, grad, lr, update)]
    assert marks(replay(mixed, detector)) == marks(replay(rows, clean)) != []
    assert dump(detector) == dump(clean)


def test_a_missing_gradient_leaves_adams_law() -> None:
    rows = [(step, None, lr, update) for step, _, lr, update in adam(450, from_step(300, 5.0))]
    assert marks(replay(rows)) == [(304, "poisoned_moments", "warn", "opened")]


@pytest.mark.parametrize("cut", [10, 200, 302, 305, 330])
def test_a_snapshot_changes_nothing(cut: int) -> None:
    rows = adam(600, lambda step: 0.05 if 300 <= step < 360 else 1.0)
    before, after = OptimizerCorruption(), OptimizerCorruption()
    found = replay(rows[:cut], before)
    restore(after, unpack(pack(dump(before))))
    assert found + replay(rows[cut:], after) == replay(rows)


def test_the_evidence_redoes_the_decision() -> None:
    evidence = replay(adam(450, from_step(300, 5.0)))[0].evidence
    by_lr = evidence["update_norm"] / evidence["current_lr"] / evidence["law_lr"]
    by_grad = (
        evidence["update_norm"]
        / evidence["current_lr"]
        / evidence["grad_norm"]
        / evidence["law_grad"]
    )
    assert any(evidence["ratio"] == pytest.approx(ratio) for ratio in (by_lr, by_grad))
    assert evidence["ratio"] > 3.0


@pytest.mark.parametrize(
    "setting", [{"min_history": 4}, {"ratio": 1.2}, {"tie": 0.5}, {"patience": 1}, {"lr_jump": 1}]
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|out of range"):
        OptimizerCorruption.Config(**setting)  # type: ignore[arg-type]


TORCH_FAULTS = [
    ("adam", None, None),
    ("sgd", None, None),
    ("adam", "second moment x 1000", "poisoned_moments"),
    ("adam", "first moment x 100", "poisoned_moments"),
    ("sgd", "momentum x 100", "poisoned_moments"),
    ("adam", "stepped twice", "doubled_update"),
    ("sgd", "not stepped", "skipped_update"),
]


@pytest.mark.parametrize(("optimizer", "fault", "kind"), TORCH_FAULTS)
def test_real_optimizers_are_judged_by_their_faults(
    optimizer: str, fault: Optional[str], kind: Optional[str]
) -> None:
    rows = torch_run(optimizer, fault, steps=260, fault_at=200)
    found = replay(rows)
    if kind is None:
        assert found == []
    else:
        assert found[0].kind == kind
        assert 200 <= found[0].step <= 230


def torch_run(optimizer: str, fault: Optional[str], steps: int, fault_at: int) -> List[Row]:
    """Trains a small network on noisy labels, with warm-up and cosine, and puts the fault in."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    inputs, labels = torch.randn(512, 20), torch.randint(0, 5, (512,))
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
    weights = list(model.parameters())
    if optimizer == "adam":
        optim = torch.optim.Adam(weights, lr=1e-3)
    else:
        optim = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    peak = optim.param_groups[0]["lr"]
    rows: List[Row] = []
    for step in range(steps):
        lr = peak * schedule(step, steps)
        optim.param_groups[0]["lr"] = lr
        batch = torch.randint(0, 512, (32,))
        optim.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        grad = float(torch.cat([weight.grad.flatten() for weight in weights]).norm())
        if step == fault_at:
            for state in optim.state.values():
                for name, scale in FAULTY_STATES.get(fault or "", {}).items():
                    state[name] *= scale
        before = torch.cat([weight.detach().flatten().clone() for weight in weights])
        if not (fault == "not stepped" and step >= fault_at):
            optim.step()
        if fault == "stepped twice" and step >= fault_at:
            optim.step()
        after = torch.cat([weight.detach().flatten() for weight in weights])
        rows.append((step, grad, lr, float((after - before).norm())))
    return rows


FAULTY_STATES: Dict[str, Dict[str, float]] = {
    "second moment x 1000": {"exp_avg_sq": 1000.0},
    "first moment x 100": {"exp_avg": 100.0},
    "momentum x 100": {"momentum_buffer": 100.0},
}
