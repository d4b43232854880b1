"""Whole logs of runs, as the journal would give them: what an engine folds."""

from __future__ import annotations

from typing import Any, List, Optional

from tests.processors.streams import FAULTY, HEALTHY

from plarv_schemas.events import ControlEvent, Event, StepEvent

__all__ = ["log_of", "names"]

names = [*HEALTHY, *FAULTY]


def log_of(name: str, steps: Optional[int] = None, mode: str = "AUTO") -> List[Event]:
    """The log of the stream ``name`` (of its own length, if none is given): a session for each
    rank, begun and ended by control events."""
    make: Any = HEALTHY.get(name) or FAULTY[name][1]
    events: List[StepEvent] = make() if steps is None else make(steps=steps)
    ranks = max([len(event.parts) for event in events] + [1])
    log: List[Event] = []
    records = [0] * ranks

    def add(rank: int, event: Event) -> None:
        log.append(event._replace(session=f"session-{rank}", record=records[rank]))
        records[rank] += 1

    for rank in range(ranks):
        data = {"mode": mode, "world_size": ranks}
        add(rank, ControlEvent("run", "", 0, rank, "session_started", data=data))
    for number, event in enumerate(events):
        for part in event.parts or (event,):
            add(part.rank, part._replace(world_size=ranks))
        if number == len(events) // 2:
            add(0, ControlEvent("run", "", 0, None, "order", data={"order": "resume"}))
    for rank in range(ranks):
        add(
            rank, ControlEvent("run", "", 0, rank, "session_finished", data={"status": "completed"})
        )
    return log
