"""The law: what a run got live is what a replay of its log gives, whole record by whole record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional, Tuple

from plarv_processors.detectors.detector import Scope, fingerprint, verdict
from plarv_processors.engine import Engine, EngineConfig
from plarv_processors.stored_fold import base_of
from plarv_schemas.events import ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.records import ACTIONS_FILE, VERDICTS_FILE, read_lines
from plarv_schemas.run_log import read_run

__all__ = ["WITNESSED", "Records", "controls", "live_records", "replayed_records"]

Records = Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]
"""(verdicts, actions), as JSON."""


class Witness:
    """Says of each step of each rank that it came: no change of the log's order goes unseen."""

    name: ClassVar[str] = "witness"
    scope: ClassVar[Scope] = "rank"

    @dataclass(frozen=True)
    class Config:
        """Nothing to set."""

    __slots__ = ("_count", "config", "version")

    def __init__(self) -> None:
        self.config = self.Config()
        self.version = fingerprint(self.name, self.config)
        self._count = 0

    def update(self, event: StepEvent) -> Tuple[Verdict, ...]:
        self._count += 1
        evidence = {"time_ns": float(event.time_ns or 0), "count": float(self._count)}
        found = verdict(
            self, event, kind="seen", level="warn", state="opened", onset_step=event.step,
            score=1.0, threshold=1.0, evidence=evidence, message="seen", rank=event.rank,
        )  # fmt: skip
        return (found,)


WITNESSED = EngineConfig(extra=(Witness,))
"""All detectors, and one that lets no event pass without a word."""


def live_records(folder: Path) -> Records:
    """What the run's own engine wrote."""
    return list(read_lines(folder / VERDICTS_FILE)), list(read_lines(folder / ACTIONS_FILE))


def replayed_records(folder: Path, config: Optional[EngineConfig] = None) -> Records:
    """What a fresh engine says of the run's log."""
    engine = Engine(config)
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
