"""Opens a log of somebody else's: which format it is, which runs it holds, their events."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Protocol, Sequence, Tuple, cast

from plarv_schemas.events import ControlEvent, Event, StepEvent, digest, to_json_value
from plarv_sinks.curve import ReplayError, Tell, first_line, listed, read_curve
from plarv_sinks.importers import (
    huggingface,
    lightning,
    mlflow,
    plain,
    tensorboard,
    wandb,
)
from plarv_sinks.importers.metric_names import COLUMNS, in_seconds, matched
from plarv_sinks.importers.recorded import RecordedRun, clean_id
from plarv_sinks.importers.settle import settle

__all__ = ["FORMATS", "ImportedRun", "format_of", "open_source"]

_HEAD_BYTES = 1 << 16


class _Importer(Protocol):
    """What a format's module offers."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether the folder, or the file that begins with ``head``, is of this format."""
        ...

    def runs(self, path: Path, given: Mapping[str, str], tell: Tell) -> Iterator[RecordedRun]:
        """The runs in it; ``given``: our column -> the log's metric."""
        ...


_IMPORTERS: Dict[str, _Importer] = {
    "huggingface": huggingface,
    "mlflow": mlflow,
    "wandb": wandb,
    "lightning": lightning,
    "tensorboard": tensorboard,
    "plain": plain,
}

FORMATS: Tuple[str, ...] = tuple(_IMPORTERS)
"""In the order in which they are tried."""


class ImportedRun:
    """One run of a source. Its log is read when its events are.

    Ids come from the log alone, so the same log gives the same events. Where the log holds two
    recordings of one run, as after a resumption, they have the same ``run_id`` and other sessions:
    folded in their order they are two attempts of the run.
    """

    def __init__(
        self, found: RecordedRun, kind: str, number: int, given: Mapping[str, str], tell: Tell
    ) -> None:
        self.run_id = found.name if kind == "plain" else clean_id(found.run_id or found.name)
        self.name = found.name
        self.project = found.project
        self.format = kind
        self.path = found.path
        self._found = found
        self._given = given
        self._tell = tell
        self._session = digest("import", kind, self.run_id, number)

    def __repr__(self) -> str:
        return f"<{self.format} run {self.run_id!r} of {str(self.path)!r}>"

    def events(self) -> Iterator[Event]:
        """Its beginning, its steps in the log's order, and its end where the log says so.

        ReplayError: nothing in it can be replayed, and why.
        """
        with _Readable(self.path):
            if self.format == "plain":
                yield from plain.events(self._found, self._given, self._tell)
                return
            found = self._found
            record = 0
            for step in self._steps():
                if record == 0:
                    yield self._control(0, "session_started", found.started_ns, self._started())
                record += 1
                yield step._replace(run_id=self.run_id, session=self._session, record=record)
            if record == 0:
                raise ReplayError(f"{self.path}: there are metrics but no values")
            if found.status:
                data = {"status": found.status, "exception": None}
                yield self._control(record + 1, "session_finished", found.finished_ns, data)

    def _steps(self) -> Iterator[StepEvent]:
        curve = self._found.curve(self._tell)
        metrics = [name for name in curve.columns if name not in ("step", "time_ns")]
        columns, others = matched(curve.columns, self._given)
        _check_given(self.path, self._given, columns, metrics)
        if "loss" not in columns and "val_loss" not in columns:
            raise ReplayError(
                f"{self.path}: no loss among its metrics ({listed(metrics) or 'none'}); "
                "name it with --column loss=METRIC"
            )
        if others:
            what = "metric" if len(others) == 1 else "metrics"
            self._tell(f"{self.path}: left out {len(others)} {what}: {listed(others)}")
        seconds = in_seconds(columns.get("step_time_ms", ""))
        for event in settle(read_curve(curve, self._tell, columns, self.run_id)):
            if seconds and event.step_time_ms is not None:
                event = event._replace(step_time_ms=event.step_time_ms * 1e3)
            yield event

    def _started(self) -> Dict[str, Any]:
        data: Dict[str, Any] = {"imported_from": self.format, "name": self.name, "world_size": 1}
        if self.project:
            data["project"] = self.project
        if self._found.config:
            data["config"] = _json(self._found.config)
        return data

    def _control(
        self, record: int, kind: Any, time_ns: Optional[int], data: Mapping[str, Any]
    ) -> ControlEvent:
        return ControlEvent(self.run_id, self._session, record, 0, kind, time_ns, None, data)


def open_source(
    path: Path,
    format: Optional[str] = None,  # noqa: A002 - the word of the command line
    columns: Optional[Mapping[str, str]] = None,
    tell: Tell = lambda line: None,
) -> Iterator[ImportedRun]:
    """The runs in a file or folder, one after the other; none is read before its turn.

    ``format``: one of `FORMATS`; without it the content decides. ``columns``: our column -> the
    log's metric, such as ``{"loss": "train/total_loss"}``, before what the names suggest. ``tell``
    hears in one line each what was left out and what could not be read.

    Raises:
        ReplayError: it is of no known format, holds no run, or a package is missing that reads it.
    """
    given = dict(columns or {})
    for ours in given:
        if ours not in COLUMNS:
            raise ReplayError(f"--column {ours}: no such column; there are {', '.join(COLUMNS)}")
    with _Readable(path):
        kind = format_of(path) if format is None else format
        if kind not in _IMPORTERS:
            what = "of no known format" if kind is None else f"no such format: {kind}"
            raise ReplayError(f"{path}: {what}; there are {', '.join(FORMATS)}")
        numbers: Dict[str, int] = {}
        for found in _IMPORTERS[kind].runs(path, given, tell):
            run_id = clean_id(found.run_id or found.name)
            numbers[run_id] = numbers.get(run_id, 0) + 1
            yield ImportedRun(found, kind, numbers[run_id], given, tell)
        if not numbers:
            raise ReplayError(f"{path}: holds no run in the format {kind}")


def format_of(path: Path) -> Optional[str]:
    """The format of a file or folder by its content, None where it is not known.

    Reads 64 kB of a file, and the names in a folder. OSError: it cannot be read.
    """
    head = b""
    if not path.is_dir():
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    for name, importer in _IMPORTERS.items():
        if importer.recognises(path, head):
            return name
    return None


class _Readable:
    """Turns what a reader may raise about a file into the one error of a replay."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: Optional[BaseException], trace: object) -> None:
        if isinstance(error, FileNotFoundError):
            raise ReplayError(f"{error.filename or self._path}: no such file") from error
        if isinstance(error, OSError):
            reason = error.strerror or first_line(error)
            raise ReplayError(f"{error.filename or self._path}: {reason}") from error


def _check_given(
    path: Path, given: Mapping[str, str], columns: Mapping[str, str], metrics: Any
) -> None:
    for ours, theirs in given.items():
        if ours not in columns or columns[ours] != theirs:
            raise ReplayError(
                f"{path}: --column {ours}={theirs}: it has no metric of that name; "
                f"there are {listed(metrics, 40) or 'none'}"
            )


def _json(value: Any) -> Any:
    """With whatever JSON lacks as text."""
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value)
        return {str(name): _json(item) for name, item in items.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in cast(Sequence[object], value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return to_json_value(value)
    return str(value)
