"""Packs events into messages: one step a message while the link keeps up, many where it does not.

While nothing is on its way, an event goes out at once, if 8 ms have passed since the last one did,
or 25 ms where more than two wait: a message costs the brokers and the workers as much as 30 steps
in one, and a loop so quick shares its machine with whoever sends. While a message is on its
way, what arrives meanwhile waits for its acknowledgement and goes out together: so a message holds
what one round trip brings, and the packing follows the link as it is measured, with nothing to set.
"""

from __future__ import annotations

from collections import deque
from typing import Deque, List, NamedTuple, Optional, Tuple

from plarv_schemas.events import ControlEvent, Event, StepEvent

__all__ = ["Limits", "Packer", "approximate_bytes"]

_LISTS = StepEvent._fields.index("sample_ids")
_REST = StepEvent._fields.index("parts")
_STEP_BYTES = 96  # of a step's scalars in a batch, at most
_TEXT_BYTES = 24  # of a layer's name
_FEW = 2
_WEIGHT = 0.2  # of the newest round trip in their mean


class Limits(NamedTuple):
    """When a message is full, and how much may be on its way."""

    events: int = 512
    age_s: float = 0.25
    interval_s: float = 0.008  # between two messages that are not full ...
    quick_interval_s: float = 0.025  # ... where a quick loop makes more than two events in that
    size_bytes: int = 448 * 1024  # estimated: the message itself stays under 512 KiB
    unacknowledged: int = 8  # messages


class Packer:
    """The events that wait, and which of them go out together.

    The caller gives the time, so a test needs no clock. Cost: O(1) an event; memory for at most
    ``limits.events`` events and one more read, see :attr:`room`.

    >>> packer = Packer()
    >>> event = ControlEvent("run", "0" * 16, 0, None, "order")
    >>> packer.add(event, 0.0)
    >>> len(packer.take(0.0))  # nothing is on its way: at once
    1
    >>> packer.add(event, 0.01)
    >>> len(packer.take(0.01)), len(packer.take(0.27))  # one is: together with what comes
    (0, 1)
    """

    __slots__ = ("limits", "round_trip_s", "_waiting", "_bytes", "_sent", "_last")

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - immutable
        self.limits = limits
        self.round_trip_s: Optional[float] = None  # a mean that follows; None: none yet
        self._waiting: Deque[Tuple[Event, int, float]] = deque()  # event, bytes, when it came
        self._bytes = 0
        self._sent: Deque[float] = deque()  # when each unacknowledged message went out
        self._last = -float("inf")  # when the newest one did

    @property
    def room(self) -> int:
        """How many more events should be read: none while a message's worth waits."""
        if self._bytes >= self.limits.size_bytes:
            return 0
        return max(0, self.limits.events - len(self._waiting))

    @property
    def waiting(self) -> int:
        """Events that wait."""
        return len(self._waiting)

    @property
    def unacknowledged(self) -> int:
        """Messages on their way."""
        return len(self._sent)

    def oldest_s(self, now: float) -> float:
        """Seconds since the oldest unacknowledged message went out; 0: there is none."""
        return now - self._sent[0] if self._sent else 0.0

    def add(self, event: Event, now: float) -> None:
        """Takes in an event that arrived."""
        size = approximate_bytes(event)
        self._waiting.append((event, size, now))
        self._bytes += size

    def take(self, now: float) -> List[Event]:
        """The events of the next message, which goes out now; none: it is not time yet."""
        limits, waiting = self.limits, self._waiting
        if not waiting or len(self._sent) >= limits.unacknowledged:
            return []
        is_full = len(waiting) >= limits.events or self._bytes >= limits.size_bytes
        if not is_full:
            wait = now - waiting[0][2] < limits.age_s if self._sent else False
            is_quick = len(waiting) > _FEW
            interval_s = limits.quick_interval_s if is_quick else limits.interval_s
            if wait or now - self._last < interval_s:
                return []
        events: List[Event] = []
        size = 0
        while waiting and len(events) < limits.events:
            if events and size + waiting[0][1] > limits.size_bytes:
                break
            event, own, _ = waiting.popleft()
            events.append(event)
            size += own
        self._bytes -= size
        self._sent.append(now)
        self._last = now
        return events

    def acknowledged(self, now: float) -> None:
        """The oldest message on its way has arrived."""
        trip = now - self._sent.popleft()
        before = self.round_trip_s
        self.round_trip_s = trip if before is None else before + _WEIGHT * (trip - before)

    def clear(self) -> None:
        """Forgets what waits and what is on its way: it is read again."""
        self._waiting.clear()
        self._sent.clear()
        self._bytes = 0
        self._last = -float("inf")


def approximate_bytes(event: Event) -> int:
    """About how much an event takes in a message; rather too much."""
    if isinstance(event, ControlEvent):
        return 256 + len(repr(event.data))
    size = _STEP_BYTES
    for values in event[_LISTS:_REST]:
        if isinstance(values, tuple):
            size += 8 * len(values)
            if values and isinstance(values[0], str):
                size += sum(_TEXT_BYTES + len(text) for text in values if isinstance(text, str))
    return size
