"""What the benchmarks share: the floor, percentiles, the table, the JSON, the progress bar."""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import platform
import struct
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence

__all__ = [
    "ROOT",
    "Floor",
    "Progress",
    "Row",
    "arguments",
    "at_least",
    "at_most",
    "finish",
    "information",
    "median",
    "middle_mean",
    "percentile",
    "standard_error",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
_FLOOR_BYTES = 1 << 20
_PAGE = 4096
_WIDTHS = (53, 58, 17)  # of the table's columns but the last


class Row(NamedTuple):
    """One line of the table; ``values`` are its numbers for the JSON."""

    what: str
    measured: str
    reach: str = ""
    ok: Optional[bool] = None
    values: Mapping[str, Any] = {}


class Floor:
    """The least that a step can cost which leaves its numbers where another thread finds them.

    One clock read, one ``struct.pack_into`` into a mapped file (of as many bytes as a step takes in
    the journal) and one ``deque.append``. The loop that measures it writes these three out in
    place: a call would be dearer than they are.
    """

    record_bytes = 56  # head, clock, step, loss, grad_norm, learning rate, record number

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            file.truncate(_FLOOR_BYTES)
            self.buffer = mmap.mmap(file.fileno(), _FLOOR_BYTES)  # holds the file open by itself
        for at in range(0, _FLOOR_BYTES, _PAGE):
            self.buffer[at] = 0
        self.pack = struct.Struct("<qqqdddq").pack_into
        self.queue: Deque[int] = deque(maxlen=4096)
        self.clock = time.monotonic_ns

    def next(self, at: int) -> int:
        """The place behind the record at ``at``."""
        at += self.record_bytes
        return at if at + self.record_bytes <= _FLOOR_BYTES else 0


class Progress:
    """A bar on stderr where that is a terminal, else nothing."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(1, total), 0
        self._shown = sys.stderr.isatty()
        self._draw()

    def add(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._done += count
        self._draw()

    def close(self) -> None:
        """Wipes the bar."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _draw(self) -> None:
        if self._shown:
            part = min(1.0, self._done / self._total)
            bar = "#" * int(part * 30)
            sys.stderr.write(f"\r\x1b[K{self._what:<52} [{bar:<30}] {part:4.0%}")
            sys.stderr.flush()


def percentile(values: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(fraction * len(ordered)) - 1))]


def median(values: Sequence[float]) -> float:
    """The median, between the two middle ones where their number is even; NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def middle_mean(values: Sequence[float]) -> float:
    """The mean of the middle half: steadier than the median, deaf to what disturbed a few."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    return math.fsum(middle) / len(middle) if middle else math.nan


def standard_error(values: Sequence[float]) -> float:
    """About that of :func:`middle_mean`, from the quartiles, for values near a normal law."""
    spread = (percentile(values, 0.75) - percentile(values, 0.25)) / 1.349
    return 1.1 * spread / math.sqrt(max(1, len(values)))


def at_most(what: str, measured: str, value: float, limit: float, unit: str, **values: Any) -> Row:
    """A row that is met where ``value`` is at most ``limit``."""
    found = {"value": value, "reach": limit, "unit": unit, **values}
    return Row(what, measured, f"<= {limit:,g} {unit}".strip(), value <= limit, found)


def at_least(what: str, measured: str, value: float, limit: float, unit: str, **values: Any) -> Row:
    """A row that is met where ``value`` is at least ``limit``."""
    found = {"value": value, "reach": limit, "unit": unit, **values}
    return Row(what, measured, f">= {limit:,g} {unit}".strip(), value >= limit, found)


def information(what: str, measured: str, **values: Any) -> Row:
    """A row without a reach."""
    return Row(what, measured, "", None, values)


def arguments(doc: Optional[str], name: str) -> argparse.ArgumentParser:
    """A parser with what both benchmarks take."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS / f"{name}.json",
        metavar="FILE",
        help=f"where the numbers go (default: benchmarks/results/{name}.json)",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: a rough look")
    return parser


def finish(name: str, rows: Iterable[Row], path: Path, *, quick: bool, load_before: float) -> None:
    """Prints each row as it comes, and writes them all as JSON."""
    machine = _machine(load_before)
    print(
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"load {load_before:.2f}" + (", --quick: a rough look" if quick else "")
    )
    _print_cells("what", "measured", "reach", "ok?")
    _print_cells(*("-" * width for width in (*_WIDTHS, 6)))
    kept: List[Row] = []
    for row in rows:
        words = {None: "", True: "ok", False: "MISSED"}
        _print_cells(row.what, row.measured, row.reach, words[row.ok])
        kept.append(row)
    document: Dict[str, Any] = {
        "benchmark": name,
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
        "machine": machine,
        "rows": [
            {"what": row.what, "measured": row.measured, "ok": row.ok, **row.values} for row in kept
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {os.path.relpath(path)}")


def _print_cells(*cells: str) -> None:
    padded = [cell.ljust(width) for cell, width in zip(cells, (*_WIDTHS, 0))]
    print("  ".join(padded).rstrip(), flush=True)


def _machine(load_before: float) -> Dict[str, Any]:
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the shorter name does
    return {
        "processor": processor,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_before": load_before,
    }
