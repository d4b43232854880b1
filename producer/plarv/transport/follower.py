"""The decision that follows from a run's verdicts and actions, for whoever does not fold it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from plarv.decision import Decision
from plarv_schemas.events import Action, Verdict
from plarv_schemas.records import ACTIONS_FILE, VERDICTS_FILE

__all__ = ["FileFollower", "Follower", "Record"]

Record = Union[Verdict, Action]


class Follower:
    """Keeps what is open, from one record to the next."""

    def __init__(self) -> None:
        self._open: Dict[Tuple[str, Optional[int]], Verdict] = {}
        self._attempt = 0
        self._step = -1
        self._pressure = 0.0

    def take(self, records: Sequence[Record]) -> Decision:
        """The decision that these records, verdicts first, make together with the earlier ones."""
        newest: Optional[Action] = None
        for record in records:
            if isinstance(record, Verdict):
                self._take_verdict(record)
            else:
                self._step = max(self._step, record.step)
                self._pressure = record.harm_pressure
                newest = record
        kind = "WARN" if self._open else "CONTINUE"
        if newest is not None and self._open:
            kind = newest.kind
        return Decision(
            self._step,
            kind,
            self._pressure if self._open else 0.0,
            tuple(self._open.values()),
            attempt=self._attempt,
        )

    def _take_verdict(self, verdict: Verdict) -> None:
        if verdict.attempt > self._attempt:
            self._attempt = verdict.attempt
            self._open.clear()
        self._step = verdict.step
        key = (verdict.detector, verdict.rank)
        if verdict.state == "resolved":
            self._open.pop(key, None)
        else:
            self._open[key] = verdict


class FileFollower:
    """Reads what the leading process writes about the run from now on: the rest is of the past."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets = {name: _size(folder / name) for name in (VERDICTS_FILE, ACTIONS_FILE)}
        self._follower = Follower()

    def look(self) -> Tuple[List[Record], Optional[Decision]]:
        """The actions that are new, and the decision they make together with the verdicts."""
        verdicts: List[Record] = [Verdict.from_dict(d) for d in self._new_lines(VERDICTS_FILE)]
        actions: List[Record] = [Action.from_dict(d) for d in self._new_lines(ACTIONS_FILE)]
        if not verdicts and not actions:
            return [], None
        return actions, self._follower.take([*verdicts, *actions])

    def _new_lines(self, name: str) -> List[Dict[str, Any]]:
        path = self._folder / name
        try:
            with open(path, "rb") as file:
                if file.seek(0, os.SEEK_END) <= self._offsets[name]:
                    return []
                file.seek(self._offsets[name])
                data = file.read()
        except OSError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offsets[name] += whole
        found: List[Dict[str, Any]] = []
        for line in data[:whole].splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # torn by a kill, and written again behind it
        return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
