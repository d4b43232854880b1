"""A store as people look at it: its runs in one frame, and each run by its id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Union

from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import LEVELS
from plarv_sinks.forensics import markup
from plarv_sinks.forensics.extras import require
from plarv_sinks.forensics.run import Run
from plarv_sinks.forensics.sentences import number
from plarv_sinks.store import Store
from plarv_sinks.store_runs import RunRow

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Forensics"]

_SHOWN = 30


class Forensics:
    """Opens a store for reading; it may be written and compacted meanwhile.

    ``tell`` hears, a line each, of files that cannot be read (default: a warning in the log
    ``plarv_sinks``); everything else is read.

    Raises:
        StoreError: there is no store at ``location``.
        ImportError: polars or pyarrow is missing.
    """

    def __init__(
        self, location: Union[str, Path], tell: Optional[Callable[[str], None]] = None
    ) -> None:
        require("pyarrow", "polars")
        self.store = Store(location, tell)
        self.location = self.store.location

    def runs(self) -> pl.DataFrame:
        """One row a run, the last heard of first.

        Columns: ``run_id``, ``project``, ``status`` (null: it did not say that it ended),
        ``attempts``, ``steps`` (reports, of all ranks), ``events``, ``world_size``, ``first_time``,
        ``last_time`` (UTC), ``last_step``, ``last_loss``, ``verdicts`` and ``actions`` as recorded,
        ``worst_level`` (null: no verdict). Where the list of runs has lost one whose tables are
        there, what the list would say of it is null.
        """
        import polars as pl

        rows = self.store.run_rows()
        listed = pl.DataFrame([_cells(row) for row in rows.values()], _schema(), orient="row")
        verdicts, actions = self._verdicts_by_run(), self._actions_by_run()
        lost = self._not_listed(set(rows), verdicts, actions)
        if lost:
            listed = pl.concat([listed, pl.DataFrame({"run_id": lost})], how="diagonal")
        joined = listed.join(verdicts, on="run_id", how="left", maintain_order="left").join(
            actions, on="run_id", how="left", maintain_order="left"
        )
        times = [
            pl.col(name).cast(pl.Datetime("ns", "UTC")) for name in ("first_time", "last_time")
        ]
        counts = [pl.col(name).fill_null(0).cast(pl.Int64) for name in ("verdicts", "actions")]
        names = [
            pl.when(pl.col("worst_level") == place).then(pl.lit(name))
            for place, name in enumerate(LEVELS)
        ]
        level = pl.coalesce(names).alias("worst_level")
        return joined.with_columns(*times, *counts, level).select(
            *_schema(), "verdicts", "actions", "worst_level"
        )

    def run(self, run_id: str) -> Run:
        """One run. StoreError: the store has none of this id."""
        row = self.store.run_rows(run_id).get(run_id)
        if row is None and run_id in self._not_listed({}):
            row = self._row_from_steps(run_id)
        return Run(self.store, row if row is not None else self.store.run_row(run_id))

    def __repr__(self) -> str:
        return f"Forensics({self.location!r}: {len(self.store.run_rows()):,} runs)"

    def _repr_html_(self) -> str:
        runs = self.runs()
        head = (
            "run_id", "project", "status", "attempts", "steps", "last_step", "last_loss",
            "verdicts", "actions", "worst_level",
        )  # fmt: skip
        cells: List[List[Any]] = []
        for row in runs.head(_SHOWN).iter_rows(named=True):
            row["last_loss"] = number(row["last_loss"])
            cells.append([row[name] for name in head])
        more = runs.height - len(cells)
        return markup.block(
            f"{self.location}: {runs.height:,} runs",
            markup.table(head, cells, level=len(head) - 1),
            markup.paragraph(f"... and {more:,} more") if more > 0 else "",
        )

    def _verdicts_by_run(self) -> pl.DataFrame:
        import polars as pl

        found = self._columns("verdicts", ("id", "level")).unique("id")
        places = [
            pl.when(pl.col("level") == name).then(pl.lit(place))
            for place, name in enumerate(LEVELS)
        ]
        found = found.with_columns(severity=pl.coalesce(places))
        return found.group_by("run_id").agg(
            verdicts=pl.len().cast(pl.Int64), worst_level=pl.col("severity").max()
        )

    def _actions_by_run(self) -> pl.DataFrame:
        import polars as pl

        found = self._columns("actions", ("id",)).unique("id")
        return found.group_by("run_id").agg(actions=pl.len().cast(pl.Int64))

    def _columns(self, table: TableName, columns: Any) -> pl.DataFrame:
        return self.store.every(table, ("run_id", *columns))

    def _not_listed(self, listed: Any, *others: pl.DataFrame) -> List[str]:
        """Runs that other tables have and the list of runs does not: one of its files is lost."""
        named = {file.run_id for file in self.store.listed("steps") if file.run_id is not None}
        for frame in others or (self._verdicts_by_run(), self._actions_by_run()):
            named.update(frame.get_column("run_id").to_list())
        return sorted(named - set(listed))

    def _row_from_steps(self, run_id: str) -> RunRow:
        """What the list of runs would say, as far as the run's own rows tell."""
        wanted = ("attempt", "step", "time_ns", "world_size", "loss")
        steps = self.store.frame("steps", run_id, wanted)
        known: Dict[str, Any] = {}
        for name in wanted:
            values = steps.get_column(name).drop_nulls()
            known[name] = (values[0], values[-1]) if len(values) else (None, None)
        first, last = known["time_ns"]
        return RunRow(
            run_id=run_id,
            project=None,
            status=None,
            attempt=known["attempt"][1] or 1,
            num_events=steps.height + self.store.frame("events", run_id).height,
            num_steps=steps.height,
            world_size=known["world_size"][1],
            first_time_ns=first,
            last_time_ns=last,
            last_step=known["step"][1],
            last_loss=known["loss"][1],
            started=None,
            state=None,
        )


def _cells(row: RunRow) -> List[Any]:
    return [
        row.run_id, row.project, row.status, row.attempt, row.num_steps, row.num_events,
        row.world_size, row.first_time_ns, row.last_time_ns, row.last_step, row.last_loss,
    ]  # fmt: skip


def _schema() -> Dict[str, Any]:
    import polars as pl

    texts = dict.fromkeys(("run_id", "project", "status"), pl.String)
    numbers = dict.fromkeys(
        ("attempts", "steps", "events", "world_size", "first_time", "last_time", "last_step"),
        pl.Int64,
    )
    return {**texts, **numbers, "last_loss": pl.Float64}
