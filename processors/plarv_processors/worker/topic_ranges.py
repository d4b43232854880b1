"""Reads ranges of topics beside the consumer group, to rebuild states."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import Any, AsyncIterator, Dict, List, Mapping, Tuple

from plarv_schemas.kafka_connection import Connection

__all__ = ["begin_offsets", "end_offsets", "new_consumer", "place", "read_ranges"]

_aiokafka: Any = importlib.import_module("aiokafka")  # it ships no types

_STALLED_S = 60.0


def new_consumer(connection: Connection, **options: Any) -> Any:
    """An aiokafka consumer without a group; it is not started yet."""
    return _aiokafka.AIOKafkaConsumer(
        **connection.client_options(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="none",
        max_partition_fetch_bytes=4 * 1024 * 1024,
        fetch_max_wait_ms=50,
        retry_backoff_ms=50,
        **options,
    )


def place(topic: str, partition: int) -> Any:
    """A topic's partition, as aiokafka wants it named."""
    return _aiokafka.TopicPartition(topic, partition)


async def end_offsets(consumer: Any, topic: str, partitions: List[int]) -> Dict[int, int]:
    """The offsets at which the next records will stand."""
    places = [place(topic, partition) for partition in partitions]
    return {tp.partition: end for tp, end in (await consumer.end_offsets(places)).items()}


async def begin_offsets(consumer: Any, topic: str, partitions: List[int]) -> Dict[int, int]:
    """The offsets of the oldest records that are kept."""
    places = [place(topic, partition) for partition in partitions]
    return {tp.partition: at for tp, at in (await consumer.beginning_offsets(places)).items()}


async def read_ranges(
    consumer: Any, topic: str, ranges: Mapping[int, Tuple[int, int]]
) -> AsyncIterator[List[Any]]:
    """The records of each partition from the first offset up to (not including) the second.

    In order within a partition, some hundred at a time. TimeoutError: the broker gives nothing for
    a minute, so what was read is not whole.
    """
    open_ranges = {
        place(topic, partition): span for partition, span in ranges.items() if span[0] < span[1]
    }
    if not open_ranges:
        return
    consumer.assign(list(open_ranges))
    for where, (begin, _) in open_ranges.items():
        consumer.seek(where, begin)
    heard = time.monotonic()
    while open_ranges:
        found = await consumer.getmany(*open_ranges, timeout_ms=500, max_records=500)
        for where, records in found.items():
            heard = time.monotonic()
            wanted = [record for record in records if record.offset < open_ranges[where][1]]
            if wanted:
                yield wanted
        for where in list(open_ranges):
            if await consumer.position(where) >= open_ranges[where][1]:
                del open_ranges[where]
        if time.monotonic() - heard > _STALLED_S:
            raise TimeoutError(f"{topic}: the broker gave nothing for {_STALLED_S:.0f} s")
        await asyncio.sleep(0)
