"""What a step can tell without being told: gradient, update, learning rate, from what the loop
holds.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, Optional

from plarv.discovery import OptimizerSearch, find_optimizer
from plarv.faults import Faults
from plarv.gradients import GradientProbe
from plarv.learning_rate import LearningRateCap, learning_rate_of
from plarv.loss_graph import parameters_of
from plarv.tensors import is_tensor, loaded_torch

__all__ = ["ModelSignals"]

_LOOKS = 16  # steps whose loss is searched for parameters before it is given up


class ModelSignals:
    """Fills in the columns of a step that the caller left out.

    With a model the hooks are there from the start; without one the first loss tensor's graph leads
    to the parameters, and these to the optimizer that steps them. Everything is held weakly.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        scaler: Any,
        cap: LearningRateCap,
        faults: Faults,
    ) -> None:
        self._faults = faults
        self._cap = cap
        self._scaler: Callable[[], Any] = _reference(scaler)
        self._optimizer: Callable[[], Any] = _reference(optimizer)
        self._probe: Optional[GradientProbe] = None
        self._search: Optional[OptimizerSearch] = None
        self._looks_left = _LOOKS
        if model is not None:
            self._begin(list(model.parameters()))

    @property
    def active(self) -> bool:
        """Whether there is anything to look at on every step."""
        return self._probe is not None

    def optimizer(self) -> Any:
        """The optimizer, given or found; None while there is none."""
        found = self._optimizer()
        if found is None and self._search is not None:
            found = self._search.optimizer()
            if found is not None:
                self._optimizer = _reference(found)
                if self._probe is not None:
                    self._probe.watch(found)
        return found

    def scaler(self) -> Any:
        """The GradScaler, given or found; None while there is none."""
        return self._scaler() if self._probe is None else self._probe.scaler()

    def fill(self, loss: Any, columns: Dict[str, Any]) -> None:
        """Adds what is known beyond ``columns``; values may be tensors that nobody has waited
        for.
        """
        if self._probe is None and self._looks_left > 0 and is_tensor(loss):
            _default(columns, "grad_norm", self._look(loss))
        probe = self._probe
        if probe is not None:
            if not probe.is_attached and loaded_torch() is not None:
                probe.attach()
            norm = probe.take()
            found = probe.signals
            _default(columns, "grad_norm", norm)
            _default(columns, "loss_scale", found.loss_scale)
            _default(columns, "grad_l1_norm", found.grad_l1_norm)
            _default(columns, "grad_l2_norm", found.grad_l2_norm)
            _default(columns, "update_norm", found.update_norm)
        if columns.get("current_lr") is None:
            optimizer = self.optimizer()
            if optimizer is not None:
                # Under a cap the schedule's rate lies in the groups, and the cap's is in force.
                capped = self._cap.current(optimizer) if self._cap.is_active else None
                _default(columns, "current_lr", capped)
                _default(columns, "current_lr", learning_rate_of(optimizer))

    def close(self) -> None:
        """Removes every hook."""
        if self._probe is not None:
            self._probe.detach()
        if self._search is not None:
            self._search.close()
        self._looks_left = 0

    def _look(self, loss: Any) -> Any:
        """Finds the parameters; the gradient norm, where this step's gradients still lie there."""
        self._looks_left -= 1
        parameters = parameters_of(loss)
        return self._begin(list(parameters)).direct() if parameters else None

    def _begin(self, parameters: Any) -> GradientProbe:
        probe = self._probe = GradientProbe(parameters, faults=self._faults)
        probe.attach()
        probe.use_scaler(self._scaler())
        optimizer = self._optimizer()
        if optimizer is not None:
            probe.watch(optimizer)
        else:
            self._search = find_optimizer(parameters)
        return probe


def _default(columns: Dict[str, Any], name: str, value: Any) -> None:
    if value is not None and columns.get(name) is None:
        columns[name] = value


def _reference(thing: Any) -> Callable[[], Any]:
    """A weak reference where there can be one, else a plain one."""
    if thing is None:
        return lambda: None
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing
