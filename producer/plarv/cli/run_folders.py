"""Finds runs on disk and says where they stand, from the ends of their journals."""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

from plarv import settings
from plarv.cli.complaint import Complaint
from plarv.journal_home import places
from plarv_schemas.events import StepEvent
from plarv_schemas.journal_reader import SegmentFile, SessionReader, segments_of
from plarv_schemas.run_log import is_run_dir

__all__ = ["RunState", "find_run", "run_folders", "state_of"]


class RunState(NamedTuple):
    """Where a run stands, as far as the end of its newest session's journal says."""

    folder: Path
    started_ns: int  # UTC, of the first session; 0: none has begun
    num_sessions: int
    num_ranks: int
    size_bytes: int
    last_ns: int = 0  # UTC, of the last event; 0: none
    last_step: Optional[StepEvent] = None
    finished: Optional[str] = None  # the status it finished with; None: it did not say

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
    return sorted(found, key=lambda path: (_last_start_ns(path), path.name), reverse=True)


def find_run(run: str) -> Path:
    """The folder of a run, named by id or path. Complaint: there is none."""
    for path in (Path(run), *places(run)):
        if is_run_dir(path):
            return path
    known = [path.name for path in run_folders()[:5]]
    hint = f"the newest are {', '.join(known)}" if known else f"there are none in {runs_root()}"
    raise Complaint(f"no run {run!r}: it is neither a run's folder nor the id of one; {hint}")


def state_of(folder: Path) -> RunState:
    """The run's state. It reads the newest session's last segment alone: quick for long runs too.

    ValueError: a journal of a newer version.
    """
    sessions = segments_of(folder)
    began = {name: _first_ns(folder, files) for name, files in sessions.items()}
    training = [files for files in sessions.values() if files[0].rank >= 0]
    newest = max(
        training, key=lambda files: (began[files[0].session], -files[0].rank), default=None
    )
    return _read_end(
        RunState(
            folder=folder,
            started_ns=min((ns for ns in began.values() if ns), default=0),
            num_sessions=len(training),
            num_ranks=len({files[0].rank for files in training}),
            size_bytes=sum(file.path.stat().st_size for each in sessions.values() for file in each),
        ),
        newest or [],
    )


def _read_end(state: RunState, files: Sequence[SegmentFile]) -> RunState:
    """The state with what the last segment of a session that has begun says."""
    for file in reversed(files):
        reader = SessionReader(state.folder, file.rank, file.session, file.segment)
        try:
            events = reader.read()
        finally:
            reader.close()
        for event in events:
            state = state._replace(last_ns=event.time_ns or state.last_ns, finished=None)
            if isinstance(event, StepEvent):
                state = state._replace(last_step=event)
            elif event.kind == "session_finished":
                state = state._replace(finished=str(event.data.get("status", "finished")))
        if events:
            break
    return state


def _first_ns(folder: Path, files: Sequence[SegmentFile]) -> int:
    reader = SessionReader(folder, files[0].rank, files[0].session, files[0].segment)
    try:
        return reader.started_ns()
    finally:
        reader.close()


def _last_start_ns(folder: Path) -> int:
    """When the run's newest session began."""
    return max(_first_ns(folder, files) for files in segments_of(folder).values())


def _ago(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
