"""A ceiling on an optimizer's learning rate that holds against any schedule."""

from __future__ import annotations

import weakref
from typing import Any, Callable, List, Optional

from plarv.discovery import scheduler_of
from plarv.faults import Faults, Guard
from plarv.tensors import is_tensor

__all__ = ["LearningRateCap", "learning_rate_of"]


class LearningRateCap:
    """Holds every parameter group of an optimizer at or below a ceiling of its own.

    In force during each ``optimizer.step()``, by its hooks; between two of them, ``enforce()``
    shows the capped rate in ``param_groups``. After each optimizer step the schedule's own rates
    are put back, so a scheduler that computes the next rate from the last one (ExponentialLR) goes
    on as if there were no cap; one that runs after ``enforce()`` is asked for its closed form where
    it has one. A rate below the ceiling, from the schedule or by hand, is left alone. Works with
    float and tensor rates; tensor rates on an accelerator are not waited for. Optimizers without
    hooks (other libraries) are capped by ``enforce()`` alone. Never raises. O(groups) a step.

    >>> class Optimizer:
    ...     param_groups = [{"lr": 0.1}, {"lr": 0.02}]
    >>> cap, optimizer = LearningRateCap(), Optimizer()
    >>> cap.apply(optimizer, 0.01)
    True
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.01, 0.002]
    >>> optimizer.param_groups[0]["lr"] = 0.5  # a scheduler sets it again
    >>> cap.enforce()
    >>> cap.current(optimizer)
    0.01
    """

    def __init__(self, faults: Optional[Faults] = None) -> None:
        self._optimizer: Callable[[], Any] = _nothing
        self._scheduler: Callable[[], Any] = _nothing
        self._epoch: object = None
        self._groups: List[_Group] = []
        self._handles: List[Any] = []
        self._guard = Guard("the learning rate could not be capped", faults)

    @property
    def is_active(self) -> bool:
        """Whether a cap is in force."""
        return bool(self._groups)

    def apply(self, optimizer: object, lr: float, scheduler: Optional[object] = None) -> bool:
        """Cap the largest group's rate at ``lr`` and the others in proportion.

        Proportions are those of the schedule's present rates, so that a second cap does not
        compound with the first. ``scheduler`` is found when not given. False, and nothing changed,
        where the optimizer has no groups with a rate, or ``lr`` is negative or not finite.
        """
        with self._guard:
            groups: List[Any] = list(getattr(optimizer, "param_groups", ()))
            if not 0.0 <= lr < float("inf") or not any("lr" in group for group in groups):
                return False
            if self._optimizer() is optimizer:
                self.enforce()
            else:
                self.lift()
                self._groups = [_Group(group) for group in groups]
                self._optimizer = _weakly(optimizer)
                self._install(optimizer)
            found = scheduler_of(optimizer) if scheduler is None else scheduler
            self._scheduler = _weakly(found)
            self._epoch = getattr(found, "last_epoch", None)
            self._set_ceilings(lr)
            self.enforce()
            return True
        self.lift()
        return False

    def enforce(self) -> None:
        """Cap what anyone has set since; call it once a step."""
        with self._guard:
            epoch = getattr(self._scheduler(), "last_epoch", None)
            has_stepped, self._epoch = epoch != self._epoch, epoch
            for index, group in enumerate(self._param_groups()):
                if index >= len(self._groups):  # a group added later
                    self._groups.append(_Group(group))
                    self._groups[index].ceiling = self._groups[0].ceiling
                closed_form = self._closed_form(index) if has_stepped else None
                self._groups[index].cap(group, closed_form)

    def lift(self) -> None:
        """Remove the cap: the schedule's own rates are in force again."""
        with self._guard:
            self._release()
        with self._guard:
            for handle in self._handles:
                handle.remove()
        self._handles = []
        self._groups = []
        self._optimizer = self._scheduler = _nothing

    def current(self, optimizer: object) -> Optional[float]:
        """The first group's rate, capped if it is; ``None`` where reading it would wait."""
        rate = learning_rate_of(optimizer)
        if not isinstance(rate, float):
            return None
        if self._groups and self._optimizer() is optimizer:
            ceiling = self._groups[0].ceiling
            return min(rate, ceiling) if isinstance(ceiling, float) else rate
        return rate

    def _install(self, optimizer: Any) -> None:
        cap = weakref.ref(self)

        def before_step(*_: object) -> None:
            alive = cap()
            if alive is not None:
                alive.enforce()

        def after_step(*_: object) -> None:
            alive = cap()
            if alive is not None:
                alive._release_after_step()

        inner: Any = getattr(optimizer, "optimizer", None)  # accelerate's wrapper has no hooks
        for owner in (optimizer, inner):
            try:
                after: Any = owner.register_step_post_hook(after_step)
                self._handles = [after, owner.register_step_pre_hook(before_step)]
                return
            except (AttributeError, TypeError):
                self._handles = []

    def _set_ceilings(self, lr: float) -> None:
        scheduled: List[Any] = [group.scheduled for group in self._groups]
        rates: List[Any] = [rate for rate in scheduled if rate is not None]
        if all(is_tensor(rate) for rate in rates):
            self._set_device_ceilings(lr, rates, scheduled)
            return
        # A mixture of floats and tensors on a device, of which none is known, waits for the device.
        largest = max(float(rate) for rate in rates)
        for group, rate in zip(self._groups, scheduled):
            share = largest if rate is None else float(rate)
            group.ceiling = lr if largest in (0.0, share) else share * (lr / largest)

    def _set_device_ceilings(self, lr: float, rates: List[Any], scheduled: List[Any]) -> None:
        largest = rates[0]
        for rate in rates:
            largest = largest.clamp(min=rate)
        for group, rate in zip(self._groups, scheduled):
            share = (largest if rate is None else rate) / largest  # NaN where all are 0
            group.ceiling = (share * lr).nan_to_num(nan=lr)

    def _release_after_step(self) -> None:
        with self._guard:
            self._release()

    def _release(self) -> None:
        for group, state in zip(self._param_groups(), self._groups):
            state.release(group)

    def _param_groups(self) -> List[Any]:
        optimizer = self._optimizer()
        return [] if optimizer is None else list(optimizer.param_groups)

    def _closed_form(self, index: int) -> Optional[float]:
        scheduler = self._scheduler()
        closed_form = getattr(scheduler, "_get_closed_form_lr", None)
        if closed_form is None:
            return None
        try:
            return float(closed_form()[index])
        except Exception:  # noqa: BLE001 - anybody's scheduler
            return None


def learning_rate_of(optimizer: object) -> Optional[object]:
    """The first group's rate: a float, a copied 0-d tensor still to be read, or ``None``."""
    try:
        groups: Any = getattr(optimizer, "param_groups", None)
        rate: object = _read(groups[0]) if groups else None
        return rate
    except Exception:  # noqa: BLE001 - anybody's optimizer
        return None


class _Group:
    """One parameter group: what the schedule wants, what it may have, and what we left there."""

    __slots__ = ("_is_capped", "_left", "_version", "ceiling", "scheduled")

    def __init__(self, group: Any) -> None:
        self.ceiling: Any = float("inf")
        self.scheduled: Any = _read(group)
        self._left: Any = self.scheduled
        self._version = _version(group)
        self._is_capped = False

    def cap(self, group: Any, closed_form: Optional[float]) -> None:
        """Show the lower of schedule and ceiling."""
        if self._has_changed(group):
            self.scheduled = _read(group)
            if self._is_capped and closed_form is not None and isinstance(self.scheduled, float):
                self.scheduled = closed_form  # the scheduler computed it from our capped rate
        if self.scheduled is None:
            return
        capped = _lower(self.scheduled, self.ceiling)
        self._leave(group, capped)
        self._is_capped = True

    def release(self, group: Any) -> None:
        """Show what the schedule wants."""
        if self._has_changed(group):
            self.scheduled = _read(group)  # changed inside optimizer.step()
        if self.scheduled is not None:
            self._leave(group, self.scheduled)
        self._is_capped = False

    def _has_changed(self, group: Any) -> bool:
        rate = group.get("lr")
        if is_tensor(rate):
            return bool(_version(group) != self._version)
        return bool(rate != self._left)

    def _leave(self, group: Any, rate: Any) -> None:
        held = group["lr"]
        if not is_tensor(held):
            if held != rate:
                group["lr"] = rate
        else:
            _fill(held, rate)
        self._left = rate
        self._version = _version(group)


def _read(group: Any) -> Any:
    """A float for what is on the host, a copy of a tensor on a device, ``None`` without a rate."""
    rate = group.get("lr")
    if rate is None:
        return None
    if is_tensor(rate):
        return float(rate.item()) if rate.device.type == "cpu" else rate.detach().clone()
    return float(rate)


def _version(group: Any) -> Any:
    rate = group.get("lr")
    return (id(rate), rate._version) if is_tensor(rate) else None


def _fill(held: Any, rate: Any) -> None:
    detached = held.detach()  # shares memory and version counter, needs no gradient
    if is_tensor(rate):
        detached.copy_(rate)
    else:
        detached.fill_(rate)


def _lower(rate: Any, ceiling: Any) -> Any:
    if isinstance(rate, float):
        return min(rate, ceiling)
    return rate.clamp(max=ceiling)


def _weakly(thing: object) -> Callable[[], Any]:
    if thing is None:
        return _nothing
    try:
        return weakref.ref(thing)
    except TypeError:  # slots without __weakref__
        return lambda: thing


def _nothing() -> None:
    return None
