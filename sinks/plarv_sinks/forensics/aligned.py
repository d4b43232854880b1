"""One row a step: what its ranks and reports say, brought together."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional, Sequence, Tuple

from plarv_schemas.events import SCALAR_COLUMNS

if TYPE_CHECKING:
    import polars as pl

__all__ = ["METRICS", "by_step", "last_of_each_step"]

METRICS: Tuple[str, ...] = tuple(
    name for name in SCALAR_COLUMNS if name not in ("time_ns", "world_size")
)
"""The columns that are numbers of the training, in wire order."""

_KEYS = ("attempt", "step")
PLACE_COLUMNS = ("attempt", "step", "rank", "ordinal")
"""What it takes of the table of steps beside the metrics."""


def by_step(
    steps: pl.DataFrame, metrics: Sequence[str] = METRICS, rank: Optional[int] = None
) -> pl.DataFrame:
    """One row an attempt's step, by step: ``attempt``, ``step``, ``ordinal`` and the metrics.

    A step that a rank reported twice has what it said last, column by column. Ranks are averaged,
    so a NaN of one is a NaN of all, unless ``rank`` names one. ``ordinal`` is of the last report.
    """
    import polars as pl

    wanted = [name for name in metrics if name in steps.columns]
    rows = steps if rank is None else steps.filter(pl.col("rank") == rank)
    rows = rows.with_columns(pl.col("attempt").fill_null(1), pl.col(wanted).cast(pl.Float64))
    of_a_rank = [*_KEYS, "rank"]
    if rows.select(of_a_rank).is_duplicated().any():
        last = [pl.col(name).drop_nulls().last() for name in wanted]
        rows = rows.group_by(of_a_rank, maintain_order=True).agg(pl.col("ordinal").last(), *last)
    if rows.get_column("rank").n_unique() > 1:
        means = [pl.col(name).mean() for name in wanted]
        rows = rows.group_by(_KEYS, maintain_order=True).agg(pl.col("ordinal").max(), *means)
    return rows.select(*_KEYS, "ordinal", *wanted).sort(_KEYS)


def last_of_each_step(rows: pl.DataFrame) -> pl.DataFrame:
    """Of the rows of :func:`by_step`, the last attempt's where a step repeats; by step."""
    columns: List[str] = rows.columns
    return rows.unique("step", keep="last", maintain_order=True).sort("step").select(columns)
