"""The fold of a run's folder: its log in, ``verdicts.jsonl`` and ``actions.jsonl`` out.

The embedded engine, ``argus resume`` and whoever finds a run whose process died use this one. What
is written is derived from the log, so losing it loses nothing: the log is folded again and records
that are there already are not written twice.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

from plarv_processors.engine import Engine, EngineConfig
from plarv_processors.snapshot import pack, unpack
from plarv_schemas.events import Action, ControlEvent, Verdict
from plarv_schemas.locks import FileLock
from plarv_schemas.records import ACTIONS_FILE, FOLD_LOCK, VERDICTS_FILE, read_lines
from plarv_schemas.run_log import RunLog

__all__ = ["FOLD_LOCK", "HeldFold", "Record", "StoredFold", "base_of", "fold_held", "fold_rest"]

Record = Union[Verdict, Action]

_SNAPSHOT = "snapshot"  # where the next start goes on
_BASE = "base"  # where the log begins, once old segments were removed
_CHECKSUM = struct.Struct("<I")  # before a state: a damaged one must not go on unnoticed
_MAX_UNWRITTEN = 1 << 20  # bytes of lines that wait for room on the disk


class StoredFold:
    """Folds what a run's folder holds and goes on as it grows.

    ``writing=True`` needs the run's fold lock (``FOLD_LOCK``): it records the order in which
    sessions were merged and appends what it finds. It begins at the last snapshot where that fits
    the engine's configuration, else at the log's beginning.
    """

    def __init__(
        self, folder: Path, config: Optional[EngineConfig] = None, *, writing: bool = True
    ) -> None:
        self.folder = folder
        self.engine = Engine(config)
        self.errors: Dict[str, int] = {}  # what could not be written, and how often
        self._writing = writing
        self._log = RunLog(folder, record=writing)
        self._unwritten: Dict[str, bytes] = {}  # lines that found no room yet
        self._begun: Set[str] = set()  # files that this fold has appended to
        self._known: Set[str] = set()
        self._saved_at = -1
        self.is_other = False  # whether the states there are of another configuration
        self.running: Set[str] = set()  # sessions of training processes that have not finished
        if writing:
            self._resume()

    def advance(self, limit: int = 256, *, keep: bool = True) -> Tuple[int, List[Record]]:
        """Folds about ``limit`` events that are there by now: how many there were, and the records.

        No events: the fold has come to the end of what is there. ``keep=False``: the records are
        not written down.
        """
        events = self._log.poll(limit)
        found: List[Record] = []
        fold = self.engine.fold
        for event in events:
            if isinstance(event, ControlEvent):
                self._note(event)
            records = fold(event)
            if records:
                found.extend(records)
        if self._writing and keep and (found or self._unwritten):
            found = self._write(found)
        return len(events), found

    def records(self) -> Dict[str, int]:
        """Each session's first record that has not been read."""
        return {session: place[3] for session, place in self._log.positions().items()}

    def discover(self) -> None:
        """Looks for sessions that have begun since, at once; ``advance`` does so now and then."""
        self._log.discover()

    def _note(self, event: ControlEvent) -> None:
        if event.kind == "session_started":
            self.running.add(event.session)
        elif event.kind == "session_finished":
            self.running.discard(event.session)

    @property
    def at_end(self) -> bool:
        """Whether the last ``advance`` folded all that was there by then."""
        return self._log.at_end

    @property
    def skipped(self) -> int:
        """Records of the log that could not be read."""
        return self._log.skipped

    @property
    def _may_save(self) -> bool:
        """Whether a fold that goes on from here would write all that is still to be written."""
        return self._writing and self._log.settled and not self._unwritten

    def save(self) -> None:
        """Writes a snapshot, by which the next start goes on from here."""
        if self._may_save and self.engine.ordinal != self._saved_at:
            if self._write_state(_SNAPSHOT):
                self._saved_at = self.engine.ordinal

    def trim(self) -> int:
        """Removes the segments that are folded, after a snapshot of the fold; the bytes freed."""
        if not self._may_save:
            return 0
        paths = list(self._log.segments_read())
        if not paths:
            return 0
        if not (self._write_state(_BASE) and self._write_state(_SNAPSHOT)):
            return 0  # without a base, nobody could replay what is left
        freed = 0
        for path in paths:
            freed += path.stat().st_size
            path.unlink()
        return freed

    def close(self) -> None:
        """Lets go of all files; the snapshot is the caller's to take."""
        self._log.close()
        if self._unwritten:
            self._write(())
        for name, lines in self._unwritten.items():
            self._lose(name, lines.count(b"\n"))
        self._unwritten.clear()

    def _resume(self) -> None:
        for name in (_SNAPSHOT, _BASE):
            state = _read_state(self.folder / name)
            if state is None:
                continue
            positions, engine = state
            try:
                self.engine.restore(engine)
            except ValueError:
                self.engine = Engine(self.engine.config)
                self.is_other = True
                continue
            self.is_other = False
            self._log.seek(positions)
            break
        for name in (VERDICTS_FILE, ACTIONS_FILE):
            self._known.update(str(record.get("id")) for record in read_lines(self.folder / name))

    def _write(self, found: Sequence[Record]) -> List[Record]:
        """Appends the records that are not there yet, and gives these back."""
        new: List[Record] = []
        for record in found:
            if self._known and record.id in self._known:
                self._known.discard(record.id)
                continue
            new.append(record)
            name = VERDICTS_FILE if isinstance(record, Verdict) else ACTIONS_FILE
            line = json.dumps(record.to_dict(), separators=(",", ":"), allow_nan=False) + "\n"
            waiting = self._unwritten.get(name, b"")
            if len(waiting) > _MAX_UNWRITTEN:
                self._lose(name, 1)
            else:
                self._unwritten[name] = waiting + line.encode("utf-8")
        for name, lines in list(self._unwritten.items()):
            try:
                rest = lines[self._append(name, lines) :]
            except OSError:
                continue  # tried again with the next events, and counted at the end
            self._unwritten[name] = rest
            if not rest:
                del self._unwritten[name]
        return new

    def _append(self, name: str, lines: bytes) -> int:
        """Appends to a file, unbuffered: a forked child must not have a part of it to write
        again.
        """
        path = self.folder / name
        with open(path, "ab", buffering=0) as file:
            if name not in self._begun and _ends_torn(path):
                file.write(b"\n")
            self._begun.add(name)
            return file.write(lines) or 0

    def _lose(self, name: str, count: int) -> None:
        why = f"no room for a record in {name}"
        self.errors[why] = self.errors.get(why, 0) + count

    def _count(self, error: OSError) -> None:
        why = f"no snapshot: {error.strerror or type(error).__name__}"
        self.errors[why] = self.errors.get(why, 0) + 1

    def _write_state(self, name: str) -> bool:
        data = pack((self._log.positions(), self.engine.snapshot()))
        temporary = self.folder / f"{name}.new"
        try:
            temporary.write_bytes(_CHECKSUM.pack(zlib.crc32(data)) + data)
            os.replace(temporary, self.folder / name)
            return True
        except OSError as error:
            self._count(error)
            return False


def base_of(folder: Path, engine: Engine) -> Optional[int]:
    """Puts ``engine`` where the folder's log begins; the ordinal of that place, None: at the start.

    An engine of another configuration starts there without a past.
    """
    state = _read_state(folder / _BASE)
    if state is None:
        return None
    try:
        engine.restore(state[1])
    except ValueError:
        return -1
    return engine.ordinal


def _read_state(path: Path) -> Optional[Tuple[Dict[str, Tuple[int, ...]], bytes]]:
    """The positions and the engine in a file; None where it is missing or damaged."""
    try:
        data = path.read_bytes()
        if data[: _CHECKSUM.size] != _CHECKSUM.pack(zlib.crc32(data[_CHECKSUM.size :])):
            return None
        positions, engine = unpack(data[_CHECKSUM.size :])
    except (OSError, ValueError, TypeError):
        return None
    return positions, engine


def _ends_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class HeldFold(NamedTuple):
    """What :func:`fold_held` came to."""

    records: Mapping[str, int]  # session -> its first record that was not there yet
    judged_anew: bool  # by others than those that judged the run: no finding was written down


def fold_held(folder: Path) -> HeldFold:
    """Folds all that a run's folder still holds; the caller holds its fold lock.

    Where the run was judged by other detectors than those of today, only the order of its log is
    written down: what these would find was not found then.
    """
    fold = StoredFold(folder)
    try:
        while fold.advance(4096, keep=not fold.is_other)[0]:
            pass
        if not fold.is_other:
            fold.save()
        return HeldFold(fold.records(), fold.is_other)
    finally:
        fold.close()


def fold_rest(folder: Path, config: Optional[EngineConfig] = None) -> bool:
    """Folds all that a run's folder still holds; False: a living engine has its lock and does
    it.
    """
    lock = FileLock(folder / FOLD_LOCK)
    if not lock.acquire():
        return False
    try:
        fold = StoredFold(folder, config)
        while fold.advance(4096)[0]:
            pass
        fold.save()
        fold.close()
    finally:
        lock.release()
    return True
