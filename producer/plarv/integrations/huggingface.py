"""Argus in the Hugging Face Trainer, and in whatever is built on it (TRL, Unsloth, Axolotl)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Protocol

from plarv.client import Argus
from plarv.exceptions import ArgusIntervention, ArgusPause
from plarv.faults import Guard
from plarv.integrations.callback_run import CallbackRun
from plarv.integrations.trainer_loss import TrainerLoss, calling_trainer

__all__ = ["ArgusCallback", "TrainerHooks"]


class _State(Protocol):
    global_step: int  # optimizer steps made
    max_steps: int
    epoch: Optional[float]
    logging_steps: int
    is_world_process_zero: bool


class _Control(Protocol):
    should_training_stop: bool
    should_save: bool


class TrainerHooks:
    """``Trainer(callbacks=[ArgusCallback()])``: the training is watched, a step an optimizer step.

    Arguments are those of ``Argus``, by name; model, optimizer, scheduler, tokenizer, dtype and
    length are taken from the Trainer. It sets ``logging_steps=1`` and says so, for then the Trainer
    tells the loss and the gradient norm of every step; the loss itself is taken from
    ``training_step()``, summed over gradient accumulation, where NaN is still NaN. With several
    ranks it is the logged mean of all of them, and only rank 0 reports it; the others report that
    they made the step. ``eval_loss`` (or the first ``eval_*_loss`` seen) is the val_loss.

    In AUTO, a pause stops the Trainer after the step, as its own early stopping does: no exception,
    ``train()`` returns, and ``intervention`` says why. A checkpoint is saved first if
    ``save_on_pause`` and the Trainer saves any, unless ``save_total_limit=1``: then it would cost
    the only earlier one. After ``argus resume RUN``, go on with ``resume_from_checkpoint`` and the
    same ``run_id``. ArgusConfigurationError: a wrong setting, at once. ArgusPause out of
    ``train()``, before the first step: the run was paused and nobody resumed it.
    """

    def __init__(
        self, api_key: Optional[str] = None, *, save_on_pause: bool = True, **settings: Any
    ) -> None:
        self._run = CallbackRun({"api_key": api_key, **settings})
        self._save_on_pause = save_on_pause
        self._loss: Optional[TrainerLoss] = None
        self._step: Optional[int] = None  # made, and not reported yet
        self._true_loss: Any = None
        self._val_name: Optional[str] = None
        self._told = False

    @property
    def argus(self) -> Optional[Argus]:
        """The run's Argus while the Trainer trains, else None."""
        return self._run.argus

    @property
    def intervention(self) -> Optional[ArgusIntervention]:
        """The pause or halt that stopped the latest training; None where it was not stopped."""
        return self._run.intervention

    def on_init_end(self, args: Any, state: _State, control: _Control, **_: Any) -> None:
        """Before a checkpoint's arguments are compared with these."""
        self._log_every_step(args, state)

    def on_train_begin(self, args: Any, state: _State, control: _Control, **parts: Any) -> None:
        """Opens the run."""
        if not self._run.enabled:
            return
        self._log_every_step(args, state)
        self._leave_trainer()
        self._step = self._val_name = None
        found = _found(args, state, parts)
        owner = state.is_world_process_zero
        self._run.begin(found, owner=owner, resumed=state.global_step > 0)
        with Guard("the Trainer could not be found"):
            trainer = calling_trainer()
            if trainer is not None and owner:
                self._loss = TrainerLoss(trainer, self._failed)

    def on_step_begin(self, args: Any, state: _State, control: _Control, **_: Any) -> None:
        """A step that the Trainer did not log is reported without what the log would have told."""
        self._report(args, state, control, {})

    def on_step_end(self, args: Any, state: _State, control: _Control, **_: Any) -> None:
        """A step is made; its gradient norm comes with the log, which follows at once."""
        if self._run.active:
            self._step = state.global_step - 1
            self._true_loss = None if self._loss is None else self._loss.take()

    def on_log(
        self,
        args: Any,
        state: _State,
        control: _Control,
        logs: Optional[Mapping[str, Any]] = None,
        **_: Any,
    ) -> None:
        """Reports the step, once the log of its training loss is there."""
        if logs is not None and "loss" in logs:
            self._report(args, state, control, logs)

    def on_evaluate(
        self,
        args: Any,
        state: _State,
        control: _Control,
        metrics: Optional[Mapping[str, Any]] = None,
        **_: Any,
    ) -> None:
        """The evaluation's loss; one outside of a training is nobody's."""
        if self._val_name is None or self._val_name not in (metrics or {}):
            names = [name for name in metrics or {} if name.endswith("_loss")]
            self._val_name = self._val_name or ("eval_loss" if "eval_loss" in names else None)
            self._val_name = self._val_name or next(iter(names), None)
        val_loss = (metrics or {}).get(self._val_name or "")
        number = max(0, state.global_step - 1)
        if self._run.validated(number, val_loss, state.epoch):
            self._stop(args, control)

    def on_epoch_end(self, args: Any, state: _State, control: _Control, **_: Any) -> None:
        """The epoch's last step, where it was not logged."""
        self._report(args, state, control, {})

    def on_train_end(self, args: Any, state: _State, control: _Control, **_: Any) -> None:
        """Ends the run."""
        self._report(args, state, control, {})
        self._leave_trainer()
        self._run.end()

    def __getstate__(self) -> Dict[str, Any]:
        """A copy, in another process too, reports nothing until it is given a training."""
        return {**self.__dict__, "_loss": None, "_true_loss": None, "_step": None}

    def __getattr__(self, name: str) -> Any:
        """Events that this class has nothing to do at, those of later Trainers too."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(name)

    def _report(self, args: Any, state: _State, control: _Control, logs: Mapping[str, Any]) -> None:
        number, self._step = self._step, None
        if number is None:
            return
        loss, self._true_loss = self._true_loss, None
        logged = logs.get("loss")
        # On several ranks ours is that of one rank. Its NaN counts though the mean has masked it.
        if loss is None or (_world_size(args) > 1 and logged is not None and _is_finite(loss)):
            loss = logged
        columns: Dict[str, Any] = {
            "grad_norm": logs.get("grad_norm"),
            "current_lr": logs.get("learning_rate"),
            "epoch": state.epoch,
            "batch_size": _batch_size(args),
        }
        if self._run.step(number, loss, columns):
            self._stop(args, control)

    def _stop(self, args: Any, control: _Control) -> None:
        """The Trainer ends after this step, by its own means."""
        stop = self._run.intervention
        if not control.should_training_stop:
            self._run.say(f"{stop}: the Trainer stops", here=args.process_index == 0)
        control.should_training_stop = True
        saves = getattr(args.save_strategy, "value", args.save_strategy) != "no"
        if self._save_on_pause and saves and args.save_total_limit != 1:
            control.should_save = control.should_save or isinstance(stop, ArgusPause)

    def _log_every_step(self, args: Any, state: _State) -> None:
        if not self._run.enabled:
            return
        strategy = args.logging_strategy
        if getattr(strategy, "value", strategy) != "steps" or args.logging_steps != 1:
            args.logging_strategy = type(strategy)("steps")
            args.logging_steps = 1
            if not self._told:
                self._told = True
                text = "logging_steps is now 1: the Trainer tells its loss where it logs"
                self._run.say(text, here=args.process_index == 0)
        state.logging_steps = 1

    def _leave_trainer(self) -> None:
        if self._loss is not None:
            self._loss.detach()
            self._loss = None

    def _failed(self, error: BaseException) -> None:
        self._leave_trainer()
        self._run.fail(error)


if TYPE_CHECKING:
    ArgusCallback = TrainerHooks


def __getattr__(name: str) -> Any:
    """``ArgusCallback``: these hooks as a TrainerCallback, made where transformers is needed."""
    if name != "ArgusCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from transformers.trainer_callback import TrainerCallback
    except ImportError as error:
        raise ImportError("ArgusCallback needs transformers: pip install transformers") from error
    base: Any = TrainerCallback
    about = {"__module__": __name__, "__doc__": TrainerHooks.__doc__}
    made = globals()["ArgusCallback"] = type("ArgusCallback", (TrainerHooks, base), about)
    return made


def _nothing(*_: object, **__: object) -> None:
    """What is done at all other events."""


def _found(args: Any, state: _State, parts: Mapping[str, Any]) -> Dict[str, Any]:
    """What the Trainer knows of its training, as arguments of ``Argus``."""
    optimizer = parts.get("optimizer")
    if type(optimizer).__module__.startswith("accelerate"):
        optimizer = getattr(optimizer, "optimizer", optimizer)  # the wrapper has no hooks
    length = getattr(args, "max_length", None) or getattr(args, "max_seq_length", None)  # TRL's
    half = "float16" if getattr(args, "fp16", False) else None
    model, scheduler = parts.get("model"), parts.get("lr_scheduler")
    return {
        "model": model if hasattr(model, "parameters") else None,
        "optimizer": optimizer if hasattr(optimizer, "param_groups") else None,
        "scheduler": scheduler if hasattr(scheduler, "step") else None,
        "tokenizer": parts.get("processing_class") or parts.get("tokenizer"),
        "dtype": "bfloat16" if getattr(args, "bf16", False) else half,
        "sequence_length": length if type(length) is int and length > 0 else None,
        "total_steps": state.max_steps if state.max_steps > 0 else None,
        "start_step": state.global_step,
    }


def _batch_size(args: Any) -> Optional[int]:
    """Samples of an optimizer step on all ranks; the last one of an epoch may have fewer."""
    try:
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
    except (AttributeError, TypeError):
        return None


def _world_size(args: Any) -> int:
    return int(getattr(args, "world_size", 1))


def _is_finite(loss: Any) -> bool:
    """Waits for nothing: the Trainer has just read the same sum to log it."""
    return math.isfinite(float(loss))
