"""Writes runs that others recorded into a store, judged by the detectors of today."""

from __future__ import annotations

from typing import Dict, Iterator, List

from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Event
from plarv_sinks.importers import ImportedRun
from plarv_sinks.replay import Finding
from plarv_sinks.run_writer import WrittenRun, write_run
from plarv_sinks.store import Store
from plarv_sinks.store_runs import RunProgress

__all__ = ["import_run"]


def import_run(run: ImportedRun, store: Store, *, judge: bool = True) -> Iterator[WrittenRun]:
    """What is new in a log: a table may hold several runs, and each is written on its own.

    The same log again adds nothing, and one that has grown adds what is new. ``judge``: what the
    detectors find is kept beside the events, as if it had been found live. The whole log is in
    memory for that time.

    ReplayError: nothing in it can be read. OSError: the store cannot be written.
    """
    by_run: Dict[str, List[Event]] = {}
    for event in run.events():
        by_run.setdefault(event.run_id, []).append(event)
    for run_id, events in by_run.items():
        row = store.run_rows(run_id).get(run_id)
        progress = RunProgress(run_id) if row is None else RunProgress.of(row)
        findings: List[Finding] = []
        if judge:
            engine = Engine(EngineConfig())
            before = store.events(run_id) if row is not None else iter(())
            for event in (*before, *events):
                findings += engine.fold(event)
        yield write_run(store, progress, iter(events), findings.copy)
