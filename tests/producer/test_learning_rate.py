"""The ceiling holds against every schedule, and a schedule below it is followed."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import pytest

torch: Any = pytest.importorskip("torch")

from torch.optim import lr_scheduler  # noqa: E402

from plarv import faults  # noqa: E402
from plarv.learning_rate import LearningRateCap, learning_rate_of  # noqa: E402


@pytest.fixture(autouse=True)
def _faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "RERAISE", True)


SCHEDULES: Dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + 0.5 * step)),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30, eta_min=1e-4),
    "step": lambda o: lr_scheduler.StepLR(o, 5, 0.1),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.01, 20),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, [1.0, 0.1], total_steps=40, cycle_momentum=False
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 4, 0.5)]
    ),
    "none": lambda _: None,
}
WITHOUT_CLOSED_FORM = ("chained",)


def weight() -> Any:
    return torch.nn.Parameter(torch.ones(2))


def optimizer_of(first: Any = 1.0, second: Any = 0.1) -> Any:
    groups = [{"params": [weight()], "lr": first}, {"params": [weight()], "lr": second}]
    return torch.optim.SGD(groups, lr=0.1)


def rates(optimizer: Any) -> List[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def advance(optimizer: Any) -> List[float]:
    """One optimizer step; the rates that were in force in it, seen on the weights."""
    before = [group["params"][0].detach().double().clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(2)
    optimizer.step()
    pairs = zip(before, optimizer.param_groups)
    return [float((old - group["params"][0].detach().double())[0]) for old, group in pairs]


def run(name: str, cap_from: int, argus_first: bool, steps: int = 20) -> Tuple[Any, Any]:
    """Rates in force at each step, and as shown after each ``enforce()``."""
    optimizer = optimizer_of()
    scheduler = SCHEDULES[name](optimizer)
    cap = LearningRateCap()
    used, shown = [], []
    for step in range(steps):
        used.append(advance(optimizer))
        if scheduler is not None and not argus_first:
            scheduler.step()
        if step == cap_from:
            assert cap.apply(optimizer, 0.05)
        cap.enforce()
        shown.append(rates(optimizer))
        if scheduler is not None and argus_first:
            scheduler.step()
    return used, shown


@pytest.mark.parametrize("argus_first", [True, False])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_rate_in_force_is_the_lower_of_schedule_and_ceiling(
    name: str, argus_first: bool
) -> None:
    if name in WITHOUT_CLOSED_FORM and argus_first:
        pytest.skip("such a schedule goes on from the capped rate; see the next test")
    scheduled, _ = run(name, cap_from=10**6, argus_first=argus_first)
    used, shown = run(name, cap_from=2, argus_first=argus_first)
    seen = scheduled[2 if argus_first else 3]  # what the schedule wanted when it was capped
    ceilings = [0.05, 0.05 * seen[1] / seen[0]]
    for plain, capped in zip(scheduled[3:], used[3:]):
        expected = [min(rate, ceiling) for rate, ceiling in zip(plain, ceilings)]
        assert capped == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for rate in shown[2:]:
        assert rate[0] <= 0.05
        assert rate[1] <= ceilings[1] * (1 + 1e-4)


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_a_schedule_without_closed_form_that_runs_after_us_never_exceeds_the_ceiling(
    name: str,
) -> None:
    used, shown = run(name, cap_from=2, argus_first=True)
    assert all(rate[0] <= 0.05 * (1 + 1e-4) for rate in used[3:])
    assert all(rate[0] <= 0.05 for rate in shown[2:])


def test_groups_keep_their_proportions_and_the_largest_gets_exactly_the_rate() -> None:
    optimizer = optimizer_of(0.02, 0.3)
    cap = LearningRateCap()
    assert cap.apply(optimizer, 0.07)
    assert rates(optimizer)[1] == 0.07
    assert rates(optimizer)[0] == pytest.approx(0.02 * 0.07 / 0.3)


def test_a_second_cap_does_not_compound_with_the_first() -> None:
    optimizer = optimizer_of()
    cap = LearningRateCap()
    cap.apply(optimizer, 0.5)
    cap.apply(optimizer, 0.25)
    assert rates(optimizer) == [0.25, pytest.approx(0.025)]
    cap.apply(optimizer, 0.5)
    assert rates(optimizer) == [0.5, pytest.approx(0.05)]


def test_a_ceiling_above_the_rate_raises_nothing() -> None:
    optimizer = optimizer_of()
    LearningRateCap().apply(optimizer, 5.0)
    assert rates(optimizer) == [1.0, 0.1]


def test_lifting_gives_the_schedule_back_what_it_had() -> None:
    optimizer = optimizer_of()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    cap = LearningRateCap()
    cap.apply(optimizer, 0.01)
    for _ in range(2):
        advance(optimizer)
        scheduler.step()
        cap.enforce()
    cap.lift()
    assert not cap.is_active
    assert rates(optimizer) == pytest.approx([0.25, 0.025])
    assert advance(optimizer) == pytest.approx([0.25, 0.025])
    assert not optimizer._optimizer_step_pre_hooks


def test_a_rate_set_by_hand_below_the_ceiling_is_left_alone() -> None:
    optimizer = optimizer_of()
    cap = LearningRateCap()
    cap.apply(optimizer, 0.05)
    optimizer.param_groups[0]["lr"] = 0.01
    assert advance(optimizer)[0] == pytest.approx(0.01, rel=1e-4)
    cap.enforce()
    assert rates(optimizer)[0] == 0.01
    optimizer.param_groups[0]["lr"] = 3.0
    assert advance(optimizer)[0] == pytest.approx(0.05, rel=1e-4)


def test_the_cap_holds_where_enforce_is_never_called() -> None:
    optimizer = optimizer_of()
    cap = LearningRateCap()
    cap.apply(optimizer, 0.05)
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = 1.0
        assert advance(optimizer)[0] == pytest.approx(0.05, rel=1e-4)


def test_a_tensor_rate_stays_the_same_tensor() -> None:
    rate = torch.tensor(0.4)
    optimizer = torch.optim.Adam([weight()], lr=rate, capturable=False, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    cap = LearningRateCap()
    assert cap.apply(optimizer, 0.1)
    for _ in range(3):
        assert float(held) == pytest.approx(0.1)
        advance(optimizer)
        assert float(held) == pytest.approx(0.4)
        scheduler.step()
        cap.enforce()
    assert optimizer.param_groups[0]["lr"] is held
    cap.lift()
    assert float(held) == pytest.approx(0.4)


Tensor: Any = torch.Tensor


class OnDevice(Tensor):  # type: ignore[misc]
    """A tensor that says it lies on an accelerator, and that nobody may wait for."""

    @property
    def device(self) -> Any:
        return SimpleNamespace(type="cuda")

    def item(self) -> float:
        raise AssertionError("waited for the device")

    __float__ = __bool__ = item


def test_a_rate_on_a_device_is_capped_without_waiting_for_it() -> None:
    first, second = (torch.tensor(rate).as_subclass(OnDevice) for rate in (0.4, 0.1))
    optimizer = Foreign(first, second)

    def held() -> List[float]:
        return [float(rate.as_subclass(torch.Tensor)) for rate in (first, second)]

    cap = LearningRateCap()
    assert cap.apply(optimizer, 0.2)
    assert held() == pytest.approx([0.2, 0.05])
    first.fill_(0.8)
    second.fill_(0.01)
    cap.enforce()
    assert held() == pytest.approx([0.2, 0.01])
    cap.enforce()
    assert held() == pytest.approx([0.2, 0.01])
    assert cap.current(optimizer) is None
    assert learning_rate_of(optimizer) is not first
    cap.lift()
    assert held() == pytest.approx([0.8, 0.01])


def test_a_group_that_is_added_later_is_capped_too() -> None:
    optimizer = optimizer_of()
    cap = LearningRateCap()
    cap.apply(optimizer, 0.05)
    optimizer.add_param_group({"params": [weight()], "lr": 2.0})
    assert advance(optimizer)[2] == pytest.approx(0.05, rel=1e-4)


class Foreign:
    """An optimizer of another library: groups, and no hooks."""

    __slots__ = ("param_groups",)

    def __init__(self, *rates: Any) -> None:
        self.param_groups = [{"lr": rate} for rate in rates]


def test_an_optimizer_of_another_library_is_capped_by_enforce() -> None:
    optimizer = Foreign(1, 0.5)
    cap = LearningRateCap()
    assert cap.apply(optimizer, 0.1)
    assert rates(optimizer) == [0.1, 0.05]
    optimizer.param_groups[0]["lr"] = 1.0
    cap.enforce()
    assert rates(optimizer) == [0.1, 0.05]
    assert cap.current(optimizer) == 0.1


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf])
def test_a_rate_that_makes_no_sense_changes_nothing(lr: float) -> None:
    optimizer = optimizer_of()
    assert not LearningRateCap().apply(optimizer, lr)
    assert rates(optimizer) == [1.0, 0.1]


@pytest.mark.parametrize("thing", [None, object(), Foreign()])
def test_what_is_no_optimizer_is_refused(thing: object) -> None:
    cap = LearningRateCap()
    assert not cap.apply(thing, 0.1)
    assert not cap.is_active
    assert cap.current(thing) is None
    cap.enforce()
    cap.lift()


def test_zero_rates_are_capped_at_the_rate_itself() -> None:
    optimizer = optimizer_of(0.0, 0.0)
    cap = LearningRateCap()
    assert cap.apply(optimizer, 0.1)
    optimizer.param_groups[0]["lr"] = 1.0
    cap.enforce()
    assert rates(optimizer) == [0.1, 0.0]


def test_the_current_rate_is_the_one_in_force() -> None:
    optimizer = optimizer_of()
    cap = LearningRateCap()
    assert cap.current(optimizer) == 1.0
    cap.apply(optimizer, 0.05)
    advance(optimizer)  # shows the schedule's own until enforce()
    assert cap.current(optimizer) == 0.05
    assert learning_rate_of(object()) is None


def test_neither_optimizer_nor_cap_is_kept_alive() -> None:
    optimizer = optimizer_of()
    cap = LearningRateCap()
    cap.apply(optimizer, 0.05)
    gone = weakref.ref(cap)
    del cap
    assert gone() is None
    advance(optimizer)
    cap = LearningRateCap()
    cap.apply(optimizer, 0.05)
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    cap.enforce()
    cap.lift()
