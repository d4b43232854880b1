"""The policy's app: folds the log and the verdicts, in the log's order, and writes actions.

Its agent only takes messages in; a task for each partition folds them once the watermarks allow it.
What counts is the snapshot's position, not the group's committed offset: after a restart all from
there is folded again, and the actions that come twice have the same ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from typing import Any, Dict, List, Mapping, Sequence, Tuple, cast

from plarv_processors.policy_fold import PolicyFold
from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.decoding import Decoder, Poison
from plarv_processors.worker.faust_app import new_app, send
from plarv_processors.worker.health import Health
from plarv_processors.worker.lane import Lane
from plarv_processors.worker.orders import OrderDesk
from plarv_processors.worker.policy_lane import PolicyLane
from plarv_processors.worker.policy_reader import PolicyReader
from plarv_processors.worker.shell import Shell, fatal
from plarv_processors.worker.silence import Silence
from plarv_schemas.events import Action, ControlEvent, digest
from plarv_schemas.messages import LeftOut, action_message, event_messages
from plarv_schemas.signatures import run_key, sign
from plarv_schemas.topics import SIGNATURE_HEADER
from plarv_schemas.versions import SNAPSHOT_VERSION

__all__ = ["PolicyShell"]

_log = logging.getLogger("plarv.worker")

_BACKLOG = 512  # messages of a partition that wait in memory
_SILENCE_EVERY_S = 1.0
_PATIENCE_S = 30.0  # for detectors that no worker runs, before it is said


class PolicyShell(Shell):
    """One agent, and a task for each partition."""

    def __init__(self, config: WorkerConfig, decoder: Decoder, health: Health) -> None:
        super().__init__(new_app(config.policy_group, config), config, decoder, health, "policy")
        awaited = config.all_detectors if config.awaited is None else config.awaited
        self._awaited = [(cls.name, cls().version) for cls in awaited]
        made_of = repr((config.policy, self._awaited))
        fingerprint = hashlib.blake2b(made_of.encode(), digest_size=4).hexdigest()
        self._name = f"{config.policy_group}/policy-{fingerprint}/{SNAPSHOT_VERSION}"
        self._tasks: Dict[int, asyncio.Task[None]] = {}
        self._silence = Silence(config.silent_after_s)
        desk = OrderDesk(config, health, self.write)
        self._reader = PolicyReader(config, desk)
        topic = self.app.topic(config.topics.steps, key_type=bytes, value_type=bytes)
        self.agents = [self.app.agent(topic, name="policy")(self._take_in)]
        self.app.task(self._look_around)

    def new_lanes(self, partition: int) -> List[Lane[Any]]:
        """One."""
        return [PolicyLane(self._name, partition, self._new_fold, self._awaited)]

    def restored(self, lane: Lane[Any], extra: Tuple[Any, ...]) -> None:
        """Goes on in the verdicts and orders where the snapshot was taken."""
        policy_lane = cast(PolicyLane, lane)
        if extra:
            begin, orders, watermarks = extra
            policy_lane.verdicts_next, policy_lane.orders_next = begin, orders
            policy_lane.watermarks = dict(watermarks)
        for run_id, entry in lane.runs.items():
            for session, rank, record in entry.fold.attempts.open_sessions():
                self._silence.heard(lane.partition, run_id, session, rank, record)

    async def prepare(self, side: Any, lanes: Mapping[int, List[Lane[Any]]]) -> None:
        """The reader and the tasks begin before the tail comes: its length has no bound."""
        for partition in [p for p in self._tasks if p not in self.lanes]:
            self._tasks.pop(partition).cancel()
            if partition not in lanes:
                self._silence.forget(partition)
        every = {p: cast(PolicyLane, each[0]) for p, each in {**self.lanes, **lanes}.items()}
        for partition, each in lanes.items():
            lane = cast(PolicyLane, each[0])
            lane.received = lane.next
            self._tasks[partition] = asyncio.ensure_future(self._work(lane))
        await self._reader.go_on(every)

    async def refold(self, lane: Lane[Any], record: Any) -> None:
        """A record of the tail waits its turn like any other."""
        await self._enqueue(cast(PolicyLane, lane), record)

    def is_good(self, lanes: Sequence[Lane[Any]], committed: int) -> bool:
        """Whether what the group has committed has come to these lanes."""
        return all(cast(PolicyLane, lane).received >= committed for lane in lanes)

    def extra(self, lane: Lane[Any]) -> Tuple[Any, ...]:
        """Positions in the verdicts and orders."""
        return cast(PolicyLane, lane).positions()

    def safe_offset(self, lane: Lane[Any]) -> int:
        """All before it is folded, and its actions are out."""
        return lane.next

    async def write(self, event: ControlEvent, partition: int) -> None:
        """Writes a control event into the log; a second copy of its session is a duplicate."""
        (message,) = event_messages([event])
        await send(self.app, self.config.topics.steps, partition, message)

    def _new_fold(self) -> PolicyFold:
        return PolicyFold(self.config.policy)

    async def _take_in(self, stream: Any) -> None:
        async for event in stream.events():
            try:
                message = event.message
                lanes = self.lanes.get(message.partition)
                if lanes:
                    await self._enqueue(cast(PolicyLane, lanes[0]), message)
            except Exception as error:  # noqa: BLE001 - Faust would take it as done
                fatal("agent policy", error)

    async def _enqueue(self, lane: PolicyLane, message: Any) -> None:
        if message.offset < lane.received:
            return
        lane.received = message.offset + 1
        lane.backlog.append(message)
        lane.wake.set()
        while len(lane.backlog) > _BACKLOG:
            lane.room.clear()
            await lane.room.wait()

    async def _work(self, lane: PolicyLane) -> None:
        """Folds a partition's messages, each when every awaited detector has passed it."""
        backlog = lane.backlog
        while True:
            try:
                if backlog and lane.watermark() > backlog[0].offset:
                    if backlog[0].offset >= lane.next:
                        await self._fold(lane, backlog[0])
                    backlog.popleft()
                    lane.room.set()
                    await asyncio.sleep(0)
                else:
                    lane.wake.clear()
                    await lane.wake.wait()
            except Exception as error:  # noqa: BLE001 - a lane that stands still helps nobody
                fatal("policy", error)

    async def _fold(self, lane: PolicyLane, message: Any) -> None:
        offset = message.offset
        batch = self.decoder.decode(message)
        if isinstance(batch, Poison):  # the detectors' app puts it with the dead letters
            lane.done(offset)
            return
        await self._tell_left_out(lane, batch.run_id, offset)
        entry = lane.entry(batch.run_id, offset)
        if entry is not None:  # from here to the fold's return nothing else runs
            actions = entry.fold.fold(batch, lane.verdicts_at(offset))
            self._silence.note(lane.partition, batch)
            for action in actions:
                await self._publish(action, lane.partition, offset)
        lane.done(offset)

    async def _tell_left_out(self, lane: PolicyLane, run_id: str, offset: int) -> None:
        """Writes down, before the message is folded, which detectors hung on it."""
        notes = [note for note in lane.left_out_at(offset) if note.run_id == run_id]
        known = lane.runs.get(run_id)
        if notes and (known is None or offset > known.offset):
            ordinal = -1 if known is None else known.fold.ordinal
            for note in notes:
                await self.write(_left_out_event(note, ordinal), lane.partition)

    async def _publish(self, action: Action, partition: int, offset: int) -> None:
        message = action_message(action, offset)
        if self.config.master_key:
            key = run_key(self.config.master_key, action.run_id)
            signature = sign(key, "action", message.value)
            message.headers.append((SIGNATURE_HEADER, signature.encode("ascii")))
        await send(self.app, self.config.topics.actions, partition, message)
        self.health.action(action.kind)

    async def _look_around(self) -> None:
        """Ends sessions that have long been silent; says which detectors nobody runs."""
        began, said = time.monotonic(), False
        while True:
            await asyncio.sleep(_SILENCE_EVERY_S)
            for partition, event in self._silence.overdue(time.monotonic()):
                if partition in self.lanes:
                    await self.write(event, partition)
            unheard = {
                version
                for lane in self.every_lane()
                if lane.next < cast(PolicyLane, lane).received
                for version in cast(PolicyLane, lane).unheard()
            }
            self.health.awaiting(len(unheard))
            if unheard and not said and time.monotonic() - began > _PATIENCE_S:
                said = True
                _log.warning(
                    "the policy waits for %s, which no worker runs: start `argus worker "
                    "--detectors` with them, or name those to wait for with --await",
                    ", ".join(sorted(version.rpartition("-")[0] for version in unheard)),
                )


def _left_out_event(note: LeftOut, ordinal: int) -> ControlEvent:
    return ControlEvent(
        run_id=note.run_id,
        session=digest("detector_left_out", note.run_id, note.detector),
        record=0,
        rank=None,
        kind="detector_left_out",
        time_ns=time.time_ns(),
        data={"detector": note.detector, "ordinal": ordinal},
    )
