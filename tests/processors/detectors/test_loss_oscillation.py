"""LossOscillation: a loss that alternates or swings ever further, and noise that does not."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

import pytest

from plarv_processors.detectors.loss_oscillation import LossOscillation
from plarv_processors.snapshot import dump, pack
from plarv_schemas.events import StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"


def replay(
    losses: Iterable[Optional[float]], detector: Optional[LossOscillation] = None
) -> List[Verdict]:
    detector = detector or LossOscillation()
    found: List[Verdict] = []
    for step, loss in enumerate(losses):
        found.extend(detector.update(StepEvent("run", "s", step, 0, step, loss=loss)))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[str, str, str]]:
    return [(one.kind, one.level, one.state) for one in found]


def descent(steps: int, noise: float = 0.03, seed: int = 1) -> List[float]:
    chance = random.Random(seed)
    return [
        (2.0 + 3.0 * math.exp(-step / 200)) * math.exp(chance.gauss(0.0, noise))
        for step in range(steps)
    ]


def alternating(losses: List[float], start: int, swing: float, stop: int = 10**9) -> List[float]:
    return [
        loss * (1.0 + swing * (-1) ** step if start <= step < stop else 1.0)
        for step, loss in enumerate(losses)
    ]


@pytest.mark.parametrize("swing", [0.06, 0.1, 0.4])
def test_a_loss_that_begins_to_alternate_is_told_within_128_steps(swing: float) -> None:
    found = replay(alternating(descent(1500), 1000, swing))
    assert marks(found) == [("period_two", "warn", "opened")]
    assert 1000 < found[0].step < 1128


def test_it_is_resolved_when_the_loss_is_smooth_again() -> None:
    found = replay(alternating(descent(2000), 1000, 0.2, stop=1400))
    assert marks(found) == [("period_two", "warn", "opened"), ("period_two", "ok", "resolved")]
    assert 1400 < found[-1].step < 1600


def test_a_loss_that_alternates_by_design_is_left_alone() -> None:
    assert replay(alternating(descent(4000), 0, 0.1)) == []


def test_the_tiny_swings_of_full_batch_descent_are_left_alone() -> None:
    assert replay(alternating(descent(3000, noise=1e-4), 1000, 0.003)) == []


def test_swings_that_grow_are_told_and_critical_when_they_go_on_growing() -> None:
    losses = [
        loss * math.exp(0.02 * math.exp(min(step - 1000, 500) / 100) * math.sin(1.3 * step))
        if step > 1000
        else loss
        for step, loss in enumerate(descent(1600, noise=0.02))
    ]
    assert marks(replay(losses)) == [
        ("growing", "warn", "opened"),
        ("growing", "critical", "escalated"),
    ]


def test_swings_that_grow_once_become_the_new_normal() -> None:
    chance = random.Random(3)
    losses = [
        2.0 * math.exp(chance.gauss(0.0, 0.02 if step < 1000 else 0.08)) for step in range(3000)
    ]
    assert marks(replay(losses)) == [("growing", "warn", "opened"), ("growing", "ok", "resolved")]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 1.0])
def test_noise_alone_raises_nothing(noise: float) -> None:
    for seed in range(3):
        assert replay(descent(4000, noise, seed)) == []


def test_a_loss_with_two_levels_at_random_raises_nothing() -> None:
    chance = random.Random(4)
    assert replay([3.0 if chance.random() < 0.6 else 5.0 for _ in range(4000)]) == []


@pytest.mark.parametrize("jump", [[9.0], [9.0, 8.0, 7.0], [0.1]])
def test_a_jump_is_no_oscillation(jump: List[float]) -> None:
    assert replay([*descent(1000), *jump, *descent(1000)[500:]]) == []


def test_a_restart_is_no_oscillation() -> None:
    assert replay([*descent(1000), *descent(1000, seed=2)]) == []


def test_losses_below_zero_are_silence_and_close_what_is_open() -> None:
    assert replay([(-1) ** step * 0.1 for step in range(2000)]) == []
    found = replay(
        [*alternating(descent(1200), 900, 0.2), -1.0, *alternating(descent(500), 0, 0.3)]
    )
    assert [one.state for one in found] == ["opened", "resolved"]


def test_the_verdict_carries_what_it_was_decided_on() -> None:
    opened = replay(alternating(descent(1500), 1000, 0.2))[0]
    numbers, config = opened.evidence, LossOscillation.Config()
    assert numbers["swing"] >= config.onset_ratio * numbers["swing_calmest"]
    assert opened.score == -numbers["autocorrelation"] > 0.0
    assert "alternates" in opened.message


def test_its_state_is_small() -> None:
    detector = LossOscillation()
    replay(descent(3000), detector)
    assert len(pack(dump(detector))) < 768


@pytest.mark.parametrize(
    "setting",
    [{"block": 4}, {"recent": 1}, {"alternating": -0.1}, {"growth": math.nan}, {"adopt_blocks": 0}],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|block|alternating"):
        LossOscillation.Config(**setting)  # type: ignore[arg-type]


@pytest.mark.skipif(not PUBLIC_RUNS.is_dir(), reason="the public runs lie beside the checkout")
def test_no_healthy_public_run_is_accused() -> None:
    for run in json.loads((PUBLIC_RUNS / "index.json").read_text()):
        if run["label"] != "healthy":
            continue
        with (PUBLIC_RUNS / run["file"]).open() as lines:
            losses = [float(row["loss"]) if row["loss"] else None for row in csv.DictReader(lines)]
        assert replay(losses) == [], run["run_id"]
