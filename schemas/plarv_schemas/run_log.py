"""A run's log: the journals of all its sessions, merged in one order that is written down.

``order.log`` in the run's folder says in which order the fold took the sessions' records, so that a
replay takes them in the same. A line ``+SESSION RANK`` gives the next number to a session, a line
``NUMBER UPTO`` says that its records were taken up to (not including) UPTO, and ``NUMBER *`` that
all further ones were, until the next line. One session alone costs one line.
"""

from __future__ import annotations

import errno
import heapq
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from plarv_schemas.events import Event
from plarv_schemas.journal_reader import SessionReader, segments_of

__all__ = ["RunLog", "is_run_dir", "read_run"]

ORDER_FILE = "order.log"

_DISCOVER_EVERY = 8  # polls; a new session may begin at any time


class RunLog:
    """The events of a run in the log's order: first what ``order.log`` says, then what arrives.

    With ``record=True`` the order of what arrives is appended to ``order.log`` before ``poll``
    returns it; only the holder of the run's fold lock may ask for that.
    """

    def __init__(self, folder: Path, *, record: bool = False) -> None:
        self.folder = folder
        self.at_end = False  # whether the last poll gave all that was there
        self._record = record
        self._readers: Dict[str, SessionReader] = {}
        self._ahead: Dict[str, List[Event]] = {}  # read, but later than what was released
        self._numbers: Dict[str, int] = {}  # session -> number in order.log
        self._script: List[Tuple[str, Optional[int]]] = []  # what order.log says, reversed
        self._open: Optional[str] = None  # the session of a last line "NUMBER *"
        self._open_at = 0  # where that line begins
        self._end = 0  # of the last whole line
        self._unordered: List[Event] = []  # merged, but their order could not be written yet
        self._polls = 0
        self._load_order()
        self.discover()

    @property
    def skipped(self) -> int:
        """Records that could not be read: unfinished ones, or damage."""
        total = 0
        for reader in self._readers.values():
            total += reader.skipped
        return total

    def discover(self) -> None:
        """Looks for sessions that have begun since."""
        for session, files in sorted(segments_of(self.folder).items()):
            if session not in self._readers:
                first = files[0]
                self._readers[session] = SessionReader(
                    self.folder, first.rank, session, first.segment
                )

    def positions(self) -> Dict[str, Any]:
        """Where every session stands. Only between two polls that released all they had read."""
        return {name: (reader.rank, *reader.position()) for name, reader in self._readers.items()}

    def seek(self, positions: Mapping[str, Any]) -> None:
        """Goes on where an earlier log of the same folder stood."""
        for session, (rank, *position) in positions.items():
            reader = self._readers.get(session)
            if reader is None:
                reader = self._readers[session] = SessionReader(self.folder, rank, session)
            reader.seek(tuple(position))

    @property
    def settled(self) -> bool:
        """Whether all that was read was released too, so that ``positions`` says where it
        stands.
        """
        return not self._unordered and not any(self._ahead.values())

    def poll(self, limit: int = 1024) -> List[Event]:
        """Up to about ``limit`` events that are there by now, in order; empty: none more yet."""
        self.at_end = False
        while self._script:
            session, upto = self._script[-1]
            reader = self._readers.get(session)
            if reader is not None:
                reader.started_ns()  # where old segments were removed it begins further on
            wanted = limit if upto is None else upto - (reader.record if reader else upto)
            events = reader.read(min(limit, wanted), upto) if reader and wanted > 0 else []
            if events:
                return events
            self._script.pop()
        self._polls += 1
        if self._polls % _DISCOVER_EVERY == 1:
            self.discover()
        return self._merge(limit)

    def close(self) -> None:
        """Lets go of all files."""
        for reader in self._readers.values():
            reader.close()

    def segments_read(self) -> Iterator[Path]:
        """The segment files before the current position of their session: no longer needed to go
        on.
        """
        for session, files in segments_of(self.folder).items():
            reader = self._readers.get(session)
            for file in files:
                if reader is not None and file.segment < reader.segment:
                    yield file.path

    def _merge(self, limit: int) -> List[Event]:
        """What the sessions have now, by time. A session with more to come holds the others back to
        its own last event, so that a backlog on one rank does not tear the ranks apart.
        """
        if self._unordered:
            self._write_order(self._unordered)
            merged, self._unordered = self._unordered, []
            return merged
        each = max(1, limit // max(1, len(self._readers)))
        cut: Optional[int] = None
        for session, reader in self._readers.items():
            ahead = self._ahead.setdefault(session, [])
            if len(ahead) < each:
                ahead.extend(reader.read(each - len(ahead)))
            if len(ahead) >= each:
                last = max(map(_when, ahead))  # not the last one's: UTC may have been set back
                cut = last if cut is None else min(cut, last)
        waiting = [ahead for ahead in self._ahead.values() if ahead]
        if len(waiting) == 1:
            merged, self._ahead = waiting[0], {}
        elif cut is None:
            merged, self._ahead = list(heapq.merge(*waiting, key=_when)), {}
        else:
            merged = []
            released: List[List[Event]] = []
            for session, ahead in self._ahead.items():
                keep = next((i for i, event in enumerate(ahead) if _when(event) > cut), len(ahead))
                released.append(ahead[:keep])
                self._ahead[session] = ahead[keep:]
            merged = list(heapq.merge(*released, key=_when))
        if self._record and merged:
            self._unordered = merged  # an error now must not lose them
            self._write_order(merged)
            self._unordered = []
        self.at_end = cut is None
        return merged

    def _load_order(self) -> None:
        try:
            data = (self.folder / ORDER_FILE).read_bytes()
        except FileNotFoundError:
            return
        names: List[str] = []
        at = 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # its writer was killed: what it would have said was not folded yet
            begin, at = at, at + len(line)
            self._end = at
            words = line.decode("ascii", "replace").split()
            if words and words[0].startswith("+"):
                names.append(words[0][1:])
                self._numbers[names[-1]] = len(names) - 1
            elif len(words) == 2 and words[0].isdigit() and int(words[0]) < len(names):
                session = names[int(words[0])]
                is_open = words[1] == "*"
                self._open, self._open_at = (session, begin) if is_open else (None, 0)
                self._script.append((session, None if is_open else int(words[1])))
        self._script.reverse()

    def _write_order(self, events: List[Event]) -> None:
        runs: List[Tuple[str, int]] = []
        for event in events:
            if runs and runs[-1][0] == event.session:
                runs[-1] = (event.session, event.record + 1)
            else:
                runs.append((event.session, event.record + 1))
        if len(runs) == 1 and runs[0][0] == self._open:
            return
        numbers, lines, end = dict(self._numbers), "", self._end
        now_open: Optional[str] = None
        open_at = 0
        if self._open is not None:
            if runs[0][0] != self._open:  # say up to where the open one had been taken
                lines += f"{numbers[self._open]} {self._taken(self._open, events)}\n"
            end = self._open_at
        for session, upto in runs:
            if session not in numbers:
                numbers[session] = len(numbers)
                lines += f"+{session} {self._readers[session].rank}\n"
            if len(runs) == 1:
                now_open, open_at = session, end + len(lines)
                lines += f"{numbers[session]} *\n"
            else:
                lines += f"{numbers[session]} {upto}\n"
        self._put(lines.encode("ascii"), end)
        self._numbers, self._open, self._open_at = numbers, now_open, open_at

    def _put(self, lines: bytes, at: int) -> None:
        """Ends the file with ``lines`` from ``at`` on, or leaves it as it was: OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.folder / ORDER_FILE, flags, 0o644)
        try:
            before = os.pread(descriptor, self._end - at, at)
            if os.pwrite(descriptor, lines, at) < len(lines):  # the disk is full
                os.pwrite(descriptor, before, at)
                os.ftruncate(descriptor, self._end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end = at + len(lines)
            os.ftruncate(descriptor, self._end)  # what a killed writer left unfinished
        finally:
            os.close(descriptor)

    def _taken(self, session: str, events: List[Event]) -> int:
        """Up to which record ``session`` had been taken before ``events``."""
        for event in events:
            if event.session == session:
                return event.record
        ahead = self._ahead.get(session)
        return ahead[0].record if ahead else self._readers[session].record


def is_run_dir(path: Path) -> bool:
    """Whether ``path`` is a folder with at least one journal in it."""
    return path.is_dir() and bool(segments_of(path))


def read_run(path: Path) -> Iterator[Event]:
    """All events of the run in folder ``path``, or of the one session of a ``.journal`` file, in
    order.

    Where old segments were removed to keep the journal within its bound, it begins after them; the
    fold's state at that place is in ``base`` (see ``plarv_processors.stored_fold``).
    """
    if path.is_file():
        yield from _read_segment(path)
        return
    log = RunLog(path)
    try:
        while True:
            events = log.poll(4096)
            if not events:
                return
            yield from events
    finally:
        log.close()


def _read_segment(path: Path) -> Iterator[Event]:
    for files in segments_of(path.parent).values():
        for file in files:
            if file.path.name == path.name:
                reader = SessionReader(
                    path.parent, file.rank, file.session, file.segment, alone=True
                )
                events = reader.read(4096)
                while events:
                    yield from events
                    events = reader.read(4096)
                reader.close()


def _when(event: Event) -> int:
    return event.time_ns or 0
