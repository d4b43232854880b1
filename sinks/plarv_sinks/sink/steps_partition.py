"""One partition of the log: its events, placed and gathered until a file is written."""

from __future__ import annotations

from array import array
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.pyarrow_types import Array, RecordBatch, require_pyarrow
from plarv_schemas.topic_reader import Record
from plarv_schemas.topics import TABLE_HEADER, header
from plarv_sinks.sink.rows import Rows
from plarv_sinks.store import StoreError
from plarv_sinks.store_runs import RunProgress, RunRow

__all__ = ["StepsPartition", "Written"]

Written = Tuple[TableName, RecordBatch]  # what goes into one file
_LAST = ("step", "loss", "world_size", "time_ns")


class StepsPartition:
    """Accepts each (session, record) once, as the fleet's detectors do, and gives it its ordinal.

    ``rows`` are those of its runs that the store has: what is placed begins after them. A message
    that cannot be read is counted in ``poison`` and dropped, as the workers do.
    """

    def __init__(self, rows: Dict[str, RunRow]) -> None:
        self.poison = 0
        self.copies = 0  # events that the store had
        self._known: Dict[str, Union[RunRow, RunProgress]] = dict(rows)
        self._begin()

    @property
    def num_rows(self) -> int:
        """Rows that wait to be written."""
        return self._steps.num_rows + len(self._controls)

    @property
    def size_bytes(self) -> int:
        """About how much memory they take."""
        return self._steps.size_bytes + 1000 * len(self._controls)

    def take(self, record: Record) -> None:
        """A message of the topic."""
        try:
            self._take(record)
        except (ValueError, TypeError, OverflowError):
            self.poison += 1

    def written(self) -> List[Written]:
        """What is to be written now, the list of runs last; empty: nothing new."""
        files: List[Written] = []
        if self._steps.num_rows:
            files.append(("steps", self._steps.sorted_by_run()))
        if self._controls:
            self._controls.sort(key=_run_and_ordinal)
            events = arrow.encode_controls(
                [event for event, _, _ in self._controls],
                ordinals=[ordinal for _, ordinal, _ in self._controls],
                attempts=[attempt for _, _, attempt in self._controls],
                schema=arrow.file_schema("events"),
            )
            files.append(("events", events))
        if files:
            rows = [self._touched[run_id].row() for run_id in sorted(self._touched)]
            files.append(("runs", arrow.encode_runs(rows)))
        return files

    def clear(self) -> None:
        """What waited has been written."""
        for run_id, progress in self._touched.items():
            if progress.status is not None:  # it has ended: as bytes it takes a tenth
                self._known[run_id] = progress.row()
        self._begin()

    def _begin(self) -> None:
        self._steps = Rows("steps")
        self._controls: List[Tuple[ControlEvent, int, int]] = []
        self._touched: Dict[str, RunProgress] = {}

    def _take(self, record: Record) -> None:
        if record.value is None:
            raise ValueError("the message is empty")
        table = header(record.headers, TABLE_HEADER)
        batch = arrow.from_ipc(bytes(record.value))
        if table == "steps":
            self._take_steps(batch, record.key)
        elif table == "events":
            events = arrow.decode_controls(batch)
            run_id = _one_run({event.run_id for event in events}, record.key)
            self._place(self._progress(run_id), events)
        else:
            raise ValueError(f"a message of steps or events is wanted, not {table!r}")

    def _take_steps(self, batch: RecordBatch, key: Optional[bytes]) -> None:
        """Places a batch as a whole where its events simply follow; else one by one."""
        columns = dict(zip(_STEP_NAMES, arrow.to_file_columns("steps", batch)))
        number = batch.num_rows
        if number == 0:
            raise ValueError("the message holds no event")
        run_id = _one_run(_distinct(columns["run_id"]), key)
        progress = self._progress(run_id)
        sessions = _distinct(columns["session"])
        records, steps = _span(columns["record"], strictly=True), _span(columns["step"])
        placed = None
        if len(sessions) == 1 and records is not None and steps is not None:
            placed = progress.place_span(sessions.pop(), records, steps, number)
        if placed is None:
            self._place_each(progress, batch, list(columns.values()))
            return
        attempt, first = placed
        last = _value(columns["time_ns"], 0)
        progress.stepped(number, _last_step(run_id, columns), last)
        self._touched[run_id] = progress
        ordinals = range(first, first + number)
        attempts = array("q", [attempt]) * number
        self._steps.add_columns(list(columns.values()), array("q", ordinals), attempts)

    def _place_each(
        self, progress: RunProgress, batch: RecordBatch, columns: Sequence[Array]
    ) -> None:
        pa = require_pyarrow()
        mask: List[bool] = []
        ordinals, attempts = array("q"), array("q")
        for event in arrow.decode_steps(batch):
            ordinal = progress.place(event)
            mask.append(ordinal is not None)
            if ordinal is not None:
                ordinals.append(ordinal)
                attempts.append(progress.attempts.of(event.session))
        self.copies += len(mask) - len(ordinals)
        if ordinals:
            self._touched[progress.run_id] = progress
            kept: List[Any] = list(columns)
            if len(ordinals) < len(mask):
                kept = [column.filter(pa.array(mask)) for column in kept]
            self._steps.add_columns(kept, ordinals, attempts)

    def _place(self, progress: RunProgress, events: Sequence[Event]) -> None:
        for event in events:
            ordinal = progress.place(event)
            if ordinal is None:
                self.copies += 1
            elif isinstance(event, ControlEvent):
                self._controls.append((event, ordinal, progress.attempts.of(event.session)))
                self._touched[progress.run_id] = progress

    def _progress(self, run_id: str) -> RunProgress:
        known = self._known.get(run_id)
        if isinstance(known, RunProgress):
            return known
        try:
            progress = RunProgress(run_id) if known is None else RunProgress.of(known)
        except ValueError as error:  # not the message's fault: it must not be dropped for it
            raise StoreError(
                f"run {run_id}: its state in the store is unreadable: {error}"
            ) from error
        self._known[run_id] = progress
        return progress


_STEP_NAMES = StepEvent._fields[:-1]


def _run_and_ordinal(control: Tuple[ControlEvent, int, int]) -> Tuple[str, int]:
    return control[0].run_id, control[1]


def _one_run(runs: Any, key: Optional[bytes]) -> str:
    if len(runs) != 1:
        raise ValueError("the message holds no event, or events of several runs")
    (run_id,) = runs
    if key is None or bytes(key) != run_id.encode("utf-8"):
        raise ValueError(f"the message's key is not the run id {run_id!r} of its events")
    return str(run_id)


def _distinct(column: Any) -> Set[str]:
    """The values of a column of text; mostly there is one."""
    return set(column.unique().to_pylist())


def _span(column: Any, *, strictly: bool = False) -> Optional[Tuple[int, int]]:
    """First and last value, where the values ascend; None: they do not."""
    number = len(column)
    if number > 1:
        compute = require_pyarrow("pyarrow.compute")
        earlier, later = column.slice(0, number - 1), column.slice(1)
        ascends = compute.greater if strictly else compute.greater_equal
        if not compute.all(ascends(later, earlier)).as_py():
            return None
    return column[0].as_py(), column[number - 1].as_py()


def _value(column: Any, place: int) -> Any:
    return column[place].as_py()


def _last_step(run_id: str, columns: Dict[str, Any]) -> StepEvent:
    """The newest step, as far as the list of runs wants it."""
    values = {name: _value(columns[name], -1) for name in _LAST}
    return StepEvent(run_id, "", 0, 0, **values)
