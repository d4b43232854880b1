"""LossDivergence: a level that is left for good, and what only looks like it."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import pytest

from plarv_processors.detectors.loss_divergence import LossDivergence
from plarv_processors.snapshot import dump, pack
from plarv_schemas.events import StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"


def replay(
    losses: Iterable[Optional[float]], detector: Optional[LossDivergence] = None
) -> List[Verdict]:
    detector = detector or LossDivergence()
    found: List[Verdict] = []
    for step, loss in enumerate(losses):
        found.extend(detector.update(StepEvent("run", "s", step, 0, step, loss=loss)))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


def descent(steps: int, floor: float = 2.0, noise: float = 0.03, seed: int = 1) -> List[float]:
    chance = random.Random(seed)
    return [
        (floor + 6.0 * math.exp(-step / 40)) * math.exp(chance.gauss(0.0, noise))
        for step in range(steps)
    ]


def test_a_loss_that_leaves_its_best_level_at_once_is_diverged_ten_losses_later() -> None:
    assert marks(replay([*descent(300), *[5.0] * 40])) == [
        (305, "rising", "warn", "opened"),
        (310, "diverged", "critical", "escalated"),
    ]


def test_a_loss_that_leaves_it_slowly_is_diverged_too() -> None:
    losses = descent(600)
    away = [loss * 1.004 ** max(0, step - 300) for step, loss in enumerate(losses)]
    found = replay(away)
    assert [one.kind for one in found] == ["rising", "diverged"]
    assert away[found[-1].step] < 2.0 * found[-1].evidence["best"]  # long before it has doubled


def test_a_loss_ten_times_its_best_level_is_diverged_at_the_third() -> None:
    assert marks(replay([*descent(300), *[60.0] * 5])) == [
        (302, "diverged", "critical", "opened"),
    ]


def test_a_restart_is_diverged_and_resolved_when_the_loss_is_back() -> None:
    found = replay([*descent(400), *descent(400, seed=2)])
    assert [one.kind for one in found] == ["rising", "diverged", "diverged"]
    assert found[-1].state == "resolved"


def test_a_level_held_from_the_start_can_be_left_too() -> None:
    chance = random.Random(3)
    at_chance = [6.9 + chance.gauss(0.0, 0.02) for _ in range(200)]
    assert marks(replay([*at_chance, *[14.0] * 30]))[-1][1:3] == ("diverged", "critical")


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_spike_of_a_few_steps_is_not_this_detectors_matter(length: int) -> None:
    assert replay([*descent(300), *[5.0] * length, *descent(300)[100:]]) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "grows",
    [
        lambda step: 21.0 * math.exp(5.0 * step / 3000),
        lambda step: 21.0 + 1.1 * step,
        lambda step: (21.0 + 15.0 * math.exp(-step / 2)) * math.exp(5.0 * step / 3000),
        lambda step: 0.7 + 4.0 * (1.0 - math.exp(-step / 500)),
    ],
    ids=["exponential", "linear", "after a short dip", "saturating"],
)
def test_a_loss_that_grows_from_the_start_is_never_critical(
    grows: Callable[[float], float], seed: int
) -> None:
    chance = random.Random(seed)
    losses = [grows(step) * math.exp(chance.gauss(0.0, 0.05)) for step in range(3000)]
    assert {one.level for one in replay(losses)} <= {"warn"}


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3, 0.5])
def test_noise_alone_raises_nothing(noise: float) -> None:
    assert replay(descent(4000, noise=noise)) == []


def test_a_loss_with_two_levels_raises_no_more_than_a_warning() -> None:
    chance = random.Random(5)
    losses = [
        (3.0 if chance.random() < 0.6 else 5.0) * math.exp(chance.gauss(0.0, 0.05))
        for _ in range(4000)
    ]
    assert "critical" not in {one.level for one in replay(losses)}


def test_a_memorised_loss_near_zero_may_vary_by_any_factor() -> None:
    chance = random.Random(6)
    losses = [
        max(1e-6, 2.0 * math.exp(-step / 60)) * math.exp(chance.gauss(0.0, 0.3))
        for step in range(1500)
    ]
    assert replay([*losses, *[1e-3] * 100]) == []


def test_losses_below_zero_are_silence_and_close_what_is_open() -> None:
    assert replay([-0.01 * (step % 7) for step in range(300)] + [5.0] * 100) == []
    found = replay([*descent(300), *[5.0] * 20, -1.0, *[50.0] * 50])
    assert [one.state for one in found] == ["opened", "escalated", "resolved"]
    assert "below zero" in found[-1].message


def test_a_zero_loss_is_passed_over() -> None:
    losses: List[float] = [*descent(300), 0.0, *[5.0] * 40]
    assert marks(replay(losses))[-1] == (311, "diverged", "critical", "escalated")


def test_the_verdict_carries_what_it_was_decided_on() -> None:
    diverged = replay([*descent(300), *[5.0] * 40])[-1]
    numbers = diverged.evidence
    assert diverged.score == pytest.approx(math.log(numbers["loss"] / numbers["best"]))
    assert diverged.score >= diverged.threshold >= LossDivergence.Config().rise
    assert numbers["far_held"] == 6.0
    assert diverged.onset_step == 300
    assert "step 300" in diverged.message


def test_its_state_is_small() -> None:
    detector = LossDivergence()
    replay(descent(2000), detector)
    assert len(pack(dump(detector))) < 512


@pytest.mark.parametrize(
    "setting",
    [{"window": 2}, {"last": 65}, {"rise": 0.9}, {"stay_points": 0}, {"negligible": -1.0}],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|last|rise"):
        LossDivergence.Config(**setting)  # type: ignore[arg-type]


def losses_of(path: Path) -> List[Optional[float]]:
    with path.open() as lines:
        return [float(row["loss"]) if row["loss"] else None for row in csv.DictReader(lines)]


@pytest.mark.skipif(not PUBLIC_RUNS.is_dir(), reason="the public runs lie beside the checkout")
def test_public_divergences_are_caught_and_healthy_runs_are_not_accused() -> None:
    caught: Dict[str, List[int]] = {}
    for run in json.loads((PUBLIC_RUNS / "index.json").read_text()):
        found = replay(losses_of(PUBLIC_RUNS / run["file"]))
        if run["label"] == "healthy":
            assert found == [], run["run_id"]
        worst = max((("ok", "warn", "critical").index(one.level) for one in found), default=0)
        caught.setdefault(run["label"], []).append(worst)
    assert caught["restart_jump"] == [2] * 4
    assert caught["spike"] == [2] * 7
    assert min(caught["diverged"]) >= 1
    assert caught["diverged"].count(2) >= 8
    assert max(caught["stalled"]) == 0
