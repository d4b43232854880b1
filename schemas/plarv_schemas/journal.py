"""The journal's format: what a step looks like on the local disk.

A session (one process start of one rank) writes segments ``rRRRRR-SESSION-NNNNNN.journal`` of a
fixed size: a header, then records, then zeros. A record is ``size, kind, mask`` + ``clock, step`` +
body + ``number + 1``. The last word is written last and counts up, so a record that a killed
process did not finish is recognised, and everything before it stands.

Two kinds of step records exist: *core* (loss, grad_norm, learning rate: what the hot path writes
with one ``pack_into``) and *full* (any columns). Times are read off one monotonic clock; the header
says what that clock means in UTC, and ``time_ns`` and ``step_time_ms`` are derived by the reader.

Layout (little endian):

===========  ==========================================================================
record       ``<I size> <B kind> <B mask> <H 0> <q clock_ns> <q step> body <Q number+1>``
core body    ``<d loss> <d grad_norm> <d current_lr>``; mask bit 0 loss, bit 1 grad_norm; lr NaN:
absent full body    ``<Q columns>`` then each present column: a scalar 8 bytes, a list ``<I n>`` +
values control      ``<i rank> <I length>`` + JSON, padded to 8
===========  ==========================================================================
"""

from __future__ import annotations

import json
import struct
from array import array
from functools import lru_cache
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from plarv_schemas.events import LIST_COLUMNS, SCALAR_COLUMNS, StepEvent, to_json_value
from plarv_schemas.versions import JOURNAL_VERSION

__all__ = [
    "CONTROL",
    "CORE",
    "CORE_SIZE",
    "CORE_STRUCT",
    "FULL",
    "MAX_RECORD_BYTES",
    "NO_STEP",
    "SegmentHeader",
    "pack_control",
    "pack_full",
    "segment_name",
    "unpack_control",
    "unpack_full",
]

CORE, FULL, CONTROL = 1, 2, 3
HAS_LOSS, HAS_GRAD_NORM = 1, 2

CORE_STRUCT = struct.Struct("<IBBHqqdddQ")
CORE_SIZE = CORE_STRUCT.size  # 56
RECORD_HEAD = struct.Struct("<IBBHqq")
TRAILER = struct.Struct("<Q")

NO_STEP = -(1 << 63)
"""Stands for an absent step or clock."""

MAX_RECORD_BYTES = 512 * 1024
"""A longer event is truncated: its lists are cut, and the writer counts it."""

_MAGIC = b"ARGUSJNL"
_HEADER = struct.Struct("<8sHHii16sQQqqqq")

# The columns a full record can carry; time_ns comes from the clock, world_size from the header.
_FULL_SCALARS: Tuple[str, ...] = tuple(
    name for name in SCALAR_COLUMNS if name not in ("time_ns", "world_size", "step_time_ms")
)
_FULL_COLUMNS: Tuple[str, ...] = _FULL_SCALARS + LIST_COLUMNS
_BIT = {name: bit for bit, name in enumerate(_FULL_COLUMNS)}
_SCALAR_MASK = (1 << len(_FULL_SCALARS)) - 1
_VALUES = StepEvent._fields[StepEvent._fields.index("epoch") : StepEvent._fields.index("parts")]
_NUM_VALUES = len(_VALUES)
_PLACE = {name: place for place, name in enumerate(_VALUES)}
_INTEGER_SCALARS = frozenset({"batch_size"})
_LIST_TYPECODE = {
    "sample_ids": "q",
    "sample_correct": "b",
    "local_levels": "b",
    "local_layers": "s",
}  # all others: "d"


class SegmentHeader(NamedTuple):
    """What stands at the start of a segment."""

    run_id: str
    session: str  # 16 hex digits
    rank: int  # -1: no training process (an operator)
    world_size: int
    segment: int  # from 0
    first_record: int
    clock_ns: int  # the monotonic clock ...
    utc_ns: int  # ... and UTC, read together
    previous_clock_ns: int  # of the last step record before this segment, or NO_STEP
    previous_step: int

    def pack(self) -> bytes:
        """The header's bytes, padded to a multiple of 64."""
        name = self.run_id.encode("utf-8")
        size = -(-(_HEADER.size + 2 + len(name)) // 64) * 64
        head = _HEADER.pack(
            _MAGIC,
            JOURNAL_VERSION,
            size,
            self.rank,
            self.world_size,
            self.session.encode("ascii"),
            self.segment,
            self.first_record,
            self.clock_ns,
            self.utc_ns,
            self.previous_clock_ns,
            self.previous_step,
        )
        return (head + struct.pack("<H", len(name)) + name).ljust(size, b"\0")

    @classmethod
    def unpack(cls, data: bytes) -> Optional[Tuple[SegmentHeader, int]]:
        """Header and its size; None where no segment has begun. ValueError: not ours, or newer."""
        if len(data) < _HEADER.size + 2 or data[:8] == bytes(8):
            return None
        if data[:8] != _MAGIC:
            raise ValueError("not an Argus journal")
        fields = _HEADER.unpack_from(data)
        version, size = fields[1], fields[2]
        if version > JOURNAL_VERSION:
            raise ValueError(
                f"journal version {version} is newer than this Argus, which reads up to "
                f"{JOURNAL_VERSION}: upgrade plarv-argus-sdk"
            )
        (length,) = struct.unpack_from("<H", data, _HEADER.size)
        start = _HEADER.size + 2
        run_id = data[start : start + length].decode("utf-8", "replace")
        rank, world_size, session = fields[3], fields[4], fields[5].decode("ascii", "replace")
        return cls(run_id, session, rank, world_size, *fields[6:]), size


def segment_name(rank: int, session: str, segment: int) -> str:
    """The file name of a segment; names sort by rank, session, segment."""
    who = "operator" if rank < 0 else f"r{rank:05d}"
    return f"{who}-{session}-{segment:06d}.journal"


def pack_full(
    record: int, clock_ns: int, step: int, columns: Mapping[str, Any]
) -> Tuple[bytes, bool]:
    """A full step record and whether its lists had to be cut to fit MAX_RECORD_BYTES.

    ``columns`` are of their wire types already; absent ones are missing or None.
    """
    mask = 0
    body: List[bytes] = []
    room = MAX_RECORD_BYTES - 4096
    truncated = False
    for name in _FULL_SCALARS:
        value = columns.get(name)
        if value is not None:
            mask |= 1 << _BIT[name]
            body.append(struct.pack("<q" if name in _INTEGER_SCALARS else "<d", value))
    for name in LIST_COLUMNS:
        values = columns.get(name)
        if values is None:
            continue
        mask |= 1 << _BIT[name]
        packed, cut = _pack_list(name, values, room)
        truncated = truncated or cut
        room -= len(packed)
        body.append(packed)
    return _frame(FULL, record, clock_ns, step, struct.pack("<Q", mask) + b"".join(body)), truncated


def pack_control(
    record: int,
    clock_ns: int,
    step: Optional[int],
    rank: Optional[int],
    kind: str,
    data: Mapping[str, Any],
) -> bytes:
    """A control record. ``data`` that is too long is replaced by a note of its length."""
    text = json.dumps([kind, to_json_value(data)], separators=(",", ":")).encode("utf-8")
    if len(text) > MAX_RECORD_BYTES - 4096:
        text = json.dumps([kind, {"truncated_bytes": len(text)}]).encode("utf-8")
    body = struct.pack("<iI", -1 if rank is None else rank, len(text)) + text
    return _frame(CONTROL, record, clock_ns, NO_STEP if step is None else step, body)


def unpack_full(data: bytes, at: int, end: int) -> List[Any]:
    """Column values of the full record whose body lies in data[at:end], in StepEvent order
    from ``epoch`` to ``local_layers`` (``step_time_ms`` left None).
    """
    (mask,) = struct.unpack_from("<Q", data, at)
    at += 8
    scalars, places = _scalars_of(mask & _SCALAR_MASK)
    values: List[Any] = [None] * _NUM_VALUES
    for place, value in zip(places, scalars.unpack_from(data, at)):
        values[place] = value
    if mask > _SCALAR_MASK:
        at += scalars.size
        for name in LIST_COLUMNS:
            if mask & (1 << _BIT[name]):
                values[_PLACE[name]], at = _unpack_list(name, data, at, end)
    return values


@lru_cache(maxsize=256)
def _scalars_of(mask: int) -> Tuple[struct.Struct, Tuple[int, ...]]:
    names = [name for name in _FULL_SCALARS if mask & (1 << _BIT[name])]
    codes = "".join("q" if name in _INTEGER_SCALARS else "d" for name in names)
    return struct.Struct("<" + codes), tuple(_PLACE[name] for name in names)


def unpack_control(data: bytes, at: int) -> Tuple[Optional[int], str, Mapping[str, Any]]:
    """Rank, kind and data of the control record whose body begins at ``at``."""
    rank, length = struct.unpack_from("<iI", data, at)
    kind, content = json.loads(data[at + 8 : at + 8 + length].decode("utf-8"))
    return (None if rank < 0 else rank), kind, content


def _frame(kind: int, record: int, clock_ns: int, step: int, body: bytes) -> bytes:
    padded = body.ljust(-(-len(body) // 8) * 8, b"\0")
    size = RECORD_HEAD.size + len(padded) + TRAILER.size
    return RECORD_HEAD.pack(size, kind, 0, 0, clock_ns, step) + padded + TRAILER.pack(record + 1)


def _pack_list(name: str, values: Sequence[Any], room: int) -> Tuple[bytes, bool]:
    typecode = _LIST_TYPECODE.get(name, "d")
    if typecode == "s":
        raw, kept = b"", 0
        for text in values:
            item = text.encode("utf-8", "replace")[:1024]
            if len(raw) + len(item) + 2 > room:
                break
            raw += struct.pack("<H", len(item)) + item
            kept += 1
    else:
        kept = max(0, min(len(values), room // array(typecode).itemsize))
        raw = array(typecode, values[:kept]).tobytes()
    return struct.pack("<I", kept) + raw, kept < len(values)


def _unpack_list(name: str, data: bytes, at: int, end: int) -> Tuple[Tuple[Any, ...], int]:
    typecode = _LIST_TYPECODE.get(name, "d")
    (count,) = struct.unpack_from("<I", data, at)
    at += 4
    if typecode == "s":
        items: List[str] = []
        for _ in range(count):
            (length,) = struct.unpack_from("<H", data, at)
            items.append(data[at + 2 : at + 2 + length].decode("utf-8", "replace"))
            at += 2 + length
        return tuple(items), at
    values: array[Any] = array(typecode)
    stop = at + count * values.itemsize
    if stop > end:
        raise ValueError("a list runs past its record")
    values.frombytes(data[at:stop])
    return tuple(values), stop
