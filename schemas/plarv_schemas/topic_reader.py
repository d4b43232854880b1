"""Reads a topic, or the partition of one run, without a consumer group: nobody else notices."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from plarv_schemas.kafka_clients import (
    REACH_S,
    BrokerError,
    consumer_client,
    partition_of,
    place_of,
)
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.kafka_types import Consumer, Place, Received

__all__ = ["NoTopicError", "Record", "TopicRange", "TopicReader", "open_topic", "record_of"]

_POLL_MS = 200  # a fetch that finds something answers at once
_BATCH = 500
_STALLED_S = 60.0


class NoTopicError(BrokerError):
    """The brokers answer, and have no such topic."""


class Record(NamedTuple):
    """One message of a topic."""

    topic: str
    partition: int
    offset: int
    time_ms: int  # UTC, when it was sent
    key: Optional[bytes]
    headers: Tuple[Tuple[str, bytes], ...]
    value: Optional[bytes]  # None: a tombstone


class TopicRange(NamedTuple):
    """Offsets of a partition, from ``begin`` up to, and not including, ``end``."""

    begin: int
    end: int


class TopicReader:
    """Reads one topic; :func:`open_topic` makes it."""

    def __init__(self, consumer: Consumer, topic: str, num_partitions: int) -> None:
        self.topic = topic
        self.num_partitions = num_partitions
        self._consumer = consumer

    def partition_of(self, run_id: str) -> int:
        """The partition in which all of the run lies."""
        return partition_of(run_id, self.num_partitions)

    def ranges(self, partitions: Optional[Iterable[int]] = None) -> Dict[int, TopicRange]:
        """What each partition holds now; None: all of them."""
        numbers = range(self.num_partitions) if partitions is None else partitions
        places = [place_of(self.topic, number) for number in numbers]
        begins = self._consumer.beginning_offsets(places)
        ends = self._consumer.end_offsets(places)
        return {place.partition: TopicRange(begins[place], ends[place]) for place in places}

    def read(self, ranges: Mapping[int, TopicRange]) -> Iterator[Record]:
        """The records of these ranges: in order within a partition, partitions interleaved.

        BrokerError: the brokers give nothing for a minute, or have removed what was to be read.
        """
        left = {
            place_of(self.topic, number): span
            for number, span in ranges.items()
            if span.begin < span.end
        }
        self._seek({place: span.begin for place, span in left.items()})
        heard = time.monotonic()
        while left:
            for place, records in self._poll().items():
                heard = time.monotonic()
                for record in records:
                    if place in left and record.offset < left[place].end:
                        yield record_of(record)
            # The last offsets of a range may hold no record (compaction): the position says so.
            done = [place for place, span in left.items() if self._position(place) >= span.end]
            for place in done:
                del left[place]
            if done and left:
                self._seek({place: self._position(place) for place in left})
            if left and time.monotonic() - heard > _STALLED_S:
                raise BrokerError(f"{self.topic}: the brokers gave nothing for {_STALLED_S:.0f} s")

    def follow(self, begins: Mapping[int, int]) -> Iterator[Optional[Record]]:
        """The records from these offsets on, without end; None a few times a second while there is
        none, also while the brokers are away.
        """
        self._seek({place_of(self.topic, number): begin for number, begin in begins.items()})
        while True:
            found = self._poll()
            for records in found.values():
                for record in records:
                    yield record_of(record)
            if not found:
                yield None

    def _seek(self, begins: Mapping[Place, int]) -> None:
        self._consumer.assign(list(begins))
        for place, begin in begins.items():
            self._consumer.seek(place, begin)

    def _poll(self) -> Mapping[Place, List[Received]]:
        return self._consumer.poll(timeout_ms=_POLL_MS, max_records=_BATCH)

    def _position(self, place: Place) -> int:
        return self._consumer.position(place)


@contextmanager
def open_topic(
    connection: Connection, topic: str, *, reach_s: float = REACH_S
) -> Generator[TopicReader, None, None]:
    """A reader of the topic; its connections are closed at the end.

    NoTopicError: there is none. BrokerError: no broker was reached within ``reach_s``, or one
    refused us, at any place inside the ``with``.
    """
    with consumer_client(connection, reach_s=reach_s) as consumer:
        partitions = consumer.partitions_for_topic(topic)
        if not partitions:
            where = ", ".join(connection.brokers)
            raise NoTopicError(f"no topic {topic} at {where}: `argus topics create` makes it")
        yield TopicReader(consumer, topic, len(partitions))


def record_of(received: Received) -> Record:
    """A message as kafka-python gives it."""
    return Record(
        received.topic,
        received.partition,
        received.offset,
        received.timestamp,
        received.key,
        tuple(received.headers),
        received.value,
    )
