"""Reads journals: one session's records, while they are written or long after.

A session is read with ``pread``, also by the process that writes it: file and map share their
pages, so a record is visible as soon as its last word is written.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.journal import (
    CONTROL,
    CORE,
    CORE_SIZE,
    CORE_STRUCT,
    FULL,
    HAS_GRAD_NORM,
    HAS_LOSS,
    MAX_RECORD_BYTES,
    NO_STEP,
    RECORD_HEAD,
    TRAILER,
    SegmentHeader,
    segment_name,
    unpack_control,
    unpack_full,
)

__all__ = ["SegmentFile", "SessionReader", "segments_of"]

_NAME = re.compile(r"^(operator|r\d{5,})-([0-9a-f]{16})-(\d{6,})\.journal$")
_CHUNK = 256 * 1024
_NO_END = 1 << 63
_PEEK = 8 * 1024  # 146 core records: enough for a reader that keeps up
_FLOAT32 = struct.Struct("<f")


class SegmentFile(NamedTuple):
    """A segment's place, read from its file name."""

    rank: int
    session: str
    segment: int
    path: Path


def segments_of(folder: Path) -> Dict[str, List[SegmentFile]]:
    """The segment files in a run's folder, by session, in order."""
    found: Dict[str, List[SegmentFile]] = {}
    for path in folder.iterdir():
        match = _NAME.match(path.name)
        if match:
            rank = -1 if match[1] == "operator" else int(match[1][1:])
            file = SegmentFile(rank, match[2], int(match[3]), path)
            found.setdefault(file.session, []).append(file)
    for files in found.values():
        files.sort(key=lambda file: file.segment)
    return found


class SessionReader:
    """The events of one session, from a position on.

    ``read`` gives what is there now; after a segment that went on in a next one it moves on by
    itself. With ``alone`` it stays in its segment.
    ``skipped`` counts records that could not be read: one that its writer did not finish, or
    damage.
    """

    __slots__ = (
        "folder", "rank", "session", "segment", "offset", "record", "header", "skipped",
        "_previous_clock", "_previous_step", "_descriptor", "_size", "_alone", "_upto",
    )  # fmt: skip

    def __init__(
        self, folder: Path, rank: int, session: str, segment: int = 0, *, alone: bool = False
    ) -> None:
        self._alone = alone
        self.folder, self.rank, self.session = folder, rank, session
        self.segment = segment  # the one being read
        self.offset = 0  # in it; 0: its header was not read yet
        self.record = 0  # number of the next record
        self.header: Optional[SegmentHeader] = None
        self.skipped = 0
        self._previous_clock = self._previous_step = NO_STEP
        self._descriptor = -1
        self._size = 0  # of the segment's file
        self._upto = _NO_END

    def position(self) -> Tuple[int, int, int, int, int]:
        """Where reading stands: what :meth:`seek` takes."""
        return self.segment, self.offset, self.record, self._previous_clock, self._previous_step

    def seek(self, position: Tuple[int, int, int, int, int]) -> None:
        """Goes on where an earlier reader stood."""
        self.close()
        self.segment, offset, record, clock, step = position
        self.offset = 0
        if offset and self._open():
            self.offset = offset
        self.record, self._previous_clock, self._previous_step = record, clock, step

    def read(self, limit: int = 1 << 30, upto: Optional[int] = None) -> List[Event]:
        """Up to ``limit`` events that are complete by now, in order; an empty list: none more yet.

        ``upto`` is the number of a record that is not read any more, nor any after it.
        Raises ValueError on a journal of a newer version; OSError where it cannot be read.
        """
        events: List[Event] = []
        self._upto = _NO_END if upto is None else upto
        while len(events) < limit and self.record < self._upto:
            # Looked at before the rest is read: once the next segment has begun, this one is whole.
            # It begins when a record found no room here, so far from the end there is none.
            near_end = self._size - self.offset <= MAX_RECORD_BYTES
            whole = near_end and self._has_begun(self.segment + 1)
            if self.offset or self._open():
                self._read_segment(events, limit, whole)
            if len(events) >= limit or self.record >= self._upto or not whole or self._alone:
                break
            self.close()
            self.segment += 1
            self.offset = 0
        return events

    def started_ns(self) -> int:
        """UTC time at which the segment being read was begun; 0 where it has not."""
        if self.header is None:
            self._open()
        return self.header.utc_ns if self.header else 0

    def close(self) -> None:
        """Lets go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _path(self, segment: int) -> Path:
        return self.folder / segment_name(self.rank, self.session, segment)

    def _has_begun(self, segment: int) -> bool:
        try:
            with open(self._path(segment), "rb") as file:
                return SegmentHeader.unpack(file.read(4096)) is not None
        except FileNotFoundError:
            return False

    def _open(self) -> bool:
        """Opens the segment and reads its header; False where it has not begun."""
        if self._descriptor < 0:
            try:
                self._descriptor = os.open(self._path(self.segment), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
        found = SegmentHeader.unpack(os.pread(self._descriptor, 4096, 0))
        if found is None:
            self._size = 0
            return False
        self._size = os.fstat(self._descriptor).st_size
        self.header, self.offset = found
        if self.record < self.header.first_record:
            self.record = self.header.first_record
        self._previous_clock = self.header.previous_clock_ns
        self._previous_step = self.header.previous_step
        return True

    def _read_segment(self, events: List[Event], limit: int, whole: bool) -> None:
        size = _PEEK
        while len(events) < limit and self.record < self._upto:
            data = os.pread(self._descriptor, size, self.offset)
            used = self._parse(data, events, limit)
            size = _CHUNK
            if used == 0 and len(data) >= 4 and _size_at(data, 0) > len(data):
                data = os.pread(self._descriptor, MAX_RECORD_BYTES + _CHUNK, self.offset)
                used = self._parse(data, events, limit)
            self.offset += used
            if 0 < used <= len(data) - 4 and not whole and _size_at(data, used) == 0:
                return  # a reader that keeps up: it need not fetch a whole chunk of zeros
            if used or len(events) >= limit or self.record >= self._upto:
                continue
            if whole and any(data):
                resumed = self._resynchronise(data)
                if resumed:
                    self.offset += resumed
                    continue
            return

    def _parse(self, data: bytes, events: List[Event], limit: int) -> int:
        """Appends the complete records at the start of ``data``; the bytes they take."""
        at, length = 0, len(data)
        header = self.header
        assert header is not None
        run_id, session, rank = header.run_id, header.session, header.rank
        world_size = header.world_size
        to_utc = header.utc_ns - header.clock_ns
        unpack_core = CORE_STRUCT.unpack_from
        new: Any = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        append = events.append
        record, upto = self.record, self._upto
        while len(events) < limit and record < upto and length - at >= RECORD_HEAD.size + 8:
            size = _size_at(data, at)
            if size < RECORD_HEAD.size + 8 or size > length - at:
                break
            kind = data[at + 4]
            if kind == CORE and size == CORE_SIZE:
                _, _, mask, _, clock, step, loss, grad_norm, lr, check = unpack_core(data, at)
                if check != record + 1:
                    break
                fields = (
                    run_id, session, record, rank, step, clock + to_utc, world_size, None,
                    loss if mask & HAS_LOSS else None, grad_norm if mask & HAS_GRAD_NORM else None,
                    lr if lr == lr else None, *_SEVEN_ABSENT, self._step_time_ms(clock, step),
                    *_REST_ABSENT,
                )  # fmt: skip
                append(new(StepEvent, fields))
            else:
                if TRAILER.unpack_from(data, at + size - 8)[0] != record + 1:
                    break
                event = self._other(data, at, size, kind, record, to_utc)
                if event is None:
                    self.skipped += 1
                else:
                    append(event)
            record += 1
            self.record = record
            at += size
        return at

    def _other(
        self, data: bytes, at: int, size: int, kind: int, record: int, to_utc: int
    ) -> Optional[Event]:
        """A full or control record; None for one that cannot be understood."""
        header = self.header
        assert header is not None
        clock, step = RECORD_HEAD.unpack_from(data, at)[4:]
        body = at + RECORD_HEAD.size
        try:
            if kind == FULL:
                columns: List[Any] = unpack_full(data, body, at + size - 8)
                columns[_STEP_TIME] = self._step_time_ms(clock, step)
                return StepEvent(
                    header.run_id, header.session, record, header.rank, step, clock + to_utc,
                    header.world_size, *columns,
                )  # fmt: skip
            if kind == CONTROL:
                rank, name, content = unpack_control(data, body)
                kind_of: Any = name  # a later version's kind is passed on as it is
                when = None if step == NO_STEP else step
                return ControlEvent(
                    header.run_id,
                    header.session,
                    record,
                    rank,
                    kind_of,
                    clock + to_utc,
                    when,
                    content,
                )
        except (struct.error, ValueError, TypeError):
            return None
        return None

    def _step_time_ms(self, clock: int, step: int) -> Optional[float]:
        """Time a step since the previous step event, as float32; None where no step was made."""
        before, last = self._previous_clock, self._previous_step
        self._previous_clock, self._previous_step = clock, step
        if before == NO_STEP or step <= last:
            return None
        return _FLOAT32.unpack(_FLOAT32.pack((clock - before) * 1e-6 / (step - last)))[0]  # type: ignore[no-any-return]

    def _resynchronise(self, data: bytes) -> int:
        """How far the next readable record is from a damaged one, 0 where there is none."""
        for at in range(8, len(data) - RECORD_HEAD.size - 8, 8):
            size = _size_at(data, at)
            if data[at + 4] not in (CORE, FULL, CONTROL) or not 32 <= size <= len(data) - at:
                continue
            number = TRAILER.unpack_from(data, at + size - 8)[0] - 1
            if self.record < number < self.record + len(data) // 32:
                self.skipped += number - self.record
                self.record = number
                return at
        return 0


# The columns of a core record that are absent: update_norm to backward_ms, batch_size to parts.
_SEVEN_ABSENT = (None,) * 7
_REST_ABSENT = (*(None,) * 11, ())
_STEP_TIME = StepEvent._fields.index("step_time_ms") - StepEvent._fields.index("epoch")


def _size_at(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")
