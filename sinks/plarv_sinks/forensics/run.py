"""One run as a store has it: its tables, its story, and why its verdicts were given."""

from __future__ import annotations

import json
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Type,
    Union,
    cast,
)

from plarv_processors.detectors.detector import Detector
from plarv_schemas import arrow
from plarv_schemas.events import Action, ControlEvent, Verdict
from plarv_sinks.findings_table import duration_text, findings_table
from plarv_sinks.forensics import markup
from plarv_sinks.forensics.aligned import METRICS, PLACE_COLUMNS, by_step, last_of_each_step
from plarv_sinks.forensics.comparison import compared
from plarv_sinks.forensics.explain import explain, find_verdict
from plarv_sinks.forensics.explanation import Explanation
from plarv_sinks.forensics.sentences import number
from plarv_sinks.forensics.step_facts import FACT_COLUMNS, missing_ends, step_facts
from plarv_sinks.forensics.timeline import timeline
from plarv_sinks.store import Store
from plarv_sinks.store_runs import RunRow

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure

    from plarv_sinks.adqi import ADQI
    from plarv_sinks.forensics.first_cause import FirstCause

__all__ = ["Run"]

_SHOWN = 20  # findings, where the run shows itself


class Run:
    """Reads one run of a store; every call reads what is there by then.

    Frames are polars data frames in the log's order. Nothing is kept between calls.
    """

    def __init__(self, store: Store, row: RunRow) -> None:
        self.store = store
        self.row = row
        self.id = row.run_id

    def steps(
        self, columns: Optional[Sequence[str]] = None, attempt: Optional[int] = None
    ) -> pl.DataFrame:
        """One row a report of a step by a rank; some columns of it, one attempt alone."""
        return self._table("steps", columns, attempt)

    def events(
        self, columns: Optional[Sequence[str]] = None, attempt: Optional[int] = None
    ) -> pl.DataFrame:
        """One row a control event: sessions, checkpoints, orders, actions applied and refused."""
        return self._table("events", columns, attempt)

    def verdicts(self) -> pl.DataFrame:
        """One row a verdict, its evidence a map (or list) of name and number."""
        found = self.store.verdicts(self.id)
        batch: Any = arrow.encode_verdicts(found, schema=arrow.file_schema("verdicts"))
        return _with_id_first(batch)

    def actions(self) -> pl.DataFrame:
        """One row an action, its parameters as JSON."""
        found = self.store.actions(self.id)
        batch: Any = arrow.encode_actions(found, schema=arrow.file_schema("actions"))
        return _with_id_first(batch)

    def timeline(self) -> pl.DataFrame:
        """What happened, in the log's order, a sentence each.

        Control events, verdicts, actions, and what is notable about the steps: where attempts begin
        and end, the extremes, where numbers are not finite, jumps of the learning rate, pauses, and
        clocks of ranks that disagree. ``time`` is of the clock of whoever wrote the event.
        """
        steps = self.store.frame("steps", self.id, FACT_COLUMNS)
        controls = list(self._controls())
        started = any(event.kind == "session_started" for _, _, event in controls)
        ends = missing_ends(steps, started, self.row.status is not None)
        return timeline(
            [*step_facts(steps), *ends],
            controls,
            self.store.verdicts(self.id),
            self.store.actions(self.id),
            steps,
        )

    def compare(
        self,
        other: Optional[Run] = None,
        *,
        attempt: Optional[int] = None,
        other_attempt: Optional[int] = None,
        rank: Optional[int] = None,
        columns: Optional[Sequence[str]] = None,
    ) -> pl.DataFrame:
        """Both runs' metrics at each step, and the difference; null where one lacks the step.

        Two attempts of this run: ``compare(attempt=1, other_attempt=2)``. Where no attempt is
        named, a step that repeats has the last attempt's values. Ranks are averaged, or ``rank``
        alone is taken. ``columns``: all metrics that both have.
        """
        metrics = METRICS if columns is None else tuple(columns)
        mine = self._by_step(metrics, attempt, rank)
        others = (other or self)._by_step(metrics, other_attempt, rank)
        return compared(mine, others, columns)

    def explain(
        self, verdict: Union[Verdict, str], detector: Optional[Type[Detector]] = None
    ) -> Explanation:
        """Why a verdict was given: formula, numbers, the steps it saw, what happened next.

        Its detector is called again on the stored steps up to the verdict's place in the log; where
        score, level or evidence come out differently, or the detector is another version, the
        explanation says so. ``verdict`` is one, its id, or how its id begins.

        Args:
            detector: the class, where it is not installed.

        Raises:
            StoreError: the run has no such verdict.
        """
        if isinstance(verdict, str):
            verdict = find_verdict(self.store.verdicts(self.id), verdict, self.id)
        return explain(self.store, verdict, detector)

    def first_cause(self) -> FirstCause:
        """The earliest evidence across detectors, ranks and layers, ranked, with its reasons."""
        from plarv_sinks.forensics.first_cause import first_cause

        return first_cause(
            self.store.events(self.id), self.store.verdicts(self.id), self.store.actions(self.id)
        )

    def plot(self, rank: Optional[int] = None) -> Figure:
        """Loss, gradient norm, learning rate and step time over the steps, verdicts and actions
        marked. A matplotlib figure: ``figure.savefig("run.png")``.

        Raises:
            ImportError: matplotlib is missing.
        """
        from plarv_sinks.forensics.plot import PLOTTED, plot

        steps = self.store.frame("steps", self.id, (*PLACE_COLUMNS, *PLOTTED))
        figure: Figure = plot(
            f"{self.id}: {self._summary()}",
            by_step(steps, PLOTTED, rank),
            self.store.verdicts(self.id),
            self.store.actions(self.id),
        )
        return figure

    def adqi(self) -> ADQI:
        """The quality of the training data, judged from the trajectory alone."""
        from plarv_sinks.adqi import adqi

        return adqi(self.steps())

    def __repr__(self) -> str:
        return f"Run({self.id!r}: {self._summary()})"

    def __str__(self) -> str:
        findings = sorted(self._findings(), key=lambda found: found.ordinal)
        lines = [f"{self.id}: {self._summary()}", *findings_table(findings[:_SHOWN])]
        if len(findings) > _SHOWN:
            lines.append(f"... and {len(findings) - _SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        verdicts = self.store.verdicts(self.id)
        rows = [
            (found.step, found.attempt, found.level, f"{found.detector}/{found.kind}", found.state,
             found.rank, found.message, found.id)
            for found in verdicts[:_SHOWN]
        ]  # fmt: skip
        head = ("step", "attempt", "level", "finding", "state", "rank", "message", "id")
        more = len(verdicts) - len(rows)
        return markup.block(
            self.id,
            markup.paragraph(self._summary()),
            markup.table(head, rows, level=2) if rows else markup.paragraph("No verdict."),
            markup.paragraph(f"... and {more} more") if more else "",
        )

    def _summary(self) -> str:
        row = self.row
        facts = [row.status or "no end recorded"]
        facts.append("1 attempt" if row.attempt == 1 else f"{row.attempt} attempts")
        facts.append(f"{row.num_steps:,} step reports")
        if row.world_size is not None and row.world_size > 1:
            facts.append(f"{row.world_size} ranks")
        if row.last_step is not None:
            facts.append(f"last step {row.last_step}, loss {number(row.last_loss)}")
        if row.first_time_ns is not None and row.last_time_ns is not None:
            facts.append(duration_text(max(0.0, (row.last_time_ns - row.first_time_ns) * 1e-9)))
        return ", ".join(facts)

    def _findings(self) -> List[Union[Verdict, Action]]:
        return [*self.store.verdicts(self.id), *self.store.actions(self.id)]

    def _table(
        self, table: arrow.TableName, columns: Optional[Sequence[str]], attempt: Optional[int]
    ) -> pl.DataFrame:
        import polars as pl

        wanted = None if columns is None else [*dict.fromkeys([*columns, "attempt"])]
        frame = self.store.frame(table, self.id, wanted)
        if attempt is not None:
            frame = frame.filter(pl.col("attempt") == attempt)
        return frame if columns is None else frame.select(columns)

    def _by_step(
        self, metrics: Sequence[str], attempt: Optional[int], rank: Optional[int]
    ) -> pl.DataFrame:
        steps = self.steps((*PLACE_COLUMNS, *metrics), attempt)
        return last_of_each_step(by_step(steps, metrics, rank))

    def _controls(self) -> Iterator[Tuple[int, int, ControlEvent]]:
        """The control events, each with its ordinal and attempt."""
        for row in self.store.frame("events", self.id).iter_rows(named=True):
            event = ControlEvent(
                self.id,
                row["session"],
                row["record"],
                row["rank"],
                row["kind"],
                row["time_ns"],
                row["step"],
                _data(row["data"]),
            )
            yield row["ordinal"], row["attempt"], event


def _data(text: str) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"unreadable": text[:40]}
    return cast("Dict[str, Any]", found)


def _with_id_first(batch: Any) -> pl.DataFrame:
    import polars as pl

    reader: Any = pl
    frame: pl.DataFrame = reader.from_arrow(batch)
    return frame.select("id", *[name for name in frame.columns if name != "id"])
