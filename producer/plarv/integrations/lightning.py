"""Argus in PyTorch Lightning, as ``lightning`` or as ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import math
import sys
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Protocol

from plarv.client import Argus
from plarv.exceptions import ArgusIntervention
from plarv.faults import Guard
from plarv.integrations.callback_run import CallbackRun
from plarv.tensors import is_tensor, loaded_torch

__all__ = ["ArgusLightningCallback", "LightningHooks"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_TRAIN = ("train_loss", "loss", "train/loss", "train_loss_step")
_VALIDATION = ("val_loss", "valid_loss", "validation_loss", "val/loss", "valid/loss")
_DTYPES = {"bf16": "bfloat16", "16": "float16", "64": "float64", "32": "float32"}


class _Trainer(Protocol):
    global_step: int  # optimizer steps made, of all optimizers
    current_epoch: int
    should_stop: bool
    sanity_checking: bool
    is_global_zero: bool
    accumulate_grad_batches: int
    precision: Any
    estimated_stepping_batches: Any
    optimizers: List[Any]
    lr_scheduler_configs: List[Any]
    train_dataloader: Any
    callback_metrics: Mapping[str, Any]


class LightningHooks:
    """``Trainer(callbacks=[ArgusLightningCallback()])``: watched, a step an optimizer step.

    Arguments are those of ``Argus``, by name; model, optimizer, scheduler, dtype and length are
    taken from the Trainer. The loss is what ``training_step`` returned, the mean over gradient
    accumulation; where it returns none, as manual optimization may, the logged metric
    ``train_metric`` (else the first there is of train_loss, loss, train/loss). ``val_metric`` (else
    val_loss, valid_loss, validation_loss, val/loss) is the val_loss; the sanity check is not
    reported. A batch in which several optimizers step, as a GAN's, is one step. With several ranks
    rank 0 reports its own loss, the others that they made the step.

    In AUTO, a pause sets ``trainer.should_stop`` and ``intervention`` says why; Lightning goes on
    until its ``min_steps`` and ``min_epochs``, where it was given any. ArgusConfigurationError: a
    wrong setting, at once. ArgusPause out of ``fit()``, before the first step: the run was paused
    and nobody resumed it.
    """

    def __init__(
        self,
        api_key: Optional[str] = None,
        *,
        train_metric: Optional[str] = None,
        val_metric: Optional[str] = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._run = CallbackRun({"api_key": api_key, **settings})
        self._train_names = (train_metric,) if train_metric else _TRAIN
        self._val_names = (val_metric,) if val_metric else _VALIDATION
        self._next = 0
        self._made = 0  # the Trainer's optimizer steps at the latest report
        self._losses: List[Any] = []  # of the micro-batches since

    @property
    def argus(self) -> Optional[Argus]:
        """The run's Argus while the Trainer fits, else None."""
        return self._run.argus

    @property
    def intervention(self) -> Optional[ArgusIntervention]:
        """The pause or halt that stopped the latest training; None where it was not stopped."""
        return self._run.intervention

    def on_train_start(self, trainer: _Trainer, pl_module: Any) -> None:
        """Opens the run."""
        if not self._run.enabled:
            return
        self._next = self._made = trainer.global_step
        self._losses = []
        found = _found(trainer, pl_module)
        self._run.begin(found, owner=trainer.is_global_zero, resumed=trainer.global_step > 0)

    def on_train_batch_end(
        self, trainer: _Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reports a step, where this batch was the last one of it."""
        if not self._run.active:
            return
        loss: Any = outputs.get("loss") if hasattr(outputs, "get") else outputs
        if is_tensor(loss):
            self._losses.append(loss.detach())
        if trainer.global_step == self._made:
            return
        self._made = trainer.global_step
        loss = self._mean_loss(trainer, pl_module)
        if loss is None:
            loss = _metric(trainer, self._train_names)
        number, self._next = self._next, self._next + 1
        if self._run.step(number, loss, {"epoch": trainer.current_epoch}):
            self._stop(trainer)

    def on_validation_end(self, trainer: _Trainer, pl_module: Any) -> None:
        """The validation's loss, within a training."""
        if not self._run.active or trainer.sanity_checking:
            return
        val_loss = _metric(trainer, self._val_names)
        if self._run.validated(max(0, self._next - 1), val_loss, trainer.current_epoch):
            self._stop(trainer)

    def on_train_end(self, trainer: _Trainer, pl_module: Any) -> None:
        """Ends the run."""
        self._run.end()

    def on_exception(self, trainer: _Trainer, pl_module: Any, exception: BaseException) -> None:
        """Ends the run as failed."""
        self._run.fail(exception)

    def _mean_loss(self, trainer: _Trainer, pl_module: Any) -> Any:
        """Of the micro-batches: the Trainer has divided each by their number, a user has not."""
        losses, self._losses = self._losses, []
        torch = loaded_torch()
        if not losses or torch is None:
            return None
        with Guard("the loss could not be averaged"), torch.no_grad():
            mean = torch.stack([loss.float().mean() for loss in losses]).mean()
            if getattr(pl_module, "automatic_optimization", True):
                mean = mean * trainer.accumulate_grad_batches
            return mean
        return None

    def _stop(self, trainer: _Trainer) -> None:
        if not trainer.should_stop:
            text = f"{self._run.intervention}: the Trainer stops"
            self._run.say(text, here=trainer.is_global_zero)
        trainer.should_stop = True


if TYPE_CHECKING:
    ArgusLightningCallback = LightningHooks


def __getattr__(name: str) -> Any:
    """``ArgusLightningCallback``: these hooks as a Callback of the Lightning that is there."""
    if name != "ArgusLightningCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    about = {"__module__": __name__, "__doc__": LightningHooks.__doc__}
    made = type(name, (LightningHooks, _callback_class()), about)
    globals()[name] = made
    return made


def _callback_class() -> Any:
    """The Callback of the package that the script has imported, else of one that is installed."""
    for package in sorted(_PACKAGES, key=lambda package: package not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ImportError:
            continue
    raise ImportError("ArgusLightningCallback needs Lightning: pip install lightning")


def _found(trainer: _Trainer, pl_module: Any) -> Dict[str, Any]:
    """What the Trainer knows of its training, as arguments of ``Argus``."""
    optimizer = next(iter(trainer.optimizers), None)
    scheduling = next(iter(trainer.lr_scheduler_configs), None)
    scheduler = getattr(scheduling, "scheduler", None)
    precision = str(trainer.precision).partition("-")[0]
    found: Dict[str, Any] = {
        "model": pl_module,
        "optimizer": optimizer if hasattr(optimizer, "param_groups") else None,
        "scheduler": scheduler if hasattr(scheduler, "step") else None,
        "dtype": _DTYPES.get(precision),
        "start_step": trainer.global_step,
    }
    if hasattr(trainer.train_dataloader, "batch_size"):
        found["dataloader"] = trainer.train_dataloader
    with Guard("the number of steps could not be told"):
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps) and steps > 0:
            found["total_steps"] = int(steps)
    return found


def _metric(trainer: _Trainer, names: Any) -> Any:
    """The first of these that was logged."""
    metrics = trainer.callback_metrics
    return next((metrics[name] for name in names if name in metrics), None)
