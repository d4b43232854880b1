from __future__ import annotations

import math
import random

import pytest

from plarv_sinks.report.envelope import Envelope
from plarv_sinks.report.scale import number_text, scale_of, step_ticks


@pytest.mark.parametrize("count", [1, 2, 479, 480, 481, 5_000, 100_000])
def test_no_extreme_is_lost_however_long_the_curve(count: int) -> None:
    chance = random.Random(count)
    values = [chance.gauss(0.0, 1.0) for _ in range(count)]
    envelope = Envelope(480)
    for step, value in enumerate(values):
        envelope.add(step, value)
    points = list(envelope.points())
    assert len(points) <= 480
    assert min(point.least for point in points) == min(values)
    assert max(point.most for point in points) == max(values)
    assert all(point.least <= point.mean <= point.most for point in points)
    assert [point.step for point in points] == sorted(point.step for point in points)


def test_what_is_not_finite_is_counted_and_moves_nothing() -> None:
    envelope = Envelope(8)
    for step in range(100):
        envelope.add(step, 1.0 if step % 2 else math.nan)
    points = list(envelope.points())
    assert sum(point.lost for point in points) == 50
    assert {(point.least, point.mean, point.most) for point in points} == {(1.0, 1.0, 1.0)}


def test_steps_far_apart_or_huge_cost_no_memory() -> None:
    envelope = Envelope(16)
    for step in (0, 5, 10**6, 2**62, 3):
        envelope.add(step, 1.0)
    assert 1 <= len(envelope) <= 16


def test_sums_that_overflow_stay_inside_the_band() -> None:
    envelope = Envelope(1)
    for step in range(4):
        envelope.add(step, 1.7e308)
    assert next(envelope.points()).mean == 1.7e308


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [-1e308, 1e308], [1e-300, 1e300], [5e-324], [1.0, 1.0000000001]],
)
def test_every_range_has_a_scale_with_few_ticks_inside_it(values: list[float]) -> None:
    scale = scale_of(values)
    assert scale is not None
    assert all(0.0 <= scale.share(value) <= 1.0 for value in values)
    assert len(scale.ticks()) <= 6
    assert all(number_text(tick) for tick in scale.ticks())


def test_no_value_has_no_scale() -> None:
    assert scale_of([math.nan, math.inf]) is None


@pytest.mark.parametrize("ends", [(0, 0), (0, 2), (7, 12), (0, 999_999), (-5, 2**62)])
def test_steps_at_the_axis_are_whole_and_in_range(ends: tuple[int, int]) -> None:
    ticks = step_ticks(*ends)
    assert 1 <= len(ticks) <= 6
    assert all(ends[0] <= tick <= ends[1] * (1 + 1e-9) for tick in ticks)
