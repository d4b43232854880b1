"""The shared statistics: bounded windows over numbers, cheap enough for every step.

All of them take finite numbers only; the caller keeps NaN and Inf out, since one of them would
stay in a running statistic for good.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import List, Sequence

__all__ = ["RobustWindow", "kendall_s", "kendall_thresholds", "median"]


def median(ordered: List[float]) -> float:
    """The median of a sorted, non-empty list.

    >>> median([1.0, 2.0, 10.0]), median([1.0, 3.0])
    (2.0, 2.0)
    """
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return 0.5 * (ordered[middle - 1] + ordered[middle])


class RobustWindow:
    """Median and scale (1.4826 x MAD) of the last ``size`` numbers.

    Both are refreshed every ``refresh`` numbers, counted from the first one, so that a number costs
    well under a microsecond on average; between two refreshes they are that much old. Until
    ``size`` numbers were seen they are refreshed at every power of two as well.

    Memory: 8 bytes x size. Time: O(1) a number, O(size log size) a refresh.

    >>> window = RobustWindow(size=5, refresh=1)
    >>> for value in (1.0, 2.0, 3.0, 4.0, 100.0):
    ...     window.push(value)
    >>> window.median, round(window.scale, 4), window.full
    (3.0, 1.4826, True)
    """

    __slots__ = ("_values", "_next", "count", "median", "scale", "low", "high", "_size", "_refresh")

    def __init__(self, size: int, refresh: int = 8) -> None:
        self._values = array("d")
        self._next = 0
        self.count = 0  # numbers seen since the last clear
        self.median = 0.0
        self.scale = 0.0
        self.low = 0.0  # smallest and largest, refreshed with the median
        self.high = 0.0
        self._size = size
        self._refresh = refresh

    @property
    def full(self) -> bool:
        """Whether ``size`` numbers are in."""
        return self.count >= self._size

    def push(self, value: float) -> None:
        """Takes one finite number in, and the oldest out when full."""
        values = self._values
        count = self.count + 1
        self.count = count
        if count <= self._size:
            values.append(value)
            if count % self._refresh == 0 or count & (count - 1) == 0:
                self.refresh()
            return
        at = self._next
        values[at] = value
        self._next = at + 1 if at + 1 < self._size else 0
        if count % self._refresh == 0:
            self.refresh()

    def refresh(self) -> None:
        """Recomputes median and scale from what is in the window now."""
        if not self._values:
            self.median = self.scale = self.low = self.high = 0.0
            return
        ordered = sorted(self._values)
        self.low = ordered[0]
        self.high = ordered[-1]
        centre = median(ordered)
        self.median = centre
        # Of sorted values the distances fall, then rise: two runs, which sorted() merges in one
        # pass.
        self.scale = 1.4826 * median(sorted([abs(value - centre) for value in ordered]))

    def clear(self) -> None:
        """Forgets all numbers."""
        del self._values[:]
        self._next = self.count = 0
        self.refresh()

    def ordered(self) -> List[float]:
        """The numbers in the window, oldest first."""
        values = self._values.tolist()
        return values[self._next :] + values[: self._next]


def kendall_s(values: Sequence[float]) -> int:
    """Mann-Kendall's S: pairs that rise minus pairs that fall, over all pairs in order of time.

    >>> kendall_s([1.0, 2.0, 3.0, 2.5]), kendall_s([3.0, 1.0]), kendall_s([1.0, 1.0])
    (4, -1, 0)
    """
    before: List[float] = []
    s = 0
    for value in values:
        above = bisect_right(before, value)
        s += bisect_left(before, value) - (len(before) - above)
        before.insert(above, value)
    return s


@lru_cache(maxsize=64)  # every run's detector asks for the same ones; nobody changes them
def kendall_thresholds(most: int, p: float) -> array[int]:
    """For 0 to ``most`` values the smallest S that noise reaches with a chance below ``p``.

    Exact, one-sided, from the number of permutations with so many inversions; where no S is that
    rare it is out of reach. Time: O(most^3), for construction.

    >>> list(kendall_thresholds(6, 0.01))
    [1, 2, 3, 5, 8, 10, 13]
    """
    thresholds = array("h", [1])
    counts = [1]  # of permutations of n values with i falling pairs
    orders = 1  # n!
    for n in range(1, most + 1):
        orders *= n
        pairs = n * (n - 1) // 2
        # The n-th value adds 0 to n - 1 of them.
        upto = list(accumulate(counts))
        upto.extend([upto[-1]] * (pairs + 1 - len(upto)))
        counts = upto[:n] + [upto[i] - upto[i - n] for i in range(n, pairs + 1)]
        del counts[pairs + 1 :]
        tail, falling = 0, 0
        while falling <= pairs:
            tail += counts[falling]
            if tail >= p * orders:
                break
            falling += 1
        thresholds.append(pairs - 2 * falling + 2)
    return thresholds
