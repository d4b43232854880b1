"""What is worth a line about a run's steps: where they begin, turn, stop being numbers and end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterator, List, NamedTuple, Optional

from plarv_sinks.forensics.aligned import by_step
from plarv_sinks.forensics.sentences import number

if TYPE_CHECKING:
    import polars as pl

__all__ = ["FACT_COLUMNS", "StepFact", "missing_ends", "step_facts"]

FACT_COLUMNS = (
    "attempt", "step", "rank", "ordinal", "time_ns", "loss", "grad_norm", "current_lr", "val_loss",
)  # fmt: skip
"""The columns of steps that it reads."""

_MOST = 20  # facts of one kind in an attempt; the rest is counted
_RATE_FACTOR = 2.0  # from one step to the next, for a learning rate to be worth a line
_RATE_SHARE = 0.1  # of the highest; below, a warm-up's first steps double as they must
_PAUSE_S = 60.0  # and as many times the usual step, for a gap to be worth a line
_PAUSE_STEPS = 20.0
_CLOCK_S = 30.0  # that two ranks' clocks may differ at the same step


class StepFact(NamedTuple):
    """One line of a timeline about steps."""

    ordinal: Optional[int]
    time_ns: Optional[int]
    attempt: int
    rank: Optional[int]
    step: int
    kind: str
    text: str


def step_facts(steps: pl.DataFrame) -> Iterator[StepFact]:
    """The notable facts of each attempt, not in order; a few dozen however long the run is."""
    import polars as pl

    if steps.is_empty():
        return
    steps = steps.with_columns(pl.col("attempt").fill_null(1))
    numbers = ("loss", "grad_norm", "current_lr", "val_loss")
    joined = by_step(steps, numbers)
    for attempt in sorted(steps.get_column("attempt").unique().to_list()):
        rows = steps.filter(pl.col("attempt") == attempt)
        means = joined.filter(pl.col("attempt") == attempt)
        yield from _ends(rows)
        yield from _extremes(means)
        yield from _stretches(rows)
        yield from _rates(means)
        yield from _pauses(rows)
        yield from _clocks(rows)


def missing_ends(steps: pl.DataFrame, started: bool, ended: bool) -> Iterator[StepFact]:
    """A line where the log has no start of the run, or no end, beside the steps nearest to it."""
    if steps.is_empty():
        return
    if not started:
        text = "the run's start is not recorded"
        yield _fact(steps.row(0, named=True), "no_start", text)
    if not ended:
        text = "the run's end is not recorded: it still runs, was killed, or its end was lost"
        yield _fact(steps.row(-1, named=True), "no_end", text)


def _ends(rows: pl.DataFrame) -> Iterator[StepFact]:
    first, last = rows.row(0, named=True), rows.row(-1, named=True)
    ranks = rows.get_column("rank").n_unique()
    who = f", {ranks} ranks" if ranks > 1 else ""
    text = f"attempt {first['attempt']} begins at step {first['step']}{who}: {_levels(first)}"
    yield _fact(first, "first_step", text, first["rank"])
    text = f"attempt {last['attempt']} has its last step, {last['step']}: {_levels(last)}"
    yield _fact(last, "last_step", text, last["rank"])


def _levels(row: Dict[str, Any]) -> str:
    return f"loss {number(row['loss'])}, learning rate {number(row['current_lr'])}"


def _extremes(means: pl.DataFrame) -> Iterator[StepFact]:
    import polars as pl

    wanted = (("loss", "lowest"), ("val_loss", "lowest"), ("grad_norm", "highest"))
    for column, which in wanted:
        finite = means.filter(pl.col(column).is_finite())
        if finite.is_empty():
            continue
        values = finite.get_column(column)
        place = values.arg_min() if which == "lowest" else values.arg_max()
        row = finite.row(place or 0, named=True)
        text = f"{which} {_words(column)} of the attempt: {number(row[column])}"
        yield _fact(row, f"{which}_{column}", text)


def _stretches(rows: pl.DataFrame) -> Iterator[StepFact]:
    """Where loss or gradient norm are NaN or infinite, each stretch of a rank in one line."""
    import polars as pl

    for column in ("loss", "grad_norm"):
        for key, mine in _by_rank(rows.filter(pl.col(column).is_not_null())):
            odd = ~mine.get_column(column).is_finite()
            if not odd.any():
                continue
            runs = mine.with_columns(odd=odd, stretch=odd.rle_id()).filter(pl.col("odd"))
            spans = runs.group_by("stretch", maintain_order=True).agg(
                pl.all().exclude("odd").first(),
                last=pl.col("step").last(),
                count=pl.len(),
            )
            yield from _told(spans, f"non_finite_{column}", column, key)


def _told(spans: pl.DataFrame, kind: str, column: str, rank: int) -> Iterator[StepFact]:
    for row in spans.head(_MOST).iter_rows(named=True):
        value = "NaN" if row[column] != row[column] else "infinite"
        text = f"{_words(column)} is {value}"
        if row["count"] > 1:
            text += f", and not finite up to step {row['last']} ({row['count']:,} reports)"
        yield _fact(row, kind, text, rank)
    if spans.height > _MOST:
        row = spans.row(-1, named=True)
        more = spans.height - _MOST
        text = f"{_words(column)} was not finite in {more:,} further stretches; this is the last"
        yield _fact(row, kind, text, rank)


def _rates(means: pl.DataFrame) -> Iterator[StepFact]:
    """Where the learning rate jumps from one step to the next."""
    import polars as pl

    rates = means.filter(pl.col("current_lr") > 0.0).with_columns(
        before=pl.col("current_lr").shift(1)
    )
    ratio = pl.col("current_lr") / pl.col("before")
    jumped = (ratio >= _RATE_FACTOR) | (ratio <= 1.0 / _RATE_FACTOR)
    loud = pl.max_horizontal("current_lr", "before") >= _RATE_SHARE * pl.col("current_lr").max()
    jumps = rates.filter(jumped & loud)
    for row in jumps.head(_MOST).iter_rows(named=True):
        text = f"learning rate {number(row['before'])} -> {number(row['current_lr'])}"
        yield _fact(row, "learning_rate", text)


def _pauses(rows: pl.DataFrame) -> Iterator[StepFact]:
    """The longest times without a step, by the clock of the first rank alone."""
    import polars as pl

    if rows.get_column("time_ns").null_count() == rows.height:
        return
    first = rows.get_column("rank").min()
    mine = rows.filter((pl.col("rank") == first) & pl.col("time_ns").is_not_null())
    mine = mine.with_columns(gap=(pl.col("time_ns") - pl.col("time_ns").shift(1)) * 1e-9)
    usual: Any = mine.get_column("gap").median()
    if usual is None:
        return
    limit = max(_PAUSE_S, _PAUSE_STEPS * usual)
    long = mine.filter(pl.col("gap") > limit).top_k(5, by="gap")
    for row in long.iter_rows(named=True):
        text = f"{row['gap']:,.0f} s since the step before; {usual:.3g} s are usual"
        yield _fact(row, "pause", text, row["rank"])
    back = mine.filter(pl.col("gap") < -1.0)
    if not back.is_empty():
        row = back.row(0, named=True)
        text = f"the clock goes back by {-row['gap']:,.0f} s; the log's order is the true one"
        yield _fact(row, "clock", text, row["rank"])


def _clocks(rows: pl.DataFrame) -> Iterator[StepFact]:
    """Ranks whose clocks disagree with the first rank's: times tell no order between them."""
    import polars as pl

    ranks: List[int] = sorted(rows.get_column("rank").unique().to_list())
    if len(ranks) < 2:
        return
    times = rows.filter(pl.col("time_ns").is_not_null())
    lowest = times.filter(pl.col("rank") == ranks[0]).select("step", mine="time_ns")
    both = times.filter(pl.col("rank") != ranks[0]).join(lowest, on="step")
    apart = both.group_by("rank").agg(
        pl.col("step", "ordinal", "attempt", "time_ns").first(),
        apart=(pl.col("time_ns") - pl.col("mine")).median() * 1e-9,
    )
    for row in apart.filter(pl.col("apart").abs() > _CLOCK_S).sort("rank").iter_rows(named=True):
        where = "ahead of" if row["apart"] > 0 else "behind"
        text = f"the clock of rank {row['rank']} is {abs(row['apart']):,.0f} s {where}"
        yield _fact(row, "clock", f"{text} that of rank {ranks[0]}", row["rank"])


def _by_rank(rows: pl.DataFrame) -> Iterator[Any]:
    for (rank,), mine in rows.group_by("rank", maintain_order=True):
        yield rank, mine


def _fact(row: Dict[str, Any], kind: str, text: str, rank: Optional[int] = None) -> StepFact:
    time_ns = row.get("time_ns")
    return StepFact(row["ordinal"], time_ns, row["attempt"], rank, row["step"], kind, text)


def _words(column: str) -> str:
    return {"grad_norm": "gradient norm", "val_loss": "validation loss"}.get(column, column)
