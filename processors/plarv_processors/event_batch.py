"""Events of one run that came in one message, with what placing them at once takes to know."""

from __future__ import annotations

from typing import List, Sequence, Tuple

from plarv_schemas.events import Event, StepEvent

__all__ = ["EventBatch"]


class EventBatch:
    """One or more events of one run, in the log's order.

    ``is_plain``: they are steps of one session of a run of one rank, records ascending and steps
    not going back, so that a fold may place all of them as it places the first. ``steps`` are the
    events then, and empty otherwise.
    """

    __slots__ = (
        "run_id", "events", "steps", "is_plain", "session", "first_record", "last_record",
        "first_step", "last_step",
    )  # fmt: skip

    def __init__(self, events: Sequence[Event]) -> None:
        """``events`` holds at least one."""
        first, last = events[0], events[-1]
        self.run_id = first.run_id
        self.events: Tuple[Event, ...] = tuple(events)
        self.session = first.session
        self.first_record, self.last_record = first.record, last.record
        self.first_step = self.last_step = 0
        self.steps = _plain_steps(events)
        self.is_plain = bool(self.steps)
        if self.steps:
            self.first_step, self.last_step = self.steps[0].step, self.steps[-1].step


def _plain_steps(events: Sequence[Event]) -> Tuple[StepEvent, ...]:
    session, record, step = events[0].session, -1, -1
    steps: List[StepEvent] = []
    for event in events:
        if not isinstance(event, StepEvent):
            return ()
        world_size = event.world_size
        if event.session != session or (world_size is not None and world_size > 1):
            return ()
        if event.record <= record or event.step < step:
            return ()
        record, step = event.record, event.step
        steps.append(event)
    return tuple(steps)
