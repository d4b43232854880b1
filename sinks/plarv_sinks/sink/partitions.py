"""The partitions that a sink holds: where each goes on, and its flushes into the store."""

from __future__ import annotations

import json
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Set

from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.kafka_clients import partition_of
from plarv_schemas.topic_reader import Record
from plarv_sinks.sink.findings_partition import FindingsPartition
from plarv_sinks.sink.steps_partition import StepsPartition, Written
from plarv_sinks.store import COVERS_KEY, Store, StoreError
from plarv_sinks.store_files import FRESH, Place, Prepared, StoredFile, fresh_path
from plarv_sinks.store_runs import RunRow

__all__ = ["Committed", "Partition", "SourceTopic", "load_partitions"]


class SourceTopic(NamedTuple):
    """A topic that a sink reads."""

    name: str
    topic_id: str  # 12 hex digits
    num_partitions: int
    table: TableName  # its main one: steps, verdicts or actions

    @property
    def marks(self) -> TableName:
        """The table whose files say how far the topic has been written: the last of a flush."""
        return "runs" if self.table == "steps" else self.table


class Committed(NamedTuple):
    """A commit of a consumer group: where to go on, and on top of which files it was made."""

    offset: int
    covered: int  # last offset in the files then; -1: none


class Gathers(Protocol):
    """What a partition's messages are gathered in."""

    poison: int
    copies: int

    @property
    def num_rows(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    def take(self, record: Record) -> None:
        """A message of the topic."""

    def written(self) -> List[Written]:
        """What is to be written now."""
        ...

    def clear(self) -> None:
        """What waited has been written."""


class Partition:
    """A partition of a topic, from where the store's files of it end.

    ``next`` is the offset to go on at, ``covered`` the last one that the files cover.
    """

    def __init__(self, topic: SourceTopic, number: int, covered: int, gathers: Gathers) -> None:
        self.topic, self.number, self.covered = topic, number, covered
        self.gathers = gathers
        self.next = covered + 1
        self.since: Optional[float] = None  # when the oldest row that waits came
        self._first_ms = 0  # when the oldest message that waits was sent
        self._first = self.next

    @property
    def source(self) -> str:
        """As the files' metadata name it."""
        return self._place().source

    def resume_at(self, committed: Optional[Committed], beginning: int) -> int:
        """The offset to read from: the files say so.

        A commit says more where it was made on top of just these files: then what lies between is
        nothing that a file would hold. ``beginning`` is the first offset that the topic still has.
        """
        at = self.covered + 1
        if committed is not None and committed.covered == self.covered:
            at = max(at, committed.offset)
        self.next = max(at, beginning)
        return self.next

    def take(self, record: Record, now: float) -> None:
        """A message; those before ``next`` were read already."""
        if record.offset < self.next:
            return
        had = self.gathers.num_rows
        self.gathers.take(record)
        self.next = record.offset + 1
        if not had and self.gathers.num_rows:
            self.since, self._first_ms, self._first = now, record.time_ms, record.offset

    def prepare(self, store: Store) -> List[Prepared]:
        """Writes what waits into files without a name yet, the one that marks the end the last.
        OSError: nothing was written, and all of it waits on.
        """
        date = time.strftime("%Y-%m-%d", time.gmtime(self._first_ms / 1000))
        place = self._place()
        covers = json.dumps({place.source: place.last}).encode("ascii")
        prepared: List[Prepared] = []
        try:
            for table, batch in self.gathers.written():
                schema = arrow.file_schema(table)
                schema = schema.with_metadata({**(schema.metadata or {}), COVERS_KEY: covers})
                path = fresh_path(table, date, place)
                prepared.append(store.files.prepare(path, schema, [batch]))
        except BaseException:
            store.files.discard(prepared)
            raise
        return prepared

    def published(self) -> None:
        """The files have their names."""
        if self.gathers.num_rows:
            self.covered = self.next - 1
        self.gathers.clear()
        self.since = None

    def _place(self) -> Place:
        return Place(self.topic.topic_id, self.number, self._first, self.next - 1)


def load_partitions(
    store: Store, topics: Sequence[SourceTopic], assigned: Mapping[str, Set[int]]
) -> List[Partition]:
    """The assigned partitions (topic name -> numbers), each where the store's files of it end.

    What a sink that was killed left without its mark is removed first. StoreError: a file cannot be
    read of those that say what the store has; without it, all would be written once more.
    """
    store.sweep()
    strict = Store(store.files.given, _refuse)
    fresh = store.files.listed(f"{FRESH}/table=steps") + store.files.listed(f"{FRESH}/table=events")
    partitions: List[Partition] = []
    for topic in topics:
        numbers = assigned.get(topic.name, set())
        if not numbers:
            continue
        covered = strict.covered(topic.marks)
        known = _known(strict, topic, numbers)
        for number in sorted(numbers):
            last = covered.get(Place(topic.topic_id, number, 0, 0).source, -1)
            partition = Partition(topic, number, last, known(number))
            if topic.table == "steps":
                _remove_unmarked(store, partition, fresh)
            partitions.append(partition)
    return partitions


def _known(store: Store, topic: SourceTopic, numbers: Set[int]) -> Callable[[int], Gathers]:
    """What makes the empty gatherer of a partition: it knows what the store has."""
    if topic.table == "steps":
        rows: Dict[int, Dict[str, RunRow]] = {number: {} for number in numbers}
        for run_id, row in store.run_rows().items():
            of_run = partition_of(run_id, topic.num_partitions)
            if of_run in rows:
                rows[of_run][run_id] = row
        return lambda number: StepsPartition(rows[number])
    table: Any = topic.table
    ids = store.ids(table)
    return lambda _: FindingsPartition(table, ids)


def _remove_unmarked(store: Store, partition: Partition, fresh: Sequence[StoredFile]) -> None:
    """Removes files of a flush that was not finished: it is done again."""
    for file in fresh:
        place = file.place
        if place is not None and place.source == partition.source:
            if place.last > partition.covered:
                store.files.remove(file.path)


def _refuse(what: str) -> None:
    raise StoreError(f"{what}; put it back or move it out of the store, then start the sink again")
