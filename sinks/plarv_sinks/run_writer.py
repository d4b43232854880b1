"""Writes one run into a store: the events that it does not have yet, and what was found in them."""

from __future__ import annotations

import time
from typing import (
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict, digest
from plarv_schemas.pyarrow_types import RecordBatch
from plarv_sinks.export import num_values
from plarv_sinks.store import Store
from plarv_sinks.store_files import steps_place, table_path
from plarv_sinks.store_runs import RunProgress

__all__ = ["WrittenRun", "write_run"]

_GROUP_VALUES = 1_000_000  # of one row group: 32,000 steps of scalars, fewer with samples

_Placed = Tuple[Event, int, int]  # with its ordinal and attempt
_Findings = Iterable[Union[Verdict, Action]]


class WrittenRun(NamedTuple):
    """What was written of one run: the new rows of each table."""

    run_id: str
    rows: Dict[TableName, int]

    def __str__(self) -> str:
        """The run and its new rows, in one line for people."""
        rows = ", ".join(f"{number:,} {table}" for table, number in self.rows.items() if number)
        return f"{self.run_id}: {rows or 'nothing new'}"


def write_run(
    store: Store, progress: RunProgress, events: Iterator[Event], findings: Callable[[], _Findings]
) -> WrittenRun:
    """Writes those of ``events`` that come after what ``progress`` has seen, and the findings whose
    ids the store does not have; ``findings`` is asked once all events have been read.

    The steps' file first and the list of runs last: by that one, the next call knows what is
    there. Killed at any point and called again with the same events, it leaves every row once.
    Memory is bounded by one row group, the control events and the findings. OSError: a file cannot
    be written. ValueError: an event does not fit its columns.
    """
    done, before = progress.num_events, progress.num_steps
    controls: List[_Placed] = []
    placed = _placed(events, progress, controls)
    first = next(placed, None)
    date = _date(first[0].time_ns if first is not None else progress.last_time_ns)
    rows: Dict[TableName, int] = {}
    if first is not None:
        folder, schema = steps_place(date, progress.run_id)
        # The session too: on an object store nothing keeps two nodes from writing at once.
        path = f"{folder}/from-{done:012d}-{digest(first[0].session)}.parquet"
        store.files.write(path, schema, _step_batches(first, placed))
        rows["steps"] = progress.num_steps - before
    for table, name, number, batch in _small_tables(store, progress.run_id, controls, findings()):
        rows[table] = number
        if number:
            name = digest(progress.run_id, name or str(done))
            path = f"{table_path(table, date)}/{name}.parquet"
            store.files.write(path, arrow.file_schema(table), [batch])
    if progress.num_events > done:
        name = digest(progress.run_id, str(progress.num_events))
        path = f"{table_path('runs', date)}/{name}.parquet"
        store.files.write(path, arrow.file_schema("runs"), [arrow.encode_runs([progress.row()])])
    return WrittenRun(progress.run_id, rows)


def _placed(
    events: Iterator[Event], progress: RunProgress, controls: List[_Placed]
) -> Iterator[_Placed]:
    """The steps that the store does not have; control events of that kind go into ``controls``."""
    for event in events:
        ordinal = progress.place(event)
        if ordinal is None:
            continue
        placed = (event, ordinal, progress.attempts.of(event.session))
        if isinstance(event, ControlEvent):
            controls.append(placed)
        else:
            yield placed


def _step_batches(first: _Placed, others: Iterator[_Placed]) -> Iterator[RecordBatch]:
    """The steps as batches, each a row group."""
    group, values = [first], 0
    for placed in others:
        group.append(placed)
        values += num_values(placed[0])
        if values >= _GROUP_VALUES:
            yield _step_batch(group)
            group, values = [], 0
    if group:
        yield _step_batch(group)


def _step_batch(group: Sequence[_Placed]) -> RecordBatch:
    return arrow.encode_steps(
        [event for event, _, _ in group if isinstance(event, StepEvent)],
        ordinals=[ordinal for _, ordinal, _ in group],
        attempts=[attempt for _, _, attempt in group],
        schema=arrow.file_schema("steps"),
    )


def _small_tables(
    store: Store, run_id: str, controls: Sequence[_Placed], findings: _Findings
) -> Iterator[Tuple[TableName, str, int, RecordBatch]]:
    """Table, name, number of rows, rows. A name of findings is made of them: what was recorded late
    must not replace what is there.
    """
    events = [event for event, _, _ in controls if isinstance(event, ControlEvent)]
    batch = arrow.encode_controls(
        events,
        ordinals=[ordinal for _, ordinal, _ in controls],
        attempts=[attempt for _, _, attempt in controls],
        schema=arrow.file_schema("events"),
    )
    yield "events", "", len(events), batch
    known = {found.id for found in store.verdicts(run_id)}
    known.update(found.id for found in store.actions(run_id))
    new = [found for found in findings if found.id not in known]
    verdicts = [found for found in new if isinstance(found, Verdict)]
    name = digest(*[found.id for found in verdicts])
    batch = arrow.encode_verdicts(verdicts, schema=arrow.file_schema("verdicts"))
    yield "verdicts", name, len(verdicts), batch
    actions = [found for found in new if isinstance(found, Action)]
    name = digest(*[found.id for found in actions])
    batch = arrow.encode_actions(actions, schema=arrow.file_schema("actions"))
    yield "actions", name, len(actions), batch


def _date(time_ns: Optional[int]) -> str:
    """The day of a time, UTC; of now where there is none."""
    return time.strftime("%Y-%m-%d", time.gmtime(None if time_ns is None else time_ns * 1e-9))
