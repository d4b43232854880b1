"""Which detectors hung on which runs: a compacted topic that every worker reads."""

from __future__ import annotations

import json
import logging
from typing import Any, Dict, Iterable, Tuple

from plarv_processors.worker.topic_ranges import begin_offsets, end_offsets, read_ranges
from plarv_schemas.messages import LeftOut
from plarv_schemas.topics import Topics

__all__ = ["from_json", "read_left_out", "to_json"]

_log = logging.getLogger("plarv.worker")


def to_json(note: LeftOut) -> bytes:
    """A note as a record's value."""
    return json.dumps(note._asdict(), separators=(",", ":")).encode("utf-8")


def from_json(value: bytes) -> LeftOut:
    """The inverse of :func:`to_json`. ValueError: it is none."""
    try:
        data = json.loads(value)
        return LeftOut(
            str(data["run_id"]), str(data["detector"]), int(data["partition"]), int(data["offset"])
        )
    except (KeyError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(f"not a note of a detector that hung: {error!r}") from error


async def read_left_out(
    side: Any, topics: Topics, partitions: Iterable[int]
) -> Dict[Tuple[str, str], LeftOut]:
    """The notes about runs of these partitions, by run and detector; of several the first."""
    wanted = sorted(partitions)
    found: Dict[Tuple[str, str], LeftOut] = {}
    if not wanted:
        return found
    begins = await begin_offsets(side, topics.left_out, wanted)
    ends = await end_offsets(side, topics.left_out, wanted)
    ranges = {partition: (begins[partition], ends[partition]) for partition in wanted}
    async for records in read_ranges(side, topics.left_out, ranges):
        for record in records:
            if record.value is None:
                continue
            try:
                note = from_json(record.value)
            except ValueError as error:
                _log.error("%s offset %d: %s", topics.left_out, record.offset, error)
                continue
            place = (note.run_id, note.detector)
            if place not in found or note.offset < found[place].offset:
                found[place] = note
    return found
