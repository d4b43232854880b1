"""Three slots on disk, each whole or not there: a process may be killed at any instant."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from plarv.checkpoints.tensor_file import digest_of
from plarv_schemas.locks import FileLock

__all__ = ["Slot", "Slots", "choose", "read_json", "write_json"]

NUM_SLOTS = 3
_MANIFEST = "checkpoint.json"
_CERTIFIED = "certified.json"
_DRAFT, _TRASH = ".argus-draft-", ".argus-trash-"
_REPLACED = re.compile(re.escape(_TRASH) + r"(\d)-[0-9a-f]+")  # what lay in a slot, until then
_HALF_JSON = re.compile(r"\.(anchor_point|checkpoint|certified)\.json\.[0-9a-f]{8}")
_FORMAT = 2


class Slot(NamedTuple):
    """A checkpoint that lies whole on disk."""

    number: int
    path: Path
    run_id: str
    step: int
    sequence: int  # the newer the larger, whatever the clock says
    size_bytes: int
    checksum: str  # over its files' digests
    certified: bool


class Slots:
    """``slot-0`` to ``slot-2`` in a folder: files, ``checkpoint.json`` that lists them, and
    ``certified.json`` where the engine found nothing against it.

    A slot is written in a folder of its own beside them and renamed when all of it is on the disk;
    what it replaces is renamed away first, and back where that fails, so that it is never half
    there. What is not ours or cannot be read is left alone: ``blocked()``. One process at a time.
    OSError: the disk does not take or give it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        self._newest = 0

    @property
    def sequence(self) -> int:
        """The largest sequence number seen so far."""
        return self._newest

    def open(self) -> bool:
        """Takes the folder, and mends what killed processes left; False: another has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire():
            return False
        try:
            self._put_back()
            self._sweep()
        except BaseException:
            self._lock.release()
            raise
        return True

    def close(self) -> None:
        """Lets the folder go."""
        self._lock.release()

    def all(self) -> Tuple[Slot, ...]:
        """The whole ones, oldest first."""
        found: List[Slot] = []
        for number in range(NUM_SLOTS):
            with contextlib.suppress(_BlockedError):
                slot = _read(number, self._place(number))
                if slot is not None:
                    found.append(slot)
        found.sort(key=lambda slot: slot.sequence)
        self._newest = max([self._newest, *(slot.sequence for slot in found)])
        return tuple(found)

    def blocked(self) -> Dict[int, str]:
        """Places that are not ours to write to, and why."""
        found: Dict[int, str] = {}
        for number in range(NUM_SLOTS):
            try:
                _read(number, self._place(number))
            except _BlockedError as error:
                found[number] = str(error)
        return found

    def verify(self, slot: Slot) -> Optional[str]:
        """Reads every byte: what is wrong with it, or None."""
        try:
            files = read_json(slot.path / _MANIFEST)["files"]
            for name, said in files.items():
                if digest_of(slot.path / name) != said["digest"]:
                    return f"{slot.path / name} is damaged: its digest is another"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{slot.path} cannot be read ({error})"
        return None

    def draft(self) -> Path:
        """A folder to write the files of a slot into; give it to publish() or discard()."""
        folder = self.folder / f"{_DRAFT}{secrets.token_hex(4)}"
        folder.mkdir()
        return folder

    def publish(
        self, draft: Path, number: int, digests: Mapping[str, str], about: Mapping[str, Any]
    ) -> Slot:
        """Makes ``draft`` the slot ``number``, in place of what lies there.

        ``digests``: of the files in it that are to be checked when it is read, by their path in it;
        what else lies in it (a tokenizer) is only synced. ``about``: run_id, step and whatever
        helps. FileExistsError: what lies there is not ours.
        """
        place = self._place(number)
        why_not = self.blocked().get(number)
        if why_not is not None:
            raise FileExistsError(errno.EEXIST, why_not)
        self.all()
        files = {
            name: {"size_bytes": (draft / name).stat().st_size, "digest": digest}
            for name, digest in sorted(digests.items())
        }
        total = hashlib.blake2b("".join(digests[name] for name in files).encode(), digest_size=16)
        manifest = {
            "format": _FORMAT, **about, "sequence": self._newest + 1, "files": files,
            "checksum": total.hexdigest(),
        }  # fmt: skip
        write_json(draft / _MANIFEST, manifest)
        for path in draft.rglob("*"):
            if path.relative_to(draft).as_posix() not in digests:
                _sync(path)
        _sync(draft)
        self._replace(place, draft, number)
        slot = _read(number, place)
        if slot is None:
            raise OSError(errno.EIO, f"{place} was written and is not there")
        self._newest = slot.sequence
        return slot

    def discard(self, draft: Path) -> None:
        """Removes a draft."""
        shutil.rmtree(draft, ignore_errors=True)

    def certify(self, step: int, about: Mapping[str, Any], *, after: int = 0) -> Optional[Slot]:
        """The newest slot of ``step``, certified from now on; None: there is none any more.

        Only those whose sequence is larger than ``after``: others are of another attempt.
        """
        for slot in reversed(self.all()):
            if slot.step == step and slot.sequence > after:
                write_json(slot.path / _CERTIFIED, {**about, "checksum": slot.checksum})
                return slot._replace(certified=True)
        return None

    def uncertify(self, slot: Slot) -> None:
        """It belongs to a branch of the run that was left."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(slot.path / _CERTIFIED)
        _sync(slot.path)

    def _place(self, number: int) -> Path:
        return self.folder / f"slot-{number}"

    def _replace(self, place: Path, draft: Path, number: int) -> None:
        trash = self.folder / f"{_TRASH}{number}-{secrets.token_hex(4)}"
        is_taken = os.path.lexists(place)
        if is_taken:
            os.rename(place, trash)
        try:
            os.rename(draft, place)
        except OSError:
            if is_taken:
                os.rename(trash, place)
            raise
        _sync(self.folder)
        if is_taken:
            shutil.rmtree(trash, ignore_errors=True)

    def _put_back(self) -> None:
        """What a killed process had moved out of a slot's place, with nothing in its place yet."""
        moved: List[Tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            match = _REPLACED.fullmatch(path.name)
            if match is not None:
                try:
                    slot = _read(int(match[1]), path)
                except _BlockedError:  # as little ours to remove as it was in its place
                    moved.append((-1, int(match[1]), path))
                else:
                    if slot is not None:
                        moved.append((slot.sequence, slot.number, path))
        for _, number, path in sorted(moved, reverse=True):
            if not os.path.lexists(self._place(number)):
                os.rename(path, self._place(number))
                _sync(self.folder)

    def _sweep(self) -> None:
        for path in list(self.folder.iterdir()):
            if path.name.startswith((_DRAFT, _TRASH)):
                shutil.rmtree(path, ignore_errors=True)
        for folder in (self.folder, *(slot.path for slot in self.all())):
            for path in list(folder.iterdir()):
                if _HALF_JSON.fullmatch(path.name):
                    path.unlink()


class _BlockedError(Exception):
    """A place that is not ours, or that cannot be told to be."""


class _Manifest(NamedTuple):
    run_id: str
    step: int
    sequence: int
    checksum: str
    sizes: Mapping[str, int]


def _read(number: int, place: Path) -> Optional[Slot]:
    """None: nothing is there, or what we wrote there is damaged. _BlockedError: neither."""
    try:
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            raise _BlockedError(f"{place} is no folder")
        said = _manifest(place)
        for name, size in said.sizes.items():
            if (place / name).stat().st_size != size:
                return None
        certified = _is_certified(place, said.checksum)
    except FileNotFoundError:  # a file that is listed is gone
        return None
    except OSError as error:
        raise _BlockedError(f"{place} cannot be read ({error.strerror})") from error
    return Slot(
        number, place, said.run_id, said.step, said.sequence,
        sum(said.sizes.values()), said.checksum, certified,
    )  # fmt: skip


def _manifest(place: Path) -> _Manifest:
    """What ``checkpoint.json`` says."""
    try:
        said = read_json(place / _MANIFEST)
        if said["format"] != _FORMAT:
            raise _BlockedError(f"{place} has format {said['format']}, this Argus reads {_FORMAT}")
        sizes = {str(name): int(file["size_bytes"]) for name, file in said["files"].items()}
        if any("\0" in name for name in sizes):
            raise ValueError("a name with a zero byte")
        return _Manifest(
            str(said["run_id"]), int(said["step"]), int(said["sequence"]), str(said["checksum"]),
            sizes,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise _BlockedError(f"{place} is no checkpoint of Argus's") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as error:  # fmt: skip
        raise _BlockedError(f"{place / _MANIFEST} is damaged, or not of Argus's") from error


def _is_certified(place: Path, checksum: str) -> bool:
    try:
        return read_json(place / _CERTIFIED).get("checksum") == checksum
    except (FileNotFoundError, ValueError, RecursionError):
        return False


def choose(slots: Sequence[Slot], keep: Collection[int] = ()) -> Optional[int]:
    """The slot to write next; None: none may go.

    One without a checkpoint first. Else the oldest certified where a newer certified one stays,
    else the oldest that waits; never the newest certified one, nor one of ``keep`` (to which the
    blocked ones belong).
    """
    held = {slot.number for slot in slots}
    for number in range(NUM_SLOTS):
        if number not in held and number not in keep:
            return number
    ordered = sorted(slots, key=lambda slot: slot.sequence)
    certified = [slot for slot in ordered if slot.certified]
    waiting = [slot for slot in ordered if not slot.certified]
    for slot in [*certified[:-1], *waiting]:
        if slot.number not in keep:
            return slot.number
    return None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replaces the file at once, or not at all."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(new, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    _sync(path.parent)


def read_json(path: Path) -> Dict[str, Any]:
    """A JSON object from a file. ValueError: it holds something else. OSError: it is not there."""
    with open(path, encoding="utf-8") as file:
        found: Any = json.load(file)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return cast(Dict[str, Any], found)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
