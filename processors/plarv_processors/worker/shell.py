"""What the detectors' app and the policy's app share: lanes for the partitions they are given."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.decoding import Decoder
from plarv_processors.worker.health import Health
from plarv_processors.worker.lane import Lane
from plarv_processors.worker.snapshots import publish_round, read_snapshots, take_up
from plarv_processors.worker.topic_ranges import begin_offsets, new_consumer, read_ranges

__all__ = ["Shell", "fatal"]

_log = logging.getLogger("plarv.worker")

_BUSY_SHARE = 20  # packing snapshots takes one part in so many of the time
_LOG_BEGIN_EVERY_S = 60.0
_TELL_EVERY_S = 2.0
_FIRST_ROUND_S = 2.0  # the app is starting until then
_EXIT_CODE = 70  # the supervisor starts the worker again; nothing was committed that is not done


def fatal(what: str, error: BaseException) -> None:
    """Ends the process at once: going on would commit what was not done."""
    _log.critical("%s: %s: %s: the worker ends", what, type(error).__name__, error, exc_info=error)
    logging.shutdown()
    os._exit(_EXIT_CODE)


class Shell:
    """Lanes by partition; filled again whenever the group has been rebalanced.

    A lane is filled from its snapshots, and from the log after these up to the group's committed
    offset, before the app's agents are let go: ``on_rebalance_complete`` is awaited by Faust.
    """

    def __init__(
        self, app: Any, config: WorkerConfig, decoder: Decoder, health: Health, label: str
    ) -> None:
        self.app = app
        self.config = config
        self.decoder = decoder
        self.health = health
        self.lanes: Dict[int, List[Lane[Any]]] = {}
        self._label = label  # detectors or policy
        self._log_begin: Dict[int, int] = {}
        self._log_begin_at = 0.0
        self._side: Any = None  # a consumer of our own, beside the group's

        async def rebuild(*_: Any, **__: Any) -> None:
            try:
                await self._rebuild()
            except Exception as error:  # noqa: BLE001 - agents without their past must not run
                fatal(f"{label}: the states could not be rebuilt", error)

        self._rebuild_hook = rebuild  # Faust's signals hold their receivers weakly
        app.on_rebalance_complete.connect(rebuild)
        app.task(self._snapshots)
        app.task(self._tell)

    # What the two apps do each in their own way.

    def new_lanes(self, partition: int) -> List[Lane[Any]]:
        """Empty lanes of a partition."""
        raise NotImplementedError

    async def prepare(self, side: Any, lanes: Mapping[int, List[Lane[Any]]]) -> None:
        """Called with lanes that have their snapshots, before the tail is folded."""

    def restored(self, lane: Lane[Any], extra: Tuple[Any, ...]) -> None:
        """A lane has taken up its snapshots; ``extra`` is what its marker held, () without one."""

    async def refold(self, lane: Lane[Any], record: Any) -> None:
        """A record of the tail, for a lane that has not folded it."""
        raise NotImplementedError

    async def installed(self) -> None:
        """The lanes are whole; agents are let go after this."""

    def extra(self, lane: Lane[Any]) -> Tuple[Any, ...]:
        """What a lane's marker keeps beside its offset."""
        return ()

    def is_good(self, lanes: Sequence[Lane[Any]], committed: int) -> bool:
        """Whether lanes in memory stand where the group does, or further."""
        return all(not lane.broken and lane.next >= committed for lane in lanes)

    def safe_offset(self, lane: Lane[Any]) -> int:
        """Up to where what the lane found is safely out: no snapshot may be ahead of it."""
        raise NotImplementedError

    # The common part.

    def every_lane(self) -> Iterator[Lane[Any]]:
        """All lanes."""
        for lanes in list(self.lanes.values()):
            yield from lanes

    async def side(self) -> Any:
        """The consumer that reads ranges."""
        if self._side is None:
            self._side = new_consumer(self.config.connection)
            await self._side.start()
        return self._side

    async def _rebuild(self) -> None:
        app, began = self.app, time.monotonic()
        generation = app.consumer_generation_id
        self.health.rebuilding(self._label, True)
        committed = await self._committed()
        side = await self.side()
        self._log_begin = await begin_offsets(side, self.config.topics.steps, list(committed))
        at = {p: max(offset, self._log_begin[p]) for p, offset in committed.items()}
        kept = {
            p: lanes for p, lanes in self.lanes.items() if p in at and self.is_good(lanes, at[p])
        }
        self.lanes = dict(kept)
        missing = [partition for partition in at if partition not in kept]
        fresh = {partition: self.new_lanes(partition) for partition in missing}
        await self._fill(side, fresh, at)
        await self._fold_tail(side, fresh, at, generation)
        if generation != app.consumer_generation_id:
            return  # rebalanced meanwhile: Faust calls again
        self.lanes = {**self.lanes, **fresh}
        await self.installed()
        gc.collect()
        gc.freeze()  # states live long: looking through them all again would be a pause for nothing
        self.health.rebuilding(self._label, False)
        self.health.rebuilt(self._label, time.monotonic() - began)

    async def _committed(self) -> Dict[int, int]:
        """The group's committed offset of each of our partitions; 0 where there is none."""
        offsets = await self.app.consumer.seek_to_committed()
        topic = self.config.topics.steps
        return {tp.partition: max(at or 0, 0) for tp, at in offsets.items() if tp.topic == topic}

    async def _fill(
        self, side: Any, fresh: Mapping[int, List[Lane[Any]]], at: Mapping[int, int]
    ) -> None:
        records = await read_snapshots(side, self.config.topics.snapshots, list(fresh))
        for partition, lanes in fresh.items():
            for lane in lanes:
                self.restored(lane, take_up(lane, records[partition], at[partition]))
                begin = self._log_begin[partition]
                if lane.next < begin:
                    if lane.runs or lane.next:
                        _log.warning(
                            "%s, partition %d: the log begins at %d, after its snapshot at %d",
                            lane.name, partition, begin, lane.next,
                        )  # fmt: skip
                    lane.next = begin
                await asyncio.sleep(0)
        await self.prepare(side, fresh)

    async def _fold_tail(
        self,
        side: Any,
        fresh: Mapping[int, List[Lane[Any]]],
        at: Mapping[int, int],
        generation: int,
    ) -> None:
        ranges = {p: (min(lane.next for lane in lanes), at[p]) for p, lanes in fresh.items()}
        async for records in read_ranges(side, self.config.topics.steps, ranges):
            for record in records:
                for lane in fresh[record.partition]:
                    if record.offset >= lane.next:
                        await self.refold(lane, record)
                await asyncio.sleep(0)
            if generation != self.app.consumer_generation_id:
                return

    async def _snapshots(self) -> None:
        """Rounds of snapshots, as long as the app runs."""
        await asyncio.sleep(min(_FIRST_ROUND_S, self.config.snapshot_s))
        while True:
            began, spent = time.monotonic(), 0.0
            for partition in list(self.lanes):
                # At once, since each waits for a commit; a partition at a time, for the memory.
                lanes = self.lanes.get(partition, [])
                rounds = await asyncio.gather(*map(self._round, lanes), return_exceptions=True)
                for lane, result in zip(lanes, rounds):
                    if isinstance(result, BaseException):  # the next round tries again
                        _log.warning("snapshots of %s: %s", lane.name, result)
                    else:
                        spent += result
            pause = max(self.config.snapshot_s, spent * _BUSY_SHARE)
            await asyncio.sleep(max(0.2, pause - (time.monotonic() - began)))
            await self._look_where_the_log_begins()

    async def _tell(self) -> None:
        """Keeps the gauges: how much waits, and how many runs there are."""
        while True:
            self.health.turn()
            ended = held = 0
            for partition, lanes in list(self.lanes.items()):
                highwater = self._highwater(partition)
                if highwater is not None:
                    waiting = highwater - min(lane.next for lane in lanes)
                    self.health.lag(self._label, partition, max(0, waiting))
                held += len(lanes[0].runs)
                ended += sum(1 for entry in lanes[0].runs.values() if entry.fold.ended)
            self.health.runs(self._label, held - ended, ended)
            await asyncio.sleep(_TELL_EVERY_S)

    def _highwater(self, partition: int) -> Optional[int]:
        for tp in self.app.consumer.assignment():
            if tp.topic == self.config.topics.steps and tp.partition == partition:
                found: Optional[int] = self.app.consumer.highwater(tp)
                return found
        return None

    async def _round(self, lane: Lane[Any]) -> float:
        generation = self.app.consumer_generation_id
        return await publish_round(
            self.app,
            self.config.topics.snapshots,
            lane,
            extra=lambda: self.extra(lane),
            committed=lambda: self.safe_offset(lane),
            is_current=lambda: generation == self.app.consumer_generation_id,
            log_begin=self._log_begin.get(lane.partition, 0),
        )

    async def _look_where_the_log_begins(self) -> None:
        now = time.monotonic()
        if now - self._log_begin_at < _LOG_BEGIN_EVERY_S or not self.lanes:
            return
        self._log_begin_at = now
        try:
            side = await self.side()
            self._log_begin = await begin_offsets(
                side, self.config.topics.steps, sorted(self.lanes)
            )
        except Exception as error:  # noqa: BLE001 - only a bound on memory hangs on it
            _log.warning("where the log begins is not known: %s", error)
