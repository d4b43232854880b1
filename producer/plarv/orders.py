"""An operator's order to a run of the embedded engine: written into its log, like any other
event.
"""

from __future__ import annotations

import getpass
import secrets
from pathlib import Path
from typing import Optional

from plarv.journal_home import places, run_folder
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.records import paused_by
from plarv_schemas.run_log import is_run_dir

__all__ = ["ORDERS", "OrderError", "find_run", "order", "user_name"]

ORDERS = ("resume", "pause", "stop")

_SEGMENT_BYTES = 16 * 1024  # it holds one order


class OrderError(Exception):
    """The order cannot be given; the message says why."""


def find_run(run: str) -> Path:
    """The folder of the run with this id, or at this path. OrderError: there is none."""
    for folder in (Path(run), *places(run)):
        if is_run_dir(folder):
            return folder
    raise OrderError(f"no run {run!r} in {run_folder('x').parent}, and no run folder of that path")


def order(run: str, kind: str, operator: Optional[str] = None) -> str:
    """Gives an order; one sentence on what became of it. OrderError: it could not be given.

    A training process that is alive takes it up with its engine (and obeys in AUTO mode, or with
    ``accept_operator=True``). Where none is, the log is folded here and now, so that ``resume``
    lifts a pause for the next attempt.
    """
    from plarv.transport.embedded import fold_rest  # the one that may look upward

    if kind not in ORDERS:
        raise OrderError(f"an order is one of {', '.join(ORDERS)}, not {kind!r}")
    folder = find_run(run)
    who = operator or user_name()
    try:
        writer = JournalWriter(
            folder,
            run_id=folder.name,
            session=secrets.token_hex(8),
            rank=-1,
            world_size=0,
            segment_bytes=_SEGMENT_BYTES,
        )
        written = writer.control(
            "order", step=None, rank=None, data={"order": kind, "operator": who}
        )
        writer.close()
        if not written:
            raise OrderError(f"the order could not be written to {folder}")
        alive = not fold_rest(folder)
    except OSError as error:
        raise OrderError(f"the order could not be written to {folder}: {error.strerror}") from error
    if alive:
        return f"{kind} ordered: the engine of run {folder.name} takes it up now"
    if kind == "resume":
        if paused_by(folder) is not None:
            raise OrderError(f"run {folder.name} is still paused: its log could not be folded")
        return f"run {folder.name} is resumed: its next attempt may start"
    return f"{kind} recorded: no engine is running for {folder.name}"


def user_name() -> str:
    """Who is at the keyboard, as an order names them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "an operator"
