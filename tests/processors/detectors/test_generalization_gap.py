"""GeneralizationGap: overfitting, and validation curves that only look like it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import pytest

from plarv_processors.detectors.generalization_gap import GeneralizationGap
from plarv_processors.windows import kendall_s, kendall_thresholds
from plarv_schemas.events import StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"

Curve = Callable[[int], float]


def read(
    events: Iterable[StepEvent], detector: Optional[GeneralizationGap] = None
) -> List[Verdict]:
    detector = detector or GeneralizationGap()
    return [found for event in events for found in detector.update(event)]


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


def run(val: Curve, train: Curve, count: int, noise: float = 0.0, seed: int = 0) -> List[StepEvent]:
    """An evaluation every ten steps, on an event of its own as most loops send it."""
    chance = random.Random(seed)
    events: List[StepEvent] = []
    for number in range(count):
        for within in range(10):
            step = 10 * number + within
            events.append(
                StepEvent("run", "s", 0, 0, step, loss=train(number) * (1 + chance.gauss(0, 0.01)))
            )
        level = val(number) * (1.0 + noise * chance.gauss(0.0, 1.0))
        events.append(StepEvent("run", "s", 0, 0, 10 * number + 9, val_loss=level))
    return events


def falling(number: int) -> float:
    return 3.0 / math.sqrt(math.sqrt(1.0 + number))


def turning(number: int) -> float:
    """Falls for 20 evaluations, then rises by 2% each."""
    return 2.0 + 2.0 * math.exp(-number / 5.0) + 0.04 * max(0, number - 20)


def test_validation_that_rises_while_training_falls_warns_and_becomes_critical_far_up() -> None:
    found = read(run(turning, falling, 60, noise=0.002))
    assert [(one.level, one.state) for one in found] == [
        ("warn", "opened"),
        ("critical", "escalated"),
    ]
    opened, escalated = found
    assert 190 <= opened.onset_step <= 220
    assert 240 < opened.step < 280
    assert opened.evidence["val_loss"] > 1.03 * opened.evidence["best_val_loss"]
    assert opened.evidence["kendall_s"] >= opened.evidence["kendall_threshold"]
    assert opened.evidence["train_loss_last"] < opened.evidence["train_loss_first"]
    assert escalated.onset_step == opened.onset_step
    assert escalated.score >= escalated.threshold == 0.20


def test_it_resolves_when_validation_is_back_at_its_best() -> None:
    def there_and_back(number: int) -> float:
        return turning(number) if number < 35 else max(1.9, turning(35) - 0.1 * (number - 35))

    found = read(run(there_and_back, falling, 60))
    assert [one.state for one in found][:1] == ["opened"]
    assert (found[-1].state, found[-1].level) == ("resolved", "ok")
    assert found[-1].evidence["val_loss"] < 1.02 * found[-1].evidence["best_val_loss"]


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.03])
def test_noise_around_a_level_is_silent(noise: float) -> None:
    for seed in range(10):
        assert not read(run(lambda _: 2.0, falling, 200, noise, seed))


def test_a_single_bad_evaluation_is_silent() -> None:
    assert not read(run(lambda number: 4.0 if number == 30 else 2.0, falling, 60, 0.005))


def test_validation_that_rises_with_the_training_loss_is_another_matter() -> None:
    """Both rise: the run diverges or the data became harder, but it memorises nothing."""
    assert not read(run(turning, lambda number: 0.5 * turning(number), 60))


def test_a_gap_that_widens_while_validation_still_falls_is_no_overfitting() -> None:
    assert not read(run(lambda number: 2.5 * (1 + number) ** -0.05, falling, 100, 0.005))


def test_without_training_losses_there_is_nothing_to_compare_with() -> None:
    events = [
        StepEvent("run", "s", 0, 0, number, val_loss=turning(number)) for number in range(100)
    ]
    assert not read(events)


def test_an_evaluation_that_comes_twice_counts_once() -> None:
    events = run(turning, falling, 60)
    twice = [again for event in events for again in ([event] * (2 if event.val_loss else 1))]
    assert marks(read(twice)) == marks(read(events))


def test_one_point_an_epoch_with_both_losses_is_enough() -> None:
    events = [
        StepEvent("run", "s", 0, 0, epoch, loss=falling(epoch), val_loss=turning(epoch))
        for epoch in range(60)
    ]
    found = read(events)
    assert [one.state for one in found] == ["opened", "escalated"]
    assert found[0].step < 30


@pytest.mark.parametrize("offset", [-5.0, -2.0])
def test_losses_below_zero_are_judged_by_their_size(offset: float) -> None:
    found = read(run(lambda number: turning(number) + offset, falling, 60))
    assert [one.kind for one in found][:1] == ["overfitting"]


def test_an_early_bump_does_not_hide_what_comes_later() -> None:
    def bumpy(number: int) -> float:
        return turning(number) + (6.0 if number == 2 else 0.0)

    assert read(run(bumpy, falling, 60))


def test_losses_near_the_largest_double_are_survived() -> None:
    events = run(lambda number: turning(number) * 4e307, lambda _: 1e308, 40)
    assert not read(events)


def test_public_runs_are_silent() -> None:
    index = PUBLIC_RUNS / "index.json"
    if not index.exists():
        pytest.skip("needs the public runs beside the checkout")
    checked = 0
    for entry in json.loads(index.read_text()):
        if entry["label"] != "healthy" or "val_loss" not in entry["other_columns"]:
            continue
        with (PUBLIC_RUNS / entry["file"]).open(newline="") as file:
            events = [of_row(row) for row in csv.DictReader(file)]
        assert not read(events), entry["run_id"]
        checked += 1
    assert checked > 20


def of_row(row: Dict[str, str]) -> StepEvent:
    loss, val = row.get("loss"), row.get("val_loss")
    return StepEvent(
        "run",
        "s",
        0,
        0,
        int(float(row["step"])),
        loss=float(loss) if loss else None,
        val_loss=float(val) if val else None,
    )


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"window": 100}, "window"),
        ({"min_evaluations": 3}, "min_evaluations"),
        ({"val_p": 0.5}, "val_p"),
        ({"min_rise": math.nan}, "min_rise"),
        ({"critical_rise": 0.01}, "critical_rise"),
    ],
)
def test_a_config_of_nonsense_is_rejected(wrong: Dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GeneralizationGap.Config(**wrong)


@pytest.mark.parametrize("p", [0.01, 0.05])
@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_thresholds_of_kendall_are_those_of_all_permutations(count: int, p: float) -> None:
    orders = [kendall_s(order) for order in itertools.permutations(range(count))]
    threshold = kendall_thresholds(count, p)[count]
    assert sum(s >= threshold for s in orders) < p * len(orders)
    assert sum(s >= threshold - 2 for s in orders) >= p * len(orders)
