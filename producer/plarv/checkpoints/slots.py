"""Three slots on disk, each whole or not there: a process may be killed at any instant."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Collection, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from plarv.checkpoints.tensor_file import digest_of
from plarv_schemas.locks import FileLock

__all__ = ["ANCHOR", "Slot", "Slots", "choose", "read_json", "write_json"]

NUM_SLOTS = 3
ANCHOR = "anchor_point.json"
_MANIFEST = "checkpoint.json"
_CERTIFIED = "certified.json"
_DRAFT, _TRASH = ".argus-draft-", ".argus-trash-"
_FORMAT = 1


class Slot(NamedTuple):
    """A checkpoint that lies whole on disk."""

    number: int
    path: Path
    run_id: str
    step: int
    time_ns: int  # UTC, when it was written
    size_bytes: int
    checksum: str  # over its files' digests
    certified: bool


class Slots:
    """``slot-0`` to ``slot-2`` in a folder: files, ``checkpoint.json`` that lists them, and
    ``certified.json`` where the engine found nothing against it.

    A slot is written in a folder of its own beside them and renamed when all of it is on the disk;
    what it replaces is renamed away first, so that it is never half there. One process at a time.
    OSError: the disk does not take or give it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")

    def open(self) -> bool:
        """Takes the folder, and sweeps away what killed processes left; False: another has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.acquire():
            return False
        for path in self.folder.iterdir():
            if path.name.startswith((_DRAFT, _TRASH)):
                shutil.rmtree(path, ignore_errors=True)
        return True

    def close(self) -> None:
        """Lets the folder go."""
        self._lock.release()

    def all(self) -> Tuple[Slot, ...]:
        """The whole ones, oldest first."""
        found = [self._read(number) for number in range(NUM_SLOTS)]
        return tuple(sorted([s for s in found if s is not None], key=lambda slot: slot.time_ns))

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

        ``digests``: of the files in it that are to be checked when it is read; what else lies in
        it (a tokenizer) is only synced. ``about``: run_id, step, time_ns and whatever helps.
        """
        files = {
            name: {"size_bytes": (draft / name).stat().st_size, "digest": digest}
            for name, digest in sorted(digests.items())
        }
        total = hashlib.blake2b("".join(digests[name] for name in files).encode(), digest_size=16)
        manifest = {
            "format": _FORMAT, **about, "files": files, "checksum": total.hexdigest(),
        }  # fmt: skip
        write_json(draft / _MANIFEST, manifest)
        for path in [path for path in draft.rglob("*") if path.name not in digests]:
            _sync(path)
        _sync(draft)
        place = self._place(number)
        self._remove(place)
        os.rename(draft, place)
        _sync(self.folder)
        slot = self._read(number)
        if slot is None:
            raise OSError(f"{place} was written and is not there")
        return slot

    def discard(self, draft: Path) -> None:
        """Removes a draft."""
        shutil.rmtree(draft, ignore_errors=True)

    def certify(self, step: int, about: Mapping[str, Any]) -> Optional[Slot]:
        """The newest slot of ``step``, certified from now on; None: there is none any more."""
        for slot in reversed(self.all()):
            if slot.step == step:
                write_json(slot.path / _CERTIFIED, about)
                return slot._replace(certified=True)
        return None

    def uncertify(self, slot: Slot) -> None:
        """It belongs to a branch of the run that was left."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(slot.path / _CERTIFIED)
        _sync(slot.path)

    def _place(self, number: int) -> Path:
        return self.folder / f"slot-{number}"

    def _read(self, number: int) -> Optional[Slot]:
        place = self._place(number)
        try:
            said = read_json(place / _MANIFEST)
            sizes = {name: int(file["size_bytes"]) for name, file in said["files"].items()}
            if said["format"] != _FORMAT:
                return None
            if any((place / name).stat().st_size != size for name, size in sizes.items()):
                return None
            return Slot(
                number, place, str(said["run_id"]), int(said["step"]), int(said["time_ns"]),
                sum(sizes.values()), str(said["checksum"]), (place / _CERTIFIED).exists(),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _remove(self, place: Path) -> None:
        if not place.exists():
            return
        trash = self.folder / f"{_TRASH}{secrets.token_hex(4)}"
        os.rename(place, trash)
        shutil.rmtree(trash, ignore_errors=True)


def choose(slots: Sequence[Slot], keep: Collection[int] = ()) -> Optional[int]:
    """The slot to write next; None: none may go.

    One without a checkpoint first. Else the oldest certified where a newer certified one stays,
    else the oldest that waits; never the newest certified one, nor one of ``keep``.
    """
    held = {slot.number for slot in slots}
    for number in range(NUM_SLOTS):
        if number not in held and number not in keep:
            return number
    ordered = sorted(slots, key=lambda slot: slot.time_ns)
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
