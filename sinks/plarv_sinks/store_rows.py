"""Reads the rows of a store's files; what cannot be read is told, and nothing else is lost."""

from __future__ import annotations

from array import array
from contextlib import contextmanager
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
)

from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.pyarrow_types import RecordBatch, require_pyarrow
from plarv_sinks.curve import first_line
from plarv_sinks.store_files import StoredFile, StoreFiles

__all__ = ["RowReader", "RunSpan", "VanishedError"]

_BATCH_ROWS = 4096
_DECODERS: Dict[TableName, Callable[[RecordBatch], object]] = {
    "steps": arrow.decode_steps,
    "events": arrow.decode_controls,
    "verdicts": arrow.decode_verdicts,
    "actions": arrow.decode_actions,
    "runs": arrow.decode_runs,
}


class VanishedError(Exception):
    """A file was there when the store was listed, and is no more: a compaction took it."""


class RunSpan(NamedTuple):
    """A file that holds events of a run, and the first and last of their ordinals."""

    first: int
    last: int
    file: StoredFile


class RowReader:
    """Reads files of one table, those of one run alone where one is named.

    ``tell`` hears, once a file, what could not be read.
    """

    def __init__(self, files: StoreFiles, table: TableName, tell: Callable[[str], None]) -> None:
        self._files = files
        self._table: TableName = table
        self._tell = tell
        self._told: Set[str] = set()
        self._good: List[Tuple[bool, Any]] = []  # schemas that were found to be the table's
        self._ranges: Dict[StoredFile, Tuple[str, str]] = {}  # the least and largest run id in it

    def tables(
        self,
        stored: Sequence[StoredFile],
        run_id: Optional[str] = None,
        columns: Optional[Sequence[str]] = None,
    ) -> List[Any]:
        """A ``pyarrow.Table`` of each file that has such rows, each with a column ``run_id``.

        Columns that a file lacks are left out. VanishedError.
        """
        found: List[Any] = []
        for file in stored:
            table = self._table_of(file, run_id, columns)
            if table is not None and table.num_rows:
                found.append(table)
        return found

    def batches(self, file: StoredFile, run_id: str) -> Iterator[RecordBatch]:
        """The run's rows of one file, some thousands at a time. VanishedError."""
        try:
            with self._open(file) as parquet:
                groups = _groups(parquet, None if file.run_id is not None else run_id)
                for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups):
                    if file.run_id is None:
                        batch = _of_run(batch, run_id)
                    if batch.num_rows:
                        yield _with_run_id(batch, run_id)
        except (require_pyarrow().ArrowException, OSError, ValueError) as error:
            self._failed(file, error)

    def decoded(self, batch: RecordBatch) -> List[Any]:
        """The rows as what they are; one whose values are none, as broken JSON, is left out."""
        return [row for _, rows in self._decoded(batch) for row in rows]

    def placed(self, batch: RecordBatch) -> Iterator[Tuple[int, Any]]:
        """The same of events, each with its ordinal."""
        for part, rows in self._decoded(batch):
            yield from zip(arrow.extra_column(part, "ordinal") or (), rows)

    def spans(self, stored: Sequence[StoredFile], run_id: str) -> List[RunSpan]:
        """Which of the files hold events of the run, by the ordinal of the first. VanishedError."""
        compute = require_pyarrow("pyarrow.compute")
        spans: List[RunSpan] = []
        for file in stored:
            table = self._table_of(file, run_id, ("run_id", "ordinal"))
            if table is not None and table.num_rows and "ordinal" in table.schema.names:
                found = compute.min_max(table.column("ordinal")).as_py()
                if found["min"] is not None:
                    spans.append(RunSpan(found["min"], found["max"], file))
        return sorted(spans)

    def metadata(self, file: StoredFile, key: bytes) -> Optional[bytes]:
        """A value of the file's metadata. VanishedError."""
        try:
            with self._open(file) as parquet:
                metadata: Dict[bytes, bytes] = parquet.schema_arrow.metadata or {}
                return metadata.get(key)
        except (require_pyarrow().ArrowException, OSError, ValueError) as error:
            self._failed(file, error)
        return None

    def _decoded(self, batch: RecordBatch) -> Iterator[Tuple[RecordBatch, List[Any]]]:
        decode: Any = _DECODERS[self._table]
        try:
            yield batch, decode(batch)
        except ValueError as error:
            if batch.num_rows > 1:
                parts: Any = batch
                for number in range(batch.num_rows):
                    yield from self._decoded(parts.slice(number, 1))
            else:
                self._tell_once(f"a row of {self._table} is left out: {first_line(error)}")

    def _table_of(
        self, file: StoredFile, run_id: Optional[str], columns: Optional[Sequence[str]]
    ) -> Any:
        if not self._may_hold(file, run_id):
            return None
        try:
            with self._open(file) as parquet:
                wanted = None
                if columns is not None:
                    there = set(parquet.schema_arrow.names)
                    wanted = [name for name in columns if name in there]
                groups = _groups(parquet, None if file.run_id is not None else run_id)
                if not groups:
                    return None
                table = parquet.read_row_groups(groups, columns=wanted)
        except (require_pyarrow().ArrowException, OSError, ValueError) as error:
            self._failed(file, error)
            return None
        if file.run_id is not None:
            return _with_run_id(table, file.run_id)
        return table if run_id is None else _of_run(table, run_id)

    @contextmanager
    def _open(self, file: StoredFile) -> Generator[Any, None, None]:
        """The Parquet file. ValueError: it is not one of this table, or of a newer version."""
        with self._files.open(file.path) as parquet:
            found = arrow.table_of(parquet.schema_arrow)
            if found != self._table:
                raise ValueError(f"it holds {found or 'something else'}, not {self._table}")
            self._check(parquet.schema_arrow, file.run_id)
            self._note_range(file, parquet)
            yield parquet

    def _check(self, schema: Any, run_id: Optional[str]) -> None:
        """ValueError: a column is missing, or holds what the table's decoder does not take."""
        named = run_id is not None
        if any(named == same and schema.equals(good) for same, good in self._good):
            return
        pa = require_pyarrow()
        columns = [pa.nulls(0, field.type) for field in schema]
        empty = pa.RecordBatch.from_arrays(columns, schema=schema)
        _DECODERS[self._table](empty if run_id is None else _with_run_id(empty, run_id))
        self._good.append((named, schema))

    def _may_hold(self, file: StoredFile, run_id: Optional[str]) -> bool:
        """Whether the file may hold the run, as far as is known from reading it before."""
        known = self._ranges.get(file)
        return run_id is None or known is None or known[0] <= run_id <= known[1]

    def _note_range(self, file: StoredFile, parquet: Any) -> None:
        if file.run_id is None and file not in self._ranges:
            ranges = [_run_ids(parquet, number) for number in range(parquet.num_row_groups)]
            known = [each for each in ranges if each is not None]
            if known and len(known) == len(ranges):
                self._ranges[file] = (min(low for low, _ in known), max(high for _, high in known))

    def _failed(self, file: StoredFile, error: Exception) -> None:
        """Tells of damage. Whatever else the file system says is no reason to go on without it."""
        if isinstance(error, FileNotFoundError):
            raise VanishedError(file.path) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise error
        self._tell_once(f"{file.path}: left out: {first_line(error)}")

    def _tell_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._tell(f"{self._files.location}: {what}")


def _groups(parquet: Any, run_id: Optional[str]) -> List[int]:
    """The row groups that may hold the run, by their statistics."""
    kept: List[int] = []
    for number in range(parquet.num_row_groups):
        found = None if run_id is None else _run_ids(parquet, number)
        if run_id is None or found is None or found[0] <= run_id <= found[1]:
            kept.append(number)
    return kept


def _run_ids(parquet: Any, group: int) -> Optional[Tuple[str, str]]:
    """The least and the largest in a row group; None: its statistics do not say."""
    column = parquet.metadata.row_group(group).column(0)  # run_id is the first where it is one
    found = column.statistics if column.path_in_schema == "run_id" else None
    return None if found is None or not found.has_min_max else (found.min, found.max)


def _of_run(rows: Any, run_id: str) -> Any:
    compute = require_pyarrow("pyarrow.compute")
    return rows.filter(compute.equal(rows.column("run_id"), _text(run_id)))


def _with_run_id(rows: Any, run_id: str) -> Any:
    """The rows with the run's id, which the folder's name alone says where it holds one run."""
    pa = require_pyarrow()
    if "run_id" in rows.schema.names:
        return rows
    ids = pa.repeat(_text(run_id), rows.num_rows)
    fields = [pa.field("run_id", pa.string(), nullable=False), *rows.schema]
    schema = pa.schema(fields, rows.schema.metadata)
    kind: Any = rows.__class__
    return kind.from_arrays([ids, *rows.columns], schema=schema)


def _text(value: str) -> Any:
    """As ``pyarrow.scalar``, which imports pandas where there is one: half a second."""
    pa, data = require_pyarrow(), value.encode("utf-8")
    ends = pa.py_buffer(array("i", (0, len(data))))
    return pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(data)])[0]
