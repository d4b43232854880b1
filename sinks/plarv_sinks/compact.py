"""Makes few large files of a store's many small ones, while others write and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import digest
from plarv_schemas.locks import FileLock
from plarv_schemas.pyarrow_types import RecordBatch, require_pyarrow
from plarv_sinks.curve import first_line
from plarv_sinks.store import COMPACTIONS, COVERS_KEY, Store, StoreError
from plarv_sinks.store_files import Prepared, StoredFile, steps_place, table_path
from plarv_sinks.store_rows import VanishedError

__all__ = ["Compacted", "compact"]

_FILES = 64  # open at once
_PORTION_BYTES = 128 * 1024 * 1024  # of files merged at once: about ten times that in memory
_BATCH_ROWS = 4096
_SMALL_BYTES = 64 * 1024 * 1024  # a file of findings or runs that is larger stays as it is
_SMALL_TABLES: Tuple[TableName, ...] = ("events", "verdicts", "actions", "runs")
_DONE = ".done"

_Merged = Tuple[List[Prepared], int]  # what was made, and its rows


class Compacted(NamedTuple):
    """What a compaction did."""

    taken: int = 0  # files that are no more
    made: int = 0
    rows: int = 0  # in those that were made


def compact(
    location: Union[str, Path],
    *,
    tell: Callable[[str], None],
    progress: Optional[Callable[[float], None]] = None,
) -> Compacted:
    """Puts each run's steps of a day into a folder of its own, and each day's rest into one file.

    A row that is there twice is kept once. Killed at any point, it leaves the store as it was or
    finishes when it is called again; a reader finds every row once at any time.

    Memory is bounded by some GiB, whatever the store's size. One compaction of a store at a
    time: on a local path others are refused; on an object store that is the caller's to see to.

    Raises:
        StoreError: there is no store, or another process compacts it.
        OSError: a file cannot be read or written.
    """
    store = Store(location, tell)
    lock: Optional[FileLock] = None
    if store.files.is_local:
        lock = FileLock(store.files.local("_compact.lock"))
        if not lock.acquire():
            raise StoreError(f"{location}: another process compacts it")
    try:
        _finish_all(store)
        return _compact(store, tell, progress)
    finally:
        if lock is not None:
            lock.release()


def _compact(
    store: Store, tell: Callable[[str], None], progress: Optional[Callable[[float], None]]
) -> Compacted:
    jobs: List[Tuple[TableName, List[StoredFile]]] = []
    for group in _step_groups(store):
        jobs.append(("steps", group))
    for table in _SMALL_TABLES:
        for group in _days(store, table):
            jobs.append((table, group))
    total = sum(file.size for _, group in jobs for file in group)
    done, result = 0, Compacted()
    for table, group in jobs:
        try:
            merged = (
                _merge_steps(store, group) if table == "steps" else _merge_day(store, table, group)
            )
        except (require_pyarrow().ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's, and no damage in a file
            tell(f"{store.location}: {group[0].path} and those beside it stay: {first_line(error)}")
            continue
        result = _commit(store, result, group, *merged)
        done += sum(file.size for file in group)
        if progress is not None:
            progress(done / max(1, total))
    return result


def _step_groups(store: Store) -> Iterator[List[StoredFile]]:
    """Fresh files of one day and partition, in the log's order, that their sink has finished."""
    covered = store.covered("runs")
    by_place: Dict[Any, List[StoredFile]] = {}
    for file in store.listed("steps"):
        place = file.place
        if place is None or place.last > covered.get(place.source, -1):
            continue
        if store.can_read(file):
            by_place.setdefault((file.date, place.source), []).append(file)
    for key in sorted(by_place):
        yield from _portions(sorted(by_place[key], key=_first_offset))


def _days(store: Store, table: TableName) -> Iterator[List[StoredFile]]:
    """The small files of each day, where there is more than one, or a fresh one."""
    covered = store.covered("runs") if table == "events" else {}
    by_date: Dict[str, List[StoredFile]] = {}
    for file in store.listed(table):
        place = file.place
        if table == "events" and place is not None and place.last > covered.get(place.source, -1):
            continue  # its sink has not finished this flush
        if file.size <= _SMALL_BYTES and store.can_read(file):
            by_date.setdefault(file.date, []).append(file)
    for date in sorted(by_date):
        for files in _portions(by_date[date]):
            if len(files) > 1 or files[0].place is not None:
                yield files


def _portions(files: Sequence[StoredFile]) -> Iterator[List[StoredFile]]:
    """The files in groups that fit into memory, also where all rows are of one run."""
    portion: List[StoredFile] = []
    size = 0
    for file in files:
        if portion and (len(portion) >= _FILES or size + file.size > _PORTION_BYTES):
            yield portion
            portion, size = [], 0
        portion.append(file)
        size += file.size
    if portion:
        yield portion


def _merge_steps(store: Store, group: Sequence[StoredFile]) -> _Merged:
    """Writes each run's rows of these files into a file of its own."""
    cursors = [_Cursor(store, file) for file in group]
    made: List[Prepared] = []
    rows = 0
    try:
        while True:
            waiting = [cursor.run_id for cursor in cursors if cursor.run_id is not None]
            if not waiting:
                return made, rows
            run_id = min(waiting)
            parts = [part for cursor in cursors for part in cursor.take(run_id)]
            whole = _each_once(require_pyarrow().Table.from_batches(parts), ("ordinal",))
            first = whole.column("ordinal")[0].as_py()
            last = whole.column("ordinal")[-1].as_py()
            folder, schema = steps_place(group[0].date, run_id)
            path = f"{folder}/{first:012d}-{last:012d}.parquet"
            made.append(store.files.prepare(path, schema, _batches(whole), sync=False))
            rows += whole.num_rows
    except BaseException:
        store.files.discard(made)
        raise
    finally:
        for cursor in cursors:
            cursor.close()


def _merge_day(store: Store, table: TableName, group: Sequence[StoredFile]) -> _Merged:
    """Writes the rows of these files into one; of runs the newest row of each."""
    tables = [store.whole(table, file) for file in group]
    whole = require_pyarrow().concat_tables(tables)
    if table == "runs":
        order = [("run_id", "ascending"), ("num_events", "descending")]
        whole = _each_once(whole.sort_by(order), ("run_id",))
    else:
        whole = whole.sort_by([("run_id", "ascending"), ("ordinal", "ascending")])
        whole = _each_once(whole, ("run_id", "ordinal") if table == "events" else ("id",))
    covers: Dict[str, int] = {}
    for file in group:
        for source, last in store.covers_of(table, file).items():
            covers[source] = max(last, covers.get(source, -1))
    schema = arrow.file_schema(table)
    data = json.dumps(covers).encode("ascii")
    schema = schema.with_metadata({**(schema.metadata or {}), COVERS_KEY: data})
    name = digest(*[file.path for file in group])
    path = f"{table_path(table, group[0].date)}/{name}.parquet"
    made = store.files.prepare(path, schema, _batches(whole), sync=False)
    return [made], whole.num_rows


def _commit(
    store: Store, result: Compacted, group: Sequence[StoredFile], made: List[Prepared], rows: int
) -> Compacted:
    """From the manifest on, readers take the new files for the old ones."""
    _sync_all(store)
    manifest = {
        "adds": {each.aside: each.path for each in made},
        "removes": [file.path for file in group],
    }
    number = 1 + max([_number(path) for path in store.files.names(COMPACTIONS)], default=0)
    path = f"{COMPACTIONS}/{number:012d}.json"
    store.files.put(path, json.dumps(manifest).encode("utf-8"))
    _finish(store, path)
    return Compacted(result.taken + len(group), result.made + len(made), result.rows + rows)


def _finish_all(store: Store) -> None:
    """Finishes what a compaction that was killed had decided."""
    for path in store.files.names(COMPACTIONS):
        if path.endswith(".json"):
            _finish(store, path)


def _finish(store: Store, path: str) -> None:
    """Gives the new files their places, removes the old ones, and says that this is done."""
    try:
        manifest = json.loads(store.files.read(path))
    except ValueError:  # cut by a power failure: nothing was decided
        store.files.remove(path)
        return
    for aside, target in manifest["adds"].items():
        if store.files.exists(aside):
            store.files.move(aside, target)
        elif not store.files.exists(target):
            raise StoreError(
                f"{store.location}: {aside} is gone, which a compaction had made; what it was made "
                f"of is still there: remove {path}"
            )
    _sync_all(store)
    for old in manifest["removes"]:
        store.files.remove(old)
    earlier = [each for each in store.files.names(COMPACTIONS) if each.endswith(_DONE)]
    store.files.move(path, path[: -len(".json")] + _DONE)  # its number tells readers to look again
    for each in earlier:
        store.files.remove(each)


def _sync_all(store: Store) -> None:
    """Once for all files: fsync of each would take a hundred times as long."""
    if store.files.is_local:
        os.sync()


class _Cursor:
    """A fresh file of steps, read run by run."""

    def __init__(self, store: Store, file: StoredFile) -> None:
        try:
            self._parquet = store.files.open(file.path)
        except FileNotFoundError as error:
            raise VanishedError(file.path) from error
        self._batches: Iterator[Any] = self._parquet.iter_batches(_BATCH_ROWS)
        self._batch: Any = None
        self.run_id: Optional[str] = None  # of the next row; None: there is none
        self._advance()

    def take(self, run_id: str) -> List[RecordBatch]:
        """The rows of the run, where they are the next."""
        taken: List[RecordBatch] = []
        compute = require_pyarrow("pyarrow.compute")
        while self.run_id == run_id:
            column = self._batch.column("run_id")
            until = compute.index(compute.not_equal(column, run_id), True).as_py()
            until = len(column) if until < 0 else until
            taken.append(self._batch.slice(0, until))
            self._batch = self._batch.slice(until)
            self._advance()
        return taken

    def close(self) -> None:
        self._parquet.close()

    def _advance(self) -> None:
        while self._batch is None or self._batch.num_rows == 0:
            batch = next(self._batches, None)
            if batch is None:
                self.run_id = None
                return
            self._batch = batch
        self.run_id = self._batch.column("run_id")[0].as_py()


def _each_once(table: Any, keys: Sequence[str]) -> Any:
    """The table, sorted as it is or by its ordinals, without rows whose keys were there before."""
    pa, compute = require_pyarrow(), require_pyarrow("pyarrow.compute")
    if keys == ("ordinal",):
        table = table.sort_by("ordinal")
    number = table.num_rows
    if number < 2:
        return table
    same: Any = None
    for key in keys:
        column = table.column(key).combine_chunks()
        equal = compute.equal(column.slice(1), column.slice(0, number - 1))
        same = equal if same is None else compute.and_(same, equal)
    if not compute.any(same).as_py():
        return table
    kept = pa.concat_arrays([pa.array([True]), compute.invert(same)])
    return table.filter(kept)


def _batches(table: Any) -> Iterator[RecordBatch]:
    yield from table.combine_chunks().to_batches()


def _first_offset(file: StoredFile) -> int:
    return -1 if file.place is None else file.place.first


def _number(path: str) -> int:
    name = path.rpartition("/")[2].partition(".")[0]
    return int(name) if name.isdigit() else 0
