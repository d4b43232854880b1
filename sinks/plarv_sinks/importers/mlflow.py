"""Reads MLflow's file store: ``mlruns/EXPERIMENT/RUN``. Nothing but files; no package is needed."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Tuple

from plarv_sinks.curve import Tell
from plarv_sinks.importers.metric_names import is_known
from plarv_sinks.importers.recorded import Point, PointCurve, RecordedRun

__all__ = ["recognises", "runs"]

_META = "meta.yaml"
_STATUS = {"3": "completed", "4": "failed", "5": "stopped"}  # 1, 2: running, scheduled


def recognises(path: Path, head: bytes) -> bool:
    """A run's folder, an experiment's, the store's, or the folder that holds ``mlruns``."""
    return path.is_dir() and bool(_folders(path))


def runs(path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
    """The runs in the order in which they started; deleted ones are left out."""
    found = [
        (meta.get("start_time", ""), folder.name, folder, meta)
        for folder, meta in ((folder, _meta(folder)) for folder in _folders(path))
        if meta.get("lifecycle_stage") != "deleted"
    ]
    for _, _, folder, meta in sorted(found, key=lambda each: each[:2]):
        yield _run(folder, meta, given)


def _run(folder: Path, meta: Mapping[str, str], given: Mapping[str, str]) -> RecordedRun:
    params = folder / "params"
    files = sorted(each for each in params.rglob("*") if each.is_file())
    config = {each.relative_to(params).as_posix(): _text(each) for each in files}
    run_id = meta.get("run_id") or folder.resolve().name
    return RecordedRun(
        folder,
        meta.get("run_name") or run_id,
        lambda tell: _curve(folder, given, tell),
        project=_meta(folder.resolve().parent).get("name", ""),
        run_id=run_id,
        config=config,
        status=_STATUS.get(meta.get("status", ""), ""),
        started_ns=_from_ms(meta.get("start_time")),
        finished_ns=_from_ms(meta.get("end_time")),
    )


def _folders(path: Path) -> List[Path]:
    for pattern in (".", "*", "*/*", "mlruns/*/*"):
        found = [each for each in path.glob(pattern) if _is_run(each)] if pattern != "." else []
        if pattern == "." and _is_run(path):
            found = [path]
        if found:
            return found
    return []


def _is_run(folder: Path) -> bool:
    return (folder / _META).is_file() and (folder / "metrics").is_dir()


def _curve(folder: Path, given: Mapping[str, str], tell: Tell) -> PointCurve:
    """The metrics, joined by their times; each keeps the order of its file."""
    metrics = folder / "metrics"
    series: Dict[str, List[Point]] = {}
    names: List[str] = []
    for file in sorted(each for each in metrics.rglob("*") if each.is_file()):
        name = file.relative_to(metrics).as_posix()
        names.append(name)
        if is_known(name, given):
            series[name] = _points(file, name, tell)
    return PointCurve(str(folder), names, list(heapq.merge(*series.values(), key=_place)))


def _place(point: Point) -> Tuple[int, int]:
    return (point.time_ns or 0, point.step)


def _points(file: Path, name: str, tell: Tell) -> List[Point]:
    points: List[Point] = []
    num_bad = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            point = _point(line, name)
            if point is not None:
                points.append(point)
            elif line.strip():
                num_bad += 1
    if num_bad:
        lines_are = "line that is" if num_bad == 1 else "lines that are"
        tell(f"{file}: left out {num_bad:,} {lines_are} no 'time value step'")
    if len(points) > 1 and not any(point.step for point in points):
        # log_metric() without a step writes 0 each time: then the order counts
        return [point._replace(step=number) for number, point in enumerate(points)]
    return points


def _point(line: str, name: str) -> Optional[Point]:
    """A line of "time in ms, value, step"; older stores wrote no step."""
    parts = line.split()
    if len(parts) not in (2, 3) or not line.endswith("\n"):  # a last line without an end is cut
        return None
    try:
        step = int(parts[2]) if len(parts) == 3 else 0
        return Point(step, int(parts[0]) * 1_000_000, name, float(parts[1]))
    except ValueError:
        return None


def _meta(folder: Path) -> Dict[str, str]:
    """The scalars of a ``meta.yaml``: one a line, quoted or not."""
    found: Dict[str, str] = {}
    if (folder / _META).is_file():
        for line in _text(folder / _META).splitlines():
            name, colon, value = line.partition(":")
            value = value.strip()
            if colon and value not in ("", "null", "''") and not line[:1].isspace():
                quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
                found[name.strip()] = value[1:-1] if quoted else value
    return found


def _from_ms(text: Optional[str]) -> Optional[int]:
    return int(text) * 1_000_000 if text is not None and text.isdigit() else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
