"""The law: what a run got live is what a replay of its log gives, whole record by whole record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

from plarv_processors.engine import Engine
from plarv_processors.stored_fold import base_of
from plarv_schemas.events import ControlEvent, Event, Verdict
from plarv_schemas.records import ACTIONS_FILE, VERDICTS_FILE, read_lines
from plarv_schemas.run_log import read_run

__all__ = ["controls", "live_records", "replayed_records"]

Records = Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]
"""(verdicts, actions), as JSON."""


def live_records(folder: Path) -> Records:
    """What the run's own engine wrote."""
    return list(read_lines(folder / VERDICTS_FILE)), list(read_lines(folder / ACTIONS_FILE))


def replayed_records(folder: Path) -> Records:
    """What a fresh engine says of the run's log."""
    engine = Engine()
    base_of(folder, engine)
    return fold(engine, list(read_run(folder)))


def fold(engine: Engine, events: List[Event]) -> Records:
    verdicts: List[Dict[str, Any]] = []
    actions: List[Dict[str, Any]] = []
    for event in events:
        for record in engine.fold(event):
            into = verdicts if isinstance(record, Verdict) else actions
            into.append(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
    assert engine.faults == {}
    return verdicts, actions


def controls(folder: Path, kind: str) -> List[ControlEvent]:
    """The run's control events of one kind, in the log's order."""
    events = read_run(folder)
    return [event for event in events if isinstance(event, ControlEvent) and event.kind == kind]
