"""The long way of a step into the journal: any columns, tensors included."""

from __future__ import annotations

import math
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Deque, Dict, List, Mapping, NamedTuple, Optional, Tuple

from plarv.columns import INTEGER_COLUMNS, LISTS, TIMINGS, ColumnReader
from plarv.device_scalars import Pending, ScalarReader
from plarv.faults import Faults
from plarv.local_report import local_columns, report_dict
from plarv.signals import ModelSignals
from plarv_schemas.journal import (
    CORE,
    CORE_SIZE,
    CORE_STRUCT,
    HAS_GRAD_NORM,
    HAS_LOSS,
    pack_full,
)
from plarv_schemas.journal_writer import JournalWriter

if TYPE_CHECKING:
    from plarv.local.kept_reports import ReportKeeper

__all__ = ["Recorder"]

_CORE_COLUMNS = frozenset({"loss", "grad_norm", "current_lr"})
# steps whose scalars a device still owes; an older one is written without them
_MAX_UNDER_WAY = 512
_FLOAT32 = struct.Struct("<f")
_INT64 = 1 << 63


class _Step(NamedTuple):
    """A step that waits for scalars from a device."""

    pending: Pending
    names: Tuple[str, ...]
    columns: Dict[str, Any]
    clock_ns: int
    step: int


class Recorder:
    """Brings a step's arguments to columns and writes them, in the order of the calls.

    A scalar that lies on a device is copied without waiting; its step, and every later one behind
    it, is written once the copy has come.
    """

    def __init__(
        self, writer: JournalWriter, columns: ColumnReader, signals: ModelSignals, faults: Faults
    ) -> None:
        self._writer = writer
        self._reports: Optional[ReportKeeper] = None
        self._columns = columns
        self._signals = signals
        self._faults = faults
        self._scalars = ScalarReader()
        self._under_way: Deque[_Step] = deque()

    @property
    def waiting(self) -> bool:
        """Whether a device still owes something."""
        return bool(self._under_way)

    def record(
        self, loss: Any, grad_norm: Any, step: int, given: Mapping[str, Any], local_report: Any
    ) -> List[str]:
        """Takes one step in; what was wrong with its arguments, in a few words each."""
        clock_ns = time.monotonic_ns()
        problems: List[str] = []
        lists = {name: given[name] for name in LISTS if given.get(name) is not None}
        columns = self._columns.read(lists, problems) if lists else {}
        if local_report is not None:
            try:
                report = report_dict(local_report)
                columns.update(local_columns(report))
                self._keep(step, report)
            except Exception:  # noqa: BLE001 - anybody's object
                problems.append("local_report was no LocalDetector's report, nor its to_dict()")
        every = {"loss": loss, "grad_norm": grad_norm, **given}
        scalars = {n: value for n, value in every.items() if value is not None and n not in lists}
        self._signals.fill(loss, scalars)
        names = tuple(scalars)
        begun = self._scalars.begin(tuple(scalars.values()))
        if isinstance(begun, Pending):
            self._under_way.append(_Step(begun, names, columns, clock_ns, step))
            self.drain()
            return problems
        problems.extend(f"{name} was no number" for name, v in zip(names, begun) if v is None)
        if self._under_way:
            read = [(name, value) for name, value in zip(names, begun) if value is not None]
            done = Pending([value for _, value in read], [])
            self._under_way.append(
                _Step(done, tuple([name for name, _ in read]), columns, clock_ns, step)
            )
            self.drain()
        else:
            self._write(names, begun, columns, clock_ns, step)
        return problems

    def tend(self) -> None:
        """From the background: brings local reports to the disk."""
        if self._reports is not None:
            self._reports.write()

    def drain(self) -> None:
        """Writes the steps whose scalars have come, in order. Never waits."""
        under_way = self._under_way
        while under_way:
            first = under_way[0]
            if not first.pending.ready():
                if len(under_way) <= _MAX_UNDER_WAY:
                    return
                self._faults.count("the device was too far behind: a step without its scalars")
            self._finish(under_way.popleft())

    def close(self, timeout_s: float) -> None:
        """Settles, and gives back what copies the scalars."""
        self.settle(timeout_s)
        self._scalars.close()
        self.tend()

    def settle(self, timeout_s: float) -> None:
        """Waits for the rest up to ``timeout_s`` and writes it, with what has come by then."""
        until = time.monotonic() + timeout_s
        for step in list(self._under_way):
            if not step.pending.wait(max(0.0, until - time.monotonic())):
                self._faults.count("the device did not answer before the exit")
                break
        while self._under_way:
            self._finish(self._under_way.popleft())

    def _keep(self, step: int, report: Mapping[str, Any]) -> None:
        if self._reports is None:
            from plarv.local.kept_reports import LOCAL_FOLDER, ReportKeeper

            writer = self._writer
            self._reports = ReportKeeper(
                writer.folder / LOCAL_FOLDER, writer.session, writer.rank, self._faults
            )
        self._reports.take(step, report)

    def _finish(self, step: _Step) -> None:
        """Writes a step with what has come of it."""
        values = step.pending.values()
        for name, value in zip(step.names, values):
            if value is None:
                self._faults.count(f"{name} could not be read from its device")
        self._write(step.names, values, step.columns, step.clock_ns, step.step)

    def _write(
        self,
        names: Tuple[str, ...],
        values: Tuple[Optional[float], ...],
        columns: Dict[str, Any],
        clock_ns: int,
        step: int,
    ) -> None:
        writer = self._writer
        core = not columns
        for name, value in zip(names, values):
            if value is not None:
                wired = columns[name] = _wire(name, value)
                # A core record has no bit for the learning rate: NaN says that there is none.
                core = core and name in _CORE_COLUMNS and (name != "current_lr" or value == value)
                if wired is None:
                    self._faults.count(f"{name} was no whole number from 0 on")
        if core:
            packed = _pack_core(writer.record, clock_ns, step, columns)
        else:
            packed, cut = pack_full(writer.record, clock_ns, step, columns)
            if cut:
                self._faults.count("an event was too long: its lists were cut")
        writer.append(packed)
        writer.last_clock_ns, writer.last_step = clock_ns, step


def _pack_core(record: int, clock_ns: int, step: int, columns: Mapping[str, Any]) -> bytes:
    loss, grad_norm = columns.get("loss"), columns.get("grad_norm")
    mask = (HAS_LOSS if loss is not None else 0) | (HAS_GRAD_NORM if grad_norm is not None else 0)
    return CORE_STRUCT.pack(
        CORE_SIZE,
        CORE,
        mask,
        0,
        clock_ns,
        step,
        0.0 if loss is None else loss,
        0.0 if grad_norm is None else grad_norm,
        columns.get("current_lr", math.nan),
        record + 1,
    )


def _wire(name: str, value: float) -> Any:
    """A scalar as the wire carries it."""
    if name in TIMINGS:
        try:
            return _FLOAT32.unpack(_FLOAT32.pack(value))[0]
        except OverflowError:
            return math.copysign(math.inf, value)
    if name in INTEGER_COLUMNS:
        return int(value) if 0.0 <= value < _INT64 else None
    return value
