"""What is known about recorded runs, and how well a detector's alarms agree with it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, cast

from plarv_sinks.curve import ReplayError, first_line

__all__ = ["Agreement", "Label", "agreement", "read_labels"]

_HEALTHY = frozenset({"healthy", "ok", "good", "normal", "clean", "0", "false"})
_STEPS = ("failure_step", "onset_step", "step")


class Label(NamedTuple):
    """What is known about one run."""

    text: str
    step: Optional[int] = None  # at which it went wrong
    detectors: frozenset[str] = frozenset()  # that ought to find it; none: any of them

    @property
    def is_healthy(self) -> bool:
        """Whether nothing ought to be found."""
        return self.text.lower() in _HEALTHY

    def wants(self, detector: str) -> bool:
        """Whether this detector ought to find something."""
        return not self.is_healthy and (not self.detectors or detector in self.detectors)


class Agreement(NamedTuple):
    """A detector's alarms against the labels, counted in runs."""

    found: int  # went wrong, and the detector says so
    false: int  # healthy, and the detector says otherwise
    missed: int

    @property
    def precision(self) -> Optional[float]:
        """The share of its alarms that are right; None: it gave none."""
        alarms = self.found + self.false
        return self.found / alarms if alarms else None

    @property
    def recall(self) -> Optional[float]:
        """The share of what it ought to find that it finds; None: there is nothing."""
        wanted = self.found + self.missed
        return self.found / wanted if wanted else None


def agreement(
    detector: str, labels: Mapping[str, Label], alarmed: Iterable[str], runs: Iterable[str]
) -> Agreement:
    """How the detector's alarms agree with the labels, over those of ``runs`` that have one.

    ``alarmed`` are the runs in which it gave an alarm. A run that went wrong in a way that this
    detector is not asked to find counts neither for nor against it.

    >>> labels = {"a": Label("nan"), "b": Label("healthy"), "c": Label("nan")}
    >>> agreement("non_finite", labels, ["a", "b"], labels)
    Agreement(found=1, false=1, missed=1)
    """
    found = false = missed = 0
    alarms = set(alarmed)
    for run_id in runs:
        label = labels.get(run_id)
        if label is None:
            continue
        if label.wants(detector):
            found += run_id in alarms
            missed += run_id not in alarms
        elif label.is_healthy:
            false += run_id in alarms
    return Agreement(found, false, missed)


def read_labels(path: Path) -> Dict[str, Label]:
    """The labels in a file, by run id: CSV with a header, JSON lines, or one JSON array.

    Columns ``run_id`` and ``label``; of one's choice ``step`` (or ``failure_step``,
    ``onset_step``) and ``detectors``, names separated by spaces or commas. Healthy is what is
    labelled healthy, ok, good, normal, clean, 0 or false; everything else went wrong.

    ReplayError: it cannot be read, or has no such columns.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _rows(text)
    except (OSError, ValueError) as error:
        raise ReplayError(f"{path}: {first_line(error)}") from error
    labels: Dict[str, Label] = {}
    for row in rows:
        run_id, label = row.get("run_id"), row.get("label")
        if run_id in (None, "") or label in (None, ""):
            raise ReplayError(f"{path}: labels have columns run_id and label, not {sorted(row)}")
        labels[str(run_id)] = Label(str(label), _step(row), _names(row.get("detectors")))
    if not labels:
        raise ReplayError(f"{path}: no label in it")
    return labels


def _rows(text: str) -> List[Mapping[str, Any]]:
    if text.lstrip().startswith("["):
        rows: Any = json.loads(text)
    elif text.lstrip().startswith("{"):
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        return list(csv.DictReader(io.StringIO(text)))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a list of objects is wanted")
    found: List[Mapping[str, Any]] = rows
    return found


def _step(row: Mapping[str, Any]) -> Optional[int]:
    for name in _STEPS:
        value = row.get(name)
        try:
            if value not in (None, ""):
                return int(float(str(value)))
        except (ValueError, OverflowError):
            continue
    return None


def _names(value: Any) -> frozenset[str]:
    if isinstance(value, str):
        return frozenset(value.replace(",", " ").split())
    names = cast(List[object], value) if isinstance(value, list) else []
    return frozenset(str(name) for name in names)
