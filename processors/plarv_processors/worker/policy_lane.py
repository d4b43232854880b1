"""What the policy keeps of a partition: its runs, verdicts that wait, how far detectors are."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Deque, Dict, List, Mapping, Sequence, Tuple

from plarv_processors.policy_fold import PolicyFold
from plarv_processors.worker.lane import Lane
from plarv_schemas.events import Verdict
from plarv_schemas.messages import LeftOut, Watermark

__all__ = ["PolicyLane"]


class PolicyLane(Lane[PolicyFold]):
    """A message of the log is folded once every awaited detector has passed it."""

    def __init__(
        self, name: str, partition: int, make: Any, awaited: Sequence[Tuple[str, str]]
    ) -> None:
        super().__init__(name, partition, make)
        self._places = {detector: at for at, (detector, _) in enumerate(awaited)}
        self._versions = [version for _, version in awaited]
        self.received = 0  # offset of the first message that did not come yet
        self.backlog: Deque[Any] = deque()  # came, and waits for the detectors
        self.wake = asyncio.Event()  # something came, or a watermark moved
        self.room = asyncio.Event()
        self.verdicts_next = 0  # position in the verdicts topic
        self.orders_next = 0  # and in the orders topic
        self.watermarks: Dict[str, int] = {}  # detector version -> first offset it has not folded
        self._pending: Dict[int, Dict[str, Tuple[Verdict, int]]] = {}  # by offset, then id
        self._left_out: Dict[int, List[LeftOut]] = {}  # by offset

    def watermark(self) -> int:
        """The first offset that not every awaited detector has folded."""
        get = self.watermarks.get
        return min((get(version, 0) for version in self._versions), default=1 << 62)

    def unheard(self) -> List[str]:
        """The awaited versions that have never told how far they are."""
        return [version for version in self._versions if version not in self.watermarks]

    def take_watermark(self, watermark: Watermark) -> None:
        """Detectors have read on; positions never go back."""
        for version, following in watermark.next.items():
            if following > self.watermarks.get(version, 0):
                self.watermarks[version] = following
        for note in watermark.left_out:
            if note.partition == self.partition and note.offset >= self.next:
                notes = self._left_out.setdefault(note.offset, [])
                if note not in notes:
                    notes.append(note)
        self.wake.set()

    def take_verdict(self, verdict: Verdict, offset: int, position: int) -> None:
        """A verdict about the message at ``offset``; ``position``: its own in its topic."""
        if offset >= self.next and verdict.detector in self._places:
            self._pending.setdefault(offset, {}).setdefault(verdict.id, (verdict, position))

    def verdicts_at(self, offset: int) -> Mapping[int, List[Verdict]]:
        """The verdicts about a message, by ordinal, as the policy hears them."""
        found: Dict[int, List[Verdict]] = {}
        for verdict, _ in self._pending.get(offset, {}).values():
            found.setdefault(verdict.ordinal, []).append(verdict)
        for verdicts in found.values():
            verdicts.sort(key=lambda verdict: self._places[verdict.detector])
        return found

    def left_out_at(self, offset: int) -> Sequence[LeftOut]:
        """The detectors that hung on the message."""
        return self._left_out.get(offset, ())

    def done(self, offset: int) -> None:
        """The message is folded, and its actions are out."""
        self.next = offset + 1
        self._pending.pop(offset, None)
        self._left_out.pop(offset, None)

    def positions(self) -> Tuple[Any, ...]:
        """What a marker keeps: from where to read verdicts and orders, and the watermarks."""
        waiting = [position for found in self._pending.values() for _, position in found.values()]
        begin = min([self.verdicts_next, *waiting])
        return (begin, self.orders_next, dict(self.watermarks))
