"""The losses that a Hugging Face Trainer computes, before it averages, rounds or masks them."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Dict, Optional

from plarv.faults import Guard
from plarv.tensors import is_tensor, loaded_torch

__all__ = ["TrainerLoss", "calling_trainer"]

_MOST_FRAMES = 12  # from the callback up to the Trainer there are two
_ABSENT = object()


class TrainerLoss:
    """Sums what ``trainer.training_step()`` returns over the micro-batches of an optimizer step.

    The Trainer divides each by the number of micro-batches or of tokens, so their sum is the step's
    loss. A callback only gets what the Trainer logs: with ``logging_nan_inf_filter`` a NaN is gone
    by then. Two methods are wrapped on the instance until ``detach()``; a result and an exception
    pass unchanged, and ``failed`` hears of the exception. Never waits for a device.
    """

    def __init__(self, trainer: Any, failed: Callable[[BaseException], None]) -> None:
        self._trainer = trainer
        self._failed = failed
        self._sum: Any = None
        self._before: Dict[str, Any] = {}
        self._ours: Dict[str, Any] = {}
        self._guard = Guard("the Trainer's loss could not be read")
        self._wrap("training_step", self._add)
        self._wrap("_run_epoch", None)  # from transformers 5 on; it sees all that can go wrong

    def take(self) -> Any:
        """The sum since the last call: a 0-d tensor, a number, or None where there was nothing."""
        total, self._sum = self._sum, None
        return total

    def detach(self) -> None:
        """Leaves the Trainer as it was, where nobody else has wrapped it since."""
        attributes: Dict[str, Any] = self._trainer.__dict__
        for name, ours in self._ours.items():
            if attributes.get(name) is ours:
                if self._before[name] is _ABSENT:
                    delattr(self._trainer, name)
                else:
                    setattr(self._trainer, name, self._before[name])
        self._ours = {}
        self._sum = None

    def _wrap(self, name: str, seen: Optional[Callable[[Any], None]]) -> None:
        method: Any = getattr(self._trainer, name, None)
        if not callable(method):
            return

        @functools.wraps(method)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            try:
                result: Any = method(*arguments, **named)
            except BaseException as error:
                if name in self._ours:
                    self._failed(error)
                raise
            if seen is not None and name in self._ours:
                seen(result)
            return result

        self._before[name] = self._trainer.__dict__.get(name, _ABSENT)
        self._ours[name] = wrapped
        setattr(self._trainer, name, wrapped)

    def _add(self, loss: Any) -> None:
        with self._guard:
            if is_tensor(loss):
                loss = loss.detach().float()
            torch = loaded_torch()
            if self._sum is None or torch is None:
                self._sum = loss
            else:
                with torch.no_grad():
                    self._sum = self._sum + loss


def calling_trainer() -> Optional[Any]:
    """The Trainer that is calling its callbacks: it hands them all it has but itself."""
    frame = inspect.currentframe()
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return None
        owner: Any = frame.f_locals.get("self")
        if hasattr(owner, "callback_handler") and hasattr(owner, "training_step"):
            return owner
        frame = frame.f_back
    return None
