"""Where a run lives on disk, and the journal of this process in it."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

from plarv import settings
from plarv.exceptions import ArgusPause
from plarv.identity import Identity
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.records import paused_by

__all__ = ["Home", "open_home", "refuse_if_paused", "run_folder", "sample_key"]


class Home(NamedTuple):
    """A run's folder and this process's writer in it."""

    folder: Path
    writer: JournalWriter
    note: str  # why it is not where it should be; "" where it is


def run_folder(run_id: str) -> Path:
    """``ARGUS_DIR/runs/RUN_ID``."""
    return Path(settings.text("ARGUS_DIR")).absolute() / "runs" / run_id


def open_home(identity: Identity, session: str) -> Optional[Home]:
    """Makes the run's folder and the first segment; None where no disk takes it.

    Where ARGUS_DIR cannot be written to, the temporary folder is taken instead, and said so.
    """
    wanted = run_folder(identity.run_id)
    fallback = Path(tempfile.gettempdir()) / f"argus-{os.getuid()}" / "runs" / identity.run_id
    note = ""
    for folder in (wanted, fallback):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writer = JournalWriter(
                folder,
                run_id=identity.run_id,
                session=session,
                rank=identity.rank,
                world_size=identity.local_world_size,  # the ranks whose files lie in this folder
            )
            return Home(folder, writer, note)
        except OSError as error:
            note = f"{folder} cannot be written to ({error.strerror}): using {fallback}"
    return None


def refuse_if_paused(run_id: str, folder: Path) -> None:
    """Raises ArgusPause where the run was paused and nobody has lifted it."""
    pause = paused_by(folder)
    if pause is not None:
        raise ArgusPause(
            f"run {run_id} was paused at step {pause.step}: {pause.reason}. "
            f"Lift it with `argus resume {run_id}`, or take another run_id.",
            pause.step,
            pause.to_dict(),
        )


def sample_key(folder: Path) -> bytes:
    """The key by which string sample ids are hashed; it never leaves the run's folder."""
    path = folder / "sample.key"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        found = path.read_bytes()
        return found if len(found) == 16 else b"\0" * 16
    except OSError:
        return secrets.token_bytes(16)
    key = secrets.token_bytes(16)
    try:
        os.write(descriptor, key)
    finally:
        os.close(descriptor)
    return key
