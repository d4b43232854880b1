"""Where a run lives on disk, and the journal of this process in it."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from plarv import settings
from plarv.exceptions import ArgusPause
from plarv.identity import Identity
from plarv_schemas.journal_reader import segments_of
from plarv_schemas.journal_writer import SEGMENT_BYTES, JournalWriter
from plarv_schemas.records import FOLD_LOCK, paused_by

__all__ = [
    "Home",
    "open_home",
    "places",
    "refuse_if_paused",
    "remove_session",
    "run_folder",
    "sample_key",
]

_KEY_BYTES = 16
_SMALLEST = 1024 * 1024  # bytes of a segment: it holds the longest event


class Home(NamedTuple):
    """A run's folder and this process's writer in it."""

    folder: Path
    writer: JournalWriter
    note: str  # why it is not where it should be; "" where it is


def run_folder(run_id: str) -> Path:
    """``ARGUS_DIR/runs/RUN_ID``."""
    return _absolute(Path(settings.text("ARGUS_DIR"))) / "runs" / run_id


def places(run_id: str) -> Tuple[Path, Path]:
    """Where a run may lie: in ARGUS_DIR, or where that is read-only, in the temporary folder."""
    fallback = Path(tempfile.gettempdir()) / f"argus-{os.getuid()}" / "runs" / run_id
    return run_folder(run_id), fallback


def open_home(identity: Identity, session: str, world_size: int) -> Optional[Home]:
    """Makes the run's folder and the first segment; None where no disk takes it.

    Where ARGUS_DIR cannot be written to, the temporary folder is taken instead, and said so.
    ``world_size`` counts the ranks that whoever judges the run sees: of the node, or of the job.
    """
    bound = settings.integer("ARGUS_JOURNAL_MAX_MB") * 1024 * 1024
    note = ""
    wanted, fallback = places(identity.run_id)
    for folder in (wanted, fallback):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writer = JournalWriter(
                folder,
                run_id=identity.run_id,
                session=session,
                rank=identity.rank,
                world_size=world_size,
                # Small enough to go one by one: one is written, two are ready, one is being folded.
                segment_bytes=max(
                    _SMALLEST, min(SEGMENT_BYTES, bound // (4 * identity.local_world_size))
                ),
            )
            return Home(folder, writer, note)
        except OSError as error:
            note = f"{folder} cannot be written to ({error.strerror}): using {fallback}"
    return None


def refuse_if_paused(run_id: str) -> None:
    """Raises ArgusPause where the run was paused and nobody has lifted it."""
    for folder in places(run_id):
        try:
            pause = paused_by(folder)
        except OSError:  # nobody can read it, so nobody can resume it
            continue
        if pause is not None:
            raise ArgusPause(
                f"run {run_id} was paused at step {pause.step}: {pause.reason}. "
                f"Lift it with `argus resume {run_id}`, or take another run_id.",
                pause.step,
                pause.to_dict(),
            )


def remove_session(folder: Path, session: str) -> None:
    """Removes a session that never began, and the folder where nothing else is in it.

    OSError: something cannot be removed.
    """
    for file in segments_of(folder).get(session, []):
        file.path.unlink()
    for path in folder.glob(f"shipped-{session}*"):
        path.unlink()
    rest = list(folder.iterdir())
    if {path.name for path in rest} <= {"sample.key", FOLD_LOCK}:  # made by this start
        for path in rest:
            path.unlink()
        folder.rmdir()


def sample_key(folder: Path) -> bytes:
    """The key by which string sample ids are hashed; it never leaves the run's folder.

    All ranks and attempts share it. Where the disk takes none, it lasts as long as the process.
    """
    key = secrets.token_bytes(_KEY_BYTES)
    path = folder / "sample.key"
    new = folder / f"sample.key.{secrets.token_hex(4)}"
    try:
        if not path.exists():
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                written = os.write(descriptor, key)
            finally:
                os.close(descriptor)
            try:
                if written == len(key):
                    os.link(new, path)  # whole, and only where no other rank was first
            except FileExistsError:
                pass
            finally:
                os.unlink(new)
        found = path.read_bytes()
    except OSError:
        return key
    return found if len(found) == _KEY_BYTES else key


def _absolute(folder: Path) -> Path:
    try:
        return folder.absolute()
    except OSError:  # the working folder is gone
        return Path(tempfile.gettempdir()) / folder
