"""The quality fold's laws: what lowers the score, what leaves no trace, what it never does."""

from __future__ import annotations

import ast
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, List, Optional, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plarv_schemas.events import StepEvent
from plarv_sinks import quality_bins, quality_fold, quality_samples
from plarv_sinks.quality_bins import StepBins
from plarv_sinks.quality_fold import ADQI, QualityConfig, QualityFold
from plarv_sinks.quality_samples import CopyCount, IdSketch, TrustCurve

NUM_STEPS = 200
BATCH = 16


def step_of(step: int, rank: int = 0, **columns: Any) -> StepEvent:
    return StepEvent("run", f"s{rank}", step, rank, step, **columns)


def score(events: Iterable[StepEvent]) -> ADQI:
    fold = QualityFold()
    for event in events:
        fold.add(event)
    return fold.score()


def total(found: ADQI) -> float:
    assert found.total is not None
    return found.total


def classifier(
    *, right: float = 1.0, by_heart: float = 0.0, passes: int = 1, seed: int = 0
) -> List[StepEvent]:
    """A calibrated classifier of ten labels; `by_heart` of its mistakes are known to it."""
    chance = random.Random(seed)
    events: List[StepEvent] = []
    for step in range(NUM_STEPS):
        samples: Dict[str, List[float]] = {"losses": [], "entropies": [], "sure": [], "right": []}
        for _ in range(BATCH):
            sure = right * chance.uniform(0.6, 0.999)
            other = (1.0 - sure) / 9.0
            agrees = chance.random() < sure or chance.random() < by_heart
            samples["losses"].append(-math.log(sure if agrees else other))
            entropy = -sure * math.log(sure) - 9.0 * other * math.log(other)
            samples["entropies"].append(entropy)
            samples["sure"].append(sure)
            samples["right"].append(agrees)
        first = step * BATCH % (NUM_STEPS * BATCH // passes)
        events.append(
            step_of(
                step,
                loss=math.fsum(samples["losses"]) / BATCH,
                grad_norm=1.0,
                sample_ids=tuple(range(first, first + BATCH)),
                sample_losses=tuple(samples["losses"]),
                sample_entropies=tuple(samples["entropies"]),
                sample_confidences=tuple(samples["sure"]),
                sample_correct=tuple(int(each) for each in samples["right"]),
            )
        )
    return events


def scalars(losses: Sequence[Optional[float]], norms: Optional[Sequence[float]] = None) -> ADQI:
    given_norms = norms or [1.0] * len(losses)
    return score(
        step_of(step, loss=loss, grad_norm=norm)
        for step, (loss, norm) in enumerate(zip(losses, given_norms))
    )


def test_fresh_data_with_right_labels_is_worth_almost_all() -> None:
    found = score(classifier())
    assert set(found.components) == {"unique", "spread", "surprise", "right"}
    assert found.components["unique"] == found.components["spread"] == 1.0
    assert total(found) > 0.9
    assert found.num_steps == NUM_STEPS


def test_wrong_labels_lower_the_score_each_time() -> None:
    totals = [total(score(classifier(right=right))) for right in (1.0, 0.9, 0.75, 0.5, 0.2)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 2.0 * totals[3]


def test_the_share_of_right_labels_is_told() -> None:
    found = score(classifier(right=0.75))
    assert found.components["right"] == pytest.approx(0.7, abs=0.06)
    assert found.components["surprise"] > 0.9  # wrong labels are no memorising


def test_ids_that_come_back_lower_the_score_each_time() -> None:
    totals = [total(score(classifier(passes=passes))) for passes in (1, 2, 10, 40, 100)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.25


def test_learning_by_heart_lowers_the_score_without_ids() -> None:
    totals = []
    for share in (0.0, 0.5, 0.9, 1.0):
        events = [event._replace(sample_ids=None) for event in classifier(by_heart=share)]
        totals.append(total(score(events)))
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.5 * totals[0]


def test_copies_with_different_ids_lower_the_score() -> None:
    chance = random.Random(1)
    margins = [chance.gauss(2.0, 1.0) for _ in range(60)]

    def events(known: Optional[int]) -> Iterable[StepEvent]:
        for step, event in enumerate(classifier()):
            drawn = [
                margins[chance.randrange(known)] if known else chance.gauss(2.0, 1.0)
                for _ in range(BATCH)
            ]
            yield event._replace(sample_margins=tuple(each + 0.01 * step for each in drawn))

    fresh, copied = score(events(None)), score(events(60))
    assert fresh.components["unique"] == 1.0
    assert copied.components["unique"] < 0.4
    assert "by copies" in copied.sentence


def test_values_of_sixteen_bits_are_no_copies() -> None:
    count = CopyCount()
    for _ in range(100):
        count.add([1.0 + place % 8 / 8.0 for place in range(32)])
    assert count.repeats() == 0.0


def test_epochs_tell_of_passes() -> None:
    once = score(step_of(step, epoch=step / 200) for step in range(200))
    often = score(step_of(step, epoch=step / 10) for step in range(200))
    assert once.components == {"unique": 1.0}
    assert total(often) < 0.7


def test_from_the_loss_alone_memorising_and_a_floor_both_cost() -> None:
    fresh = scalars([3.0 * (step + 1) ** -0.2 for step in range(400)])
    by_heart = scalars([3.0 * (step + 1) ** -0.2 / (1 + (step / 150) ** 4) for step in range(400)])
    noisy = scalars([2.8 + 0.2 * (step + 1) ** -0.2 for step in range(400)])
    assert total(fresh) > total(by_heart)
    assert total(fresh) > total(noisy)


def test_a_gradient_that_grows_while_the_loss_falls_costs() -> None:
    losses = [3.0 * (step + 1) ** -0.2 for step in range(400)]
    steady = scalars(losses)
    growing = scalars(losses, [1.0 + step / 200 for step in range(400)])
    assert total(growing) < total(steady)


@pytest.mark.parametrize("power", [-8, 1, 40])
def test_losses_and_gradients_times_a_power_of_two_change_nothing(power: int) -> None:
    chance = random.Random(power)
    losses = [3.0 * (step + 1) ** -0.3 + chance.gauss(0, 0.01) for step in range(300)]
    norms = [chance.uniform(0.5, 2.0) for _ in losses]
    scale = 2.0**power
    scaled = scalars([scale * loss for loss in losses], [scale * norm for norm in norms])
    assert scaled == scalars(losses, norms)


def test_ranks_may_come_in_any_order() -> None:
    events = classifier(right=0.8, passes=3)
    others = [event._replace(rank=1, session="s1") for event in classifier(right=0.7, seed=5)]
    apart = score([*events, *others])
    together = score([event for pair in zip(others, events) for event in pair])
    backwards = score([*reversed(others), *reversed(events)])
    whole = score(
        event._replace(sample_ids=None, parts=(event, other))
        for event, other in zip(events, others)
    )
    for found in (together, backwards, whole):
        assert found.components == pytest.approx(dict(apart.components), rel=1e-9)
        assert found.total == pytest.approx(total(apart), rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_what_is_not_finite_leaves_no_trace(value: float) -> None:
    clean = classifier(right=0.9)
    # A bin's width depends on the steps, so the broken records are of steps that are there.
    broken = step_of(
        0, loss=value, grad_norm=value, epoch=value, sample_losses=(value,) * 4,
        sample_entropies=(value,) * 4, sample_confidences=(value,) * 4, sample_correct=(1,) * 4,
        sample_margins=(value,) * 4,
    )  # fmt: skip
    spoilt: List[StepEvent] = []
    for event in clean:
        spoilt += [broken._replace(step=event.step), event]
    assert score(spoilt) == score(clean)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [step_of(0)],
        [step_of(0, loss=1.0, grad_norm=1.0, sample_losses=(1.0, 1.0), sample_ids=(1, 1))],
        [step_of(step, loss=math.nan, grad_norm=math.nan) for step in range(500)],
    ],
)
def test_with_nothing_to_judge_from_it_says_so(events: List[StepEvent]) -> None:
    found = score(events)
    assert found.total is None
    assert not found.components
    assert found.sentence.startswith("nothing to judge the data from in ")


def test_steps_that_go_back_are_judged_too() -> None:
    events = classifier()
    again = score([*events, *events[100:]])
    assert again.num_steps == NUM_STEPS
    assert 0.0 < total(again) < total(score(events))  # served again


def test_a_run_that_goes_on_late_is_judged_as_finely() -> None:
    late = [event._replace(step=event.step + 1_000_000) for event in classifier(right=0.9)]
    assert score(late).components["right"] == pytest.approx(
        score(classifier(right=0.9)).components["right"], abs=0.03
    )


def test_the_score_may_be_asked_on_the_way() -> None:
    fold = QualityFold()
    for event in classifier(passes=3):
        fold.score()
        fold.add(event)
    assert fold.score() == score(classifier(passes=3))


def test_the_state_is_bounded() -> None:
    bins, sketch = StepBins(), IdSketch(most=64)
    for step in range(0, 200_000, 7):
        bins.add(step_of(step, loss=1.0))
        sketch.add((step,))
    assert 64 < sum(len(quarter) for quarter in bins.quarters()) <= 128
    visits = sketch.visits()
    assert visits is not None
    assert visits.ids <= 64
    assert visits.per_id == 1.0


def test_beyond_its_size_the_sketch_still_counts_visits_well() -> None:
    sketch = IdSketch()
    for _ in range(3):
        sketch.add(range(20_000))
    sketch.add(range(10_000))
    visits = sketch.visits()
    assert visits is not None
    assert visits.per_id == pytest.approx(3.5, abs=0.1)


def test_uneven_visits_cost() -> None:
    sketch = IdSketch()
    sketch.add([0] * 900)
    sketch.add(range(100))
    visits = sketch.visits()
    assert visits is not None
    assert visits.evenness < 0.05


def test_trust_curves_add_up() -> None:
    first, second, both = TrustCurve(), TrustCurve(), TrustCurve()
    for curve in (first, both):
        curve.add((0.5, 0.9, None, math.nan, 2.0), (1, 0, 1, 1, 1))
    for curve in (second, both):
        curve.add((0.99, 1.0), (1, 0))
    first.merge(second)
    assert (first.samples, first.wrong, first.doubt) == (both.samples, both.wrong, both.doubt)
    assert first.agreement(0.25) == both.agreement(0.25) == 0.0
    assert first.agreement(0.5) == 0.5


@pytest.mark.parametrize("module", [quality_fold, quality_bins, quality_samples])
def test_the_fold_is_pure(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    standard = {"__future__", "array", "bisect", "dataclasses", "math", "typing"}
    ours = {"plarv_schemas.events", "plarv_sinks.quality_bins", "plarv_sinks.quality_samples"}
    assert imported <= standard | ours


numbers = st.one_of(st.none(), st.floats(width=32), st.floats())
lists = st.one_of(st.none(), st.lists(st.floats(), max_size=6).map(tuple))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            step_of,
            st.integers(-(2**63), 2**63 - 1),
            loss=numbers, grad_norm=numbers, epoch=numbers, sample_losses=lists,
            sample_entropies=lists, sample_confidences=lists, sample_margins=lists,
            sample_ids=st.one_of(st.none(), st.lists(st.integers(), max_size=6).map(tuple)),
            sample_correct=st.one_of(st.none(), st.lists(st.integers(0, 2), max_size=6).map(tuple)),
        ),
        max_size=200,
    )
)  # fmt: skip
def test_it_never_raises_and_stays_between_0_and_1(events: List[StepEvent]) -> None:
    fold = QualityFold(QualityConfig(min_samples=8, min_ids=8, min_steps=8))
    for event in events:
        fold.add(event)
    found = fold.score()
    assert found.total is None or 0.0 <= found.total <= 1.0
    assert all(0.0 <= value <= 1.0 for value in found.components.values())


@pytest.mark.parametrize(
    "given_config",
    [
        {"drift": 0.5},
        {"lag": -1.0},
        {"slow_rate": 2.0},
        {"min_samples": 1},
        {"surest": 0.0},
        {"learned_weight": 1.5},
        {"repeat_life": 0.0},
    ],
)
def test_a_config_without_sense_is_refused(given_config: Dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given_config))):
        QualityConfig(**given_config)
