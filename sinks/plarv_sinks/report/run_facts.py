"""What a report needs of a run's events, folded in one pass with bounded memory."""

from __future__ import annotations

from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Tuple

from plarv_processors.attempts import Attempts
from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_sinks.report.envelope import Envelope

__all__ = ["SERIES", "AttemptCurves", "RankCurves", "RunFacts"]

SERIES: Tuple[Tuple[str, str], ...] = (
    ("loss", "Loss"),
    ("val_loss", "Validation loss"),
    ("grad_norm", "Gradient norm"),
    ("current_lr", "Learning rate"),
    ("update_norm", "Update norm"),
    ("step_time_ms", "Step time, ms"),
)
"""(column, title) of the charts, in their order."""

_RANK_SERIES = ("loss", "step_time_ms", "forward_ms", "grad_norm")
_BUCKETS, _RANK_BUCKETS = 480, 96
_MAX_ATTEMPTS = 8  # drawn: the first and the newest
_MAX_RANKS = 64  # kept apart; further ones are only counted
_MAX_CONTROLS = 400  # kept from each end


class AttemptCurves:
    """The curves of one attempt, over all ranks."""

    __slots__ = ("attempt", "first_step", "last_step", "curves", "status", "exception")

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.first_step = -1
        self.last_step = -1
        self.curves: Dict[str, Envelope] = {name: Envelope(_BUCKETS) for name, _ in SERIES}
        self.status: Optional[str] = None
        self.exception: Optional[str] = None


class RankCurves:
    """One rank in the newest attempt."""

    __slots__ = ("rank", "num_steps", "last_step", "num_lost", "curves", "last")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.num_steps = 0
        self.last_step = -1
        self.num_lost = 0  # losses that were not finite
        self.curves = {name: Envelope(_RANK_BUCKETS) for name in _RANK_SERIES}
        self.last: Dict[str, float] = {}


class RunFacts:
    """Takes a run's events in the log's order; the fields say what there was.

    Args:
        ordinal: of the first event; not 0 where old segments of a journal were removed.
        wanted: ordinals whose times are kept.
    """

    def __init__(self, ordinal: int = 0, wanted: FrozenSet[int] = frozenset()) -> None:
        self._next = ordinal
        self._wanted = wanted
        self.times: Dict[int, int] = {}  # wanted ordinal -> UTC nanoseconds
        self.run_id: Optional[str] = None
        self.started: Mapping[str, Any] = {}  # what the first session said of itself
        self.num_events = 0
        self.num_steps = 0  # of one rank, of all attempts
        self.world_size = 1
        self.first_ns: Optional[int] = None
        self.last_ns: Optional[int] = None
        self.attempts: Dict[int, AttemptCurves] = {}
        self.ranks: Dict[int, RankCurves] = {}
        self.ranks_of = 0  # the attempt that `ranks` are of
        self.num_other_ranks = 0  # events of ranks past those kept
        self.first_loss: Optional[float] = None
        self.best_loss: Optional[Tuple[float, int]] = None  # loss, step
        self.last_loss: Optional[float] = None
        self.num_samples = 0  # by batch_size
        self.saved: List[Tuple[int, int, str]] = []  # attempt, step, name of checkpoints
        self.controls: List[Tuple[int, int, ControlEvent]] = []  # (ordinal, attempt, event)
        self.num_controls = 0
        self._place = Attempts()

    @property
    def newest(self) -> Optional[AttemptCurves]:
        """The newest attempt that has steps."""
        return self.attempts[max(self.attempts)] if self.attempts else None

    def add(self, event: Event) -> None:
        """Takes one event; a duplicate changes nothing."""
        attempt = self._place.place(event)
        if attempt is None:
            return
        ordinal = self._next
        self._next += 1
        self.num_events += 1
        if self.run_id is None:
            self.run_id = event.run_id
        if event.time_ns is not None:
            if ordinal in self._wanted:
                self.times[ordinal] = event.time_ns
            if self.first_ns is None:
                self.first_ns = event.time_ns
            self.last_ns = max(event.time_ns, self.last_ns or event.time_ns)
        if isinstance(event, ControlEvent):
            self._control(event, ordinal, attempt)
        elif attempt == self._place.current:
            self._step(event, attempt)

    def _step(self, event: StepEvent, attempt: int) -> None:
        curves = self.attempts.get(attempt)
        if curves is None:
            curves = self._begin(attempt)
        step = event.step
        if curves.first_step < 0:
            curves.first_step = step
        curves.last_step = max(curves.last_step, step)
        if event.world_size is not None:
            self.world_size = event.world_size
        for name, curve in curves.curves.items():
            value = getattr(event, name)
            if value is not None:
                curve.add(step, value)
        if event.loss is not None:
            self._loss(event.loss, step)
        self.num_samples += event.batch_size or 0
        if attempt == self.ranks_of:
            self._rank(event)

    def _begin(self, attempt: int) -> AttemptCurves:
        if len(self.attempts) >= _MAX_ATTEMPTS:
            del self.attempts[sorted(self.attempts)[1]]
        self.attempts[attempt] = AttemptCurves(attempt)
        self.ranks, self.ranks_of, self.num_other_ranks = {}, attempt, 0
        return self.attempts[attempt]

    def _loss(self, loss: float, step: int) -> None:
        if self.first_loss is None:
            self.first_loss = loss
        self.last_loss = loss
        if loss - loss == 0.0 and (self.best_loss is None or loss < self.best_loss[0]):
            self.best_loss = (loss, step)

    def _rank(self, event: StepEvent) -> None:
        rank = self.ranks.get(event.rank)
        if rank is None:
            if len(self.ranks) >= _MAX_RANKS:
                self.num_other_ranks += 1
                return
            rank = self.ranks[event.rank] = RankCurves(event.rank)
        if event.step != rank.last_step:
            rank.num_steps += 1
            if event.rank == next(iter(self.ranks)):  # the first one seen counts for all
                self.num_steps += 1
        rank.last_step = event.step
        for name, curve in rank.curves.items():
            value = getattr(event, name)
            if value is None:
                continue
            if self.world_size > 1:
                curve.add(event.step, value)
            if value - value == 0.0:
                rank.last[name] = value
            elif name == "loss":
                rank.num_lost += 1

    def _control(self, event: ControlEvent, ordinal: int, attempt: int) -> None:
        self.num_controls += 1
        self.controls.append((ordinal, attempt, event))
        if len(self.controls) > 2 * _MAX_CONTROLS:
            del self.controls[_MAX_CONTROLS]
        if event.kind == "session_started" and not self.started:
            self.started = event.data
        elif event.kind == "session_finished" and attempt in self.attempts:
            curves = self.attempts[attempt]
            status = str(event.data.get("status") or "finished")
            if curves.status in (None, "completed"):  # a rank that failed says more than the rest
                curves.status = status
                exception = event.data.get("exception")
                curves.exception = None if exception is None else str(exception)
        elif event.kind == "checkpoint_saved" and event.step is not None:
            name = str(event.data.get("name", event.data.get("path", "")))
            self.saved.append((attempt, event.step, name))
            del self.saved[: -2 * _MAX_CONTROLS]
