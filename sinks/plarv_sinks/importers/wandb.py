"""Reads what W&B has of runs: CSV exports, and the ``.wandb`` files of runs that were offline."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

from plarv_sinks.curve import ReplayError, Tell
from plarv_sinks.curve_files import CsvCurve, header_of
from plarv_sinks.importers.metric_names import is_known
from plarv_sinks.importers.recorded import RecordedRun, RowCurve, missing_package
from plarv_sinks.importers.wandb_log import MAGIC, read_records

__all__ = ["recognises", "runs"]

_AXES = ("Step", "_step", "global_step", "train/global_step", "trainer/global_step")
_STEPS = ("train/global_step", "trainer/global_step")  # optimizer steps, where W&B counts its logs
_BOUNDS = ("__MIN", "__MAX")  # of the points that the chart joined
_BETWEEN = " - "


def recognises(path: Path, head: bytes) -> bool:
    """An offline log, a folder with some, a chart's CSV or a run's history as CSV."""
    if path.is_dir():
        return bool(_logs(path))
    if head.startswith(MAGIC):
        return True
    columns = header_of(head)
    return _is_chart(columns) or _is_history(columns)


def runs(path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
    """The runs in the order of the folders' times, or of a chart's columns.

    Several offline logs of one run, as after a resumption, are recordings of the same run id.
    """
    if path.is_dir():
        for file in _logs(path):
            yield _offline(file, given, tell)
        return
    with path.open("rb") as opened:
        if opened.read(len(MAGIC)) == MAGIC:
            yield _offline(path, given, tell)
            return
    table = CsvCurve(path)
    if _is_chart(table.columns):
        yield from _charted(path, table)
    else:
        rows = [dict(zip(table.columns, cells)) for cells in table.rows(table.columns)]
        yield RecordedRun(path, path.stem, lambda _: _history(path, rows, given))


def _logs(path: Path) -> List[Path]:
    for pattern in ("*.wandb", "*run-*/*.wandb", "wandb/*run-*/*.wandb"):
        # latest-run is a link to one of the others
        found = [file for file in path.glob(pattern) if not file.parent.is_symlink()]
        if found:
            return sorted(found, key=lambda file: (file.parent.name, file.name))
    return []


def _is_chart(columns: Sequence[str]) -> bool:
    """One axis, and "RUN - METRIC" for every run, with its bounds beside it."""
    return len(columns) > 1 and all(_BETWEEN in column for column in columns[1:])


def _is_history(columns: Sequence[str]) -> bool:
    return "_step" in columns and ("_timestamp" in columns or "_runtime" in columns)


def _charted(path: Path, table: CsvCurve) -> Iterator[RecordedRun]:
    """Each run's columns under their metrics' names; the axis is the step."""
    if table.columns[0] not in _AXES:
        raise ReplayError(
            f"{path}: its axis is {table.columns[0]}, not Step; export the chart with steps as axis"
        )
    found: Dict[str, Dict[str, str]] = {}  # run -> column -> metric
    for column in table.columns[1:]:
        name, _, metric = column.rpartition(_BETWEEN)
        metrics = found.setdefault(name, {})
        if not metric.endswith(_BOUNDS) and metric not in _AXES:
            metrics[column] = metric
    for name, metrics in found.items():
        if metrics:
            yield RecordedRun(path, name, _chart(table, metrics))


def _chart(table: CsvCurve, metrics: Mapping[str, str]) -> Any:
    def curve(tell: Tell) -> RowCurve:
        names = ("step", *metrics.values())
        columns = (table.columns[0], *metrics)
        return RowCurve(table.name, [dict(zip(names, cells)) for cells in table.rows(columns)])

    return curve


def _offline(path: Path, given: Mapping[str, str], tell: Tell) -> RecordedRun:
    """The run of one log, which is read here: its name stands in it."""
    rows: List[Dict[str, object]] = []
    run: Any = None
    config: Dict[str, Any] = {}
    status = ""
    for record in _records(path, tell):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config.update(_config(record.run.config.update))
        elif kind == "config":
            config.update(_config(record.config.update))
        elif kind == "history":
            rows.append(_row(record.history))
        elif kind == "exit":
            status = "failed" if record.exit.exit_code else "completed"
    if run is None:
        raise ReplayError(f"{path}: it does not say which run it is of; it is cut at its beginning")
    started = run.start_time.seconds * 1_000_000_000 + run.start_time.nanos
    return RecordedRun(
        path,
        run.display_name or run.run_id,
        lambda _: _history(path, rows, given),
        project=run.project,
        run_id=run.run_id,
        config={name: value for name, value in config.items() if not name.startswith("_")},
        status=status,
        started_ns=started or None,
    )


def _records(path: Path, tell: Tell) -> Iterator[Any]:
    try:
        record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
        decode_error: Any = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise missing_package(path, "wandb") from error
    num_bad = 0
    for data in read_records(path, tell):
        try:
            yield record_type.FromString(data)
        except decode_error:
            num_bad += 1
    if num_bad:
        tell(f"{path}: {num_bad:,} records could not be read")


def _config(items: Any) -> Dict[str, Any]:
    return {item.key or ".".join(item.nested_key): _value(item.value_json) for item in items}


def _row(history: Any) -> Dict[str, object]:
    """One call of ``run.log``: its numbers, nested ones under names with dots."""
    row: Dict[str, object] = {"_step": history.step.num}
    for item in history.item:
        value = _value(item.value_json)
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            row[item.key or ".".join(item.nested_key)] = value
    return row


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _history(
    path: Path, rows: Sequence[Mapping[str, object]], given: Mapping[str, str]
) -> RowCurve:
    """A history's rows with our names for step and time."""
    axis = "_step" if "step" in given else _axis(rows)
    found: List[Dict[str, object]] = []
    for row in rows:
        mine = {name: cell for name, cell in row.items() if name and name[0] != "_"}
        if "step" not in given:
            mine["step"] = row.get(axis)
        mine["time_ns"] = _nanoseconds(row.get("_timestamp"))
        found.append(mine)
    return RowCurve(str(path), found)


def _axis(rows: Sequence[Mapping[str, object]]) -> str:
    """The trainer's own step where every row that has something for us carries it."""
    for axis in _STEPS:
        told = [row for row in rows if any(is_known(name, {}) for name in row)]
        if told and all(row.get(axis) not in (None, "") for row in told):
            return axis
    return "_step"


def _nanoseconds(cell: object) -> Optional[int]:
    try:
        return int(float(str(cell)) * 1e6) * 1000
    except (ValueError, OverflowError):
        return None
