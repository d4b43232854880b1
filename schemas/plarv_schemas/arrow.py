"""The Arrow form of what travels and is kept: one record batch is many of one kind.

A batch carries its table's name and the schema version in its metadata. A column without a value is
not sent, and a column of floats travels as float32 where that loses nothing; timings always do. A
file of many batches needs fixed columns instead: those of :func:`file_schema`.

pyarrow is imported at first use.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import repeat
from typing import Any, Callable, Dict, List, Literal, Optional, Sequence, Tuple, cast

from plarv_schemas.arrow_columns import (
    EXTRA_COLUMNS,
    TABLE_COLUMNS,
    TABLES,
    Column,
    TableName,
    ValueKind,
)
from plarv_schemas.events import LIST_COLUMNS, Action, ControlEvent, StepEvent, Verdict
from plarv_schemas.pyarrow_types import Array, DataType, RecordBatch, Schema, require_pyarrow
from plarv_schemas.versions import SCHEMA_VERSION

__all__ = [
    "TABLES",
    "TableName",
    "decode_actions",
    "decode_controls",
    "decode_runs",
    "decode_steps",
    "decode_verdicts",
    "encode_actions",
    "encode_controls",
    "encode_runs",
    "encode_steps",
    "encode_verdicts",
    "extra_column",
    "file_schema",
    "from_ipc",
    "table_of",
    "to_file_columns",
    "to_ipc",
]

_VERSION_KEY = b"argus.schema_version"
_TABLE_KEY = b"argus.table"


def encode_steps(
    events: Sequence[StepEvent],
    *,
    ordinals: Optional[Sequence[int]] = None,
    attempts: Optional[Sequence[int]] = None,
    schema: Optional[Schema] = None,
) -> RecordBatch:
    """One row an event; ``parts`` are not sent.

    Args:
        ordinals: of the events in their run's log, where a fold has found them.
        attempts: likewise.
        schema: exactly its columns and types, as a file of many batches needs; see `file_schema`.

    Raises:
        ValueError: a value that its column cannot hold, as text in ``loss``; the column is named.
    """
    rows = [event[:-1] for event in events]
    return _encode("steps", rows, {"ordinal": ordinals, "attempt": attempts}, schema)


def decode_steps(batch: RecordBatch) -> List[StepEvent]:
    """The inverse of `encode_steps`. ValueError: another table, newer version, broken column."""
    columns = _decode("steps", batch)
    for place in range(len(columns) - len(LIST_COLUMNS), len(columns)):
        if columns[place].count(None) < len(columns[place]):
            columns[place] = [None if cell is None else tuple(cell) for cell in columns[place]]
    # Past the constructor, which costs more than all the rest: the fields are in their order.
    new: Any = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return [new(StepEvent, row) for row in zip(*columns, repeat(()))]


def encode_controls(
    events: Sequence[ControlEvent],
    *,
    ordinals: Optional[Sequence[int]] = None,
    attempts: Optional[Sequence[int]] = None,
    schema: Optional[Schema] = None,
) -> RecordBatch:
    """One row an event; ``data`` as JSON text, where non-finite numbers are NaN and Infinity."""
    rows = [(*event[:-1], _to_json(event.data)) for event in events]
    return _encode("events", rows, {"ordinal": ordinals, "attempt": attempts}, schema)


def decode_controls(batch: RecordBatch) -> List[ControlEvent]:
    """The inverse of `encode_controls`; tuples in ``data`` come back as lists."""
    rows = zip(*_decode("events", batch))
    return [ControlEvent(*row)._replace(data=_from_json(row[-1])) for row in rows]


def encode_verdicts(verdicts: Sequence[Verdict], *, schema: Optional[Schema] = None) -> RecordBatch:
    """One row a verdict, with its id beside its fields."""
    rows = [found._replace(evidence=_to_items(found.evidence)) for found in verdicts]
    return _encode("verdicts", rows, {"id": [found.id for found in verdicts]}, schema)


def decode_verdicts(batch: RecordBatch) -> List[Verdict]:
    """The inverse of `encode_verdicts`."""
    verdicts = [Verdict(*row) for row in zip(*_decode("verdicts", batch))]
    return [found._replace(evidence=dict(cast(Any, found.evidence))) for found in verdicts]


def encode_actions(actions: Sequence[Action], *, schema: Optional[Schema] = None) -> RecordBatch:
    """One row an action, with its id beside its fields; ``parameters`` as JSON text."""
    rows = [
        action._replace(parameters=cast(Any, _to_json(action.parameters))) for action in actions
    ]
    return _encode("actions", rows, {"id": [action.id for action in actions]}, schema)


def decode_actions(batch: RecordBatch) -> List[Action]:
    """The inverse of `encode_actions`."""
    actions = [Action(*row) for row in zip(*_decode("actions", batch))]
    try:
        return [
            action._replace(
                sessions=tuple(
                    (each["session"], each["first_record"]) for each in cast(Any, action.sessions)
                ),
                parameters=_from_json(cast(str, action.parameters)),
                verdict_ids=tuple(action.verdict_ids),
            )
            for action in actions
        ]
    except KeyError as error:
        raise ValueError(f"column sessions has no {error}") from error


def extra_column(batch: RecordBatch, name: Literal["ordinal", "attempt"]) -> Optional[List[int]]:
    """The events' ordinals or attempts, where the batch carries them."""
    names = batch.schema.names
    if name not in names:
        return None
    return cast(List[int], _checked(Column(name, "int", required=True), batch, names))


def encode_runs(rows: Sequence[Tuple[Any, ...]]) -> RecordBatch:
    """One row a run: the table's columns, in their order."""
    return _encode("runs", rows, {}, file_schema("runs"))


def decode_runs(batch: RecordBatch) -> List[Tuple[Any, ...]]:
    """The inverse of `encode_runs`."""
    return list(zip(*_decode("runs", batch)))


def to_file_columns(table: TableName, batch: RecordBatch) -> List[Array]:
    """The table's columns in its files' types, without those of the fold. ValueError, as above."""
    if table_of(batch.schema) not in (None, table):
        raise ValueError(f"this batch holds {table_of(batch.schema)}, not {table}")
    names = batch.schema.names
    columns: List[Array] = []
    for column in TABLE_COLUMNS[table]:
        kind = _type_of(column.kind)
        found = _found(column, batch, names)
        if found is None:
            found = _nulls(column.kind, batch.num_rows)
        columns.append(found if found.type == kind else found.cast(kind))
    return columns


@lru_cache(maxsize=None)
def file_schema(table: TableName) -> Schema:
    """Every column of the table, floats as float64, those of the fold (or the id) included."""
    pa = require_pyarrow()
    fields = [
        pa.field(column.name, _type_of(column.kind), nullable=not column.required)
        for column in TABLE_COLUMNS[table] + EXTRA_COLUMNS[table]
    ]
    return cast(Schema, pa.schema(fields, _metadata(table)))


def table_of(schema: Schema) -> Optional[TableName]:
    """Which of our tables a batch or file of this schema holds; None: not one of ours.

    ValueError: a version newer than this reader.
    """
    metadata = schema.metadata or {}
    name = metadata.get(_TABLE_KEY, b"").decode("utf-8", "replace")
    version = metadata.get(_VERSION_KEY, b"1").decode("ascii", "replace")
    if not version.isdigit():
        raise ValueError(f"schema version {version!r} is not a number")
    if int(version) > SCHEMA_VERSION:
        raise ValueError(
            f"schema version {version} is newer than this Argus, which reads up to "
            f"{SCHEMA_VERSION}: upgrade plarv-argus-sdk"
        )
    return next((table for table in TABLES if table == name), None)


def to_ipc(batch: RecordBatch) -> bytes:
    """The batch as one Arrow IPC stream with its schema. Not compressed: Kafka does that better."""
    pa = require_pyarrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return cast(bytes, sink.getvalue().to_pybytes())


def from_ipc(data: bytes) -> RecordBatch:
    """The inverse of `to_ipc`. ValueError: not one whole batch of a version that we read."""
    pa = require_pyarrow()
    try:
        with pa.ipc.open_stream(data) as reader:
            batches = list(reader)
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not an Arrow record batch: {error}") from error
    if len(batches) != 1:
        raise ValueError(f"a message holds one record batch; this one holds {len(batches)}")
    batch = cast(RecordBatch, batches[0])
    table_of(batch.schema)
    return batch


def _encode(
    table: TableName,
    rows: Sequence[Tuple[Any, ...]],
    extras: Dict[str, Optional[Sequence[Any]]],
    schema: Optional[Schema],
) -> RecordBatch:
    pa = require_pyarrow()
    columns = TABLE_COLUMNS[table]
    values: List[Optional[Sequence[Any]]] = list(zip(*rows)) if rows else [()] * len(columns)
    values += [extras.get(column.name) for column in EXTRA_COLUMNS[table]]
    fields: List[Any] = []
    arrays: List[Array] = []
    for column, cells in zip(columns + EXTRA_COLUMNS[table], values):
        if schema is None and (cells is None or not (column.required or _has_value(cells))):
            continue
        cells = [None] * len(rows) if cells is None else cells
        array = _array(column, cells)
        if schema is None:
            array = _narrowed(column.kind, array)
        fields.append(pa.field(column.name, array.type, nullable=not column.required))
        arrays.append(array)
    metadata = _metadata(table)
    made = schema if schema is not None else pa.schema(fields, metadata)
    return cast(RecordBatch, pa.RecordBatch.from_arrays(arrays, schema=made))


def _has_value(cells: Sequence[Any]) -> bool:
    return any(cell is not None for cell in cells)


def _array(column: Column, cells: Sequence[Any]) -> Array:
    pa = require_pyarrow()
    try:
        if column.kind == "timing":  # rounded to float32, which a safe conversion would refuse
            return cast(Array, pa.array(cells, pa.float64()).cast(pa.float32(), safe=False))
        return cast(Array, pa.array(cells, _type_of(column.kind)))
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise ValueError(f"column {column.name}: {error}") from error


def _narrowed(kind: ValueKind, array: Array) -> Array:
    """The array in a type of half the size or less, where that loses nothing."""
    pa, compute = require_pyarrow(), require_pyarrow("pyarrow.compute")
    if kind in ("float", "floats"):
        narrow = pa.float32()
    elif kind == "ints":
        narrow = pa.int8()
    else:
        return array
    wide = array.flatten() if kind in ("floats", "ints") else array
    back = wide.cast(narrow, safe=False).cast(wide.type)
    same = compute.equal(wide, back)
    if kind != "ints":
        same = compute.or_(same, compute.is_nan(wide))
    if compute.all(same).as_py() is False:
        return array
    return array.cast(narrow if wide is array else pa.list_(narrow), safe=False)


@lru_cache(maxsize=256)  # half of a batch's columns are not sent, and batches are alike
def _nulls(kind: ValueKind, number: int) -> Array:
    return cast(Array, require_pyarrow().nulls(number, _type_of(kind)))


@lru_cache(maxsize=None)
def _type_of(kind: ValueKind) -> DataType:
    pa = require_pyarrow()
    session = [pa.field("session", pa.string(), False), pa.field("first_record", pa.int64(), False)]
    makers: Dict[ValueKind, Callable[[], DataType]] = {
        "text": pa.string,
        "json": pa.string,
        "int": pa.int64,
        "float": pa.float64,
        "timing": pa.float32,
        "texts": lambda: cast(DataType, pa.list_(pa.string())),
        "ints": lambda: cast(DataType, pa.list_(pa.int64())),
        "floats": lambda: cast(DataType, pa.list_(pa.float64())),
        "bytes": pa.binary,
        "map": lambda: cast(DataType, pa.map_(pa.string(), pa.float64())),
        "sessions": lambda: cast(DataType, pa.list_(pa.struct(session))),
    }
    return makers[kind]()


def _decode(table: TableName, batch: RecordBatch) -> List[List[Any]]:
    """The table's columns, in order; a column that was not sent is all None."""
    found = table_of(batch.schema)
    if found not in (None, table):
        raise ValueError(f"this batch holds {found}, not {table}")
    names = batch.schema.names
    absent = [None] * batch.num_rows
    return [
        _checked(column, batch, names) if column.required or column.name in names else absent
        for column in TABLE_COLUMNS[table]
    ]


def _checked(column: Column, batch: RecordBatch, names: Sequence[str]) -> List[Any]:
    array = _found(column, batch, names)
    return [None] * batch.num_rows if array is None else array.to_pylist()


def _found(column: Column, batch: RecordBatch, names: Sequence[str]) -> Optional[Array]:
    """The batch's column, where it was sent. ValueError: it is not what it must be."""
    times = names.count(column.name)
    if times > 1:
        raise ValueError(f"column {column.name} is there {times} times")
    if times == 0:
        if column.required:
            raise ValueError(f"column {column.name} is missing")
        return None
    array = batch.column(column.name)
    if not _fits(column.kind, cast(Any, array.type)):
        raise ValueError(f"column {column.name} holds {array.type}, which is not {column.kind}")
    if column.required and array.null_count:
        raise ValueError(f"column {column.name} has {array.null_count} missing values")
    return array


@lru_cache(maxsize=256)
def _fits(kind: ValueKind, found: Any) -> bool:
    """Whether such values may come as the type found: in any width, as other writers choose."""
    types = require_pyarrow("pyarrow.types")
    if kind in ("texts", "ints", "floats", "sessions"):
        is_list = types.is_list(found) or types.is_large_list(found)
        return bool(is_list and _fits_value(kind.rstrip("s"), found.value_type))
    return _fits_value(kind, found)


def _fits_value(kind: str, found: Any) -> bool:
    types = require_pyarrow("pyarrow.types")
    if types.is_null(found):
        return True
    if kind in ("text", "json"):
        if types.is_dictionary(found):
            found = found.value_type
        checks = [types.is_string, types.is_large_string]
        checks.append(getattr(types, "is_string_view", types.is_string))  # since pyarrow 16
    elif kind == "int":
        checks = [types.is_integer]
    elif kind in ("float", "timing"):
        checks = [types.is_floating]
    elif kind == "bytes":
        checks = [types.is_binary, types.is_large_binary]
    else:
        checks = [types.is_map if kind == "map" else types.is_struct]
    return any(check(found) for check in checks)


def _metadata(table: TableName) -> Dict[bytes, bytes]:
    return {_VERSION_KEY: str(SCHEMA_VERSION).encode(), _TABLE_KEY: table.encode()}


def _to_items(values: Any) -> Any:
    return list(values.items())


def _to_json(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def _from_json(text: str) -> Dict[str, Any]:
    try:
        values: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    if "\\ud" in text.lower():  # half a surrogate pair could not be written into any text again
        values = json.loads(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is wanted, not {text[:40]!r}")
    return cast(Dict[str, Any], values)
