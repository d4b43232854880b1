"""What a store says of each run: a row in its list of runs, and what it takes to go on writing."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Optional, Tuple

from plarv_processors.attempts import Attempts
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import ControlEvent, Event, StepEvent

__all__ = ["RunProgress", "RunRow"]


class RunRow(NamedTuple):
    """One run, as far as the store has it. Fields as the columns of the table ``runs``."""

    run_id: str
    project: Optional[str]
    status: Optional[str]  # it ended with; None: it did not say
    attempt: int  # the newest
    num_events: int  # accepted; the next one's ordinal
    num_steps: int  # events of steps, of all ranks
    world_size: Optional[int]
    first_time_ns: Optional[int]  # UTC
    last_time_ns: Optional[int]
    last_step: Optional[int]
    last_loss: Optional[float]
    started: Optional[str]  # JSON: what the first session said of itself
    state: Optional[bytes]  # of the fold that finds duplicates; see RunProgress


class RunProgress:
    """Which events of a run a store has: places each next one, and counts.

    Cost: O(1) an event; about 1 KB a run.

    >>> progress = RunProgress("run")
    >>> [progress.place(StepEvent("run", "a", record, 0, record)) for record in (0, 1, 1, 2)]
    [0, 1, None, 2]
    """

    __slots__ = (
        "run_id", "project", "status", "num_events", "num_steps", "world_size", "first_time_ns",
        "last_time_ns", "last_step", "last_loss", "started", "attempts",
    )  # fmt: skip

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.project: Optional[str] = None
        self.status: Optional[str] = None
        self.num_events = 0
        self.num_steps = 0
        self.world_size: Optional[int] = None
        self.first_time_ns: Optional[int] = None
        self.last_time_ns: Optional[int] = None
        self.last_step: Optional[int] = None
        self.last_loss: Optional[float] = None
        self.started: Optional[str] = None
        self.attempts = Attempts()

    def place(self, event: Event) -> Optional[int]:
        """The event's ordinal; None: it was there before."""
        if self.attempts.place(event) is None:
            return None
        ordinal = self.num_events
        self.num_events += 1
        if isinstance(event, ControlEvent):
            self._control(event)
            self.at(event.time_ns, event.time_ns)
        else:
            self.stepped(1, event)
        return ordinal

    def place_span(
        self, session: str, records: Tuple[int, int], steps: Tuple[int, int], number: int
    ) -> Optional[Tuple[int, int]]:
        """The attempt and the first ordinal of ``number`` steps, placed all at once; None: they
        must be placed one by one. See :meth:`Attempts.place_span`.
        """
        attempt = self.attempts.place_span(session, records, steps)
        if attempt is None:
            return None
        ordinal = self.num_events
        self.num_events += number
        return attempt, ordinal

    def stepped(self, number: int, last: StepEvent, first_time_ns: Optional[int] = None) -> None:
        """Counts ``number`` placed steps, of which ``last`` is the newest."""
        self.num_steps += number
        self.last_step = last.step
        if last.loss is not None:
            self.last_loss = last.loss
        if last.world_size is not None:
            self.world_size = last.world_size
        self.status = None
        self.at(first_time_ns or last.time_ns, last.time_ns)

    def at(self, first_ns: Optional[int], last_ns: Optional[int]) -> None:
        """Notes when something happened, from when to when."""
        if self.first_time_ns is None:
            self.first_time_ns = first_ns
        self.last_time_ns = last_ns if last_ns is not None else self.last_time_ns

    def row(self) -> RunRow:
        """As the store keeps it."""
        return RunRow(
            self.run_id,
            self.project,
            self.status,
            self.attempts.current,
            self.num_events,
            self.num_steps,
            self.world_size,
            self.first_time_ns,
            self.last_time_ns,
            self.last_step,
            self.last_loss,
            self.started,
            pack(dump(self.attempts)),
        )

    @classmethod
    def of(cls, row: RunRow) -> RunProgress:
        """The inverse of :meth:`row`. ValueError: its state is of another version."""
        progress = cls(row.run_id)
        for name, value in zip(RunRow._fields, row):
            if name not in ("run_id", "attempt", "state"):
                setattr(progress, name, value)
        if row.state is not None:
            restore(progress.attempts, unpack(row.state))
        return progress

    def _control(self, event: ControlEvent) -> None:
        data = event.data
        if event.kind == "session_started":
            self.status = None
            self.project = _text(data.get("project")) or self.project
            if self.started is None:
                self.started = json.dumps(dict(data), separators=(",", ":"))
            world_size = data.get("world_size")
            if type(world_size) is int and 0 < world_size < 1 << 31:
                self.world_size = world_size
        elif event.kind == "session_finished" and self.attempts.ended:
            self.status = _text(data.get("status")) or "finished"
        elif event.kind == "rank_silent" and self.attempts.ended:
            self.status = "silent"


def _text(value: Any) -> Optional[str]:
    return value if isinstance(value, str) and value else None
