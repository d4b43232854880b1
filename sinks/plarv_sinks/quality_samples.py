"""Bounded counts over the samples of a run: how often they come back, how sure ones turn out."""

from __future__ import annotations

import math
from array import array
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

__all__ = ["CopyCount", "IdSketch", "TrustCurve", "Visits", "is_number"]

_MASK = (1 << 64) - 1
_LARGEST = 1e100  # what is beyond is no loss, and its sums would overflow


def is_number(value: Optional[float]) -> bool:
    """Whether ``value`` is there, finite and of a size that can be summed."""
    return value is not None and -_LARGEST < value < _LARGEST


class Visits(NamedTuple):
    """How often samples were served, told by an even sample of the ids."""

    per_id: float  # times, the mean over the ids
    evenness: float  # 1: all ids equally often; (sum n)^2 / (ids x sum n^2)
    ids: int  # that were looked at


class IdSketch:
    """Counts the visits of a fixed, pseudo-random share of all ids, so that the state is bounded.

    An id is kept while its hash lies below a level, which halves whenever more than ``most`` ids
    are kept: which ones remain depends on the ids alone, not on their order. Up to ``most`` ids the
    counts are exact; beyond, the mean is right within about 1/sqrt(most) of its spread.

    Memory: ``most`` entries, about 100 bytes each. Time: 0.3 us an id. Source: distinct sampling,
    Gibbons 2001.

    >>> sketch = IdSketch(most=1024)
    >>> for _ in range(5):
    ...     sketch.add(range(300))
    >>> sketch.visits()
    Visits(per_id=5.0, evenness=1.0, ids=300)
    """

    __slots__ = ("_counts", "_level", "_most")

    def __init__(self, most: int = 1024) -> None:
        self._counts: Dict[int, int] = {}  # by hash
        self._level = _MASK
        self._most = most

    def add(self, ids: Iterable[Optional[int]]) -> None:
        """Takes in the ids of one batch."""
        counts, level = self._counts, self._level
        for each in ids:
            if each is None:
                continue
            key = ((each & _MASK) ^ ((each & _MASK) >> 31)) * 0x9E3779B97F4A7C15 & _MASK
            key = (key ^ (key >> 29)) * 0xBF58476D1CE4E5B9 & _MASK
            if key <= level:
                counts[key] = counts.get(key, 0) + 1
                if len(counts) > self._most:
                    counts, level = self._halve()

    def visits(self) -> Optional[Visits]:
        """What the counts say; None before the first id."""
        counts = self._counts
        if not counts:
            return None
        total = sum(counts.values())
        squares = sum(n * n for n in counts.values())
        return Visits(total / len(counts), total * total / (len(counts) * squares), len(counts))

    def _halve(self) -> Tuple[Dict[int, int], int]:
        while len(self._counts) > self._most:
            self._level >>= 1
            self._counts = {key: n for key, n in self._counts.items() if key <= self._level}
        return self._counts, self._level


class CopyCount:
    """Pairs of samples in one batch that look exactly alike, though their ids may differ.

    Two copies in one batch meet the same weights, so their margins (else losses) agree up to
    rounding. By the birthday problem a list in which each sample stands 1 + r times shows r pairs
    in N(N-1)/2, N samples served. Pairs that merely lie close (relative distance between ``_SAME``
    and ten times it) tell how many agree by chance. Values of 16 bits are passed over, since there
    unlike samples agree too, and so are small ones, whose last digits are rounding.

    Not seen: passes over a shuffled set, where no batch holds a sample twice, and copies that
    dropout makes differ.

    Memory: four numbers. Time: one sort of a batch.

    >>> count = CopyCount()
    >>> for step in range(400):  # the samples 0 to 999, 16 drawn at a time
    ...     drawn = [(step * 7919 + place * 613) * 31 % 997 for place in range(16)]
    ...     count.add([1.0 + 0.003001 * sample for sample in drawn])
    >>> count.repeats()
    0.0
    >>> for step in range(400):
    ...     count.add([1.1, 2.7, 1.1] + [1.0 + 0.00717 * place for place in range(13)])
    >>> count.repeats() > 10.0
    True
    """

    __slots__ = ("_alike", "_close", "_pairs", "_samples")

    _SAME = 3e-6  # relative; float32 rounds at 1e-7, and a product of matrices adds a few of these
    _SMALLEST = 0.05  # nats: a cross entropy near 0 is the difference of two large numbers
    _DEVIATIONS = 2.0  # that the count must exceed chance by

    def __init__(self) -> None:
        self._alike = 0
        self._close = 0
        self._pairs = 0.0
        self._samples = 0

    def add(self, values: Sequence[Optional[float]]) -> None:
        """Takes in one value for each sample of one batch."""
        kept = [value for value in values if value is not None and is_number(value)]
        size = len(kept)
        if size < 2:
            return
        self._samples += size
        self._pairs += 0.5 * size * (size - 1)
        kept.sort()
        before = kept[0]
        run = 0  # neighbours in a row that look alike
        for value in kept[1:]:
            distance = value - before
            reach = self._SAME * abs(value)
            if distance > 10.0 * reach or abs(value) < self._SMALLEST:
                run = 0
            elif distance > reach:
                self._close += 1
                run = 0
            elif not _is_short(value):
                run += 1
                self._alike += run  # the new one pairs with each of the run
            before = value

    def repeats(self) -> Optional[float]:
        """Further copies of each sample, the least that the counts allow; None without pairs."""
        if self._pairs <= 0.0:
            return None
        chance = self._close / 9.0
        sure = self._alike - chance - self._DEVIATIONS * math.sqrt(self._alike + chance)
        return max(0.0, sure) * self._samples / self._pairs


def _is_short(value: float) -> bool:
    """Whether 11 bits hold it, as float16 and bfloat16 do."""
    scaled = math.frexp(value)[0] * 2048.0
    return scaled == int(scaled)


class TrustCurve:
    """How often the labels agree with the model, by how sure it is of a sample.

    Counts in cells of half a bit of ``-log2(1 - confidence)``, up to 16 bits. Memory: 64 doubles.

    >>> curve = TrustCurve()
    >>> curve.add([0.9] * 80 + [0.99] * 20, [0] * 80 + [1] * 19 + [0])
    >>> curve.agreement(0.2)
    0.95
    """

    __slots__ = ("doubt", "samples", "wrong", "_counts")

    _CELLS = 32

    def __init__(self) -> None:
        self.samples = 0
        self.wrong = 0  # samples
        self.doubt = 0.0  # the sum of 1 - confidence: samples that should be wrong
        self._counts = array("d", [0.0] * (2 * self._CELLS))  # samples, then those that agree

    def add(self, confidences: Sequence[Optional[float]], correct: Sequence[Optional[int]]) -> None:
        """Takes in the samples of one batch; confidences outside 0-1 are left out."""
        counts, cells = self._counts, self._CELLS
        for confidence, right in zip(confidences, correct):
            if confidence is None or right is None or not 0.0 <= confidence <= 1.0:
                continue
            doubt = 1.0 - confidence
            cell = min(cells - 1, int(-2.0 * math.log2(doubt))) if doubt > 1e-5 else cells - 1
            counts[cell] += 1.0
            self.samples += 1
            self.doubt += doubt
            if right == 1:
                counts[cells + cell] += 1.0
            else:
                self.wrong += 1

    def merge(self, other: TrustCurve) -> None:
        """Adds what ``other`` counted."""
        self.samples += other.samples
        self.wrong += other.wrong
        self.doubt += other.doubt
        for cell, count in enumerate(other._counts):
            self._counts[cell] += count

    def agreement(self, share: float) -> float:
        """The part of the surest ``share`` of all samples whose labels agree; NaN without any."""
        left = wanted = share * self.samples
        agreed: List[float] = []
        for cell in reversed(range(self._CELLS)):
            count = self._counts[cell]
            taken = min(left, count)
            if taken > 0.0:
                agreed.append(taken * self._counts[self._CELLS + cell] / count)
                left -= taken
        return min(1.0, math.fsum(agreed) / wanted) if wanted > 0.0 else math.nan
