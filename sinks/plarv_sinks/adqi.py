"""The quality of a run's training data, judged from its stored steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Tuple

from plarv_schemas.events import StepEvent
from plarv_sinks.quality_fold import ADQI, QualityFold

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ADQI", "adqi"]

_SCALARS = ("epoch", "loss", "grad_norm")
_NUMBERS = ("sample_losses", "sample_confidences", "sample_margins", "sample_entropies")
_INTEGERS = ("sample_ids", "sample_correct")
_SLICE = 65_536  # rows that are Python objects at a time


def adqi(steps: pl.DataFrame) -> ADQI:
    """How good the training data of one run was, in 0-1, with its components and a sentence.

    ``steps`` has the columns of :class:`~plarv_schemas.events.StepEvent` by name, any of them, in
    any order of rows; others are passed over, and so is a column that holds no numbers. Without
    ``step`` the rows count as steps; rows whose step is null are left out. With a column
    ``attempt`` the newest one alone is judged. How it is judged, and what the components mean:
    :class:`~plarv_sinks.quality_fold.QualityFold`.

    It cannot know:

    - whether the labels are wrong or the subject is unpredictable, where ``sample_correct`` and
      ``sample_confidences`` are not given: then wrong labels move the total by a fifth at most;
    - labels that are wrong by a rule (one class always named as another): the model learns the
      rule, and the labels agree with it; nor wrong labels that were all learned by heart;
    - whether the data is about the right thing, covers what the model will meet, is biased, or has
      leaked from the test set: no trajectory shows that;
    - copies with different ids that never meet in one batch and are too many to be learned by
      heart; nor texts that are alike but not the same;
    - from loss and gradient norm alone, whether a loss that falls very fast was memorised or the
      task is easy and suddenly understood (on such a task of the benchmark it ordered the shares of
      right labels backwards, correlation -0.8), and what a change of the learning rate did;
    - how much had been learned before the first step: a fine-tuned model starts low, and
      *learned* is then too small;
    - whether losses and entropies mean the same: both must be in the same unit (label smoothing,
      other losses than cross entropy, dropout in one of them only mislead *surprise*).

    So compare totals of runs of one task, model and set of signals; across tasks they say little.

    Raises:
        ValueError: ``steps`` holds more than one ``run_id``.

    Cost: 3.5 s a million rows of scalars, 60 s with 32 samples of all signals each.

    >>> import polars as pl
    >>> found = adqi(pl.DataFrame({"loss": [0.19] * 500, "sample_ids": [list(range(32))] * 500}))
    >>> {name: round(value, 2) for name, value in found.components.items()}
    {'unique': 0.03, 'spread': 1.0, 'pace': 1.0, 'learned': 0.0}
    >>> print(found.sentence)  # doctest: +NORMALIZE_WHITESPACE
    data quality 0.03 of 1 after 500 steps: by their ids a sample was served 500 times; the loss
    fell at most as step^-0; the loss of unseen samples fell by an estimated 0%
    >>> adqi(pl.DataFrame({"step": [0], "loss": [2.0]})).total is None
    True
    """
    if "run_id" in steps.columns and steps["run_id"].n_unique() > 1:
        raise ValueError(f"adqi judges one run, these steps are of {steps['run_id'].n_unique()}")
    if "attempt" in steps.columns:
        steps = steps.filter(steps["attempt"] == steps["attempt"].max())
    fold = QualityFold()
    for event in _events(steps):
        fold.add(event)
    return fold.score()


def _events(steps: pl.DataFrame) -> Iterator[StepEvent]:
    columns = _readable(steps)
    places = [StepEvent._fields.index(name) for name in columns.columns]
    row: List[Any] = ["", "", 0, 0, 0, *[None] * (len(StepEvent._fields) - 5)]
    row[-1] = ()  # parts
    for part in columns.iter_slices(_SLICE):
        values: Tuple[Any, ...]
        for values in part.iter_rows():
            for place, value in zip(places, values):
                row[place] = value
            yield StepEvent(*row)


def _readable(steps: pl.DataFrame) -> pl.DataFrame:
    """The columns that the fold reads, in the types it expects."""
    import polars as pl

    kinds: Dict[str, Any] = {"step": pl.Int64()}
    kinds.update({name: pl.Float64() for name in _SCALARS})
    kinds.update({name: pl.List(pl.Float64()) for name in _NUMBERS})
    kinds.update({name: pl.List(pl.Int64()) for name in _INTEGERS})
    if "step" not in steps.columns or not _is_like(steps["step"].dtype, pl.Int64()):
        steps = steps.drop("step", strict=False).with_row_index("step")
    kept: List[pl.Series] = []
    for name, kind in kinds.items():
        if name not in steps.columns or not _is_like(steps[name].dtype, kind):
            continue
        kept.append(steps[name].cast(kind, strict=False))
    return pl.DataFrame(kept).filter(pl.col("step").is_not_null())


def _is_like(given: pl.DataType, wanted: pl.DataType) -> bool:
    """Numbers for a number, a list of numbers for such a list; a column of nulls is either."""
    import polars as pl

    if isinstance(wanted, pl.List):
        if not isinstance(given, (pl.List, pl.Array)):
            return False
        given = given.inner if isinstance(given.inner, pl.DataType) else given.inner()
    return given.is_numeric() or given in (pl.Boolean(), pl.Null())
