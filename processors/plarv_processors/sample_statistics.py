"""Bounded statistics over the samples of batches: which batch was seen, where the margins lie."""

from __future__ import annotations

import math
import struct
import zlib
from bisect import bisect_right
from typing import List, NamedTuple, Optional, Sequence, Tuple

from plarv_processors.windows import RobustWindow

__all__ = [
    "BatchMemory",
    "Concentration",
    "LossShares",
    "MarginHeaps",
    "checksum",
    "finite",
    "signed_confidences",
    "total",
]

_KEY_BYTES = 4
_READ = 8  # samples of a batch that its checksum reads, up to twice as many


def checksum(
    ids: Optional[Sequence[int]], losses: Optional[Sequence[float]], rank: int
) -> Optional[bytes]:
    """Four bytes for what ``rank`` was served: ids in order, else the bits of the losses.

    Of a batch of 16 or more only 8 to 15 samples are read, evenly spread. None where they say
    nothing: fewer than two, or losses that are all equal (0.0 is common in policy gradients) or not
    finite. The same on every Python version.
    """
    try:
        if ids:
            if len(ids) < 2:
                return None
            read = ids[:: max(1, len(ids) // _READ)]
            data = struct.pack(f"<{len(read)}q", *read)
        else:
            some = (losses or ())[:: max(1, len(losses or ()) // _READ)]
            if len(some) < 2 or total(some) is None or min(some) == max(some):
                return None
            data = struct.pack(f"<{len(some)}d", *some)
    except struct.error:  # an id beyond 64 bits
        return None
    return zlib.crc32(data, rank).to_bytes(_KEY_BYTES, "little")


def total(values: Sequence[float]) -> Optional[float]:
    """The exactly rounded sum, None where a value or the sum is not finite."""
    try:
        result = math.fsum(values)
    except (OverflowError, ValueError):  # a partial sum beyond a double, or inf - inf
        return None
    return result if result - result == 0.0 else None


def finite(values: Sequence[float]) -> Sequence[float]:
    """``values`` without NaN and Inf.

    >>> finite((1.0, math.nan, 2.0))
    [1.0, 2.0]
    """
    return [value for value in values if value - value == 0.0]


def signed_confidences(
    confidences: Optional[Sequence[float]], correct: Optional[Sequence[int]]
) -> Sequence[float]:
    """A margin for each sample where only the confidence and whether it was right are known.

    ``2 c - 1`` if right, ``1 - 2 c`` if wrong, 0 up to a confidence of a half, which decides
    nothing. A NaN stays one.

    >>> signed_confidences((0.9, 0.9, 0.3), (1, 0, 0))
    [0.8, -0.8, 0.0]
    """
    if not confidences or not correct:
        return ()
    return [
        0.0 if c <= 0.5 else (c + c - 1.0 if right else 1.0 - c - c)
        for c, right in zip(confidences, correct)
    ]


class BatchMemory:
    """Checksums of the last ``horizon`` batches, and how often one of them comes back.

    Memory: 4 bytes x horizon. Time: one search of these bytes.

    >>> memory = BatchMemory(horizon=8)
    >>> for key in (b"aaaa", b"bbbb", b"bbbb", b"bbbb", b"aaaa"):
    ...     print(memory.add(key), memory.repeats(near=1, most=16))
    False (1, 1)
    False (1, 1)
    True (2, 2)
    True (3, 3)
    True (2, 1)
    """

    __slots__ = ("_past", "_bytes", "distinct", "streak", "long")

    def __init__(self, horizon: int) -> None:
        self._past = b""  # oldest first
        self._bytes = _KEY_BYTES * horizon
        self.distinct = 0  # batches that were new when they came
        self.streak = 0  # in a row
        self.long = False  # whether the data is known to be longer than the horizon

    def add(self, key: bytes) -> bool:
        """Takes a batch in; whether it came within the horizon before."""
        past = self._past
        self._past = (past + key)[-self._bytes :]
        if key in past and _last(past, key, len(past)) >= 0:
            self.streak = 0
            return True
        self.distinct += 1
        self.streak = streak = self.streak + 1
        if streak * _KEY_BYTES >= self._bytes:
            self.long = True
        return False

    def repeats(self, near: int, most: int) -> Tuple[int, int]:
        """How often the last batch came within the horizon, and how often of these in a row.

        It is in a row while it is found again within ``near`` batches. Counts up to ``most``.
        """
        past = self._past
        after = len(past) - _KEY_BYTES
        key = past[after:]
        times = in_row = 1
        unbroken = True
        place = _last(past, key, after)
        while place >= 0 and times < most:
            times += 1
            unbroken = unbroken and after - place <= near * _KEY_BYTES
            in_row += unbroken
            after = place
            place = _last(past, key, place)
        return times, in_row


def _last(past: bytes, key: bytes, end: int) -> int:
    """The place of the last whole ``key`` before ``end``, -1 where there is none."""
    place = past.rfind(key, 0, end)
    while place > 0 and place % _KEY_BYTES:  # the end of one key and the start of the next
        place = past.rfind(key, 0, place + _KEY_BYTES - 1)
    return place


class MarginHeaps:
    """Whether margins form two heaps: the learned samples and the confidently wrong ones.

    With T = half the median positive margin of a pool, ``far`` counts the samples in (-3T, -T] and
    ``near`` those in (-T, T]: two ranges of the same width. One heap with its peak right of -T
    gives far <= near, however wide and skewed it is. Counts are decayed by 0.8 a pool.

    >>> heaps = MarginHeaps()
    >>> for _ in range(5):
    ...     heaps.add([-2.1, -2.0, -1.9] + [1.8 + 0.01 * i for i in range(40)])
    >>> heaps.far > 2 * heaps.near, heaps.learned
    (True, True)
    """

    __slots__ = ("far", "near", "samples", "learned")

    def __init__(self) -> None:
        self.far = 0.0
        self.near = 0.0
        self.samples = 0.0
        self.learned = False  # most samples of the last pool are right

    def add(self, ordered: List[float]) -> None:
        """Takes in the sorted, finite margins of one pool."""
        size = len(ordered)
        wrong = bisect_right(ordered, 0.0)
        self.learned = 2 * wrong < size
        far = near = 0
        if self.learned and ordered[0] != ordered[-1]:
            half = 0.5 * ordered[(wrong + size) // 2]
            low = bisect_right(ordered, -half)
            far = low - bisect_right(ordered, -3.0 * half)
            near = bisect_right(ordered, half) - low
        self.far = 0.8 * self.far + far
        self.near = 0.8 * self.near + near
        self.samples = 0.8 * self.samples + size

    @property
    def z(self) -> float:
        """Standard deviations by which the far count exceeds the near one, were both Poisson."""
        both = self.far + self.near
        return (self.far - self.near) / math.sqrt(both) if both > 0.0 else 0.0


class Concentration(NamedTuple):
    """How a batch's loss is spread. Excess is what a loss has above the batch's smallest."""

    log_ratio: float  # of the largest excess to the sum of all but the largest tenth
    z: float  # robust standard deviations above the batches before
    share: float  # of the excess, held by the largest tenth of the samples
    excess: float  # the largest
    record: float  # the largest excess of the batches before, slowly forgotten
    largest: float
    smallest: float


class LossShares:
    """Whether a few samples carry a batch's loss, against the batches before.

    Memory: 32 doubles. Time: one sort of the losses a batch.

    >>> shares = LossShares(floor=0.25)
    >>> for _ in range(20):
    ...     usual = shares.read([0.1 * i for i in range(32)])
    ...     shares.accept(usual)
    >>> odd = shares.read([0.1 * i for i in range(31)] + [90.0])
    >>> round(usual.share, 2), round(odd.share, 2), odd.z > 8.0, odd.excess > 2.0 * odd.record
    (0.18, 0.7, True, True)
    """

    __slots__ = ("_ratios", "_floor", "_record", "alarm")

    _WINDOW = 32  # batches
    _FADE = 0.995  # of the record, a batch

    def __init__(self, floor: float) -> None:
        self._ratios = RobustWindow(self._WINDOW)  # log ratios
        self._floor = floor
        self._record = 0.0
        self.alarm = -math.inf  # a batch with no loss above it is hardly one to be read

    @property
    def count(self) -> int:
        """Batches taken in."""
        return self._ratios.count

    @property
    def filling(self) -> bool:
        """Whether the window still wants every batch."""
        return not self._ratios.full

    @property
    def usual(self) -> float:
        """The median ratio of the batches before."""
        return math.exp(self._ratios.median)

    def read(self, losses: Sequence[float], least: int = 2) -> Optional[Concentration]:
        """How these losses are spread; non-finite ones are left out.

        None where fewer than ``least`` are left, all are equal or they exceed a double.
        """
        if total(losses) is None:
            losses = finite(losses)
        ordered = sorted(losses)
        size = len(ordered)
        if size < least:
            return None
        most = max(1, size // 10)
        largest, smallest = ordered[-1], ordered[0]
        excess = largest - smallest
        top, rest = total(ordered[-most:]), total(ordered[:-most])
        if top is None or rest is None or not 0.0 < excess < math.inf:
            return None
        top -= most * smallest
        rest -= (size - most) * smallest
        if not (top - top == 0.0 and rest - rest == 0.0):
            return None
        log_ratio = math.log(excess / rest) if excess < 1e3 * rest else math.log(1e3)
        ratios = self._ratios
        z = (log_ratio - ratios.median) / max(ratios.scale, self._floor)
        return Concentration(
            log_ratio, z, top / (top + rest), excess, self._record, largest, smallest
        )

    def accept(self, batch: Concentration) -> None:
        """Takes the batch into the past."""
        self._ratios.push(batch.log_ratio)
        self._record = max(batch.excess, self._FADE * self._record)
        self.alarm = batch.smallest + self._record
