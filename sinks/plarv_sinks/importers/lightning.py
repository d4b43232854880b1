"""Reads the ``metrics.csv`` of Lightning's ``CSVLogger``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple

from plarv_sinks.curve import Tell
from plarv_sinks.curve_files import CsvCurve, header_of
from plarv_sinks.importers.recorded import RecordedRun

__all__ = ["recognises", "runs"]

_FILE = "metrics.csv"
_VERSION = re.compile(r"version_\d+\Z")
_OURS = re.compile(r"(train|training|val|valid|validation|test)[_/].+|.+_(step|epoch)|lr-.+")


def recognises(path: Path, head: bytes) -> bool:
    """A table with epoch and step whose metrics are named as Lightning's are, or a folder of it."""
    if path.is_dir():
        return any(_is_log(file) for file in _files(path))
    columns = header_of(head)
    if not {"epoch", "step"} <= set(columns) or "loss" in columns:
        return False
    return any(_OURS.match(column) for column in columns)


def runs(path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
    """The run of each ``metrics.csv``, by the order of its folders' names."""
    for file in _files(path) if path.is_dir() else [path]:
        if file is path or _is_log(file):
            yield _run(file)


def _run(file: Path) -> RecordedRun:
    return RecordedRun(file, _name(file), lambda _: CsvCurve(file), config=_config(file.parent))


def _files(folder: Path) -> List[Path]:
    """At most three folders below: ``lightning_logs/version_0/metrics.csv`` of a project."""
    found = (folder.glob("/".join(["*"] * depth + [_FILE])) for depth in range(4))
    return sorted((file for files in found for file in files), key=_in_order)


def _in_order(file: Path) -> List[Tuple[int, str]]:
    """version_10 after version_9."""
    parts = re.split(r"(\d+)", str(file))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def _is_log(file: Path) -> bool:
    with file.open("rb") as head:
        return recognises(file, head.read(8192)) or (file.parent / "hparams.yaml").is_file()


def _name(file: Path) -> str:
    if file.name != _FILE:
        return file.stem
    folder = file.resolve().parent
    if _VERSION.match(folder.name) and folder.parent.name:
        return f"{folder.parent.name}/{folder.name}"
    return folder.name or file.stem


def _config(folder: Path) -> Dict[str, str]:
    """The scalars of ``hparams.yaml``, as text; what is nested is left out."""
    file = folder / "hparams.yaml"
    if not file.is_file():
        return {}
    found: Dict[str, str] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, value = line.partition(": ")
        if colon and not line[:1].isspace() and value.strip():
            found[name] = value.strip()
    return found
