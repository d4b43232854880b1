"""Replays what was recorded: any file of a run as a stream of events, folded again."""

from __future__ import annotations

from pathlib import Path
from typing import Collection, Iterable, Iterator, List, Mapping, Optional, Protocol, Tuple, Union

from plarv_processors.engine import Engine, EngineConfig, left_out_by
from plarv_processors.stored_fold import base_of
from plarv_schemas.events import Action, Event, StepEvent, Verdict
from plarv_schemas.pyarrow_types import require_pyarrow
from plarv_schemas.run_log import RunLog, is_run_dir, read_run
from plarv_sinks.curve import ReplayError, Tell, first_line, listed, read_curve
from plarv_sinks.exported import read_export, read_recorded_controls, read_recorded_steps
from plarv_sinks.importers import ImportedRun, format_of, open_source
from plarv_sinks.importers.plain import is_binary, open_table, table_columns

__all__ = ["Finding", "Fold", "ReplayError", "RunSummary", "engine_for", "read_events", "replay"]

Finding = Union[Verdict, Action]

_KINDS = "CSV, JSON lines, Parquet, a journal, an export's folder or a known logger's files"
_HEAD_BYTES = 8192


class Fold(Protocol):
    """What a replay asks of an engine."""

    def fold(self, event: Event) -> Tuple[Finding, ...]:
        """The verdicts and actions of the event."""
        ...


class RunSummary:
    """What a replay went through in one run.

    >>> summary = RunSummary("run")
    >>> for step in range(0, 300, 100):
    ...     summary.count_event(StepEvent("run", "file", step, 0, step, step_time_ms=500.0))
    >>> summary.num_steps, summary.duration_s
    (3, 100.5)
    """

    __slots__ = (
        "run_id", "num_steps", "num_verdicts", "num_actions",
        "_first_ns", "_last_ns", "_rank", "_step", "_steps_ms", "_timed", "_low", "_high",
    )  # fmt: skip

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.num_steps = 0  # of one rank; an evaluation at a step that was counted adds none
        self.num_verdicts = 0
        self.num_actions = 0
        self._first_ns: Optional[int] = None
        self._last_ns: Optional[int] = None
        self._rank: Optional[int] = None  # the one that is counted: the first seen
        self._step: Optional[int] = None  # last one counted
        self._steps_ms = 0.0
        self._timed = 0  # steps with a time
        self._low = self._high = 0

    @property
    def duration_s(self) -> Optional[float]:
        """From the first event to the last; without times, steps times the mean step; else None."""
        if self._first_ns is not None and self._last_ns is not None:
            return max(0.0, (self._last_ns - self._first_ns) * 1e-9)
        if self._timed == 0:
            return None
        return (self._high - self._low + 1) * self._steps_ms / self._timed * 1e-3

    def count_event(self, event: Event) -> None:
        """Takes one event of the run."""
        if event.time_ns is not None:
            if self._first_ns is None:
                self._first_ns = event.time_ns
            self._last_ns = event.time_ns
        if not isinstance(event, StepEvent):
            return
        if self._rank is None:
            self._rank, self._low, self._high = event.rank, event.step, event.step
        if event.rank != self._rank:
            return
        if event.step != self._step:
            self._step = event.step
            self.num_steps += 1
            self._low, self._high = min(self._low, event.step), max(self._high, event.step)
        took = event.step_time_ms
        if took is not None and took - took == 0.0:
            self._steps_ms += took
            self._timed += 1

    def count_finding(self, finding: Finding) -> None:
        """Takes one verdict or action of the run."""
        if isinstance(finding, Verdict):
            self.num_verdicts += 1
        else:
            self.num_actions += 1


def read_events(
    path: Path,
    tell: Tell,
    *,
    format: Optional[str] = None,  # noqa: A002 - the word of the command line
    columns: Optional[Mapping[str, str]] = None,
    runs: Collection[str] = (),
) -> Iterator[Event]:
    """The events recorded in a file or folder, in the log's order; `tell` hears what was left out.

    A table of a curve (CSV, JSON lines, Parquet; see `read_curve`), a run's folder or one of its
    ``.journal`` files, a folder that an export wrote, or what another logger wrote (see
    `plarv_sinks.importers`). Content decides, not the name, unless ``format`` names an importer.
    ``columns``: our column -> the log's. ``runs``: ids or names, of several the only ones to read.

    Raises:
        ReplayError: there is nothing that can be replayed, and why, in one line.
    """
    try:
        if format is None:
            yield from _open(path, tell, columns or {}, runs)
        else:
            yield from _imported(path, tell, format, columns or {}, runs)
    except ImportError as error:
        raise ReplayError(f"{path}: {error}") from error
    except OSError as error:
        raise ReplayError(f"{path}: {error.strerror or first_line(error)}") from error


def _imported(
    path: Path, tell: Tell, kind: str, columns: Mapping[str, str], runs: Collection[str]
) -> Iterator[Event]:
    """The events of a source's runs; one of several that cannot be replayed is told."""
    names: List[str] = []
    chosen: List[ImportedRun] = []
    for run in open_source(path, kind, columns, tell):
        names.append(run.name)
        if not runs or run.name in runs or run.run_id in runs:
            chosen.append(run)
    if not chosen:
        raise ReplayError(f"{path}: no run of that name; there are {listed(names, 40)}")
    if len(chosen) == 1:
        yield from chosen[0].events()
        return
    failed: List[ReplayError] = []
    for run in chosen:
        try:
            yield from run.events()
        except ReplayError as error:
            failed.append(error)
            tell(f"run {run.name} left out: {error}")
    if len(failed) == len(chosen):
        raise failed[0]


def engine_for(path: Path, config: EngineConfig, tell: Tell) -> Engine:
    """An engine that stands where the recording begins.

    That is the run's start, unless old segments of a journal were removed: then the state of the
    fold was kept, and `tell` hears where the replay begins.
    """
    engine = Engine(config)
    base = base_of(path, engine) if path.is_dir() else None
    if base is not None and base >= 0:
        tell(f"{path}: begins at the event of ordinal {base + 1:,}; older ones were removed")
    elif base is not None:
        tell(f"{path}: older events were removed; the fold's state there is of other detectors")
    for detector, ordinal in _left_out(path):
        engine.leave_out(detector, ordinal)
    return engine


def replay(
    events: Iterable[Event], engine: Fold, summary: Optional[RunSummary] = None
) -> Iterator[Finding]:
    """The verdicts and actions of one run's events, as they come; `summary` counts."""
    for event in events:
        findings = engine.fold(event)
        if summary is not None:
            summary.count_event(event)
        for finding in findings:
            if summary is not None:
                summary.count_finding(finding)
            yield finding


def _left_out(path: Path) -> Iterator[Tuple[str, int]]:
    """Detectors that the export's run had to go on without, and the last ordinal of each."""
    if not (path / "events.parquet").is_file():
        return
    for event in read_recorded_controls(path / "events.parquet"):
        found = left_out_by(event)
        if found is not None:
            yield found


def _open(
    path: Path, tell: Tell, columns: Mapping[str, str], runs: Collection[str]
) -> Iterator[Event]:
    if path.is_dir():
        return _open_folder(path, tell, columns, runs)
    if not path.exists():
        raise ReplayError(f"{path}: no such file")
    if not path.is_file():
        raise ReplayError(f"{path}: not a file; {_KINDS} can be replayed")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if path.suffix == ".journal" or head[:8] == b"ARGUSJNL":
        return _journal(path, read_run(path))
    if not head.strip():
        raise ReplayError(f"{path}: the file is empty")
    if head[:4] == b"PAR1":
        return _open_parquet(path, tell, columns)
    found = format_of(path)
    if found is None and is_binary(head):
        raise ReplayError(f"{path}: a binary file; {_KINDS} can be replayed")
    if found in (None, "plain"):
        if not runs:
            return _open_table(path, tell, columns)
        found = "plain"
    return _imported(path, tell, found or "plain", columns, runs)


def _open_folder(
    path: Path, tell: Tell, columns: Mapping[str, str], runs: Collection[str]
) -> Iterator[Event]:
    if is_run_dir(path):
        return _journal(path, _read_folder(path, tell))
    if (path / "steps.parquet").is_file():
        return read_export(path)
    for folder in (path, path / "runs"):
        ours = [each for each in folder.iterdir() if is_run_dir(each)] if folder.is_dir() else []
        if ours:
            raise ReplayError(f"{path}: holds {len(ours)} runs; name one, such as {max(ours)}")
    found = format_of(path)
    if found is not None:
        return _imported(path, tell, found, columns, runs)
    raise ReplayError(
        f"{path}: a folder without a journal, steps.parquet or the files of a logger that is known"
    )


def _read_folder(path: Path, tell: Tell) -> Iterator[Event]:
    log = RunLog(path)
    try:
        while True:
            events = log.poll()
            if not events:
                break
            yield from events
    finally:
        log.close()
    if log.skipped:
        tell(f"{path}: {log.skipped:,} records could not be read")


def _journal(path: Path, events: Iterator[Event]) -> Iterator[Event]:
    found = False
    try:
        for event in events:
            found = True
            yield event
    except ValueError as error:
        raise ReplayError(f"{path}: {error}") from error
    if not found:
        raise ReplayError(f"{path}: the journal holds no event")


def _open_parquet(path: Path, tell: Tell, columns: Mapping[str, str]) -> Iterator[Event]:
    from plarv_schemas.arrow import table_of

    parquet, error_type = require_pyarrow("pyarrow.parquet"), require_pyarrow().ArrowException
    try:
        table = table_of(parquet.read_schema(path))
    except (error_type, OSError, ValueError) as error:
        raise ReplayError(f"{path}: unreadable Parquet: {first_line(error)}") from error
    if table == "steps":
        return read_recorded_steps(path)
    if table is not None:
        raise ReplayError(f"{path}: holds {table}, not steps; name its folder to replay the run")
    return _open_table(path, tell, columns)


def _open_table(path: Path, tell: Tell, columns: Mapping[str, str]) -> Iterator[Event]:
    source = open_table(path, tell)
    return read_curve(source, tell, table_columns(source, columns, tell))
