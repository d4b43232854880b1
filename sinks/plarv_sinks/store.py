"""What is kept of all runs, as Parquet below one path or URI; see docs/store.md for the layout."""

from __future__ import annotations

import heapq
import json
import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Literal,
    Optional,
    Sequence,
    Set,
    Tuple,
    TypeVar,
    Union,
    cast,
)

from plarv_processors.engine import left_out_by
from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import Action, ControlEvent, Event, Verdict
from plarv_schemas.pyarrow_types import RecordBatch, require_pyarrow
from plarv_sinks.store_files import FRESH, StoredFile, StoreFiles, shown, table_path
from plarv_sinks.store_layout import filled
from plarv_sinks.store_rows import RowReader, RunSpan, VanishedError
from plarv_sinks.store_runs import RunRow

if TYPE_CHECKING:
    import polars as pl

__all__ = ["COMPACTIONS", "COVERS_KEY", "Store", "StoreError"]

COMPACTIONS = "_compactions"
COVERS_KEY = b"argus.covers"  # JSON: topic id and partition -> last offset that a file covers

_TRIES = 8  # a compaction that took a file away is over before the store is listed again
_T = TypeVar("_T")


class StoreError(Exception):
    """The store cannot be read, or does not hold what was asked for; the message says which."""


class Store:
    """Reads what the sinks wrote, while they write and while it is compacted.

    A file that is damaged, foreign or of a newer version is left out, and ``tell`` hears of it once
    (default: a warning in the log ``plarv_sinks``). Every event, verdict and action is there once,
    in the log's order. ``create`` makes the folder of a local store.

    Raises:
        StoreError: there is no store at ``location``.
        ImportError: pyarrow (for data frames: polars) is missing.
    """

    def __init__(
        self,
        location: Union[str, Path],
        tell: Optional[Callable[[str], None]] = None,
        *,
        create: bool = False,
    ) -> None:
        self._tell = tell if tell is not None else logging.getLogger("plarv_sinks").warning
        try:
            self.files = StoreFiles(location)
        except (OSError, ValueError) as error:
            raise StoreError(f"{shown(location)}: {error}") from error
        self.location = self.files.location
        if create and self.files.is_local:
            self.files.local("").mkdir(parents=True, exist_ok=True)
        if self.files.is_local and not self.files.local("").is_dir():
            raise StoreError(f"{self.location}: no such folder; `argus sink` and runs write stores")
        self._readers: Dict[str, RowReader] = {}

    def listed(
        self, table: TableName, run_id: Optional[str] = None, since: Optional[str] = None
    ) -> List[StoredFile]:
        """The files of a table, those that may hold the run; ``since``: a date, YYYY-MM-DD.

        A file whose rows a finished compaction has put elsewhere is not among them.
        """
        for _ in range(_TRIES):
            before = self.files.names(COMPACTIONS)
            done, moved = self._compacted(before)
            found = [file for file in self._table_files(table, run_id) if file.path not in done]
            if self.files.names(COMPACTIONS) == before:
                break  # none began or ended meanwhile
        else:
            raise self._restless()
        there = {file.path for file in found}
        for path, target in moved.items():
            file = StoredFile.at(target)
            if file is not None and file.table == table and target not in there:
                if run_id is None or file.run_id in (None, run_id):
                    found.append(file._replace(path=path))
        return [file for file in found if since is None or file.date >= since]

    def run_rows(self, run_id: Optional[str] = None) -> Dict[str, RunRow]:
        """The newest row of each run, or of one, by id; the run that was last heard of first."""

        def read() -> List[Any]:
            return self._reader("runs").tables(self.listed("runs"), run_id)

        newest: Dict[str, RunRow] = {}
        for table in self._again(read):
            for batch in table.to_batches():
                for values in self._reader("runs").decoded(batch):
                    row = RunRow(*values)
                    known = newest.get(row.run_id)
                    if known is None or row.num_events > known.num_events:
                        newest[row.run_id] = row
        return dict(
            sorted(newest.items(), key=lambda item: (-(item[1].last_time_ns or 0), item[0]))
        )

    def run_row(self, run_id: str) -> RunRow:
        """The row of one run. StoreError: the store has no such run."""
        found = self.run_rows(run_id).get(run_id)
        if found is None:
            names = ", ".join(list(self.run_rows())[:5])
            hint = f"the newest are {names}" if names else "it holds none"
            raise StoreError(f"{self.location}: no run {run_id}; {hint}")
        return found

    def frame(
        self, table: TableName, run_id: str, columns: Optional[Sequence[str]] = None
    ) -> pl.DataFrame:
        """One run's rows, in the log's order, each once; of some columns, where they are named."""
        key = "ordinal" if table in ("steps", "events") else "id"
        wanted = None if columns is None else ["run_id", "ordinal", key, *columns]

        def read() -> List[Any]:
            return self._reader(table).tables(self.listed(table, run_id), run_id, wanted)

        frame = _frame(self._again(read), table)
        frame = frame.unique(key, keep="first", maintain_order=True).sort(
            "ordinal", maintain_order=True
        )
        return frame if columns is None else frame.select(columns)

    def every(self, table: TableName, columns: Sequence[str]) -> pl.DataFrame:
        """Some columns of all runs' rows, as they lie there: a row may be there twice."""

        def read() -> List[Any]:
            return self._reader(table).tables(self.listed(table), columns=columns)

        return _frame(self._again(read), table, columns).select(columns)

    def scan(self, table: TableName) -> pl.LazyFrame:
        """All rows of a table, lazily and as they lie there; not to be kept over a compaction."""
        import polars as pl

        listed = self.listed(table)
        if not listed:
            return _frame([], table).lazy()
        if not self.files.is_local:
            scan: Any = cast(Any, pl).scan_pyarrow_dataset
            found: pl.LazyFrame = scan(self.files.dataset([file.path for file in listed]))
            return found
        # With and without the run in the folder's name: polars wants one kind of name in a scan.
        parts = [
            pl.scan_parquet(paths, hive_partitioning=True)
            for paths in (
                [self.files.uri(file.path) for file in listed if (file.run_id is None) == together]
                for together in (True, False)
            )
            if paths
        ]
        return pl.concat(parts, how="diagonal_relaxed")

    def events(self, run_id: str) -> Iterator[Event]:
        """The run's events in the log's order, as a fold reads them; some thousands in memory."""
        for _, event in self.placed_events(run_id):
            yield event

    def placed_events(self, run_id: str) -> Iterator[Tuple[int, Event]]:
        """The same, each with its ordinal: a number that is missing is an event that is."""
        steps = self._ordered("steps", run_id)
        controls = self._ordered("events", run_id)
        yield from heapq.merge(steps, controls, key=_ordinal)

    def controls(self, run_id: str) -> Iterator[ControlEvent]:
        """The run's control events alone."""
        for _, event in self._ordered("events", run_id):
            if isinstance(event, ControlEvent):
                yield event

    def verdicts(self, run_id: str) -> List[Verdict]:
        """The recorded verdicts, by ordinal: none of a detector that had been left out by then."""
        last: Dict[str, int] = {}
        for event in self.controls(run_id):
            left = left_out_by(event)
            if left is not None:
                last[left[0]] = min(left[1], last.get(left[0], left[1]))
        found: Dict[str, Verdict] = {}
        for batch in self._finding_batches("verdicts", run_id):
            for verdict in self._reader("verdicts").decoded(batch):
                if verdict.ordinal <= last.get(verdict.detector, verdict.ordinal):
                    found.setdefault(verdict.id, verdict)
        return sorted(found.values(), key=_finding_ordinal)

    def actions(self, run_id: str) -> List[Action]:
        """The recorded actions, by ordinal."""
        found: Dict[str, Action] = {}
        for batch in self._finding_batches("actions", run_id):
            for action in self._reader("actions").decoded(batch):
                found.setdefault(action.id, action)
        return sorted(found.values(), key=_finding_ordinal)

    def ids(self, table: Literal["verdicts", "actions"]) -> Set[str]:
        """The ids of all recorded verdicts (or actions)."""

        def read() -> List[Any]:
            return self._reader(table).tables(self.listed(table), columns=("id",))

        found: Set[str] = set()
        for each in self._again(read):
            found.update(each.column("id").to_pylist())
        return found

    def covered(self, table: TableName) -> Dict[str, int]:
        """Up to which offset each topic's partition is in the table's files.

        The keys are ``TOPIC_ID/PARTITION``; what no file covers is not there.
        """
        return self._again(partial(self._covered, table))

    def covers_of(self, table: TableName, file: StoredFile) -> Dict[str, int]:
        """What one file covers: its name says so, or its metadata. VanishedError."""
        if file.place is not None:
            return {file.place.source: file.place.last}
        found: Dict[str, int] = json.loads(self._reader(table).metadata(file, COVERS_KEY) or b"{}")
        return found

    def sweep(self) -> None:
        """Removes what writers that were killed left; not what a compaction is still to move."""
        _, moved = self._compacted(self.files.names(COMPACTIONS))
        self.files.sweep(moved)

    def can_read(self, file: StoredFile) -> bool:
        """Whether it is a file of its table, in a version that we read; else ``tell`` hears it."""
        return self._reader(_name(file.table)).metadata(file, b"argus.table") is not None

    def whole(self, table: TableName, file: StoredFile) -> Any:
        """All of one file, as a ``pyarrow.Table`` of the table's columns. OSError, ArrowException:
        it cannot be read.
        """
        with self.files.open(file.path) as parquet:
            return filled(parquet.read(), arrow.file_schema(table))

    def _covered(self, table: TableName) -> Dict[str, int]:
        upto: Dict[str, int] = {}
        for file in self.listed(table):
            for source, last in self.covers_of(table, file).items():
                upto[source] = max(last, upto.get(source, -1))
        return upto

    def _ordered(self, table: TableName, run_id: str) -> Iterator[Tuple[int, Event]]:
        """Ordinal and event, in order, each once; goes on where a compaction moves the rows."""
        reader, done = self._reader(table), -1
        for _ in range(_TRIES):
            try:
                for together in _overlapping(reader.spans(self.listed(table, run_id), run_id)):
                    parts = [_placed(reader, span.file, run_id) for span in together]
                    for ordinal, event in heapq.merge(*parts, key=_ordinal):
                        if ordinal > done:
                            done = ordinal
                            yield ordinal, event
                return
            except VanishedError:
                continue
        raise self._restless()

    def _finding_batches(self, table: TableName, run_id: str) -> Iterator[RecordBatch]:
        def read() -> List[Any]:
            return self._reader(table).tables(self.listed(table, run_id), run_id)

        for found in self._again(read):
            yield from found.to_batches()

    def _table_files(self, table: TableName, run_id: Optional[str]) -> List[StoredFile]:
        if table != "steps" or run_id is None:
            return self.files.listed(f"table={table}") + self.files.listed(f"{FRESH}/table={table}")
        found: List[StoredFile] = []
        for folder in self.files.folders("table=steps"):
            date = folder.rpartition("=")[2]
            found += self.files.listed(table_path("steps", date, run_id))
        return found + self.files.listed(f"{FRESH}/table=steps")

    def _compacted(self, manifests: Sequence[str]) -> Tuple[Set[str], Dict[str, str]]:
        """Files that compactions have replaced, and where those lie that are still to be moved."""
        done: Set[str] = set()
        moved: Dict[str, str] = {}
        for path in manifests:
            if path.endswith(".json"):
                with suppress(FileNotFoundError, ValueError):  # it is finished; or it was cut
                    manifest = json.loads(self.files.read(path))
                    done.update(manifest["removes"])
                    moved.update(manifest["adds"])
        return done, moved

    def _reader(self, table: TableName) -> RowReader:
        if table not in self._readers:
            self._readers[table] = RowReader(self.files, table, self._tell)
        return self._readers[table]

    def _again(self, read: Callable[[], _T]) -> _T:
        """What ``read`` gives; once more where a compaction took a file away meanwhile."""
        for _ in range(_TRIES):
            try:
                return read()
            except VanishedError:
                continue
        raise self._restless()

    def _restless(self) -> StoreError:
        return StoreError(f"{self.location}: it changes faster than it can be read")


def _name(table: str) -> TableName:
    """The table of this name. StopIteration: there is none, which no listed file can have."""
    return next(name for name in arrow.TABLES if name == table)


def _overlapping(spans: Sequence[RunSpan]) -> Iterator[List[RunSpan]]:
    """The files in the order of their events, those together whose ranges overlap: clocks of two
    hosts that disagree about the day leave such.
    """
    together: List[RunSpan] = []
    last = -1
    for span in sorted(spans):
        if together and span.first > last:
            yield together
            together = []
        together.append(span)
        last = max(last, span.last)
    if together:
        yield together


def _placed(reader: RowReader, file: StoredFile, run_id: str) -> Iterator[Tuple[int, Event]]:
    for batch in reader.batches(file, run_id):
        yield from reader.placed(batch)


def _ordinal(row: Tuple[int, Event]) -> int:
    return row[0]


def _finding_ordinal(finding: Union[Verdict, Action]) -> int:
    return finding.ordinal


def _frame(
    tables: Sequence[Any], table: TableName, only: Optional[Sequence[str]] = None
) -> pl.DataFrame:
    """The tables' rows in one frame; columns that a table lacks are null."""
    import polars as pl

    pa, reader = require_pyarrow(), cast(Any, pl)
    columns: Any = arrow.file_schema(table)
    if only is not None:
        columns = pa.schema([columns.field(name) for name in only])
    plain: List[Any] = []
    for each in tables:  # other writers choose other widths
        kept = [field for field in columns if field.name in each.schema.names]
        plain.append(each.select([field.name for field in kept]).cast(pa.schema(kept)))
    none = pa.Table.from_arrays([pa.nulls(0, field.type) for field in columns], schema=columns)
    whole = pa.concat_tables([none, *plain], promote_options="default")
    frame: pl.DataFrame = reader.from_arrow(whole)
    return frame
