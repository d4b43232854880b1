"""A training curve in rows, as a CSV has it, read as step events."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Set,
    SupportsFloat,
    Tuple,
    cast,
)

from plarv_schemas.events import LIST_COLUMNS, SCALAR_COLUMNS, StepEvent

__all__ = [
    "CurveSource",
    "ReplayError",
    "Tell",
    "first_line",
    "listed",
    "read_curve",
    "understood",
]

Tell = Callable[[str], None]
"""Takes one line for the person who reads along."""


class ReplayError(Exception):
    """A recording that cannot be replayed; its text is one line for a person.

    >>> str(ReplayError("run.csv: no such file"))
    'run.csv: no such file'
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says.

    >>> first_line(ValueError("no footer", "at 0"))
    "('no footer', 'at 0')"
    """
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class CurveSource(Protocol):
    """A file of rows that can be read more than once."""

    @property
    def name(self) -> str:
        """The file's path."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """All column names, as they stand in the file."""
        ...

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[object]]:
        """The cells of these columns, row by row; None or an empty string: no value."""
        ...


_ALIASES = {"lr": "current_lr", "learning_rate": "current_lr", "step_ms": "step_time_ms"}
_PLACES = ("run_id", "rank", "step", "attempt")
_TIMINGS = frozenset({"forward_ms", "backward_ms", "step_time_ms"})
_INTEGERS = frozenset({"time_ns", "world_size", "batch_size"})
_INTEGER_LISTS = frozenset({"sample_ids", "sample_correct", "local_levels"})
_KNOWN = frozenset((*_PLACES, *SCALAR_COLUMNS, *LIST_COLUMNS))
_MISSING = frozenset({"", "na", "n/a", "none", "null"})
_FLOAT32 = struct.Struct("<f")
_INT64 = 1 << 63


def understood(columns: Sequence[str]) -> Tuple[Dict[str, str], List[str]]:
    """Our name -> the file's name of every column that we know, and the file's other columns.

    >>> understood(["Step", "lr", "loss", "reward"])
    ({'step': 'Step', 'loss': 'loss', 'current_lr': 'lr'}, ['reward'])
    """
    found: Dict[str, str] = {}
    for aliases in ({}, _ALIASES):  # a column's own name goes before its aliases
        for column in columns:
            name = column.strip().lower()
            name = aliases.get(name, "") if aliases else name
            if name in _KNOWN and name not in found:
                found[name] = column
    used = set(found.values())
    return found, [column for column in columns if column not in used]


def read_curve(
    source: CurveSource, tell: Tell, found: Optional[Mapping[str, str]] = None, run_id: str = ""
) -> Iterator[StepEvent]:
    """The rows as step events, in their order; `tell` hears of what was left out.

    ``found``: our name -> the file's name of every column to read; without it the columns are
    `understood`. ``run_id``: of rows that name none; without it the file's name.

    A row's number is its event's record. Without a step column the rows of each run, attempt and
    rank count from 0. Each rank is a session, and each value of ``attempt`` another one, as after a
    restart. Without a world size it is the number of ranks in the file.

    Raises:
        ReplayError: neither loss nor val_loss is there, or no row.
    """
    others: Sequence[str] = ()
    if found is None:
        found, others = understood(source.columns)
    if "loss" not in found and "val_loss" not in found:
        columns = listed(source.columns)
        raise ReplayError(f"{source.name}: no loss and no val_loss column; its columns: {columns}")
    if others:
        tell(f"{source.name}: ignored columns: {listed(others)}")
    reader = _RowReader(source, found, run_id)
    if "rank" in found:
        reader.count_ranks()
    yield from reader.events()
    for line in reader.complaints():
        tell(f"{source.name}: {line}")
    if reader.num_rows == 0:
        raise ReplayError(f"{source.name}: there are columns but no rows")


class _Place(NamedTuple):
    run_id: str
    attempt: Optional[int]
    rank: int


class _RowReader:
    """Turns rows into events and keeps count of what could not be read."""

    def __init__(self, source: CurveSource, found: Mapping[str, str], run_id: str) -> None:
        self.num_rows = 0
        self._source = source
        self._found = found
        self._default_run = run_id or _stem(source.name)
        self._ranks: Dict[Tuple[str, Optional[int]], Set[int]] = {}
        self._attempts: Dict[str, Dict[Optional[int], int]] = {}  # run -> attempt -> from 1
        self._next_step: Dict[_Place, int] = {}
        self._bad_cells = 0
        self._first_bad = ""
        self._without_step = 0

    def count_ranks(self) -> None:
        """Reads the places of all rows, for the number of ranks of each attempt."""
        names = [name for name in _PLACES if name in self._found]
        for cells in self._source.rows([self._found[name] for name in names]):
            place = self._place(dict(zip(names, cells)))
            self._ranks.setdefault((place.run_id, place.attempt), set()).add(place.rank)
        self._bad_cells, self._first_bad = 0, ""

    def events(self) -> Iterator[StepEvent]:
        names = list(self._found)
        values = [name for name in names if name not in _PLACES]
        for cells in self._source.rows([self._found[name] for name in names]):
            row = dict(zip(names, cells))
            record = self.num_rows
            self.num_rows += 1
            place = self._place(row)
            step = self._step(place, row)
            if step is None:
                self._without_step += 1
                continue
            columns: Dict[str, Any] = {name: self._value(name, row[name]) for name in values}
            if columns.get("world_size") is None:
                columns["world_size"] = len(self._ranks.get(place[:2], (0,)))
            session = self._session(place)
            yield StepEvent(place.run_id, session, record, place.rank, step, **columns)

    def complaints(self) -> Iterator[str]:
        if self._without_step:
            yield f"{_count(self._without_step, 'row')} without a step left out"
        if self._bad_cells:
            yield (
                f"{_count(self._bad_cells, 'cell')} could not be read and count as missing, "
                f"the first: {self._first_bad}"
            )

    def _place(self, row: Mapping[str, object]) -> _Place:
        run_id = row.get("run_id")
        name = "" if run_id is None else str(run_id).strip()
        attempt, rank = self._integer("attempt", row), self._integer("rank", row)
        return _Place(name or self._default_run, attempt, 0 if rank is None or rank < 0 else rank)

    def _step(self, place: _Place, row: Mapping[str, object]) -> Optional[int]:
        if "step" in row:
            return self._integer("step", row)
        step = self._next_step.get(place, 0)
        self._next_step[place] = step + 1
        return step

    def _session(self, place: _Place) -> str:
        """Such as "file", "file-2" for the second attempt, "file-2.7" for rank 7 in it."""
        attempts = self._attempts.setdefault(place.run_id, {})
        number = attempts.setdefault(place.attempt, len(attempts) + 1)
        name = "file" if number == 1 else f"file-{number}"
        return f"{name}.{place.rank}" if place.rank else name

    def _integer(self, name: str, row: Mapping[str, object]) -> Optional[int]:
        value: Optional[int] = self._read(name, row.get(name), _integer)
        return value

    def _value(self, name: str, cell: object) -> Any:
        if name in _INTEGERS:
            return self._read(name, cell, _integer)
        if name in LIST_COLUMNS:
            return self._read(name, cell, lambda found: _list(name, found))
        return self._read(name, cell, _timing if name in _TIMINGS else _number)

    def _read(self, name: str, cell: object, read: Callable[[object], Any]) -> Any:
        try:
            return read(cell)
        except (ValueError, TypeError, OverflowError):
            self._bad_cells += 1
            if not self._first_bad:
                self._first_bad = f"{str(cell)[:40]!r} in column {name}, row {self.num_rows}"
            return None


def _number(cell: object) -> Optional[float]:
    """A cell's number, NaN and Inf included; None where it is empty. ValueError: not a number."""
    if cell is None:
        return None
    if isinstance(cell, str):
        try:
            return float(cell)
        except ValueError:
            if cell.strip().lower() in _MISSING:
                return None
            raise
    if isinstance(cell, bool) or not isinstance(cell, SupportsFloat):
        raise ValueError("not a number")
    return float(cell)


def _integer(cell: object) -> Optional[int]:
    """A cell's whole number of 64 bits. ValueError: another number."""
    if type(cell) is int:
        value = cell
    else:
        number = _number(cell)
        if number is None:
            return None
        value = int(number)  # of NaN a ValueError, of Inf an OverflowError
        if value != number:
            raise ValueError("not a whole number")
        if isinstance(cell, str) and abs(value) >= 1 << 53:
            value = int(cell)
    if not -_INT64 <= value < _INT64:
        raise OverflowError("not a number of 64 bits")
    return value


def _timing(cell: object) -> Optional[float]:
    """A time as it travels: float32."""
    number = _number(cell)
    if number is None:
        return None
    try:
        return float(_FLOAT32.unpack(_FLOAT32.pack(number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


def _list(name: str, cell: object) -> Optional[Tuple[Any, ...]]:
    """A list, or JSON text of one."""
    if isinstance(cell, str):
        if cell.strip().lower() in _MISSING:
            return None
        cell = json.loads(cell)
    if cell is None:
        return None
    if not isinstance(cell, (list, tuple)):
        raise ValueError("not a list")
    items = cast(Sequence[object], cell)
    if name == "local_layers":
        return tuple(str(item) for item in items)
    return tuple(_item(name, item) for item in items)


def _item(name: str, item: object) -> Any:
    if name not in _INTEGER_LISTS:
        number = _number(item)  # null: what JSON writers make of NaN
        return math.nan if number is None else number
    if name == "sample_ids" and isinstance(item, str):
        digest = hashlib.blake2b(item.encode("utf-8", "replace"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
    value = _integer(int(item) if isinstance(item, bool) else item)
    if value is None:
        raise ValueError("not a number")
    return value


def _stem(name: str) -> str:
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    return base.rsplit(".", 1)[0] or base


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(name.strip()[:40] or "(no name)" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
