"""Writes one session's journal: the training thread packs into mapped pages, nothing else.

A background thread calls :meth:`JournalWriter.prepare` to make the next segments ready:
``posix_fallocate`` first, so that a full disk is an error here and not a SIGBUS in the loop, then
the map, then a write to every page, so that the loop takes no page fault.
"""

from __future__ import annotations

import mmap
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, Deque, Mapping, Optional, Tuple

from plarv_schemas.journal import (
    CORE,
    CORE_STRUCT,
    NO_STEP,
    RECORD_HEAD,
    TRAILER,
    SegmentHeader,
    pack_control,
    segment_name,
)

__all__ = ["SEGMENT_BYTES", "JournalWriter"]

SEGMENT_BYTES = 4 * 1024 * 1024
"""73,000 core steps; in a loop without a pause the background thread has 50 ms and more to make the
next one."""

_PAGE = 4096
_MAX_WAITING = 16_384  # records that wait in memory while no segment is ready ...
_MAX_WAITING_BYTES = 8 * 1024 * 1024  # ... and their bytes: long lists are long records


class JournalWriter:
    """One session's journal.

    ``buffer``, ``position``, ``limit`` and ``record`` are the training thread's: it packs a core
    record at ``position`` while that is below ``limit``, adds one to ``record``, and moves on.
    Everything else goes through :meth:`append`. ``prepare`` and ``close`` are another thread's.

    An event that finds no room is lost, and with it every later one, so that the log has an end and
    no hole; ``lost`` counts them and ``ended`` says why. ``position`` and ``record`` belong
    together:
    after an exception that came from outside between two lines (Ctrl-C), :meth:`settle` says so.
    """

    __slots__ = (
        "buffer", "position", "limit", "record", "lost", "ended", "last_clock_ns", "last_step",
        "run_id", "session", "rank", "world_size", "folder", "segment", "prepared_bytes",
        "held", "full", "_spares", "_waiting", "_waiting_bytes", "_segment_bytes",
        "_next_segment", "_closed",
    )  # fmt: skip

    def __init__(
        self,
        folder: Path,
        *,
        run_id: str,
        session: str,
        rank: int,
        world_size: int,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Makes the first segment; raises OSError where that is impossible."""
        self.folder = folder
        self.run_id, self.session, self.rank, self.world_size = run_id, session, rank, world_size
        self.record = 0  # number of the next record
        self.lost = 0
        self.ended = ""
        self.full = ""  # why no further segment can be made, as the one says who prepares them
        self.last_clock_ns = self.last_step = NO_STEP  # of the last step record
        self.segment = -1
        self.prepared_bytes = 0  # of all segments made so far
        self._segment_bytes = max(segment_bytes, 2 * _PAGE)
        self._next_segment = 0
        self._spares: Deque[Tuple[int, mmap.mmap]] = deque()
        self._waiting: Deque[bytes] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self.held = False
        self.buffer: mmap.mmap = mmap.mmap(-1, _PAGE)
        self.position, self.limit = 0, 0
        self.prepare(spares=1)
        self.rotate()

    @property
    def ready(self) -> int:
        """How many segments are ready beside the one being written."""
        return len(self._spares)

    @property
    def segment_bytes(self) -> int:
        """Size of a segment on disk."""
        return self._segment_bytes

    def prepare(self, spares: int = 2) -> None:
        """Makes segments until ``spares`` are ready. For the background thread; OSError: no
        room.
        """
        while len(self._spares) < spares and not self._closed:
            number = self._next_segment
            path = self.folder / segment_name(self.rank, self.session, number)
            size = self._segment_bytes
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                _allocate(descriptor, size)
                buffer = mmap.mmap(descriptor, size)
            except OSError:
                os.unlink(path)
                raise
            finally:
                os.close(descriptor)
            for at in range(0, size, _PAGE):
                buffer[at] = 0
            self._next_segment = number + 1
            self.prepared_bytes += size
            self._spares.append((number, buffer))
        if self._closed:  # meanwhile, by the other thread
            self._drop_spares()

    def rotate(self) -> bool:
        """Moves on to the next segment that is ready; False where none is. Never waits."""
        while self._spares and self._spares[0][0] <= self.segment:
            self._spares.popleft()  # taken already, by a call that a signal's handler broke off
        if self._closed or not self._spares:
            return False
        number, buffer = self._spares[0]
        self._remember_last()
        header = SegmentHeader(
            self.run_id,
            self.session,
            self.rank,
            self.world_size,
            number,
            self.record - len(self._waiting),
            time.monotonic_ns(),
            time.time_ns(),
            self.last_clock_ns,
            self.last_step,
        ).pack()
        buffer[8 : len(header)] = header[8:]
        buffer[:8] = header[:8]  # the magic last: from here on the segment counts
        self.limit = 0
        self.buffer, self.segment, self.position = buffer, number, len(header)
        self._spares.popleft()
        self.hold(self.held)
        return True

    def hold(self, held: bool) -> None:
        """Whether the training thread must take the long way through :meth:`append`'s caller."""
        self.held = held
        closed = held or self.ended or self._waiting or self._closed
        self.limit = 0 if closed else self._segment_bytes - CORE_STRUCT.size

    def append(self, packed: bytes) -> bool:
        """Writes one packed record, made with ``record`` as its number; False: it was lost."""
        if self.ended or self._closed or len(packed) > self._segment_bytes - 512:
            self.lost += 1  # the latter only with the tiny segments of tests and orders
            return False
        if (self._waiting and not self.flush()) or not self._write(packed):
            return self._wait(packed)
        self.record += 1
        return True

    def flush(self) -> bool:
        """Writes what waits in memory for a segment; True when nothing waits any more."""
        while self._waiting:
            packed = self._waiting[0]
            if not self._write(packed):
                self.limit = 0
                return False
            self._waiting.popleft()
            self._waiting_bytes -= len(packed)
        return True

    def settle(self) -> None:
        """Counts a record that is whole in the segment, but not yet in ``position`` and
        ``record``.
        """
        if self.segment < 0 or self._waiting or self._closed:
            return
        before = TRAILER.unpack_from(self.buffer, self.position - TRAILER.size)[0]
        if before == self.record + 1:
            self.record += 1
        size = int.from_bytes(self.buffer[self.position : self.position + 4], "little")
        end = self.position + size
        if size > RECORD_HEAD.size and end <= self._segment_bytes:
            if TRAILER.unpack_from(self.buffer, end - TRAILER.size)[0] == self.record + 1:
                self.position, self.record = end, self.record + 1

    def control(
        self, kind: str, *, step: Optional[int], rank: Optional[int], data: Mapping[str, Any]
    ) -> bool:
        """Writes a control event now; False: it was lost."""
        return self.append(pack_control(self.record, time.monotonic_ns(), step, rank, kind, data))

    def close(self) -> None:
        """Cuts the last segment to its length and removes those that were never used."""
        if self._closed:
            return
        try:
            while not self.flush() and not self.full:
                self.prepare(spares=1)
        except OSError:
            pass  # no room: what waits is lost
        if self._waiting:
            self.lost += len(self._waiting)
            self.record -= len(self._waiting)
            self.ended = self.ended or self.full or "no room for a journal segment"
            self._waiting.clear()
        self._closed = True
        self.limit = 0
        # A step that another thread is in the midst of must not touch the pages that are cut off.
        self.buffer = mmap.mmap(-1, _PAGE)
        if self.segment >= 0:
            path = self.folder / segment_name(self.rank, self.session, self.segment)
            try:
                os.truncate(path, self.position)
            except OSError:
                pass  # the zeros behind the last record say the same
        self._drop_spares()

    def _drop_spares(self) -> None:
        """Removes the segments that were never used; two threads may do so at once."""
        while True:
            try:
                number, _ = self._spares.popleft()
                if number > self.segment:
                    os.unlink(self.folder / segment_name(self.rank, self.session, number))
            except IndexError:
                return
            except OSError:
                pass  # gone already

    def _remember_last(self) -> None:
        """Clock and step of the last record, where the hot path wrote it: it keeps no such
        notes.
        """
        at = self.position - CORE_STRUCT.size
        if self.segment < 0 or at < 0:
            return
        size, kind, _, _, clock_ns, step, _, _, _, number = CORE_STRUCT.unpack_from(self.buffer, at)
        if size == CORE_STRUCT.size and kind == CORE and number == self.record:
            self.last_clock_ns, self.last_step = clock_ns, step

    def _write(self, packed: bytes) -> bool:
        size = len(packed)
        if self.position + size > self._segment_bytes and not self.rotate():
            return False
        at = self.position
        end = at + size
        # The size goes in last: a copy may run in any order, and until then the record is not
        # there.
        self.buffer[at + 4 : end] = packed[4:]
        self.buffer[at : at + 4] = packed[:4]
        self.position = end
        return True

    def _wait(self, packed: bytes) -> bool:
        size = self._waiting_bytes + len(packed)
        if len(self._waiting) >= _MAX_WAITING or size > _MAX_WAITING_BYTES:
            self.ended = self.full or "no journal segment could be made in time"
            self.lost += 1
            return False
        self._waiting.append(packed)
        self._waiting_bytes = size
        self.limit = 0  # nothing may overtake what waits
        self.record += 1
        return True


def _allocate(descriptor: int, size: int) -> None:
    """Real blocks for the whole file, so that a mapped write can never find the disk full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1 << 20)  # macOS: written zeros are the only blocks that are sure to be there
    written = 0
    while written < size:
        written += os.write(descriptor, zeros[: size - written])
