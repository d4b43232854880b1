"""Snapshots of lanes in a compacted topic: written in rounds, read when partitions come.

A round packs the runs that changed, a few at a time between other work, and is published once the
group's committed offset has passed all of it, so that no state is ever ahead of the verdicts that
are safely out. The marker, published last, is where the lane stood when the round began: the tail
starts there, and a run that was packed later skips what it holds already.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from plarv_processors.snapshot import unpack
from plarv_processors.worker.faust_app import send_all
from plarv_processors.worker.lane import Lane
from plarv_processors.worker.topic_ranges import begin_offsets, end_offsets, read_ranges

__all__ = ["Saved", "publish_round", "read_snapshots", "take_up"]

_log = logging.getLogger("plarv.worker")

_AT_ONCE = 16  # runs packed between two yields: about half a millisecond
_LOOK_S = 0.1
_MARKER = b""  # in a run id's place


class Saved(NamedTuple):
    """What the topic holds of one lane."""

    next: int
    extra: Tuple[Any, ...]
    runs: Mapping[str, bytes]


async def publish_round(
    app: Any,
    topic: str,
    lane: Lane[Any],
    *,
    extra: Callable[[], Tuple[Any, ...]],
    committed: Callable[[], int],
    is_current: Callable[[], bool],
    log_begin: int,
) -> float:
    """One round of a lane; the seconds of CPU that packing took."""
    if lane.next == lane.saved and not lane.dirty:
        return 0.0
    start, positions = lane.next, extra()
    dirty, lane.dirty = lane.dirty, {}
    records: List[Tuple[bytes, Optional[bytes]]] = []
    spent, upto = 0.0, start
    pending = list(dirty)
    while pending:
        begun = time.perf_counter()
        for run_id in pending[:_AT_ONCE]:
            if run_id in lane.runs:
                records.append((_key(lane.name, run_id.encode()), lane.packed(run_id)))
                upto = max(upto, lane.runs[run_id].offset + 1)
        del pending[:_AT_ONCE]
        spent += time.perf_counter() - begun
        await asyncio.sleep(0)
    upto = max(upto, lane.next)
    gone = list(lane.past(log_begin))
    while committed() < upto:
        if not is_current() or lane.broken:
            lane.dirty = {**dirty, **lane.dirty}
            return spent
        await asyncio.sleep(_LOOK_S)
    records.append((_key(lane.name, _MARKER), lane.marker(start, positions)))
    try:
        await send_all(app, topic, lane.partition, records)
        await _remove(app, topic, lane, gone)
    except Exception as error:  # noqa: BLE001 - the next round publishes it; nothing depends on it
        _log.warning("no snapshot of %s (%s): trying again later", lane.name, error)
        lane.dirty = {**dirty, **lane.dirty}
        return spent
    lane.saved = start
    return spent


async def read_snapshots(
    consumer: Any, topic: str, partitions: List[int]
) -> Dict[int, Dict[bytes, bytes]]:
    """The newest record of each key, by partition."""
    found: Dict[int, Dict[bytes, bytes]] = {partition: {} for partition in partitions}
    if not partitions:
        return found
    begins = await begin_offsets(consumer, topic, partitions)
    ends = await end_offsets(consumer, topic, partitions)
    ranges = {partition: (begins[partition], ends[partition]) for partition in partitions}
    async for records in read_ranges(consumer, topic, ranges):
        for record in records:
            kept = found[record.partition]
            if record.value is None:
                kept.pop(record.key, None)
            else:
                kept[record.key] = record.value
    return found


def take_up(lane: Lane[Any], records: Mapping[bytes, bytes], committed: int) -> Tuple[Any, ...]:
    """Fills an empty lane with its snapshots; the extra values of its marker, () without one."""
    marker = records.get(_key(lane.name, _MARKER))
    if marker is None:
        return ()
    begin = _key(lane.name, b"")
    try:
        start, extra = unpack(marker)
        if start > committed:
            return ()
        for key, value in records.items():
            if key.startswith(begin) and len(key) > len(begin):
                lane.load(key[len(begin) :].decode("utf-8"), value)
    except (ValueError, TypeError) as error:
        _log.error("the snapshots of %s cannot be read (%s): folding anew", lane.name, error)
        lane.runs.clear()
        return ()
    lane.next = lane.saved = start
    return tuple(extra)


async def _remove(app: Any, topic: str, lane: Lane[Any], runs: List[str]) -> None:
    """Forgets runs that ended and have left the log."""
    tombstones: List[Tuple[bytes, Optional[bytes]]] = []
    for run_id in runs:
        entry = lane.runs.get(run_id)
        if entry is not None and entry.fold.ended:
            del lane.runs[run_id]
            lane.dirty.pop(run_id, None)
            tombstones.append((_key(lane.name, run_id.encode()), None))
    await send_all(app, topic, lane.partition, tombstones)


def _key(name: str, run_id: bytes) -> bytes:
    return name.encode("utf-8") + b"\0" + run_id
