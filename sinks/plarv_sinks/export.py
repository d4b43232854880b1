"""A run's folder as Parquet: steps, control events, verdicts and actions, folded anew."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

from plarv_processors.engine import Engine, EngineConfig
from plarv_processors.stored_fold import base_of
from plarv_schemas import arrow
from plarv_schemas.arrow_columns import RUN_TABLES, TableName
from plarv_schemas.events import Action, Event, StepEvent, Verdict
from plarv_schemas.journal_reader import segments_of
from plarv_schemas.pyarrow_types import require_pyarrow
from plarv_schemas.records import read_findings
from plarv_schemas.run_log import RunLog, is_run_dir
from plarv_sinks.curve import ReplayError, Tell

__all__ = ["Export", "export", "num_values"]

_Row = Union[Event, Verdict, Action]
_POLL_EVENTS = 256
_GROUP_VALUES = 500_000  # of one row group: 16,000 steps of scalars, fewer with samples


class Export(NamedTuple):
    """What an export wrote."""

    folder: Path
    rows: Dict[TableName, int]


def export(
    run_dir: Path,
    output: Path,
    *,
    tell: Tell,
    progress: Optional[Callable[[float], None]] = None,
) -> Export:
    """Folds the run's whole journal anew and writes its four tables as Parquet files into `output`.

    Steps and events carry session, record, ordinal and attempt; verdicts and actions their ids.
    Where old segments were removed, the tables of steps and events begin after them, and the
    verdicts and actions found before are those that were recorded. A file has its name only once it
    is whole.
    Memory is bounded by one row group a table, whatever the run's length.

    Args:
        tell: hears, in a line each, what could not be exported.
        progress: hears the share of the journal that was read, 0 to 1.

    Raises:
        ReplayError: `run_dir` holds no journal, or one of a newer version.
        OSError: a file cannot be read or written.
        ImportError: pyarrow is missing.
    """
    if not is_run_dir(run_dir):
        raise ReplayError(f"{run_dir}: not a run's folder: no journal in it")
    require_pyarrow("pyarrow.parquet")
    output.mkdir(parents=True, exist_ok=True)
    engine = Engine(EngineConfig())
    base = base_of(run_dir, engine)
    writers: Dict[TableName, _TableWriter] = {
        table: _TableWriter(output / f"{table}.parquet", table) for table in RUN_TABLES
    }
    log = RunLog(run_dir)
    try:
        if base is not None:
            _say_where_it_begins(run_dir, base, tell)
            for finding in read_findings(run_dir):
                if finding.ordinal <= base:
                    writers["verdicts" if isinstance(finding, Verdict) else "actions"].add(finding)
        _fold(log, engine, writers, run_dir, progress)
        rows: Dict[TableName, int] = {table: writer.close() for table, writer in writers.items()}
        for writer in writers.values():
            writer.publish()
    except ValueError as error:
        raise ReplayError(f"{run_dir}: {error}") from error
    finally:
        log.close()
        for writer in writers.values():
            writer.discard()
    _take_base_along(run_dir, output, base)
    if log.skipped:
        tell(f"{run_dir}: {log.skipped:,} records could not be read")
    for name, reason in engine.faults.items():
        tell(f"{run_dir}: detector {name} raised and was left out: {reason}")
    return Export(output, rows)


def _fold(
    log: RunLog,
    engine: Engine,
    writers: Dict[TableName, _TableWriter],
    run_dir: Path,
    progress: Optional[Callable[[float], None]],
) -> None:
    steps, events = writers["steps"], writers["events"]
    verdicts, actions = writers["verdicts"], writers["actions"]
    while True:
        batch = log.poll(_POLL_EVENTS)
        if not batch:
            return
        for event in batch:
            findings = engine.fold(event)
            if not engine.accepted:
                continue
            attempt = engine.attempts.of(event.session)
            (steps if isinstance(event, StepEvent) else events).add(event, engine.ordinal, attempt)
            for finding in findings:
                (verdicts if isinstance(finding, Verdict) else actions).add(finding)
        if progress is not None:
            progress(_share_read(run_dir, log))


class _TableWriter:
    """One Parquet file, written group by group under a temporary name."""

    def __init__(self, path: Path, table: TableName) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        self._table: TableName = table
        self._schema = arrow.file_schema(table)
        self._rows: List[Any] = []
        self._places: List[Tuple[int, int]] = []
        self._num_values = 0
        self._num_rows = 0
        self._writer: Any = require_pyarrow("pyarrow.parquet").ParquetWriter(
            self._temporary, self._schema, compression="zstd"
        )

    def add(self, row: _Row, ordinal: int = -1, attempt: int = 0) -> None:
        self._rows.append(row)
        self._places.append((ordinal, attempt))
        self._num_values += num_values(row)
        if self._num_values >= _GROUP_VALUES:
            self._flush()

    def close(self) -> int:
        """Writes what is left; the number of rows."""
        self._flush()
        self._writer.close()
        return self._num_rows

    def publish(self) -> None:
        """Gives the file its name."""
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Removes the file, unless it has been published."""
        self._writer.close()
        if self._temporary.exists():
            self._temporary.unlink()

    def _flush(self) -> None:
        rows = self._rows
        if not rows:
            return
        ordinals, attempts = zip(*self._places)
        if self._table == "steps":
            batch = arrow.encode_steps(
                rows, ordinals=ordinals, attempts=attempts, schema=self._schema
            )
        elif self._table == "events":
            batch = arrow.encode_controls(
                rows, ordinals=ordinals, attempts=attempts, schema=self._schema
            )
        elif self._table == "verdicts":
            batch = arrow.encode_verdicts(rows, schema=self._schema)
        else:
            batch = arrow.encode_actions(rows, schema=self._schema)
        self._writer.write_batch(batch)
        self._num_rows += len(rows)
        self._rows, self._places, self._num_values = [], [], 0


def num_values(row: _Row) -> int:
    """About how many values a row holds, so that long lists make short row groups."""
    if isinstance(row, StepEvent):
        values = 30
        for cell in row[21:30]:
            if cell is not None:
                values += len(cell)
        return values
    return 100


def _share_read(run_dir: Path, log: RunLog) -> float:
    """The share of the segments' bytes that was read; a last segment is mostly not full."""
    positions = log.positions()
    size = read = 0
    for session, files in segments_of(run_dir).items():
        _, segment, offset = positions.get(session, (0, 0, 0))[:3]
        for file in files:
            length = file.path.stat().st_size
            size += length
            read += length if file.segment < segment else 0
            read += min(offset, length) if file.segment == segment else 0
    return read / size if size else 1.0


def _say_where_it_begins(run_dir: Path, base: int, tell: Tell) -> None:
    where = "" if base < 0 else f" with the event of ordinal {base + 1:,}"
    tell(f"{run_dir}: older segments were removed to bound the journal; steps begin{where}")
    if base < 0:
        tell(f"{run_dir}: the fold's state there is of another configuration: it starts anew")


def _take_base_along(run_dir: Path, output: Path, base: Optional[int]) -> None:
    """The state at which the log begins goes along, so that the export replays as the run does."""
    source, target = run_dir / "base", output / "base"
    if base is not None and base >= 0:
        if not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)
    elif target.exists() and output != run_dir:
        target.unlink()
