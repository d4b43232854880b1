"""Reads a table of a curve: CSV, JSON lines or Parquet, with a mapping of columns."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional

from plarv_schemas.events import StepEvent
from plarv_sinks.curve import CurveSource, ReplayError, Tell, listed, read_curve, understood
from plarv_sinks.curve_files import CsvCurve, JsonLinesCurve, ParquetCurve
from plarv_sinks.importers.recorded import RecordedRun

__all__ = ["events", "is_binary", "open_table", "recognises", "runs", "table_columns"]

_HEAD_BYTES = 8192
_KINDS = "CSV, JSON lines and Parquet"


def recognises(path: Path, head: bytes) -> bool:
    """Any file that is no binary one, or Parquet."""
    return not path.is_dir() and (head[:4] == b"PAR1" or not is_binary(head[:_HEAD_BYTES]))


def runs(path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
    """The runs that a column ``run_id`` names, or the one that the file is.

    Each of several is read by a pass over the file of its own.
    """
    source = open_table(path, tell)
    columns = table_columns(source, given, tell) or understood(source.columns)[0]
    found: Dict[str, None] = {}
    if "run_id" in columns:
        for (cell,) in source.rows([columns["run_id"]]):
            found["" if cell is None else str(cell).strip()] = None
    for name in found or ("",):
        yield RecordedRun(path, name or path.stem, lambda _: source)


def events(found: RecordedRun, given: Mapping[str, str], tell: Tell) -> Iterator[StepEvent]:
    """The steps of one run of the table, under the names that the table has."""
    source = found.curve(tell)
    columns = table_columns(source, given, tell)
    for event in read_curve(source, tell, columns, found.name if columns else ""):
        if event.run_id == found.name:
            yield event


def table_columns(
    source: CurveSource, given: Mapping[str, str], tell: Tell
) -> Optional[Dict[str, str]]:
    """Our name -> the table's, where a mapping is given; None: the names speak for themselves.

    ReplayError: the mapping names a column that is not there.
    """
    if not given:
        return None
    for ours, theirs in given.items():
        if theirs not in source.columns:
            raise ReplayError(
                f"{source.name}: --column {ours}={theirs}: no such column; "
                f"its columns: {listed(source.columns)}"
            )
    rest = [column for column in source.columns if column not in given.values()]
    found, _ = understood(rest)
    found.update(given)
    others: List[str] = [column for column in rest if column not in found.values()]
    if others:
        tell(f"{source.name}: ignored columns: {listed(others)}")
    return found


def open_table(path: Path, tell: Tell) -> CurveSource:
    """The file as rows. ReplayError: it is empty, binary, or one JSON array."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.strip():
        raise ReplayError(f"{path}: the file is empty")
    if head[:4] == b"PAR1":
        return ParquetCurve(path)
    if is_binary(head):
        raise ReplayError(f"{path}: a binary file; {_KINDS} can be read as tables")
    text = head.decode("utf-8-sig", "replace").lstrip()
    if text.startswith("["):
        raise ReplayError(f"{path}: one JSON array; write one object a line (JSON lines) instead")
    if not text.startswith("{"):
        return CsvCurve(path)
    source = JsonLinesCurve(path)
    if source.num_bad_lines:
        tell(f"{path}: lines that are no JSON object and were left out: {source.num_bad_lines}")
    return source


def is_binary(head: bytes) -> bool:
    """A NUL, or more bytes that are not UTF-8 than a name or two in another encoding would make."""
    if b"\0" in head:
        return True
    text = head.decode("utf-8", "replace")
    return text.count("\ufffd") > max(4, len(text) // 20)
