"""Two runs, or two attempts, side by side: what each had at the same step."""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional, Sequence

from plarv_sinks.forensics.aligned import METRICS

if TYPE_CHECKING:
    import polars as pl

__all__ = ["compared"]


def compared(
    mine: pl.DataFrame, other: pl.DataFrame, metrics: Optional[Sequence[str]] = None
) -> pl.DataFrame:
    """A row for every step that either has, by step.

    For each metric three columns: ``loss``, ``loss_other`` and ``loss_difference`` (the other
    subtracted); null where a step is missing on that side. Without ``metrics``, those that both
    have values of.
    """
    import polars as pl

    names = [name for name in metrics or METRICS if name in mine.columns and name in other.columns]
    if metrics is None:
        names = [name for name in names if _has_values(mine, name) and _has_values(other, name)]
    joined = mine.select("step", *names).join(
        other.select("step", *names), on="step", how="full", suffix="_other", coalesce=True
    )
    columns: List[pl.Expr] = [pl.col("step")]
    for name in names:
        difference = pl.col(name) - pl.col(f"{name}_other")
        columns += [pl.col(name), pl.col(f"{name}_other"), difference.alias(f"{name}_difference")]
    return joined.select(columns).sort("step")


def _has_values(rows: pl.DataFrame, name: str) -> bool:
    return rows.get_column(name).null_count() < rows.height
