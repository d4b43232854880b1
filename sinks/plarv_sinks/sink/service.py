"""``argus sink``: reads a fleet's topics and writes the store's files, until it is told to stop."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Generator, List, Optional, Sequence, Set, Tuple

from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import digest
from plarv_schemas.kafka_clients import (
    admin_client,
    broker_error,
    open_consumer,
    place_of,
)
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.kafka_types import Place as KafkaPlace
from plarv_schemas.kafka_types import require_kafka
from plarv_schemas.topic_reader import NoTopicError, record_of
from plarv_schemas.topics import Topics
from plarv_sinks.sink.partitions import Committed, Partition, SourceTopic, load_partitions
from plarv_sinks.store import Store
from plarv_sinks.store_files import Prepared

__all__ = ["Sink", "SinkConfig", "SinkCounts"]

_POLL_MS = 500
_CLOSE_MS = 5_000  # a group that is just being joined would keep it longer
_POLL_RECORDS = 2000
_RETRY_S = 5.0
_MAX_WAITING_BYTES = 512 * 1024 * 1024  # of all partitions together


@dataclass(frozen=True)
class SinkConfig:
    """What a sink reads, and how long a row may wait for its file."""

    connection: Connection
    topics: Topics
    group: str
    flush_s: float = 30.0  # a row waits no longer
    flush_rows: int = 500_000  # of one partition


@dataclass
class SinkCounts:
    """What a sink has done since it started."""

    rows: int = 0  # written
    files: int = 0
    poison: int = 0  # messages that cannot be read, dropped
    copies: int = 0  # records that the store had
    waiting: int = 0  # rows
    behind: int = 0  # messages that the topics hold and were not read


class Sink:
    """One of a fleet's sinks; several share the partitions. Not for several threads.

    The store's files say where a partition goes on; the group's commit follows them. A flush writes
    its files aside, asks the group whether this sink is still a member, and gives the files their
    names, the one that marks the end the last. While the disk takes nothing, nothing more is read.
    """

    def __init__(self, config: SinkConfig, store: Store, tell: Callable[[str], None]) -> None:
        self.config, self.counts = config, SinkCounts()
        self._store, self._tell = store, tell
        self._partitions: Dict[Tuple[str, int], Partition] = {}
        self._listener = _Listener()
        self._consumer: Any = None
        self._topics: List[SourceTopic] = []
        self._is_full = False  # the disk: it takes nothing
        self._wait_until = 0.0  # with the next flush
        self._committed_at = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Reads and writes until ``stop`` is set; then writes what waits.

        BrokerError: the brokers cannot be reached at the start, or refuse us.
        """
        self._topics = _source_topics(self.config)
        with self._subscribed():
            while not stop.is_set():
                self._turn()
            self._flush([each for each in self._partitions.values() if each.gathers.num_rows])
            self._commit()

    def _turn(self) -> None:
        found = self._polled()
        new = self._follow_assignment()
        now = time.monotonic()
        for place, received in found.items():
            key = (place.topic, place.partition)
            partition = self._partitions.get(key)
            # What came with the assignment was read from where the commit stands: now it is read
            # from where the files end.
            if partition is not None and key not in new:
                for each in received:
                    partition.take(record_of(each), now)
        if now >= self._wait_until:
            self._flush(self._due(now))
        if now - self._committed_at >= self.config.flush_s:
            self._commit()  # of what was read and is nothing to write, too
        self._count()

    def _polled(self) -> Any:
        try:
            return self._consumer.poll(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except Exception as error:
            said = broker_error(self.config.connection, error)
            if said is None:
                raise
            self._tell(f"{said}; trying again")
            time.sleep(_POLL_MS / 1000)
            return {}

    def _follow_assignment(self) -> Set[Tuple[str, int]]:
        """Lets go of partitions that were taken away, and takes up those that are new: these.

        What waited of the first is read again by whoever has them now.
        """
        lost, gained = self._listener.take()
        for key in lost:
            self._partitions.pop(key, None)
        new = {key for key in gained if key not in self._partitions}
        if not new:
            return new
        assigned: Dict[str, Set[int]] = {}
        for topic, number in new:
            assigned.setdefault(topic, set()).add(number)
        places = [place_of(topic, number) for topic, number in new]
        beginnings = self._consumer.beginning_offsets(places)
        for partition in load_partitions(self._store, self._topics, assigned):
            place = place_of(partition.topic.name, partition.number)
            beginning = beginnings[place]
            at = partition.resume_at(self._committed(place, partition), beginning)
            if 0 <= partition.covered < beginning - 1:
                self._tell(
                    f"{partition.topic.name}, partition {partition.number}: the brokers no longer "
                    f"hold offsets {partition.covered + 1:,} to {beginning - 1:,}: they are lost"
                )
            self._consumer.seek(place, at)
            self._partitions[place.topic, place.partition] = partition
        return new

    def _committed(self, place: KafkaPlace, partition: Partition) -> Optional[Committed]:
        found = self._consumer.committed(place, metadata=True)
        if found is None or found.offset < 0:
            return None
        source, _, covered = str(found.metadata or "").rpartition(":")
        if source != partition.source or not covered.lstrip("-").isdigit():
            return None
        return Committed(found.offset, int(covered))

    def _due(self, now: float) -> List[Partition]:
        config = self.config
        due = [
            each
            for each in self._partitions.values()
            if each.gathers.num_rows >= config.flush_rows
            or (each.since is not None and now - each.since >= config.flush_s)
        ]
        waiting = sum(each.gathers.size_bytes for each in self._partitions.values())
        if not due and waiting > _MAX_WAITING_BYTES:
            due = [max(self._partitions.values(), key=lambda each: each.gathers.size_bytes)]
        return due

    def _flush(self, due: List[Partition]) -> None:
        for partition in due:
            try:
                prepared = partition.prepare(self._store)
                if not self._commit():  # the group no longer counts us in, or cannot be asked
                    self._store.files.discard(prepared)
                    self._wait_until = time.monotonic() + _RETRY_S
                    return
                self._store.files.publish(prepared)
                if not self._all_there(prepared):
                    self._listener.lose([(partition.topic.name, partition.number)])
                    self._follow_assignment()
                    return
            except OSError as error:
                self._wait_for_the_disk(error)
                return
            self.counts.rows += partition.gathers.num_rows
            self.counts.files += len(prepared)
            partition.published()
        if due:
            self._read_on()
            self._commit()

    def _all_there(self, prepared: Sequence[Prepared]) -> bool:
        """Whether nobody has taken the files for those of a sink that was killed.

        That happens to one that is stopped between two renames until its partitions are somebody
        else's. A mark without what it marks is removed.
        """
        if all(self._store.files.exists(path) for _, path in prepared):
            return True
        self._store.files.remove(prepared[-1].path)
        self._tell("this sink was stopped for so long that another one has its partitions")
        return False

    def _commit(self) -> bool:
        """Commits what the files cover, and what was read beyond and is nothing to write; whether
        the group took it, and so counts this sink as a member.
        """
        self._committed_at = time.monotonic()
        structs = require_kafka("kafka.structs")
        offsets: Dict[Any, Any] = {}
        for partition in self._partitions.values():
            at = partition.covered + 1 if partition.gathers.num_rows else partition.next
            note = f"{partition.source}:{partition.covered}"
            place = place_of(partition.topic.name, partition.number)
            offsets[place] = structs.OffsetAndMetadata(at, note, -1)
        if not offsets:
            return True
        try:
            self._consumer.commit(offsets, timeout_ms=10_000)
        except Exception as error:
            errors = require_kafka("kafka.errors")
            if isinstance(error, errors.CommitFailedError):
                self._listener.lose(self._partitions)
                self._follow_assignment()
                return False
            said = broker_error(self.config.connection, error)
            if said is None:
                raise
            self._tell(f"{said}; trying again")
            return False
        return True

    def _wait_for_the_disk(self, error: OSError) -> None:
        if not self._is_full:
            why = error.strerror or str(error)
            self._tell(f"{self._store.location}: {why}; nothing is lost: trying again")
        self._is_full = True
        self._wait_until = time.monotonic() + _RETRY_S
        self._consumer.pause(*self._consumer.assignment())

    def _read_on(self) -> None:
        if self._is_full:
            self._is_full = False
            self._consumer.resume(*self._consumer.paused())
            self._tell(f"{self._store.location}: writing again")

    def _count(self) -> None:
        counts, partitions = self.counts, self._partitions.values()
        counts.waiting = sum(each.gathers.num_rows for each in partitions)
        counts.poison = sum(each.gathers.poison for each in partitions)
        counts.copies = sum(each.gathers.copies for each in partitions)
        counts.behind = 0
        for partition in partitions:
            place = place_of(partition.topic.name, partition.number)
            counts.behind += max(0, (self._consumer.highwater(place) or 0) - partition.next)

    @contextmanager
    def _subscribed(self) -> Generator[None, None, None]:
        config = self.config
        self._consumer = open_consumer(
            config.connection, group_id=config.group, auto_offset_reset="earliest"
        )
        require_kafka().ConsumerRebalanceListener.register(_Listener)
        try:
            self._consumer.subscribe([each.name for each in self._topics], listener=self._listener)
            yield
        finally:
            self._consumer.close(autocommit=False, timeout_ms=_CLOSE_MS)


def _source_topics(config: SinkConfig) -> List[SourceTopic]:
    """The topics as they stand. NoTopicError: one is missing. BrokerError."""
    topics = config.topics
    names: Dict[str, TableName] = {
        topics.steps: "steps",
        topics.verdicts: "verdicts",
        topics.actions: "actions",
    }
    with admin_client(config.connection) as admin:
        described = {str(each["name"]): each for each in admin.describe_topics(list(names))}
    found: List[SourceTopic] = []
    for name, table in names.items():
        topic = described.get(name, {})
        if topic.get("error_code") or not topic.get("partitions"):
            where = ", ".join(config.connection.brokers)
            raise NoTopicError(f"no topic {name} at {where}: `argus topics create` makes it")
        given = str(topic.get("topic_id") or "").replace("-", "").strip("0")
        topic_id = str(topic["topic_id"]).replace("-", "")[:12] if given else digest(name)[:12]
        found.append(SourceTopic(name, topic_id, len(topic["partitions"]), table))
    return found


class _Listener:
    """Notes what the group says, which it does on a thread of the client's, during a poll."""

    def __init__(self) -> None:
        self._lost: Set[Tuple[str, int]] = set()
        self._gained: Set[Tuple[str, int]] = set()

    def take(self) -> Tuple[Set[Tuple[str, int]], Set[Tuple[str, int]]]:
        """What was lost and gained since it was last asked."""
        lost, gained = self._lost, self._gained
        self._lost, self._gained = set(), set()
        return lost, gained

    def lose(self, keys: Any) -> None:
        """The group no longer counts us as a member."""
        self._lost.update(keys)

    def on_partitions_revoked(self, revoked: Any) -> None:
        keys = {(each.topic, each.partition) for each in revoked}
        self._lost |= keys
        self._gained -= keys

    def on_partitions_lost(self, lost: Any) -> None:
        self.on_partitions_revoked(lost)

    def on_partitions_assigned(self, assigned: Any) -> None:
        self._gained |= {(each.topic, each.partition) for each in assigned}
