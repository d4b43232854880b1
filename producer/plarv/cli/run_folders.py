"""Finds runs on disk and says where they stand, from the ends of their journals."""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Optional

from plarv import settings
from plarv.cli.complaint import Complaint
from plarv_schemas.events import ControlEvent, StepEvent
from plarv_schemas.journal_reader import SessionReader, segments_of
from plarv_schemas.run_log import is_run_dir

__all__ = ["RunState", "find_run", "run_folders", "state_of"]


class RunState(NamedTuple):
    """Where a run's newest session of its lowest rank stands, as far as its journal says."""

    folder: Path
    started_ns: int  # UTC, of the first session
    num_sessions: int
    num_ranks: int
    last_ns: int  # UTC, of the last event; 0: none
    last_step: Optional[StepEvent]
    finished: Optional[str]  # the status it finished with; None: it did not say
    size_bytes: int

    def progress_text(self, now_ns: int) -> str:
        """Whether it runs, in words."""
        if self.finished is not None:
            return f"finished: {self.finished}"
        if not self.last_ns:
            return "no event yet"
        silent_s = max(0.0, (now_ns - self.last_ns) * 1e-9)
        return f"open, last event {_ago(silent_s)} ago"


def runs_root() -> Path:
    """The folder of all runs: ``runs`` in ARGUS_DIR."""
    return Path(settings.text("ARGUS_DIR")) / "runs"


def run_folders() -> List[Path]:
    """The runs' folders, the newest first."""
    root = runs_root()
    found = [path for path in root.iterdir() if is_run_dir(path)] if root.is_dir() else []
    return sorted(found, key=lambda path: (-_newest(path), path.name))


def find_run(run: str) -> Path:
    """The folder of a run, named by id or path. Complaint: there is none."""
    for path in (Path(run), runs_root() / run):
        if is_run_dir(path):
            return path
    known = [path.name for path in run_folders()[:5]]
    hint = f"the newest are {', '.join(known)}" if known else f"there are none in {runs_root()}"
    raise Complaint(f"no run {run!r}: it is neither a run's folder nor the id of one; {hint}")


def state_of(folder: Path) -> RunState:
    """The run's state. Reads one segment a session at most, so it is quick for long runs too."""
    sessions = segments_of(folder)
    newest: Optional[SessionReader] = None
    newest_key = (0, 0)
    started: List[int] = []
    ranks = set()
    for session, files in sessions.items():
        ranks.add(files[0].rank)
        first = SessionReader(folder, files[0].rank, session, files[0].segment)
        started.append(first.started_ns())
        first.close()
        key = (started[-1], -files[0].rank)
        if files[0].rank >= 0 and (newest is None or key > newest_key):
            last = max((file for file in files if file.begun), key=lambda file: file.segment)
            newest, newest_key = SessionReader(folder, last.rank, session, last.segment), key
    return _state(folder, newest, min(filter(None, started), default=0), len(sessions), ranks)


def _ago(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
