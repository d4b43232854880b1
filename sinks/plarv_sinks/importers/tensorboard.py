"""Reads TensorBoard's event files, by the loader of the package ``tensorboard``."""

from __future__ import annotations

import heapq
import importlib
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from plarv_sinks.curve import Tell
from plarv_sinks.importers.metric_names import is_known
from plarv_sinks.importers.recorded import Point, PointCurve, RecordedRun, missing_package

__all__ = ["recognises", "runs"]

_FRAMING_BYTES = 16  # of a record: its length, and two checksums
_SCALARS = "scalars"


def recognises(path: Path, head: bytes) -> bool:
    """An event file by its first record, or a folder with one somewhere below."""
    if path.is_dir():
        return next(_event_files(path), None) is not None
    return b"brain.Event:" in head[:64]


def runs(path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
    """A run for each folder with event files, as TensorBoard has it, in the order of their names.

    The files of a folder are read in the order of their times, so a run that was resumed goes back.
    Memory: some 100 bytes a point of a metric that is read.
    """
    if path.is_dir():
        folders: Dict[Path, List[Path]] = {}
        for file in _event_files(path):
            folders.setdefault(file.parent, []).append(file)
    else:
        folders = {path.parent: [path]}
    root = path if path.is_dir() else path.parent
    for folder in sorted(folders):
        yield _run(root, folder, sorted(folders[folder]), given)


def _run(root: Path, folder: Path, files: List[Path], given: Mapping[str, str]) -> RecordedRun:
    name = "/".join((root.resolve().name, *folder.relative_to(root).parts))
    return RecordedRun(files[0], name, lambda tell: _curve(files, given, tell))


def _event_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if "tfevents" in name and not name.endswith(".profile-empty"):
                yield Path(place, name)


def _curve(files: List[Path], given: Mapping[str, str], tell: Tell) -> PointCurve:
    metrics: Dict[str, None] = {}
    read = [_points(file, metrics, given, tell) for file in files]
    # Files of a resumed run follow one another; those of several writers lie side by side.
    points = list(heapq.merge(*read, key=_time))
    return PointCurve(str(files[0]), list(metrics), points)


def _time(point: Point) -> int:
    return point.time_ns or 0


def _points(
    path: Path, metrics: Dict[str, None], given: Mapping[str, str], tell: Tell
) -> Iterator[Point]:
    """The scalars in a file; `metrics` learns the names of all, also of those that are not kept."""
    event_pb2 = _import("tensorboard.compat.proto.event_pb2", path)
    decode_error = _import("google.protobuf.message", path).DecodeError
    plugins: Dict[str, str] = {}
    num_bad = 0
    for record in _records(path, tell):
        try:
            event = event_pb2.Event.FromString(record)
        except decode_error:
            num_bad += 1
            continue
        time_ns = int(event.wall_time * 1e9) if abs(event.wall_time) < 9e9 else None
        for value in event.summary.value:
            number = _scalar(value, plugins, path)
            if number is None:
                continue
            metrics[value.tag] = None
            if is_known(value.tag, given):
                yield Point(event.step, time_ns, value.tag, number)
    if num_bad:
        tell(f"{path}: {num_bad:,} events could not be read")


def _records(path: Path, tell: Tell) -> Iterator[bytes]:
    """The file's records, up to its end or to the first that is cut or broken."""
    size_bytes = path.stat().st_size
    read_bytes, number = 0, 0
    for record in _loader(path):
        yield record
        number += 1
        read_bytes += len(record) + _FRAMING_BYTES
    if read_bytes < size_bytes:
        tell(
            f"{path}: cut or broken after {number:,} events, at byte {read_bytes:,} of "
            f"{size_bytes:,}; read up to there"
        )


def _loader(path: Path) -> Iterator[bytes]:
    module = _import("tensorboard.backend.event_processing.event_file_loader", path)
    records: Iterator[bytes] = module.RawEventFileLoader(str(path)).Load()
    return records


def _import(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_package(path, "tensorboard") from error


def _scalar(value: Any, plugins: Dict[str, str], path: Path) -> Optional[float]:
    """The number of a scalar summary of either style; None: a histogram, an image, a text."""
    if value.HasField("metadata"):  # written with a tag's first value alone
        plugins[value.tag] = value.metadata.plugin_data.plugin_name
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or plugins.get(value.tag) != _SCALARS:
        return None
    make_ndarray = _import("tensorboard.util.tensor_util", path).make_ndarray
    try:
        array: Any = make_ndarray(value.tensor)
        return float(array.item()) if array.size == 1 else None
    except (ValueError, TypeError):
        return None
