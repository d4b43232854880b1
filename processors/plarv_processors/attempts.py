"""Which events count, and to which attempt of the run they belong: a function of the log alone."""

from __future__ import annotations

from typing import Dict, List, Optional, Tuple

from plarv_processors.event_batch import EventBatch
from plarv_schemas.events import ControlEvent, Event

__all__ = ["ENDINGS", "Attempts"]

ENDINGS = frozenset({"session_finished", "rank_silent"})
"""Kinds of control events by which an attempt may have ended."""

_MAX_SESSIONS = 4096  # of one run; the oldest are forgotten past that

# What is kept of a session, in a plain list: it is read on every event.
_RECORD, _ATTEMPT, _STEP, _RANK, _FIRST, _ENDED = range(6)


class Attempts:
    """Finds duplicates by (session, record), and the attempt of every event.

    The next attempt is opened by a new session of a rank that had one in this attempt, by a session
    of another restart of the launcher, by a ``recovered`` event, and by a step that goes back. The
    other ranks join it when the same happens to them. What an earlier attempt still sends is
    accepted but stale: it has a place in the log and no say in what follows.

    Cost: O(1) an event; some 100 bytes a session.
    """

    __slots__ = ("current", "_sessions", "_steps_seen", "_restart")

    def __init__(self) -> None:
        self.current = 0
        self._sessions: Dict[str, List[int]] = {}
        self._steps_seen = False  # in the current attempt
        self._restart: Optional[int] = None  # of the launcher, in the current attempt

    def place(self, event: Event) -> Optional[int]:
        """The attempt of ``event``, from 1; None: its key was seen before."""
        known = self._sessions.get(event.session)
        if known is None:
            known = self._enter(event)
        elif event.record <= known[_RECORD]:
            return None
        known[_RECORD] = event.record
        if isinstance(event, ControlEvent):
            if event.kind == "recovered":
                self._go_on(known, event.record)
            elif event.kind == "session_finished":
                known[_ENDED] = 1
            elif event.kind == "rank_silent":
                self._end(event)
            return known[_ATTEMPT]
        if event.step < known[_STEP]:
            self._go_on(known, event.record)
        known[_STEP] = event.step
        known[_ENDED] = 0
        self._steps_seen = True
        return known[_ATTEMPT]

    def place_all(self, batch: EventBatch) -> Optional[int]:
        """The attempt of all events of a batch at once; None: they must be placed one by one."""
        if not batch.is_plain:
            return None
        records = (batch.first_record, batch.last_record)
        return self.place_span(batch.session, records, (batch.first_step, batch.last_step))

    def place_span(
        self, session: str, records: Tuple[int, int], steps: Tuple[int, int]
    ) -> Optional[int]:
        """The attempt of steps of one session whose records ascend from the first to the last, and
        whose steps do not go back; None: they must be placed one by one.
        """
        known = self._sessions.get(session)
        if known is None or records[0] <= known[_RECORD] or steps[0] < known[_STEP]:
            return None
        known[_RECORD], known[_STEP], known[_ENDED] = records[1], steps[1], 0
        self._steps_seen = True
        return known[_ATTEMPT]

    @property
    def ended(self) -> bool:
        """Whether every session of the current attempt has finished, or has long been silent."""
        ranks = [
            known[_ENDED]
            for known in self._sessions.values()
            if known[_ATTEMPT] == self.current and known[_RANK] >= 0
        ]
        return bool(ranks) and all(ranks)

    def sessions(self) -> Tuple[Tuple[str, int], ...]:
        """(session, first record) of each rank in the current attempt, by rank."""
        ranks = [
            (known[_RANK], name, known[_FIRST])
            for name, known in self._sessions.items()
            if known[_ATTEMPT] == self.current and known[_RANK] >= 0
        ]
        return tuple((name, first) for _, name, first in sorted(ranks))

    def open_sessions(self) -> Tuple[Tuple[str, int, int], ...]:
        """(session, rank, last record) of the current attempt's sessions that have not ended."""
        return tuple(
            (name, known[_RANK], known[_RECORD])
            for name, known in self._sessions.items()
            if known[_ATTEMPT] == self.current and known[_RANK] >= 0 and not known[_ENDED]
        )

    def of(self, session: str) -> int:
        """The attempt that the session's last event belongs to; 0: a session not seen, or
        forgotten.
        """
        known = self._sessions.get(session)
        return 0 if known is None else known[_ATTEMPT]

    def _end(self, event: ControlEvent) -> None:
        """A session that a ``rank_silent`` event names has ended, unless it goes on."""
        silent = self._sessions.get(str(event.data.get("session", "")))
        if silent is not None:
            silent[_ENDED] = 1

    def _enter(self, event: Event) -> List[int]:
        """A session's first event."""
        rank = -1 if event.rank is None else event.rank
        restart: Optional[int] = None
        if isinstance(event, ControlEvent) and event.kind == "session_started":
            value = event.data.get("restart_count")
            restart = value if isinstance(value, int) else None
        if self.current == 0:
            self.current = 1
            self._restart = restart
        elif rank >= 0 and self._is_next(rank, restart):
            self._open_next(restart)
        known = [-1, self.current, -1, rank, event.record, 0]
        if len(self._sessions) >= _MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[event.session] = known
        return known

    def _is_next(self, rank: int, restart: Optional[int]) -> bool:
        if not self._steps_seen:
            return False
        if restart is not None and self._restart is not None and restart != self._restart:
            return True
        return any(
            known[_RANK] == rank and known[_ATTEMPT] == self.current
            for known in self._sessions.values()
        )

    def _open_next(self, restart: Optional[int]) -> None:
        self.current += 1
        self._steps_seen = False
        self._restart = restart

    def _go_on(self, known: List[int], record: int) -> None:
        """The session goes back: into the current attempt if it lags, else into a new one."""
        if known[_ATTEMPT] == self.current:
            self._open_next(self._restart)
        known[_ATTEMPT] = self.current
        known[_FIRST] = record
        known[_STEP] = -1
