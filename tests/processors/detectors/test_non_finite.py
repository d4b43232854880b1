"""NonFinite: what is lost, what a loss scaler skips, what masks a NaN, what comes before one."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import pytest

from plarv_processors.detectors.non_finite import NonFinite
from plarv_processors.snapshot import dump, pack
from plarv_schemas.events import StepEvent, Verdict

PUBLIC_RUNS = Path(__file__).parents[4] / "shared" / "data" / "public-runs"
NAN, INF = math.nan, math.inf

Row = Tuple[Optional[float], ...]  # loss, grad_norm, loss_scale; what is left out is absent
HEALTHY: List[Row] = [(2.0 + 0.01 * (k % 5), 1.0 + 0.1 * (k % 3)) for k in range(60)]


def replay(
    rows: Iterable[Row], detector: Optional[NonFinite] = None, rank: int = 0
) -> List[Verdict]:
    detector = detector or NonFinite()
    found: List[Verdict] = []
    for step, row in enumerate(rows):
        loss, grad, scale = (*row, None, None)[:3]
        event = StepEvent("run", "s", step, rank, step, loss=loss, grad_norm=grad, loss_scale=scale)
        found.extend(detector.update(event))
    return found


def marks(found: Iterable[Verdict]) -> List[Tuple[int, str, str, str]]:
    return [(one.step, one.kind, one.level, one.state) for one in found]


def scaled(scales: Sequence[float], grad: float = 1.0) -> List[Row]:
    return [(2.0, grad, scale) for scale in scales]


@pytest.mark.parametrize("lost", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_critical_at_once_and_dead_at_the_third(lost: float) -> None:
    assert marks(replay([*HEALTHY, *[(lost, 1.0)] * 10])) == [
        (60, "loss_non_finite", "critical", "opened"),
        (62, "dead", "critical", "escalated"),
    ]


def test_a_single_lost_loss_is_resolved_after_sixteen_calm_events() -> None:
    assert marks(replay([*HEALTHY, (NAN, 1.0), *HEALTHY])) == [
        (60, "loss_non_finite", "critical", "opened"),
        (76, "loss_non_finite", "ok", "resolved"),
    ]


def test_losses_lost_now_and_then_are_not_dead() -> None:
    found = replay([*HEALTHY, *[(NAN, 1.0), (NAN, 1.0), (2.0, 1.0)] * 5])
    assert {one.kind for one in found} == {"loss_non_finite"}


def test_a_validation_event_in_between_does_not_revive_a_dead_run() -> None:
    found = replay([(NAN, None), (None, None), (NAN, None), (None, None), (NAN, None)])
    assert marks(found)[-1] == (4, "dead", "critical", "escalated")


def test_a_nan_masked_as_zero_is_found_at_its_second_event() -> None:
    assert marks(replay([(0.2051, NAN), (0.0, NAN), (0.0, NAN), (0.0, NAN)])) == [
        (2, "masked_non_finite", "critical", "opened"),
        (3, "dead", "critical", "escalated"),
    ]


@pytest.mark.parametrize("grad", [0.5, 0.0, None])
def test_a_run_that_logs_zero_without_a_bad_gradient_is_healthy(grad: Optional[float]) -> None:
    assert replay([(0.0, grad) if k % 5 else (0.001, grad) for k in range(300)]) == []


def test_where_zero_is_a_usual_loss_it_masks_nothing() -> None:
    found = replay([*[(0.0, 0.5)] * 50, (0.0, NAN), (0.0, NAN), *[(0.0, 0.5)] * 20])
    assert {one.level for one in found} == {"warn", "ok"}


def test_a_scalers_lone_skips_are_silence() -> None:
    rows: List[Row] = [(2.0, NAN if k % 100 == 50 else 1.0) for k in range(1000)]
    assert replay(rows) == []


def test_gradients_that_are_lost_again_and_again_are_told_and_no_more() -> None:
    rows: List[Row] = [(2.0, NAN if k in (50, 58, 66) else 1.0) for k in range(100)]
    assert marks(replay(rows)) == [
        (58, "grad_non_finite", "warn", "opened"),
        (82, "grad_non_finite", "ok", "resolved"),
    ]


def test_five_skips_in_a_row_are_a_collapse() -> None:
    found = replay([*HEALTHY, *[(2.0, INF)] * 6])
    assert marks(found)[-1] == (64, "scaler_collapse", "critical", "escalated")
    assert found[-1].onset_step == 60


def test_a_scale_that_halves_five_times_is_a_collapse_though_the_gradient_is_repeated() -> None:
    falling = [65536.0 / 2**k for k in range(1, 6)]
    found = replay([*scaled([65536.0] * 30), *scaled(falling, grad=464441.887)])
    assert marks(found) == [
        (32, "grad_non_finite", "warn", "opened"),
        (34, "scaler_collapse", "critical", "escalated"),
    ]


def test_a_sparse_log_shows_several_halvings_at_once() -> None:
    found = replay([*scaled([65536.0] * 30), *scaled([1024.0])])
    assert marks(found) == [(30, "scaler_collapse", "critical", "opened")]


def test_a_scale_that_hunts_is_healthy() -> None:
    scales = [65536.0 if k % 50 < 25 else 32768.0 for k in range(500)]
    assert replay(scaled(scales)) == []


def test_a_scale_that_falls_below_one_is_a_collapse_and_one_that_was_always_there_is_not() -> None:
    assert marks(replay(scaled([4.0, 2.0, 1.0, 0.5])))[-1][1:3] == ("scaler_collapse", "critical")
    assert replay(scaled([0.5] * 100)) == []


def test_the_first_search_for_a_scale_may_take_long() -> None:
    searching: List[Row] = [(11.0, INF, 2.0 ** (32 - k)) for k in range(20)]
    assert replay([*searching, *[(11.0, 1.0, 4096.0)] * 100]) == []


def test_an_overflow_is_announced_before_it_comes() -> None:
    away: List[Row] = [(2.4, 3.0), (4.5, 40.0), (70.0, 9e3), (1e6, 1e9), (NAN, NAN)]
    assert marks(replay([*HEALTHY, *away])) == [
        (61, "overflow_ahead", "warn", "opened"),
        (64, "loss_non_finite", "critical", "escalated"),
    ]


def test_an_overflow_in_the_first_steps_is_announced_without_a_history() -> None:
    rows: List[Row] = [(0.339, 8.54), (0.335, 8.57), (14.0, 493.0), (54.6, 133.2), (203.7, 1822.3)]
    assert marks(replay(rows)) == [(2, "overflow_ahead", "warn", "opened")]


def test_a_huge_gradient_under_a_normal_loss_is_no_overflow() -> None:
    assert replay([*HEALTHY, (2.0, 11140.0), (2.0, 1.0)]) == []


def test_a_loss_that_jumps_under_a_normal_gradient_is_no_overflow() -> None:
    assert replay([*HEALTHY, (60.0, 1.2), (2.0, 1.0)]) == []


def test_a_runaway_that_turns_back_is_resolved() -> None:
    found = replay([*HEALTHY, (9.0, 400.0), *HEALTHY])
    assert [one.state for one in found] == ["opened", "resolved"]
    assert found[-1].step == 76


def test_ranks_are_judged_each_for_itself() -> None:
    detector = NonFinite()
    for rank in (0, 1):
        assert replay(HEALTHY, detector, rank) == []
    found = replay([(NAN, 1.0)], detector, rank=1) + replay([(2.0, 1.0)], detector, rank=0)
    assert [(one.rank, one.kind) for one in found] == [(1, "loss_non_finite")]


def test_a_further_rank_costs_less_than_half_a_kilobyte() -> None:
    detector = NonFinite()
    sizes = []
    for rank in range(9):
        replay(HEALTHY, detector, rank)
        sizes.append(len(pack(dump(detector))))
    assert (sizes[-1] - sizes[0]) / 8 < 512


def test_the_verdict_carries_what_it_was_decided_on() -> None:
    opened = replay([*HEALTHY, (9.0, 400.0)])[0]
    numbers = opened.evidence
    rise = math.log(numbers["grad_norm"] / numbers["usual_grad_norm"])
    assert rise / numbers["grad_deviation"] >= NonFinite.Config().overflow_z
    assert opened.score == pytest.approx(math.exp(rise))
    assert "400" in opened.message
    assert "rank 0" in opened.message


@pytest.mark.parametrize(
    "setting",
    [
        {"dead_losses": 1},
        {"scaled_skips": 9},
        {"calm": 0},
        {"memory": 1},
        {"overflow_rise": NAN},
        {"overflow_z": 0.0},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting: Dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|rise"):
        NonFinite.Config(**setting)  # type: ignore[arg-type]


def number(cell: Optional[str]) -> Optional[float]:
    return float(cell) if cell else None


def public_run(path: Path) -> List[Tuple[int, Row]]:
    with path.open() as lines:
        return [
            (
                int(float(row["step"])),
                (number(row["loss"]), number(row["grad_norm"]), number(row.get("loss_scale"))),
            )
            for row in csv.DictReader(lines)
        ]


@pytest.mark.skipif(not PUBLIC_RUNS.is_dir(), reason="the public runs lie beside the checkout")
def test_every_public_nan_is_found_at_its_step_and_no_healthy_run_is_accused() -> None:
    announced = 0
    for run in json.loads((PUBLIC_RUNS / "index.json").read_text()):
        if run["label"] not in ("healthy", "nan"):
            continue
        rows = public_run(PUBLIC_RUNS / run["file"])
        found = replay([row for _, row in rows])
        if run["label"] == "healthy":
            assert found == [], run["run_id"]
            continue
        critical = next(one for one in found if one.level == "critical")
        assert rows[critical.step][0] == run["failure_step"], run["run_id"]
        announced += found[0].kind == "overflow_ahead"
    assert announced >= 10
