"""One event a step, of a log that writes its metrics one by one or in rows with gaps."""

from __future__ import annotations

from typing import Dict, Iterable, Iterator, Optional

from plarv_schemas.events import StepEvent

__all__ = ["settle"]

_VALUES = tuple(range(StepEvent._fields.index("loss"), StepEvent._fields.index("parts")))
_EPOCH, _TIME = StepEvent._fields.index("epoch"), StepEvent._fields.index("time_ns")


def settle(events: Iterable[StepEvent]) -> Iterator[StepEvent]:
    """The events of one session with those of the same step joined, in their order.

    Only where a metric goes back behind its own last step the run began again, and the steps go
    back with it. A metric that is merely behind the others (an evaluation that counts epochs, a
    value written late) belongs to the step that the run has reached. Events without a value are
    left out. O(1) an event.

    >>> def at(step, **values):
    ...     return StepEvent("run", "s", 0, 0, step, **values)
    >>> log = [at(8, loss=2.0), at(9, loss=1.5), at(1, val_loss=3.0), at(8, loss=2.0)]
    >>> [(each.step, each.loss, each.val_loss) for each in settle(log)]
    [(8, 2.0, None), (9, 1.5, 3.0), (8, 2.0, None)]
    """
    held: Optional[StepEvent] = None
    seen: Dict[int, int] = {}  # place of a value -> its last own step
    reached = 0
    for event in events:
        present = [place for place in _VALUES if event[place] is not None]
        if not present:
            continue
        if any(event.step < seen.get(place, event.step) for place in present):
            seen.clear()
            reached = event.step
        reached = max(reached, event.step) if seen else event.step
        for place in present:
            seen[place] = event.step
        if event.step != reached:
            event = event._replace(step=reached)
        joined = None if held is None else _join(held, event)
        if joined is None and held is not None:
            yield held
        held = joined or event
    if held is not None:
        yield held


def _join(first: StepEvent, second: StepEvent) -> Optional[StepEvent]:
    """Both in one; None: they are of different steps, or both have the same value."""
    if first.step != second.step:
        return None
    fields = list(first)
    for place in _VALUES:
        if second[place] is None:
            continue
        if fields[place] is not None:
            return None
        fields[place] = second[place]
    for place in (_EPOCH, _TIME):
        if fields[place] is None:
            fields[place] = second[place]
    return StepEvent._make(fields)
