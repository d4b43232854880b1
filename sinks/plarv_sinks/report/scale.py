"""From values to places in a chart: linear or logarithmic, with ticks that people can read."""

from __future__ import annotations

import math
from typing import Iterable, List, NamedTuple, Optional

__all__ = ["Scale", "number_text", "scale_of", "step_ticks"]

_LOG_FROM = 30.0  # largest to smallest value
_MAX_TICKS = 5


class Scale(NamedTuple):
    """A range of values on the way up from 0 to 1."""

    low: float
    high: float
    is_log: bool

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; outside is held at the edge."""
        if self.is_log:
            if not value > 0.0:
                return 0.0
            span = math.log(self.high) - math.log(self.low)
            share = (math.log(value) - math.log(self.low)) / span
        else:  # halves: the span of two doubles may be no double
            share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return min(1.0, max(0.0, share))

    def ticks(self) -> List[float]:
        """Round values in the range, at most five."""
        return _decades(self.low, self.high) if self.is_log else _round(self.low, self.high)


def scale_of(values: Iterable[float]) -> Optional[Scale]:
    """A scale that holds all finite values; None: there are none.

    >>> scale_of([1.0, 2.0, 1000.0]).is_log
    True
    >>> scale_of([2.0, 4.0]).ticks()
    [2.0, 2.5, 3.0, 3.5, 4.0]
    """
    finite = [value for value in values if value - value == 0.0]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if low > 0.0 and high / low >= _LOG_FROM:
        return Scale(low / 1.1, min(high, 1e308 / 1.1) * 1.1, True)
    pad = 0.04 * (high / 2 - low / 2) * 2 if high > low else max(abs(high) * 0.1, 1e-12)
    largest = 1.7e308
    return Scale(max(low - pad, -largest), min(high + pad, largest), False)


def step_ticks(first: int, last: int) -> List[int]:
    """Round steps from first to last, at most six.

    >>> step_ticks(0, 900)
    [0, 200, 400, 600, 800]
    """
    if last <= first:
        return [first]
    return [round(each) for each in _round(float(first), float(last), whole=True)]


def number_text(value: float) -> str:
    """A number of an axis or a table, short.

    >>> [number_text(each) for each in (0.0, 12345.0, 0.000031, 2.5, 1e30, float("nan"))]
    ['0', '12,345', '3.1e-5', '2.5', '1e30', 'NaN']
    """
    if value != value:
        return "NaN"
    if value in (math.inf, -math.inf):
        return "Inf" if value > 0 else "-Inf"
    size = abs(value)
    if value == 0.0 or 1e-4 <= size < 1000.0:
        return f"{value:.4g}"
    if size < 1e6 and size >= 1.0:
        return f"{value:,.0f}"
    mantissa, _, power = f"{value:.3g}".partition("e")
    if not power:
        mantissa, _, power = f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(power)}"


def _round(low: float, high: float, *, whole: bool = False) -> List[float]:
    span = high - low
    if not 0.0 < span < math.inf:
        return [low, high]
    size = 10.0 ** math.floor(math.log10(span))
    for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0):
        width = step * size
        first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
        if whole and (width < 1.0 or width != math.floor(width)):
            continue
        if last - first < _MAX_TICKS:
            return [at * width for at in range(first, last + 1)]
    return [low, high]


def _decades(low: float, high: float) -> List[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        every = max(1, math.ceil((last - first + 1) / _MAX_TICKS))
        return [10.0**power for power in range(first, last + 1, every)]
    found = [
        part * 10.0**power
        for power in range(first - 1, last + 1)
        for part in (1.0, 2.0, 5.0)
        if low <= part * 10.0**power <= high
    ]
    return found[:: max(1, math.ceil(len(found) / _MAX_TICKS))]
