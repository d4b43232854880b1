"""LossPlateau: a run that never learns, and the flat curves that are nobody's failure."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Tuple

import pytest

from plarv_processors.detectors.loss_plateau import LossPlateau
from plarv_processors.snapshot import dump, pack
from plarv_schemas.events import StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"

Row = Tuple[Optional[float], Optional[float]]  # loss, learning rate


def replay(rows: Iterable[Row], detector: Optional[LossPlateau] = None) -> List[Verdict]:
    detector = detector or LossPlateau()
    found: List[Verdict] = []
    for step, (loss, lr) in enumerate(rows):
        event = StepEvent("run", "s", step, 0, step, loss=loss, current_lr=lr)
        found.extend(detector.update(event))
    return found


def flat(level: float, noise: float, steps: int = 2000, seed: int = 1) -> List[float]:
    chance = random.Random(seed)
    return [level * math.exp(chance.gauss(0.0, noise)) for _ in range(steps)]


def rows(losses: Iterable[float], lr: Optional[float] = 1e-3) -> List[Row]:
    return [(loss, lr) for loss in losses]


def test_a_run_that_stays_at_chance_is_told_once() -> None:
    found = replay(rows(flat(math.log(1000.0), 0.004)))
    assert [(one.step, one.kind, one.level, one.state) for one in found] == [
        (255, "no_progress", "warn", "opened")
    ]


def test_a_run_that_gets_worse_before_it_stands_still_is_told_too() -> None:
    losses = [6.8 + 0.4 * (1.0 - math.exp(-step / 50)) for step in range(1000)]
    assert [one.kind for one in replay(rows(losses))] == ["no_progress"]


def test_a_run_that_only_learns_the_frequency_of_words_is_told() -> None:
    losses = [7.2 + 3.5 * math.exp(-step / 3) + 0.05 * math.sin(step) for step in range(1000)]
    assert [one.kind for one in replay(rows(losses))] == ["no_progress"]


def test_a_loss_alone_is_enough() -> None:
    assert len(replay(rows(flat(2.3, 0.004), lr=None))) == 1


def test_a_run_that_learns_again_is_resolved() -> None:
    losses = flat(6.9, 0.004, 400) + [6.9 * 0.995**step for step in range(300)]
    assert [one.state for one in replay(rows(losses))] == ["opened", "resolved"]


def test_a_run_that_came_down_and_flattened_has_converged() -> None:
    losses = [1.0 + 9.0 * math.exp(-step / 30) for step in range(3000)]
    assert replay(rows(losses)) == []


def test_slow_progress_is_progress() -> None:
    losses = [loss * (1 + step) ** -0.1 for step, loss in enumerate(flat(9.0, 0.01, 4000))]
    assert replay(rows(losses)) == []


def test_a_fine_tuning_whose_batches_differ_is_left_alone() -> None:
    assert replay(rows(flat(1.05, 0.06, 4000))) == []


def test_a_loss_that_rises_does_not_stand_still() -> None:
    assert replay(rows([21.0 * math.exp(step / 600) for step in range(3000)])) == []


def test_a_policy_gradient_loss_around_zero_is_left_alone() -> None:
    chance = random.Random(2)
    assert replay(rows([0.0 if k % 5 else abs(chance.gauss(0, 1e-3)) for k in range(3000)])) == []
    assert replay(rows([chance.gauss(-0.01, 0.03) for _ in range(3000)])) == []


@pytest.mark.parametrize("lr", [0.0, 1e-6])
def test_steps_that_cannot_learn_do_not_count(lr: float) -> None:
    warm: List[Row] = [(6.9, 1e-3)] * 64
    assert replay([*warm, *rows(flat(6.9, 0.004), lr=lr)]) == []


def test_less_than_256_losses_are_too_few() -> None:
    assert replay(rows(flat(2.3, 0.004, 255))) == []


def test_a_plateau_in_a_long_run_is_still_seen_against_its_first_quarter() -> None:
    losses = [10.0 - 3.0 * min(step, 2000) / 2000 for step in range(12_000)]
    found = replay(rows(losses))
    assert [one.kind for one in found] == ["no_progress"]
    assert 2000 * 3 < found[0].step < 12_000


def test_the_verdict_carries_what_it_was_decided_on() -> None:
    opened = replay(rows(flat(6.9, 0.004)))[0]
    numbers = opened.evidence
    assert opened.score == numbers["level"] / numbers["level_before"] > opened.threshold
    assert numbers["level"] > LossPlateau.Config().start_share * numbers["start"]
    assert numbers["noise"] <= LossPlateau.Config().quiet
    assert numbers["losses"] == 256.0
    assert "192 losses" in opened.message


def test_its_state_is_bounded_however_long_the_run() -> None:
    sizes = []
    for steps in (600, 20_000):
        detector = LossPlateau()
        replay(rows([9.0 * (1 + step) ** -0.1 for step in range(steps)]), detector)
        sizes.append(len(pack(dump(detector))))
    assert max(sizes) < 768


@pytest.mark.parametrize(
    "setting",
    [{"block": 2}, {"levels": 9}, {"min_points": 16}, {"progress": 1.0}, {"quiet": 0.0}],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        LossPlateau.Config(**setting)  # type: ignore[arg-type]


def number(cell: str) -> Optional[float]:
    return float(cell) if cell else None


@pytest.mark.skipif(not PUBLIC_RUNS.is_dir(), reason="the public runs lie beside the checkout")
def test_public_runs_that_never_learn_are_told_and_healthy_ones_are_not() -> None:
    for run in json.loads((PUBLIC_RUNS / "index.json").read_text()):
        with (PUBLIC_RUNS / run["file"]).open() as lines:
            found = replay(
                [(number(row["loss"]), number(row["lr"])) for row in csv.DictReader(lines)]
            )
        assert bool(found) == (run["label"] == "stalled"), run["run_id"]
        assert "critical" not in {one.level for one in found}
