from __future__ import annotations

import math
from typing import Any, List

from plarv_processors.complete_steps import CompleteSteps
from plarv_schemas.events import StepEvent


def event(rank: int, step: int, world_size: int = 2, **columns: Any) -> StepEvent:
    return StepEvent("run", f"s{rank}", step, rank, step, world_size=world_size, **columns)


def feed(steps: CompleteSteps, events: List[StepEvent]) -> List[StepEvent]:
    return [out for given in events for out in steps.add(given)]


def test_one_rank_passes_through_untouched() -> None:
    steps, given = CompleteSteps(), event(0, 3, world_size=1, loss=1.0)
    assert steps.add(given) == (given,)
    assert steps.add(given)[0] is given


def test_a_step_is_complete_when_all_ranks_have_reported_it() -> None:
    steps = CompleteSteps()
    assert steps.add(event(0, 0, loss=1.0, step_time_ms=10.0, batch_size=4)) == ()
    (joined,) = steps.add(event(1, 0, loss=3.0, step_time_ms=30.0, batch_size=4))
    assert (joined.rank, joined.loss, joined.step_time_ms, joined.batch_size) == (0, 2.0, 30.0, 8)
    assert [part.rank for part in joined.parts] == [0, 1]


def test_the_order_in_which_ranks_arrive_changes_nothing() -> None:
    forward, backward = CompleteSteps(), CompleteSteps()
    ranks = [event(rank, 0, world_size=3, loss=0.1 * rank) for rank in range(3)]
    assert feed(forward, ranks) == feed(backward, ranks[::-1])


def test_a_rank_that_stays_away_is_waited_for_a_fixed_number_of_steps() -> None:
    steps = CompleteSteps()
    out = feed(steps, [event(0, step, loss=float(step)) for step in range(20)])
    assert [joined.step for joined in out] == list(range(12))
    assert all(len(joined.parts) == 1 for joined in out)


def test_a_rank_that_comes_back_late_does_not_bring_a_step_up_again() -> None:
    steps = CompleteSteps()
    feed(steps, [event(0, step, loss=1.0) for step in range(20)])
    assert feed(steps, [event(1, 3, loss=1.0)]) == []
    out = feed(steps, [event(1, 15, loss=3.0)])
    assert [(joined.step, len(joined.parts)) for joined in out] == [
        (12, 1),
        (13, 1),
        (14, 1),
        (15, 2),
    ]


def test_a_non_finite_loss_on_one_rank_makes_the_mean_non_finite() -> None:
    for bad in (math.nan, math.inf):
        steps = CompleteSteps()
        (joined,) = feed(steps, [event(0, 0, loss=1.0), event(1, 0, loss=bad)])
        assert joined.loss is not None
        assert not math.isfinite(joined.loss)
    steps = CompleteSteps()
    (joined,) = feed(steps, [event(0, 0, loss=math.inf), event(1, 0, loss=-math.inf)])
    assert joined.loss is not None
    assert math.isnan(joined.loss)


def test_a_second_report_of_a_step_adds_what_the_first_left_out() -> None:
    steps = CompleteSteps()
    out = feed(
        steps,
        [event(0, 0, loss=1.0), event(0, 0, loss=9.0, val_loss=2.0), event(1, 0, loss=1.0)],
    )
    assert [(joined.loss, joined.val_loss) for joined in out] == [(1.0, 2.0)]


def test_an_evaluation_on_its_own_comes_from_rank_zero_alone() -> None:
    steps = CompleteSteps()
    out = feed(steps, [event(0, 5, val_loss=1.0), event(1, 5, val_loss=1.0)])
    assert [joined.val_loss for joined in out] == [1.0]


def test_the_local_report_is_the_worst_and_samples_stay_with_their_rank() -> None:
    steps = CompleteSteps()
    (joined,) = feed(
        steps,
        [
            event(0, 0, local_levels=(0, 2), local_layers=("a",), sample_losses=(1.0,)),
            event(1, 0, local_levels=(1, 0), local_layers=("b", "a")),
        ],
    )
    assert joined.local_levels == (1, 2)
    assert joined.local_layers == ("a", "b")
    assert joined.sample_losses is None
