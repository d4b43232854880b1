"""ADQI over data frames, and over models that were really trained."""

from __future__ import annotations

import math
from typing import Any, Dict, Iterator, List

import pytest

from plarv_schemas.events import StepEvent
from plarv_sinks.quality_fold import ADQI, QualityFold

pl: Any = pytest.importorskip("polars")

from plarv_sinks.adqi import adqi  # noqa: E402


def columns(count: int = 300) -> Dict[str, List[Any]]:
    return {
        "step": list(range(count)),
        "loss": [2.0 / (1 + step) ** 0.2 for step in range(count)],
        "grad_norm": [1.0] * count,
        "epoch": [step / 100 for step in range(count)],
        "sample_ids": [[step % 100 * 4 + place for place in range(4)] for step in range(count)],
        "sample_losses": [[0.1, 0.2, 0.3, 2.0 + step] for step in range(count)],
        "sample_entropies": [[0.5, 0.5, 0.5, 2.0 + step] for step in range(count)],
        "sample_confidences": [[0.9, 0.8, 0.9, 0.4]] * count,
        "sample_correct": [[1, 1, 0, 0]] * count,
        "sample_margins": [[1.0, 2.0, -1.0, -2.0]] * count,
    }


def folded(given: Dict[str, List[Any]]) -> ADQI:
    fold = QualityFold()
    for row in range(len(given["step"])):
        values: Dict[str, Any] = {
            name: tuple(column[row]) if isinstance(column[row], list) else column[row]
            for name, column in given.items()
        }
        fold.add(StepEvent("run", "s", row, 0, **values))
    return fold.score()


def test_it_says_what_the_fold_says() -> None:
    assert adqi(pl.DataFrame(columns())) == folded(columns())


def test_columns_that_it_does_not_know_are_passed_over() -> None:
    frame = pl.DataFrame(columns()).with_columns(run_id=pl.lit("a"), note=pl.lit("b"))
    assert adqi(frame) == adqi(pl.DataFrame(columns()))


@pytest.mark.parametrize("kept", [["step", "loss"], ["loss"], ["sample_ids"], ["epoch"]])
def test_some_columns_are_enough(kept: List[str]) -> None:
    assert adqi(pl.DataFrame(columns()).select(kept)).total is not None


def test_an_empty_frame_gives_a_sentence() -> None:
    for frame in (pl.DataFrame(), pl.DataFrame({"step": []}), pl.DataFrame({"note": ["a"]})):
        found = adqi(frame)
        assert found.total is None
        assert found.sentence.startswith("nothing to judge")


def test_nulls_and_nans_are_left_out() -> None:
    given = columns()
    spoilt = {name: [*column, None] for name, column in given.items()}
    assert adqi(pl.DataFrame(spoilt, strict=False)) == adqi(pl.DataFrame(given))
    nothing = pl.DataFrame(given).with_columns(
        pl.lit(math.nan).alias("loss"),
        pl.lit([None, math.nan], dtype=pl.List(pl.Float64)).alias("sample_losses"),
    )
    assert adqi(nothing).total is not None


def test_columns_of_a_wrong_type_are_passed_over() -> None:
    frame = pl.DataFrame(columns()).with_columns(
        loss=pl.struct("step"), sample_losses=pl.lit("x"), sample_ids=pl.lit(True),
        step=pl.lit("first"),
    )  # fmt: skip
    assert set(adqi(frame).components) >= {"unique", "right"}


def test_two_runs_are_refused() -> None:
    frame = pl.concat(
        [pl.DataFrame(columns()).with_columns(run_id=pl.lit(name)) for name in ("a", "b")]
    )
    with pytest.raises(ValueError, match="one run, these steps are of 2"):
        adqi(frame)


@pytest.fixture
def one_thread() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other
    yield
    torch.set_num_threads(before)


def trained(unique: float, right: float) -> Any:
    """A small classifier on overlapping clusters, as a frame of what Argus records."""
    torch: Any = pytest.importorskip("torch")
    functional = torch.nn.functional
    num_steps, batch = 300, 32
    chance = torch.Generator().manual_seed(3)
    torch.default_generator.manual_seed(4)
    count = round(unique * num_steps * batch)
    centres = 1.2 * torch.randn(5, 8, generator=chance)
    labels = torch.randint(0, 5, (count,), generator=chance)
    inputs = centres[labels] + torch.randn(count, 8, generator=chance)
    shift = torch.randint(1, 5, (count,), generator=chance)
    labels = (labels + shift * (torch.rand(count, generator=chance) > right)) % 5
    passes = math.ceil(1 / unique)
    order = torch.cat([torch.randperm(count, generator=chance) for _ in range(passes)])
    model = torch.nn.Sequential(torch.nn.Linear(8, 128), torch.nn.ReLU(), torch.nn.Linear(128, 5))
    rows: List[Dict[str, Any]] = []
    for step in range(num_steps):
        ids = order[step * batch : (step + 1) * batch]
        logits = model(inputs[ids])
        losses = functional.cross_entropy(logits, labels[ids], reduction="none")
        losses.mean().backward()
        with torch.no_grad():  # torch.optim takes seconds to import
            for weight in model.parameters():
                weight -= 0.5 * weight.grad
                weight.grad = None
        chances = logits.detach().softmax(-1)
        rows.append(
            {
                "step": step,
                "loss": losses.mean().item(),
                "sample_losses": losses.tolist(),
                "sample_entropies": (-chances * chances.log()).sum(-1).tolist(),
                "sample_confidences": chances.amax(-1).tolist(),
                "sample_correct": (chances.argmax(-1) == labels[ids]).int().tolist(),
            }
        )
    return pl.DataFrame(rows)


@pytest.mark.usefixtures("one_thread")
def test_trained_models_tell_good_data_from_repeated_and_from_mislabelled() -> None:
    good, repeated, worse = trained(1.0, 1.0), trained(0.01, 1.0), trained(1.0, 0.7)
    totals = [adqi(frame).total or 0.0 for frame in (good, repeated, worse)]
    assert totals[0] > 0.8
    assert totals[1] < 0.6  # without ids: it was learned by heart
    assert totals[2] < 0.6
    assert adqi(worse).components["right"] == pytest.approx(0.7, abs=0.08)
