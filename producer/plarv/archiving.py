"""Keeps a run that has ended as Parquet: a process of its own writes it into the store."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from plarv import settings
from plarv.transport.child_process import leave_alone, start_apart

__all__ = ["LOG_FILE", "NO_STORE", "start_archive", "store_location"]

NO_STORE = "none"  # ARGUS_STORE: runs that end are not kept as Parquet
LOG_FILE = "archive.log"  # in the run's folder: what that process had to say


def store_location() -> str:
    """The store of ARGUS_STORE, else ``store`` in ARGUS_DIR; "" where none is wanted.

    A path is absolute, a URI as it was given.
    """
    found = settings.text("ARGUS_STORE")
    if found == NO_STORE:
        return ""
    if "://" in found:
        return found
    return str(Path(found or Path(settings.text("ARGUS_DIR")) / "store").absolute())


def start_archive(folder: Path) -> bool:
    """Has the run in ``folder`` written into the store; whether a process was started for it.

    None is started without pyarrow, or where no store is wanted. Cost: some milliseconds; the
    process takes a second and outlives this one. OSError: it cannot be started.
    """
    location = store_location()
    if not location or importlib.util.find_spec("pyarrow") is None:
        return False
    with open(folder / LOG_FILE, "ab") as log:
        process = start_apart(
            ["plarv", "sink", str(folder.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            ARGUS_STORE=location,  # it may hold a key
        )
    leave_alone(process)
    return True
