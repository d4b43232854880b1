"""SampleAnomaly: what the single samples give away, and what looks like it but is training."""

from __future__ import annotations

import math
import random
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import pytest

from plarv_processors.detectors.sample_anomaly import SampleAnomaly
from plarv_schemas.events import StepEvent, Verdict

BARE = StepEvent("run", "session", 0, 0, 0)
Draw = Callable[[random.Random, int], float]


def read(events: Iterable[StepEvent], detector: Optional[SampleAnomaly] = None) -> List[Verdict]:
    detector = detector or SampleAnomaly()
    return [found for event in events for found in detector.update(event)]


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


def kinds(found: Iterable[Verdict]) -> List[str]:
    return [one.kind for one in found if one.state == "opened"]


def of_ids(batches: Sequence[Sequence[int]]) -> List[StepEvent]:
    return [
        BARE._replace(record=step, step=step, sample_ids=tuple(ids))
        for step, ids in enumerate(batches)
    ]


def of_losses(draw: Draw, steps: int, seed: int = 0, size: int = 32) -> List[StepEvent]:
    chance = random.Random(seed)
    return [
        BARE._replace(
            record=step,
            step=step,
            sample_losses=tuple(draw(chance, step) for _ in range(size)),
        )
        for step in range(steps)
    ]


def of_margins(draw: Draw, steps: int, seed: int = 0) -> List[StepEvent]:
    return [
        event._replace(sample_losses=None, sample_margins=event.sample_losses)
        for event in of_losses(draw, steps, seed)
    ]


def epochs(samples: int, size: int, count: int, shuffle: str, seed: int = 0) -> List[List[int]]:
    chance = random.Random(seed)
    batches: List[List[int]] = []
    for _ in range(count):
        ids = list(range(samples))
        if shuffle == "samples":
            chance.shuffle(ids)
        epoch = [ids[at : at + size] for at in range(0, samples, size)]
        if shuffle == "batches":
            chance.shuffle(epoch)
        batches.extend(epoch)
    return batches


# The same batch again.


def test_a_loader_that_is_stuck_warns_at_the_third_time_and_is_critical_at_the_twelfth() -> None:
    fresh = epochs(32 * 40, 32, 1, "none")
    found = read(of_ids([*fresh[:30], *[fresh[29]] * 20, *fresh[30:]]))
    assert marks(found)[:2] == [
        (31, "repeated_batch", "warn", "opened"),
        (40, "repeated_batch", "critical", "escalated"),
    ]
    assert found[0].onset_step == 30
    assert found[0].evidence["in_row"] == 3.0
    assert found[0].message == "the run got the same batch 3 times in a row, after 29 others"


def test_it_resolves_when_the_loader_moves_on() -> None:
    batches = epochs(32 * 200, 32, 1, "none")
    found = read(of_ids([*batches[:50], *[batches[49]] * 5, *batches[50:]]))
    assert [one.state for one in found] == ["opened", "resolved"]
    assert found[-1].step == 54 + 32


def test_a_stretch_that_is_served_again_and_again_is_found_without_being_in_a_row() -> None:
    batches = epochs(32 * 300, 32, 1, "samples")
    found = read(of_ids([*batches[:200], *batches[180:200] * 3]))
    assert kinds(found) == ["repeated_batch"]
    assert found[0].step == 200 + 20  # the first batch of the stretch for the third time
    assert "3 times in 128 batches" in found[0].message


@pytest.mark.parametrize("shuffle", ["samples", "batches", "none"])
@pytest.mark.parametrize("samples", [64, 96, 640, 32 * 127, 32 * 129, 32 * 300])
def test_passes_over_the_data_are_normal_whatever_its_size(samples: int, shuffle: str) -> None:
    count = max(3, 1_000 * 32 // samples)
    assert not read(of_ids(epochs(samples, 32, count, shuffle)))


def test_a_run_of_one_batch_warns_but_is_never_critical() -> None:
    found = read(of_ids([list(range(32))] * 200))
    assert marks(found) == [(2, "repeated_batch", "warn", "opened")]


def test_batches_of_one_sample_are_not_batches() -> None:
    assert not read(of_ids([[7]] * 100))


def test_without_ids_the_bits_of_the_losses_tell() -> None:
    events = of_losses(lambda chance, _: chance.expovariate(1.0), 60)
    stuck = [
        event._replace(sample_losses=events[40].sample_losses) if event.step > 40 else event
        for event in events
    ]
    assert marks(read(stuck))[0] == (42, "repeated_batch", "warn", "opened")


def test_losses_that_are_all_zero_are_no_repetition() -> None:
    assert not read(of_losses(lambda _, __: 0.0, 300))


def test_each_rank_has_its_own_batches() -> None:
    batches = epochs(32 * 400, 32, 1, "samples")
    events: List[StepEvent] = []
    for step in range(100):
        for rank in range(4):
            ids = tuple(batches[4 * step + rank])
            if rank == 2 and step >= 50:
                ids = tuple(batches[4 * 50 + 2])
            events.append(
                StepEvent("run", f"s{rank}", step, rank, step, world_size=4, sample_ids=ids)
            )
    found = read(events)
    assert marks(found)[:2] == [
        (52, "repeated_batch", "warn", "opened"),
        (61, "repeated_batch", "critical", "escalated"),
    ]
    assert found[0].evidence["rank"] == 2.0
    assert found[0].message.startswith("rank 2 got")


def test_ranks_that_share_a_batch_as_model_parallel_ones_do_are_normal() -> None:
    batches = epochs(32 * 100, 32, 1, "samples")
    assert not read(
        StepEvent("run", f"s{rank}", step, rank, step, world_size=4, sample_ids=tuple(ids))
        for step, ids in enumerate(batches)
        for rank in range(4)
    )


def test_ids_beyond_64_bits_are_passed_over() -> None:
    assert not read(of_ids([[2**70, 1, 2]] * 50))


# Labels that contradict what the model has learned.


def learning(chance: random.Random, step: int) -> float:
    return chance.gauss(5.0 * (1.0 - math.exp(-step / 200.0)) - 0.5, 1.5)


def flipped(share: float, start: int = 0) -> Draw:
    def draw(chance: random.Random, step: int) -> float:
        margin = learning(chance, step)
        return -margin if step >= start and chance.random() < share else margin

    return draw


@pytest.mark.parametrize("share", [0.2, 0.3, 0.4])
def test_wrong_labels_are_found_while_the_rest_is_learned(share: float) -> None:
    for seed in range(3):
        found = read(of_margins(flipped(share), 1_500, seed))
        assert kinds(found) == ["label_noise"]
        assert found[0].level == "warn"
        assert 0.6 * share < found[0].evidence["far_share"] < 1.1 * share


def test_wrong_labels_from_some_step_on_are_found_and_resolve_with_them() -> None:
    def draw(chance: random.Random, step: int) -> float:
        return flipped(0.25 if step < 1_200 else 0.0, start=600)(chance, step)

    found = read(of_margins(draw, 2_000))
    assert [one.state for one in found] == ["opened", "resolved"]
    assert 600 <= found[0].onset_step < found[0].step < 900
    assert 1_200 < found[1].step < 1_600


@pytest.mark.parametrize(
    "draw",
    [
        learning,
        lambda chance, _: chance.gauss(0.5, 2.0),  # 40% wrong for good: hard, not noisy
        lambda chance, _: 3.0 - chance.expovariate(0.5),  # a long left tail
        lambda chance, _: 1.5 + chance.choice((-1, 1)) * chance.expovariate(0.5),
        lambda chance, _: chance.gauss(-3.0, 1.0),  # nothing is learned
        lambda chance, step: (  # a rare class that is learned late
            chance.gauss(-2.2 + 7.0 * min(1.0, step / 150.0), 1.0)
            if chance.random() < 0.1
            else chance.gauss(2.2 + step / 500.0, 1.0)
        ),
    ],
)
def test_margins_in_one_heap_are_no_label_noise(draw: Draw) -> None:
    for seed in range(3):
        assert not read(of_margins(draw, 1_200, seed))


@pytest.mark.parametrize(("share", "expected"), [(0.0, []), (0.25, ["label_noise"])])
def test_confidence_and_correctness_do_where_margins_are_missing(
    share: float, expected: List[str]
) -> None:
    chance = random.Random(3)
    events: List[StepEvent] = []
    for step in range(1_000):
        scores = [chance.gauss(4.0, 2.0) for _ in range(32)]
        events.append(
            BARE._replace(
                record=step,
                step=step,
                sample_confidences=tuple(1.0 / (1.0 + math.exp(-abs(one))) for one in scores),
                sample_correct=tuple(
                    int((one > 0.0) != (chance.random() < share)) for one in scores
                ),
            )
        )
    assert kinds(read(events)) == expected


# A few samples that carry the loss.


def with_large(count: int, at: int, value: float, seed: int = 0) -> List[StepEvent]:
    events = of_losses(lambda chance, _: chance.expovariate(1.0), 300, seed)
    losses = events[at].sample_losses or ()
    events[at] = events[at]._replace(
        sample_ids=tuple(range(900, 932)),
        sample_losses=(*losses[: 32 - count], *[value] * count),
    )
    return events


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("at", [200, 201, 202, 203])
def test_one_to_three_samples_that_carry_a_batch_are_found_and_named(count: int, at: int) -> None:
    found = read(with_large(count, at, 200.0))
    assert marks(found)[0] == (at, "concentrated_loss", "warn", "opened")
    assert found[0].evidence["share"] > 0.8
    assert found[0].evidence["place"] == 32.0 - count
    assert f"sample {932 - count} alone" in found[0].message
    assert [one.state for one in found] in (["opened"], ["opened", "resolved"])


@pytest.mark.parametrize(
    "draw",
    [
        lambda chance, _: chance.gauss(2.0, 0.5),
        lambda chance, _: chance.expovariate(1.0),
        lambda chance, _: chance.lognormvariate(0.0, 1.5),
        lambda chance, step: math.log1p(math.exp(-learning(chance, step))),
        lambda chance, _: 8.0 * chance.random() if chance.random() < 0.02 else 1e-3,
        lambda chance, _: chance.gauss(-1.0, 3.0),
    ],
)
def test_losses_of_every_usual_spread_are_silent(draw: Draw) -> None:
    for seed in range(3):
        assert not read(of_losses(draw, 1_000, seed))


def test_samples_that_are_not_finite_are_left_out() -> None:
    events = with_large(1, 200, 200.0)
    odd = [
        event._replace(sample_losses=(math.nan, *(event.sample_losses or ()), math.inf))
        for event in events
    ]
    assert kinds(read(odd)) == ["concentrated_loss"]
    assert not read([event._replace(sample_losses=(math.inf, math.nan)) for event in events])


# All three.


def test_a_stuck_loader_comes_before_what_it_explains() -> None:
    events = with_large(1, 200, 200.0)
    events = [
        event._replace(sample_ids=tuple(range(first, first + 32)))
        for event in events
        for first in (32 * min(event.step, 204),)
    ]
    assert marks(read(events))[:3] == [
        (200, "concentrated_loss", "warn", "opened"),
        (206, "concentrated_loss", "ok", "resolved"),
        (206, "repeated_batch", "warn", "opened"),
    ]


def test_a_huge_batch_is_read_in_part() -> None:
    ids = tuple(range(1_000_000))
    events = [
        BARE._replace(record=step, step=step, sample_ids=ids, sample_margins=(1.0, -1.0) * 500_000)
        for step in range(5)
    ]
    assert kinds(read(events)) == ["repeated_batch"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_ranks": 0},
        {"min_repeats": 2},
        {"critical_repeats": 17},
        {"pool": 8},
        {"noise_share": 0.5},
        {"heap_ratio": math.nan},
        {"top_z": 0.0},
    ],
)
def test_a_config_of_nonsense_is_rejected(wrong: Dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SampleAnomaly.Config(**wrong)
