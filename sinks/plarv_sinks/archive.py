"""Writes the runs of this machine into a store: what the embedded engine left of each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from plarv_processors.engine import Engine
from plarv_processors.stored_fold import base_of, fold_rest
from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict, digest
from plarv_schemas.locks import FileLock
from plarv_schemas.pyarrow_types import RecordBatch, require_pyarrow
from plarv_schemas.records import FOLD_LOCK, read_findings
from plarv_schemas.run_log import RunLog, is_run_dir
from plarv_sinks.curve import ReplayError, Tell
from plarv_sinks.export import num_values
from plarv_sinks.store import Store
from plarv_sinks.store_files import table_path, without_run_id
from plarv_sinks.store_runs import RunProgress

__all__ = ["Archived", "archive"]

_POLL_EVENTS = 4096
_LOOK_S = 0.1
_GROUP_VALUES = 1_000_000  # of one row group: 32,000 steps of scalars, fewer with samples

_Placed = Tuple[Event, int, int]  # with its ordinal and attempt


class Archived(NamedTuple):
    """What was written of one run: the new rows of each table."""

    run_id: str
    rows: Dict[TableName, int]


def archive(
    run_dir: Path, location: Union[str, Path], *, tell: Tell, wait_s: float = 0.0
) -> Archived:
    """Writes what a store does not have yet of a run's folder: events, verdicts and actions.

    What is still to be folded is folded first; a run whose process is about to end is waited for,
    up to ``wait_s``. Killed at any point and called again, it leaves every row once. Memory is
    bounded by one row group and the run's control events.

    Raises:
        ReplayError: ``run_dir`` holds no journal, one of a newer version, or that of a run that
            another process is folding.
        OSError: a file cannot be read or written.
        ImportError: pyarrow is missing.
    """
    if not is_run_dir(run_dir):
        raise ReplayError(f"{run_dir}: not a run's folder: no journal in it")
    require_pyarrow("pyarrow.parquet")
    lock = FileLock(run_dir / FOLD_LOCK)
    # In which order ranks are merged must be decided and written down before anybody keeps it.
    until = time.monotonic() + wait_s
    while not (fold_rest(run_dir) and lock.acquire()):
        if time.monotonic() >= until:
            raise ReplayError(f"{run_dir}: it is running; it can be written once it has ended")
        time.sleep(_LOOK_S)
    log = RunLog(run_dir)
    try:
        return _write(run_dir, log, Store(location, tell, create=True), tell)
    except ValueError as error:
        raise ReplayError(f"{run_dir}: {error}") from error
    finally:
        log.close()
        lock.release()


def _write(run_dir: Path, log: RunLog, store: Store, tell: Tell) -> Archived:
    """Steps first and the list of runs last: by that one, the next call knows what is there."""
    batch = log.poll(_POLL_EVENTS)
    if not batch:
        raise ReplayError(f"{run_dir}: the journal holds no event")
    run_id = batch[0].run_id
    progress = _progress(run_dir, run_id, store, tell)
    done = progress.num_events
    controls: List[_Placed] = []
    placed = _placed(batch, log, progress, controls)
    first = next(placed, None)
    date = _date(first[0].time_ns if first is not None else progress.last_time_ns)
    rows: Dict[TableName, int] = {}
    if first is not None:
        path = f"{table_path('steps', date, run_id)}/from-{done:012d}.parquet"
        before = progress.num_steps
        schema = without_run_id(arrow.file_schema("steps"), run_id)
        store.files.write(path, schema, _step_batches(first, placed))
        rows["steps"] = progress.num_steps - before + 1
    if log.skipped:
        tell(f"{run_dir}: {log.skipped:,} records could not be read")
    for table, name, number, small in _small_tables(run_dir, run_id, store, controls):
        rows[table] = number
        if number:
            path = f"{table_path(table, date)}/{digest(run_id, name or str(done))}.parquet"
            store.files.write(path, arrow.file_schema(table), [small])
    if progress.num_events > done:
        path = f"{table_path('runs', date)}/{digest(run_id, str(progress.num_events))}.parquet"
        store.files.write(path, arrow.file_schema("runs"), [arrow.encode_runs([progress.row()])])
    return Archived(run_id, rows)


def _progress(run_dir: Path, run_id: str, store: Store, tell: Tell) -> RunProgress:
    """Where the store's rows of the run end; where it has none, where the journal begins."""
    row = store.run_rows().get(run_id)
    if row is not None:
        return RunProgress.of(row)
    progress = RunProgress(run_id)
    engine = Engine()
    base = base_of(run_dir, engine)
    if base is not None:
        tell(f"{run_dir}: older events were removed before a store had them")
    if base is not None and base >= 0:
        progress.attempts, progress.num_events = engine.attempts, base + 1
    return progress


def _placed(
    events: Sequence[Event], log: RunLog, progress: RunProgress, controls: List[_Placed]
) -> Iterator[_Placed]:
    """The steps that the store does not have; control events of that kind go into ``controls``."""
    while events:
        for event in events:
            ordinal = progress.place(event)
            if ordinal is None:
                continue
            placed = (event, ordinal, progress.attempts.of(event.session))
            if isinstance(event, ControlEvent):
                controls.append(placed)
            else:
                yield placed
        events = log.poll(_POLL_EVENTS)


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
    steps = [event for event, _, _ in group if isinstance(event, StepEvent)]
    return arrow.encode_steps(
        steps,
        ordinals=[ordinal for _, ordinal, _ in group],
        attempts=[attempt for _, _, attempt in group],
        schema=arrow.file_schema("steps"),
    )


def _small_tables(
    run_dir: Path, run_id: str, store: Store, controls: Sequence[_Placed]
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
    findings = [found for found in read_findings(run_dir) if found.id not in known]
    verdicts = [found for found in findings if isinstance(found, Verdict)]
    name = digest(*[found.id for found in verdicts])
    batch = arrow.encode_verdicts(verdicts, schema=arrow.file_schema("verdicts"))
    yield "verdicts", name, len(verdicts), batch
    actions = [found for found in findings if isinstance(found, Action)]
    name = digest(*[found.id for found in actions])
    batch = arrow.encode_actions(actions, schema=arrow.file_schema("actions"))
    yield "actions", name, len(actions), batch


def _date(time_ns: Optional[int]) -> str:
    """The day of a time, UTC; of now where there is none."""
    return time.strftime("%Y-%m-%d", time.gmtime(None if time_ns is None else time_ns * 1e-9))
