"""Bounded statistics over the ranks of a run: their times, their agreement, the run's own pace."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from typing import List, NamedTuple, Optional, Sequence, Tuple

from plarv_processors.windows import median

__all__ = ["Pace", "PeerTimes", "Replicas", "Slowness"]


class Slowness(NamedTuple):
    """A median time and what it is compared with."""

    ratio: float
    median_ms: float
    reference_ms: float
    rank: Optional[int]  # None: the run


class PeerTimes:
    """Median time of each rank over a report of steps, against the lower median of all ranks.

    The lower median, so that of two ranks the slow one is judged by the fast one. A rank without a
    time in half the steps of a report is left out of it.

    Memory: 4 bytes x ranks x steps of a report, and 40 bytes a rank. Time: O(ranks) a step.

    >>> peers = PeerTimes(steps=2)
    >>> peers.add([0, 1, 2], [100.0, 100.0, 150.0])
    >>> [(slow.rank, slow.ratio) for slow in peers.add([0, 1, 2], [100.0, 100.0, 150.0])]
    [(0, 1.0), (1, 1.0), (2, 1.5)]
    """

    __slots__ = ("_steps", "_ranks", "_rows", "_count")

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._ranks: List[int] = []
        self._rows = array("f")  # a row a step: the time of each rank, NaN where there is none
        self._count = 0  # rows

    def add(
        self, ranks: List[int], times: Sequence[Optional[float]]
    ) -> Optional[Tuple[Slowness, ...]]:
        """Takes one complete step in; at the end of a report every rank's slowness."""
        row = [math.nan if time is None else time for time in times]
        if ranks != self._ranks:
            row = self._aligned(ranks, row)
        self._rows.extend(row)
        self._count += 1
        if self._count < self._steps:
            return None
        size = len(self._ranks)
        medians: List[Tuple[float, int]] = []
        for place, rank in enumerate(self._ranks):
            times_of_rank = sorted(
                [time for time in self._rows[place::size] if 0.0 < time < math.inf]
            )
            if 2 * len(times_of_rank) >= self._steps:
                medians.append((median(times_of_rank), rank))
        del self._rows[:]
        self._count = 0
        if len(medians) < 2:
            return ()
        reference = sorted(medians)[(len(medians) - 1) // 2][0]
        return tuple([Slowness(own / reference, own, reference, rank) for own, rank in medians])

    def _aligned(self, ranks: List[int], row: List[float]) -> List[float]:
        """``row`` in the order of all ranks ever seen; a new rank starts a new report."""
        every = sorted({*self._ranks, *ranks})
        if every != self._ranks:
            self._ranks = every
            del self._rows[:]
            self._count = 0
        given = dict(zip(ranks, row))
        return [given.get(rank, math.nan) for rank in every]


class Pace:
    """Median step time of each report of steps, against the median of the reports before it.

    A report counts as slow when it is ``ratio`` times the reference, ``errors`` standard errors of
    a median above it, and a ``share`` of its steps is above it. Slow reports never enter the
    reference, and a batch size that changes by 5% starts it anew.

    >>> pace = Pace(steps=4)
    >>> for time in [10.0, 11.0, 10.0, 11.0, 20.0, 21.0, 20.0, 21.0]:
    ...     report = pace.add(time, batch_size=None)
    ...     if report is not None:
    ...         print(report.median_ms, pace.is_slow(report, ratio=1.15, errors=6.0, share=0.8))
    ...         pace.accept(report)
    10.5 False
    20.5 True
    """

    __slots__ = ("_steps", "_block", "_past", "_samples", "_batch", "_above", "_error")

    _MOST = 20  # reports in the reference

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._block = array("d")  # step times of this report
        self._past = array("d")  # medians of the last reports that were not slow
        self._samples = 0.0  # in this report
        self._batch = 0.0  # samples a report of the reference
        self._above = 0.0  # share of the last report's steps above the reference
        self._error = 0.0  # standard error of the last report's median

    @property
    def reports(self) -> int:
        """How many reports the reference has."""
        return len(self._past)

    def add(self, time_ms: float, batch_size: Optional[int]) -> Optional[Slowness]:
        """Takes one positive, finite time in; at the end of a report its slowness."""
        block = self._block
        block.append(time_ms)
        if batch_size is not None:
            self._samples += batch_size
        if len(block) < self._steps:
            return None
        ordered = sorted(block)
        del block[:]
        if abs(self._samples - self._batch) > 0.05 * self._batch:
            del self._past[:]
            self._batch = self._samples
        self._samples = 0.0
        own = median(ordered)
        reference = median(sorted(self._past)) if self._past else own
        self._above = 1.0 - bisect_right(ordered, reference) / len(ordered)
        spread = median(sorted([abs(time - own) for time in ordered]))
        self._error = 1.2533 * 1.4826 * spread / math.sqrt(len(ordered))
        return Slowness(own / reference, own, reference, None)

    def is_slow(self, report: Slowness, ratio: float, errors: float, share: float) -> bool:
        """Whether the report that :meth:`add` gave last is slow."""
        return (
            report.ratio >= ratio
            and report.median_ms - report.reference_ms >= errors * self._error
            and self._above >= share
        )

    def accept(self, report: Slowness) -> None:
        """Takes the report into the reference."""
        if len(self._past) >= self._MOST:
            del self._past[0]
        self._past.append(report.median_ms)

    def clear(self) -> None:
        """Forgets the reference: what comes now is the new pace."""
        del self._past[:]


class Replicas:
    """Whether the ranks' gradient norms agree, in a run in which they did from the start.

    >>> replicas = Replicas(steps=2, agreement=1e-3)
    >>> [replicas.spread([3.0, 3.0, norm]) for norm in (3.0, 3.0, 3.0, 4.0)]
    [None, None, 0.0, 0.25]
    >>> replicas.disagrees(0.09), replicas.odd([3.0, 3.0, 3.3])
    (True, 2)
    """

    __slots__ = ("_steps", "_agreement", "_learned", "_off", "tolerance")

    def __init__(self, steps: int, agreement: float) -> None:
        self._steps = steps
        self._agreement = agreement
        self._learned = 0  # steps
        self._off = False  # the norms differ by design
        self.tolerance = agreement

    def spread(self, norms: Sequence[Optional[float]]) -> Optional[float]:
        """Largest minus smallest, relative; None while learning, or where it says nothing."""
        if self._off or len(norms) < 2:
            return None
        given = [norm for norm in norms if norm is not None and 0.0 <= norm < math.inf]
        if len(given) < len(norms):
            return None
        largest = max(given)
        if largest == 0.0:  # not computed, or nothing to learn
            return None
        spread = (largest - min(given)) / largest
        if self._learned >= self._steps:
            return spread
        self._learned += 1
        self._off = spread > self._agreement
        self.tolerance = max(self.tolerance, 4.0 * spread)
        return None

    def disagrees(self, spread: float) -> bool:
        """Whether ``spread`` is beyond what the learned steps had."""
        return spread > self.tolerance

    def odd(self, norms: Sequence[Optional[float]]) -> Optional[int]:
        """The place of the one norm that differs from all others, which agree; None without one."""
        given = [norm for norm in norms if norm is not None]
        if len(given) < 3 or len(given) < len(norms):
            return None
        centre = median(sorted(given))
        place = max(range(len(given)), key=lambda at: abs(given[at] - centre))
        others = given[:place] + given[place + 1 :]
        largest = max(others)
        return place if largest - min(others) <= self.tolerance * largest else None
