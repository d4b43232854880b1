"""A detector called again over what a store kept, up to one place in the log."""

from __future__ import annotations

from collections import deque
from typing import Any, Deque, Iterable, List, NamedTuple, Set, Tuple, Type, cast

from plarv_processors.detector_fold import DetectorFold
from plarv_processors.detectors.detector import Detector, Scope
from plarv_processors.event_batch import EventBatch
from plarv_schemas.events import LIST_COLUMNS, SCALAR_COLUMNS, Event, StepEvent, Verdict

__all__ = ["Refold", "refold"]

_MAX_SEEN = 1024  # events that are kept of what the detector was handed
_COLUMNS = SCALAR_COLUMNS + LIST_COLUMNS
_READABLE = frozenset((*_COLUMNS, "parts"))


class Refold(NamedTuple):
    """What a detector says and saw when the stored events are folded again."""

    verdicts: Tuple[Verdict, ...]  # all until then, with the ordinals that the store gives
    seen: Tuple[StepEvent, ...]  # the last that it was handed, of all ranks joined where it asks so
    read: Tuple[str, ...]  # the columns that it looked at, in wire order
    by_rank: bool  # whether it looked at the ranks' own events, too
    num_events: int
    missing: int  # events that the log must have had before, and the store does not have
    fault: str  # what the detector raised; empty: nothing


def refold(detector: Type[Detector], events: Iterable[Tuple[int, Event]], upto: int) -> Refold:
    """Folds the events, each with its ordinal, up to and with that of ordinal ``upto``.

    Cost: that of the detector and about 5 us an event.
    """
    seen: Deque[StepEvent] = deque(maxlen=_MAX_SEEN)
    read: Set[str] = set()
    fold = DetectorFold(_witnessed(detector, seen, read))
    verdicts: List[Verdict] = []
    num_events = missing = 0
    expected = 0
    for ordinal, event in events:
        if ordinal > upto:
            break
        missing += max(0, ordinal - expected)
        expected = ordinal + 1
        num_events += 1
        for found in fold.fold(EventBatch((event,))):
            verdicts.append(found._replace(ordinal=ordinal))
    missing += max(0, upto + 1 - expected)
    columns = tuple(name for name in _COLUMNS if name in read)
    by_rank = "parts" in read
    return Refold(tuple(verdicts), tuple(seen), columns, by_rank, num_events, missing, fold.fault)


def _witnessed(detector: Type[Detector], seen: Deque[StepEvent], read: Set[str]) -> Type[Detector]:
    """A class like ``detector`` that notes what it is handed and what it reads of it."""
    watched = _watched(read)

    class Witnessed:
        name = detector.name
        scope: Scope = detector.scope

        def __init__(self) -> None:
            self._detector = detector()
            self.version = self._detector.version
            seen.clear()  # a new attempt begins: what was before is no part of its past

        def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
            seen.append(event)
            parts = tuple([watched(*part) for part in event[-1]])
            return self._detector.update(watched(*event[:-1], parts))

    return cast("Type[Detector]", Witnessed)


def _watched(read: Set[str]) -> Type[StepEvent]:
    """Steps that note in ``read`` which of their columns are looked at."""

    class Watched(StepEvent):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            if name in _READABLE:
                read.add(name)
            return super().__getattribute__(name)

    return Watched
