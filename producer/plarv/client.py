"""Argus: the object beside the training loop."""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Sequence, Type, Union

from plarv import lifecycle, settings
from plarv.columns import MAX_STEP, step_number
from plarv.decision import CONTINUE, Decision
from plarv.exceptions import ArgusError, ArgusHalt, ArgusIntervention, ArgusPause
from plarv.parameters import check_arguments
from plarv.session import Session, open_session
from plarv_schemas.journal import CORE, CORE_SIZE, HAS_GRAD_NORM, HAS_LOSS

if TYPE_CHECKING:
    from plarv.checkpoints.ring import Recovery

__all__ = ["Argus"]

# CORE_STRUCT with its first four fields as one word, made once: three numbers fewer to pack.
_pack_core = struct.Struct("<QqqdddQ").pack_into
_HEAD_LOSS = int.from_bytes(struct.pack("<IBBH", CORE_SIZE, CORE, HAS_LOSS, 0), "little")
_HEAD_BOTH = int.from_bytes(
    struct.pack("<IBBH", CORE_SIZE, CORE, HAS_LOSS | HAS_GRAD_NORM, 0), "little"
)
_clock_ns = time.monotonic_ns
_NAN = float("nan")  # an absent learning rate, in a core record


class Argus:
    """Watches one training run from inside its loop.

    Every ``step()`` is written to a journal under ``ARGUS_DIR`` (``./.argus``); the embedded engine
    reads it on a thread, and ``step()`` returns the newest decision it has reached. In MANUAL mode
    Argus only reports. In AUTO mode it lowers the learning rate and raises ``ArgusPause`` or
    ``ArgusHalt`` out of ``step()``, which raises nothing else. ArgusConfigurationError: a wrong
    argument. ArgusPause from the constructor: the run was paused and not resumed.

    All arguments are optional; see the README for each. ``ARGUS_DISABLED=1`` makes it do nothing.

    >>> with Argus(silent=True) as argus:
    ...     decision = argus.step(2.5, grad_norm=1.0)
    >>> decision.action, decision.harm_pressure
    ('CONTINUE', 0.0)
    """

    _session: Optional[Session]
    _writer: Any  # a JournalWriter, or what stands in its place
    _lr_group: Optional[Mapping[str, Any]]

    def __init__(
        self,
        api_key: Optional[str] = None,
        run_id: Optional[str] = None,
        model: Any = None,
        optimizer: Any = None,
        tokenizer: Any = None,
        mode: Optional[str] = None,
        sequence_length: Optional[int] = None,
        vocab_size: Optional[int] = None,
        num_layers: Optional[int] = None,
        hidden_dim: Optional[int] = None,
        dtype: Any = None,
        checkpoint_dir: Union[str, Path, None] = None,
        silent: Optional[bool] = None,
        fail_open: bool = False,
        catch_exceptions: bool = True,
        step0_timeout: float = 12.0,
        on_pause: Optional[Callable[..., object]] = None,
        *,
        url: Optional[str] = None,
        brokers: Union[str, Sequence[str], None] = None,
        dataloader: Any = None,
        total_steps: Optional[int] = None,
        start_step: int = 0,
        project: Optional[str] = None,
        accept_operator: bool = False,
        scheduler: Any = None,
        scaler: Any = None,
        run_key: Optional[str] = None,
        raise_checkpoint: bool = False,
    ) -> None:
        given = dict(locals())
        del given["self"]
        self._disarm()
        self._catch = catch_exceptions is not False
        if settings.flag("ARGUS_DISABLED"):
            return
        check_arguments(given)
        self._next_step = int(start_step)
        session = self._session = open_session(given, self._hear, self._follow_rate)
        if session is None:
            return
        self._writer = session.writer
        lifecycle.watch(self)

    def step(
        self,
        loss: Any,
        grad_norm: Any = None,
        # By name, please, all of these. They are not keyword-only because CPython then looks up
        # every default in a dict: a fifth of a step's time, more where caches are cold.
        step: Optional[int] = None,
        local_report: Any = None,
        perplexity: Any = None,
        sample_ids: Any = None,
        sample_losses: Any = None,
        sample_confidences: Any = None,
        sample_margins: Any = None,
        sample_entropies: Any = None,
        sample_correct: Any = None,
        forward_ms: Any = None,
        backward_ms: Any = None,
        grad_l1_norm: Any = None,
        grad_l2_norm: Any = None,
        epoch: Any = None,
        update_norm: Any = None,
        val_loss: Any = None,
        current_lr: Any = None,
        batch_size: Any = None,
        loss_scale: Any = None,
    ) -> Decision:
        """Reports one optimizer step; returns the newest decision that the engine has reached.

        ``loss`` is a number, a numpy scalar or a tensor with one element, on any device; it is
        never waited for. Steps count from ``start_step`` where ``step`` is not given. ``grad_norm``
        is the L2 norm before clipping; left out, it is measured where a model is known. Timings are
        in milliseconds, ``sample_*`` hold one value a sample.

        Raises ArgusPause, ArgusHalt and ArgusCheckpoint, where opted in; nothing else unless
        ``catch_exceptions=False``. Bad values are left out and counted.
        """
        # The short way, in one piece: numbers only, nothing to apply, room in the segment.
        writer = self._writer
        position = writer.position
        if (
            type(loss) is float and position < writer.limit
            and local_report is None and perplexity is None and sample_ids is None
            and sample_losses is None and sample_confidences is None and sample_margins is None
            and sample_entropies is None and sample_correct is None and forward_ms is None
            and backward_ms is None and grad_l1_norm is None and grad_l2_norm is None
            and epoch is None and update_norm is None and val_loss is None and current_lr is None
            and batch_size is None and loss_scale is None
        ):  # fmt: skip
            try:
                if type(grad_norm) is float:
                    head = _HEAD_BOTH
                elif grad_norm is None:
                    head, grad_norm = _HEAD_LOSS, 0.0
                else:
                    head = 0
                number = self._next_step
                if step is not None:
                    number = step
                    if type(step) is not int or step < 0:
                        head = 0
                if head:
                    group = self._lr_group
                    record = writer.record + 1
                    _pack_core(
                        writer.buffer, position, head, _clock_ns(), number,
                        loss, grad_norm, _NAN if group is None else group["lr"], record,
                    )  # fmt: skip
                    writer.position = position + CORE_SIZE
                    writer.record = record
                    self._next_step = number + 1
                    return self._decision
            except (struct.error, TypeError, KeyError):  # an odd step or learning rate
                pass
            except BaseException:  # from a signal's handler, between two of these lines
                writer.settle()
                raise
        return self._step(
            loss, grad_norm, step, local_report,
            {
                "perplexity": perplexity, "sample_ids": sample_ids, "sample_losses": sample_losses,
                "sample_confidences": sample_confidences, "sample_margins": sample_margins,
                "sample_entropies": sample_entropies, "sample_correct": sample_correct,
                "forward_ms": forward_ms, "backward_ms": backward_ms, "grad_l1_norm": grad_l1_norm,
                "grad_l2_norm": grad_l2_norm, "epoch": epoch, "update_norm": update_norm,
                "val_loss": val_loss, "current_lr": current_lr, "batch_size": batch_size,
                "loss_scale": loss_scale,
            },
        )  # fmt: skip

    def complete(self, status: str = "completed") -> None:
        """Ends the run: folds what is left, within ``ARGUS_SHUTDOWN_TIMEOUT``, and says what
        happened.

        Harmless when called twice. ``status`` is kept with the run: completed, failed, stopped, …
        """
        self._complete(str(status), None)

    def recover(self, step: Optional[int] = None) -> Optional[Recovery]:
        """Puts model, optimizer, scheduler and random numbers back to a checkpoint of
        ``checkpoint_dir``, and opens the run's next attempt.

        To the one of ``anchor_point.json``: the last certified before the last collapse, or the
        newest certified; where none is certified, to the newest. ``step`` names another. What it
        went back to, or None where there is no checkpoint. Steps go on behind it.

        ArgusError: it does not fit this model, or cannot be read; nothing has changed then.
        """
        session = self._session
        if session is None:
            return None
        found = session.recover(step)
        self._go_on_behind(session)
        return found

    @property
    def run_id(self) -> str:
        """The run's id; '' where Argus is disabled."""
        return self._session.run_id if self._session else ""

    @property
    def run_dir(self) -> Optional[Path]:
        """The run's folder; None where Argus is disabled."""
        return self._session.folder if self._session else None

    @property
    def decision(self) -> Decision:
        """The newest decision, without a step."""
        return self._decision

    def __enter__(self) -> Argus:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if kind is None:
            self._complete("completed", None)
        elif issubclass(kind, ArgusPause):
            self._complete("paused", kind.__name__)
        elif issubclass(kind, ArgusHalt):
            self._complete("halted", kind.__name__)
        else:
            self._complete("failed", kind.__name__)

    def __reduce__(self) -> Any:
        """A copy in another process (a DataLoader's worker) is inert: one process reports a run."""
        return (_inert, ())

    def _step(
        self, loss: Any, grad_norm: Any, step: Any, local_report: Any, given: Mapping[str, Any]
    ) -> Decision:
        """The long way: whatever is not plain numbers, and whatever there is to apply."""
        session = self._session
        if session is None:
            return CONTINUE
        number = min(self._next_step, MAX_STEP)
        try:
            if step is not None:
                wanted = step_number(step)
                if wanted is None:
                    session.problem("step was no whole number from 0 on", self._catch)
                else:
                    number = wanted
            self._next_step = number + 1
            session.record(loss, grad_norm, number, given, local_report, self._catch)
            if session.late == 1:
                lifecycle.watch(self)  # to say at the exit how many
            session.intervene(number)
            self._go_on_behind(session)
        except ArgusIntervention:
            raise
        except Exception as error:  # the one place where our errors end
            if not self._catch:
                raise error if isinstance(error, ArgusError) else ArgusError(str(error)) from error
            session.faults.count("step() failed", error)
        except BaseException:  # Ctrl-C
            session.writer.settle()
            raise
        return self._decision

    def _go_on_behind(self, session: Session) -> None:
        """Counts on from the checkpoint that the training went back to, if it did."""
        if session.resume_at is not None:
            self._next_step, session.resume_at = session.resume_at, None

    def _hear(self, decision: Decision) -> None:
        """The transport's thread has a newer decision."""
        self._decision = decision

    def _follow_rate(self, group: Optional[Mapping[str, Any]]) -> None:
        """The parameter group that holds the learning rate is now this one."""
        self._lr_group = group

    def _complete(
        self, status: str, exception: Optional[str], begun: Optional[float] = None
    ) -> None:
        session = self._session
        if session is not None:
            lifecycle.forget(self)
            session.close(status, exception, begun)

    def _at_exit(self, begun: float) -> None:
        """The interpreter goes: an uncaught exception is the run's end."""
        error = getattr(sys, "last_type", None)
        name = error.__name__ if error else None
        self._complete("failed" if error else "exited", name, begun)

    def _after_fork(self) -> None:
        """In a forked child: the run stays the parent's."""
        session = self._session
        self._disarm()
        if session is not None:
            session.abandon()

    def _disarm(self) -> None:
        """Inert: no run, nothing to write to."""
        self._catch = True
        self._next_step = 0
        self._session = None
        self._writer = lifecycle.CLOSED
        self._decision = CONTINUE
        self._lr_group = None


def _inert() -> Argus:
    argus = Argus.__new__(Argus)
    argus._disarm()  # pyright: ignore[reportPrivateUsage] - it is ours
    return argus
