"""What every importer hands over: one run as a log of somebody else's has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

from plarv_sinks.curve import CurveSource, ReplayError, Tell

__all__ = ["Point", "PointCurve", "RecordedRun", "RowCurve", "clean_id", "missing_package"]


@dataclass(frozen=True)
class RecordedRun:
    """One run, its curve not yet read."""

    path: Path
    name: str  # as the log names it; ids are made of it
    curve: Callable[[Tell], CurveSource]  # reads the log
    project: str = ""
    run_id: str = ""  # where the log has one beside the name
    config: Optional[Mapping[str, Any]] = None
    status: str = ""  # empty: the log does not say that the run ended
    started_ns: Optional[int] = None  # UTC
    finished_ns: Optional[int] = None  # UTC


class RowCurve:
    """Rows in memory, each with the columns that it has."""

    def __init__(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        self.name = name
        self._rows = rows
        found: Dict[str, None] = {}
        for row in rows:
            found.update(dict.fromkeys(row))
        self.columns: List[str] = list(found)

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[object]]:
        """The cells of these columns; None where a row lacks one."""
        for row in self._rows:
            yield [row.get(column) for column in columns]


class Point(NamedTuple):
    """One value of one metric."""

    step: int
    time_ns: Optional[int]  # UTC
    metric: str
    value: float


class PointCurve:
    """Metrics that were written one value at a time, in the order of the log.

    ``metrics`` names all that the log has; points of those that nobody reads need not be kept.
    """

    def __init__(self, name: str, metrics: Sequence[str], points: Sequence[Point]) -> None:
        self.name = name
        self.columns: List[str] = ["step", "time_ns", *metrics]
        self._points = points

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[object]]:
        """One row a point."""
        places = {column: place for place, column in enumerate(columns)}
        step, time_ns = places.get("step"), places.get("time_ns")
        for point in self._points:
            cells: List[object] = [None] * len(columns)
            place = places.get(point.metric)
            if place is not None:
                cells[place] = point.value
            if step is not None:
                cells[step] = point.step
            if time_ns is not None:
                cells[time_ns] = point.time_ns
            yield cells


def clean_id(name: str) -> str:
    """A run id as Argus's own are: letters, digits, ``.``, ``_`` and ``-``, at most 128.

    >>> clean_id("lightning_logs/version 0")
    'lightning_logs-version-0'
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._")[:128] or "run"


def missing_package(path: Path, package: str) -> ReplayError:
    """The error where a format's own package is needed to read it."""
    return ReplayError(
        f"{path}: reading it needs the package {package}: pip install 'plarv-argus-sdk[importers]'"
    )
