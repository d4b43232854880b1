"""The detectors' app: one Faust agent a detector, each with lanes and a position of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Dict, List, Mapping, Tuple, Type

from plarv_processors.dead_letters import letter_of
from plarv_processors.detector_fold import DetectorFold
from plarv_processors.detectors.detector import Detector
from plarv_processors.event_batch import EventBatch
from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.decoding import Decoder, Poison
from plarv_processors.worker.faust_app import new_app, send
from plarv_processors.worker.health import Health
from plarv_processors.worker.lane import Lane
from plarv_processors.worker.left_out import read_left_out
from plarv_processors.worker.shell import Shell, fatal
from plarv_processors.worker.watchdog import Watchdog
from plarv_processors.worker.watermarks import Watermarks
from plarv_schemas.events import Verdict
from plarv_schemas.messages import LeftOut, verdict_message
from plarv_schemas.versions import SNAPSHOT_VERSION

__all__ = ["DetectorShell"]

_log = logging.getLogger("plarv.worker")

_IN_A_ROW = 4  # messages that an agent takes before another one has its turn


class DetectorShell(Shell):
    """Reads the steps topic with every detector for itself and writes what they find."""

    def __init__(
        self, config: WorkerConfig, decoder: Decoder, health: Health, watchdog: Watchdog
    ) -> None:
        super().__init__(
            new_app(config.detector_group, config), config, decoder, health, "detectors"
        )
        self._watchdog = watchdog
        self._versions = {cls.name: cls().version for cls in config.detectors}
        self._by_name: Dict[Tuple[str, int], Lane[DetectorFold]] = {}
        self.left_out: Dict[Tuple[str, str], LeftOut] = {}  # (run, detector)
        self._watermarks = Watermarks(self.app, config, self._positions, self.notes)
        topic = self.app.topic(config.topics.steps, key_type=bytes, value_type=bytes)
        self.agents = [self._agent(cls, topic) for cls in config.detectors]
        self.app.task(self._watermarks.run)

    def new_lanes(self, partition: int) -> List[Lane[Any]]:
        """One a detector."""
        group = self.config.detector_group
        return [
            Lane(f"{group}/{self._versions[cls.name]}/{SNAPSHOT_VERSION}", partition, _maker(cls))
            for cls in self.config.detectors
        ]

    async def prepare(self, side: Any, lanes: Mapping[int, List[Lane[Any]]]) -> None:
        """Learns which detectors hung on which runs, before any of them is called."""
        self.left_out = await read_left_out(side, self.config.topics, set(lanes) | set(self.lanes))

    async def refold(self, lane: Lane[Any], record: Any) -> None:
        """A record of the tail; its verdicts are out already."""
        decoded = self.decoder.decode(record)
        if isinstance(decoded, EventBatch):
            self._fold(lane, decoded, record.offset)
        lane.next = record.offset + 1

    async def installed(self) -> None:
        """The agents find their lanes by name."""
        self._by_name = {
            (cls.name, partition): lane
            for partition, lanes in self.lanes.items()
            for cls, lane in zip(self.config.detectors, lanes)
        }

    def safe_offset(self, lane: Lane[Any]) -> int:
        """The committed offset: what stands before it has been judged by every agent."""
        for tp, offset in list(self.app.consumer._committed_offset.items()):
            if tp.topic == self.config.topics.steps and tp.partition == lane.partition:
                return int(offset or 0)
        return 0

    def notes(self, partition: int) -> Tuple[LeftOut, ...]:
        """Which detectors of this worker are left out of runs of the partition."""
        found = [n for n in self.left_out.values() if n.partition == partition]
        return tuple(sorted(n for n in found if n.detector in self._versions))

    def _agent(self, cls: Type[Detector], topic: Any) -> Any:
        name = cls.name

        async def judge(stream: Any) -> None:
            turns = 0
            async for event in stream.events():
                try:
                    await self._handle(name, event.message)
                except Exception as error:  # noqa: BLE001 - Faust would take it as done
                    fatal(f"agent {name}", error)
                turns += 1
                if turns % _IN_A_ROW == 0:
                    await asyncio.sleep(0)

        return self.app.agent(topic, name=f"detector-{name}")(judge)

    async def _handle(self, name: str, message: Any) -> None:
        """One message for one detector."""
        lane = self._by_name.get((name, message.partition))
        offset = message.offset
        if lane is None or offset < lane.next:
            return  # given to another worker meanwhile, or folded before a restart
        if offset > lane.next:
            self.health.gap(message.partition, lane.next, offset)
        decoded = self.decoder.decode(message)
        if isinstance(decoded, Poison):
            if name == self.config.detectors[0].name:
                await self._bury(message, decoded)
            lane.next = offset + 1
            return
        began = time.perf_counter()
        verdicts = self._fold(lane, decoded, offset)
        self.health.folded(name, len(decoded.events), time.perf_counter() - began)
        if verdicts:
            lane.broken = True  # until they are out; a lane that is left in between is filled anew
            await self._publish(verdicts, message.partition, offset)
            lane.broken = False
            self._watermarks.hurry(message.partition, offset)
        lane.next = offset + 1
        if name == self.config.detectors[-1].name:
            self.health.judged(message.timestamp)

    def _fold(self, lane: Lane[DetectorFold], batch: EventBatch, offset: int) -> List[Verdict]:
        entry = lane.entry(batch.run_id, offset)
        if entry is None:
            return []
        fold = entry.fold
        name = fold.detector_class.name
        if self.left_out:
            note = self.left_out.get((batch.run_id, name))
            if note is not None and offset >= note.offset:
                fold.leave_out()
        was_off = fold.is_off
        self._watchdog.enter(LeftOut(batch.run_id, name, lane.partition, offset))
        verdicts = fold.fold(batch)
        self._watchdog.leave()
        if fold.is_off and not was_off:
            _log.error("run %s: detector %s raised: %s", batch.run_id, name, fold.fault)
            self.health.fault(name)
        return verdicts

    async def _publish(self, verdicts: List[Verdict], partition: int, offset: int) -> None:
        for verdict in verdicts:
            message = verdict_message(verdict, offset)
            await send(self.app, self.config.topics.verdicts, partition, message)
            self.health.verdict(verdict.detector, verdict.level)

    async def _bury(self, message: Any, poison: Poison) -> None:
        """A message that cannot be read goes to the dead letters, with the reason."""
        _log.error(
            "partition %d, offset %d cannot be read: %s",
            message.partition, message.offset, poison.reason,
        )  # fmt: skip
        self.health.dead_letter()
        letter = letter_of(message, self.config.topics.steps, poison.reason)
        await send(self.app, self.config.topics.dead_letters, None, letter)

    def _positions(self) -> Dict[int, Dict[str, int]]:
        """By partition: how far each detector has read."""
        return {
            partition: {
                self._versions[cls.name]: lane.next
                for cls, lane in zip(self.config.detectors, lanes)
            }
            for partition, lanes in self.lanes.items()
        }


def _maker(cls: Type[Detector]) -> Any:
    return lambda: DetectorFold(cls)
