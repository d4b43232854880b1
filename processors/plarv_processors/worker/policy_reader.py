"""Reads verdicts, watermarks and orders for the partitions whose log the policy folds."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Dict, Mapping, Optional

from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.orders import OrderDesk
from plarv_processors.worker.policy_lane import PolicyLane
from plarv_processors.worker.shell import fatal
from plarv_processors.worker.topic_ranges import begin_offsets, new_consumer, place
from plarv_schemas.messages import decode_verdict, decode_watermark
from plarv_schemas.topics import OFFSET_HEADER, TABLE_HEADER, header

__all__ = ["PolicyReader"]

_log = logging.getLogger("plarv.worker")


class PolicyReader:
    """A consumer without a group: which partitions it reads follows from those of the log."""

    def __init__(self, config: WorkerConfig, desk: OrderDesk) -> None:
        self._config = config
        self._desk = desk
        self._consumer: Any = None
        self._task: Optional[asyncio.Task[None]] = None
        self._lanes: Dict[int, PolicyLane] = {}

    async def go_on(self, lanes: Mapping[int, PolicyLane]) -> None:
        """Reads for these lanes from now on, for each from where it stands."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._consumer is None:
            self._consumer = new_consumer(self._config.connection)
            await self._consumer.start()
        self._lanes = dict(lanes)
        if not lanes:
            return
        consumer, topics = self._consumer, self._config.topics
        verdicts = await begin_offsets(consumer, topics.verdicts, list(lanes))
        orders = await begin_offsets(consumer, topics.orders, list(lanes))
        places: Dict[Any, int] = {}
        for partition, lane in lanes.items():
            lane.verdicts_next = max(lane.verdicts_next, verdicts[partition])
            lane.orders_next = max(lane.orders_next, orders[partition])
            places[place(topics.verdicts, partition)] = lane.verdicts_next
            places[place(topics.orders, partition)] = lane.orders_next
        consumer.assign(list(places))
        for where, offset in places.items():
            consumer.seek(where, offset)
        self._task = asyncio.ensure_future(self._read(consumer))

    async def _read(self, consumer: Any) -> None:
        orders = self._config.topics.orders
        while True:
            try:
                found = await consumer.getmany(timeout_ms=1000, max_records=1000)
                for where, records in found.items():
                    lane = self._lanes[where.partition]
                    for record in records:
                        if where.topic == orders:
                            await self._desk.take(record, lane)
                            lane.orders_next = record.offset + 1
                        else:
                            _take(record, lane)
                            lane.verdicts_next = record.offset + 1
                await asyncio.sleep(0)
            except Exception as error:  # noqa: BLE001 - without verdicts the policy stands still
                fatal("the policy's reader", error)


def _take(record: Any, lane: PolicyLane) -> None:
    """A record of the verdicts topic. One that cannot be read is told and passed over."""
    table = header(record.headers, TABLE_HEADER)
    try:
        if table == "watermark":
            lane.take_watermark(decode_watermark(record.value))
        elif table == "verdicts":
            offset = int(header(record.headers, OFFSET_HEADER) or "")
            lane.take_verdict(decode_verdict(record.value), offset, record.offset)
        else:
            raise ValueError(f"neither a verdict nor a watermark: {table!r}")
    except (ValueError, TypeError) as error:
        _log.error("%s-%d offset %d: %s", record.topic, record.partition, record.offset, error)
