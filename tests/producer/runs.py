"""Runs as the SDK's tests make them and read them back."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

from plarv.client import Argus
from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.records import ACTIONS_FILE, VERDICTS_FILE, read_lines
from plarv_schemas.run_log import read_run

__all__ = [
    "DEADLINE_S",
    "caught_up",
    "controls_of",
    "events_of",
    "folder_of",
    "healthy",
    "recorded",
    "replayed",
    "steps_of",
    "until",
]

DEADLINE_S = 60.0  # for what takes milliseconds: a machine may be busy, and a hang must still end


def until(condition: Callable[[], Any]) -> None:
    """Waits until ``condition()`` holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come to pass"
        time.sleep(0.002)


def caught_up(argus: Argus, step: int) -> None:
    """Waits until the engine has folded ``step``."""
    until(lambda: argus.decision.step == step)


def healthy(argus: Argus, count: int, start: int = 0) -> int:
    """``count`` steps of a run that nothing is wrong with; the last one's number."""
    chance = random.Random(start)
    for step in range(start, start + count):
        argus.step(2.5 + 0.05 * chance.random(), 1.0 + 0.1 * chance.random(), step=step)
    return start + count - 1


def folder_of(argus: Argus) -> Path:
    folder = argus.run_dir
    assert folder is not None
    return folder


def events_of(run: Any) -> List[Event]:
    """The events in the journal of an Argus or of a run's folder."""
    return list(read_run(folder_of(run) if isinstance(run, Argus) else run))


def steps_of(run: Any) -> List[StepEvent]:
    return [event for event in events_of(run) if isinstance(event, StepEvent)]


def controls_of(run: Any, kind: Optional[str] = None) -> List[ControlEvent]:
    events = [event for event in events_of(run) if isinstance(event, ControlEvent)]
    return [event for event in events if kind is None or event.kind == kind]


def recorded(folder: Path) -> Dict[str, Mapping[str, Any]]:
    """The verdicts and actions that the engine wrote while the run went on, by id."""
    records = [*read_lines(folder / VERDICTS_FILE), *read_lines(folder / ACTIONS_FILE)]
    found: Dict[str, Mapping[str, Any]] = {str(record["id"]): record for record in records}
    assert len(found) == len(records), "a record was written twice"
    return found


def replayed(folder: Path) -> Dict[str, Mapping[str, Any]]:
    """The verdicts and actions that a fresh engine finds in the run's events, by id."""
    engine = Engine(EngineConfig())
    found: Dict[str, Mapping[str, Any]] = {}
    for event in read_run(folder):
        for record in engine.fold(event):
            assert isinstance(record, (Verdict, Action))
            found[record.id] = record.to_dict()
    return found
