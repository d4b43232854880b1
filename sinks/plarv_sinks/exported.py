"""Reads what an export wrote: steps and events of a run, in the log's order."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence, Tuple

from plarv_schemas import arrow
from plarv_schemas.events import ControlEvent, Event
from plarv_schemas.pyarrow_types import RecordBatch, require_pyarrow
from plarv_sinks.curve import ReplayError, first_line

__all__ = ["read_export", "read_recorded_controls", "read_recorded_steps"]

_BATCH_ROWS = 1024


def read_export(folder: Path) -> Iterator[Event]:
    """The events of the export in `folder`, steps and control events merged by their ordinals.

    ReplayError: steps.parquet is missing, or a file is broken or written by a newer version.
    """
    steps = _rows(folder / "steps.parquet", arrow.decode_steps)
    events_file = folder / "events.parquet"
    controls = _rows(events_file, arrow.decode_controls) if events_file.is_file() else iter(())
    for _, event in heapq.merge(steps, controls, key=_ordinal):
        yield event


def read_recorded_steps(path: Path) -> Iterator[Event]:
    """The steps of a ``steps.parquet`` on its own, without the control events beside it."""
    for _, event in _rows(path, arrow.decode_steps):
        yield event


def read_recorded_controls(path: Path) -> Iterator[ControlEvent]:
    """The control events of an ``events.parquet`` on its own."""
    for _, event in _rows(path, arrow.decode_controls):
        if isinstance(event, ControlEvent):
            yield event


def _ordinal(row: Tuple[int, Event]) -> int:
    return row[0]


def _rows(
    path: Path, decode: Callable[[RecordBatch], Sequence[Event]]
) -> Iterator[Tuple[int, Event]]:
    """Ordinal and event of each row; where ordinals were not written, rows keep their order."""
    parquet, error_type = require_pyarrow("pyarrow.parquet"), require_pyarrow().ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            arrow.table_of(file.schema_arrow)  # a newer version is told before rows are read
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS):
                events = decode(batch)
                ordinals: Any = arrow.extra_column(batch, "ordinal")
                if ordinals is None:
                    ordinals = range(number, number + len(events))
                number += len(events)
                rows: List[Tuple[int, Event]] = list(zip(ordinals, events))
                yield from rows
    except (error_type, OSError, ValueError) as error:
        raise ReplayError(f"{path}: {first_line(error)}") from error
