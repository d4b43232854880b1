"""Who has not been heard of for long: somebody looks at the clock once, and writes it down."""

from __future__ import annotations

import time
from typing import Dict, Iterator, List, Tuple

from plarv_processors.event_batch import EventBatch
from plarv_schemas.events import ControlEvent, digest

__all__ = ["Silence"]


class Silence:
    """Sessions that are open, with when they were last heard and their last record."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._open: Dict[Tuple[int, str], Dict[str, Tuple[float, int, int]]] = {}

    def note(self, partition: int, batch: EventBatch) -> None:
        """Events of a run were folded."""
        last = batch.events[-1]
        if batch.is_plain:
            self.heard(partition, batch.run_id, last.session, last.rank or 0, last.record)
            return
        for event in batch.events:
            if isinstance(event, ControlEvent):
                if event.kind == "session_finished":
                    self._finished(partition, batch.run_id, event.session)
                    continue
                if event.rank is None:  # no session of a training process
                    continue
            self.heard(partition, batch.run_id, event.session, event.rank or 0, event.record)

    def heard(self, partition: int, run_id: str, session: str, rank: int, record: int) -> None:
        """A session gave a sign of life."""
        sessions = self._open.setdefault((partition, run_id), {})
        sessions[session] = (time.monotonic(), rank, record)

    def forget(self, partition: int) -> None:
        """The partition is another worker's now."""
        for place in [place for place in self._open if place[0] == partition]:
            del self._open[place]

    def overdue(self, now: float) -> Iterator[Tuple[int, ControlEvent]]:
        """(partition, event) for each session that has been silent too long; each told once."""
        found: List[Tuple[int, ControlEvent]] = []
        for (partition, run_id), sessions in list(self._open.items()):
            for session, (at, rank, record) in list(sessions.items()):
                if now - at >= self._after_s:
                    found.append((partition, _event(run_id, session, rank, record)))
                    self._finished(partition, run_id, session)
        return iter(found)

    def _finished(self, partition: int, run_id: str, session: str) -> None:
        sessions = self._open.get((partition, run_id))
        if sessions is not None:
            sessions.pop(session, None)
            if not sessions:
                del self._open[partition, run_id]


def _event(run_id: str, session: str, rank: int, record: int) -> ControlEvent:
    return ControlEvent(
        run_id=run_id,
        session=digest("rank_silent", run_id, session, record),
        record=0,
        rank=None,
        kind="rank_silent",
        time_ns=time.time_ns(),
        data={"session": session, "rank": rank},
    )
