"""Writes the runs of this machine into a store: what the embedded engine left of each."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

from plarv_processors.attempts import Attempts
from plarv_processors.engine import Engine
from plarv_processors.stored_fold import HeldFold, base_of, fold_held
from plarv_schemas.events import Event, StepEvent, digest
from plarv_schemas.locks import FileLock
from plarv_schemas.pyarrow_types import require_pyarrow
from plarv_schemas.records import FOLD_LOCK, read_findings
from plarv_schemas.run_log import RunLog, is_run_dir
from plarv_sinks.curve import ReplayError, Tell
from plarv_sinks.quality_fold import ADQI
from plarv_sinks.run_quality import RunQuality
from plarv_sinks.run_writer import WrittenRun, write_run
from plarv_sinks.store import Store
from plarv_sinks.store_runs import RunProgress

__all__ = ["QUALITY_FILE", "archive", "read_quality"]

QUALITY_FILE = "adqi.json"  # in the run's folder: the quality of its data, once it has ended
_POLL_EVENTS = 4096
_LOOK_S = 0.1
_OTHERS_S = 30.0  # that another node's process may take to write the same run


def archive(
    run_dir: Path, store: Union[Store, str, Path], *, tell: Tell, wait_s: float = 0.0
) -> WrittenRun:
    """Writes what a store does not have yet of a run's folder: events, verdicts and actions; and
    into the folder, the quality of the run's data (:func:`read_quality`).

    What is still to be folded is folded first; a run whose process is about to end is waited for,
    up to ``wait_s``. Killed at any point and called again, it leaves every row once. Memory is
    bounded by one row group and the run's control events.

    Raises:
        ReplayError: ``run_dir`` holds no journal, one of a newer version, or that of a run that
            another process is folding.
        StoreError: there is no such store, and none can be made.
        OSError: a file cannot be read or written.
        ImportError: pyarrow is missing.
    """
    if not is_run_dir(run_dir):
        raise ReplayError(f"{run_dir}: not a run's folder: no journal in it")
    require_pyarrow("pyarrow.parquet")
    if not isinstance(store, Store):
        store = Store(store, tell, create=True)
    with ExitStack() as held:
        _hold(FileLock(run_dir / FOLD_LOCK), held, wait_s, f"{run_dir}: it is running")
        try:
            fold = fold_held(run_dir)
            log, quality = RunLog(run_dir), RunQuality()
            held.callback(log.close)
            events = _events(log, quality, fold)
            first = next(events, None)
            if first is None:
                raise ReplayError(f"{run_dir}: the journal holds no event")
            if store.files.is_local:  # another node of the run has a folder of its own
                lock = FileLock(store.files.local(f"_run-{digest(first.run_id)}.lock"))
                _hold(lock, held, max(wait_s, _OTHERS_S), f"{run_dir}: another process writes it")
            progress = _progress(run_dir, first.run_id, store, tell)
            found = partial(read_findings, run_dir)
            written = write_run(store, progress, chain((first,), events), found)
        except ValueError as error:
            raise ReplayError(f"{run_dir}: {error}") from error
    if log.skipped:
        tell(f"{run_dir}: {log.skipped:,} records could not be read")
    if fold.judged_anew:
        tell(f"{run_dir}: judged by other detectors than today's: what they wrote down is kept")
    _keep_quality(run_dir, quality.score())
    return written


def _hold(lock: FileLock, held: ExitStack, wait_s: float, why_not: str) -> None:
    until = time.monotonic() + wait_s
    while not lock.acquire():
        if time.monotonic() >= until:
            raise ReplayError(f"{why_not}; it can be written once that has ended")
        time.sleep(_LOOK_S)
    held.callback(lock.release)


def read_quality(run_dir: Path) -> Optional[ADQI]:
    """The quality of a run's data, where its end was kept; None: it was not, or cannot be read."""
    try:
        found: Dict[str, Any] = json.loads((run_dir / QUALITY_FILE).read_text(encoding="utf-8"))
        return ADQI(**found)
    except (OSError, ValueError, TypeError):
        return None


def _events(log: RunLog, quality: RunQuality, fold: HeldFold) -> Iterator[Event]:
    """The journal's events, on their way through the fold that judges the data.

    Those that were folded: of what other ranks wrote since, the order is not decided.
    """
    attempts = Attempts()
    while True:
        batch = log.poll(_POLL_EVENTS)
        if not batch:
            return
        for event in batch:
            if event.record >= fold.records.get(event.session, 0):
                continue
            attempt = attempts.place(event)
            if isinstance(event, StepEvent) and attempt is not None:
                quality.add(event, attempt)
            yield event


def _progress(run_dir: Path, run_id: str, store: Store, tell: Tell) -> RunProgress:
    """Where the store's rows of the run end; where it has none, where the journal begins."""
    row = store.run_rows(run_id).get(run_id)
    progress = RunProgress(run_id) if row is None else RunProgress.of(row)
    engine = Engine()
    base = base_of(run_dir, engine)
    if base is not None and base >= progress.num_events:
        missing = base + 1 - progress.num_events
        tell(f"{run_dir}: {missing:,} events were removed before the store had them")
        progress.attempts, progress.num_events = engine.attempts, base + 1
    elif base == -1 and row is None:
        tell(f"{run_dir}: older events were removed before a store had them")
    return progress


def _keep_quality(run_dir: Path, quality: ADQI) -> None:
    found = {**quality._asdict(), "components": dict(quality.components)}
    temporary = run_dir / f".{QUALITY_FILE}.new"
    temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    os.replace(temporary, run_dir / QUALITY_FILE)
