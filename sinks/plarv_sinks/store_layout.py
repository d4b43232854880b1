"""How a table's file is laid out: columns, their encodings, and the length of row groups."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping

from plarv_schemas.arrow_columns import EXTRA_COLUMNS, TABLE_COLUMNS, TableName
from plarv_schemas.pyarrow_types import RecordBatch, Schema, require_pyarrow

__all__ = ["filled", "group_rows", "options"]

_GROUP_ROWS = 32_768
_GROUP_BYTES = 32 * 1024 * 1024


def filled(rows: Any, schema: Schema) -> Any:
    """The batch or table with just these columns, in these types; one that it lacks is null."""
    if rows.schema is schema:
        return rows
    pa, there = require_pyarrow(), set(rows.schema.names)
    columns: List[Any] = []
    for field in schema:
        if field.name not in there:
            columns.append(pa.nulls(rows.num_rows, field.type))
        else:
            column = rows.column(field.name)
            columns.append(column if column.type == field.type else column.cast(field.type))
    if isinstance(rows, pa.Table):
        return pa.Table.from_arrays(columns, schema=schema)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def group_rows(batch: RecordBatch) -> int:
    """Rows of a group: many, so that they compress, and few where samples make them long."""
    size: int = getattr(batch, "nbytes")  # noqa: B009 - no part of the protocol
    per_row = max(1, size // max(1, batch.num_rows))
    return max(256, min(_GROUP_ROWS, _GROUP_BYTES // per_row))


def options(schema: Schema) -> Mapping[str, Any]:
    """How each column is laid out: floats byte by byte, integers as differences, text by number."""
    names = set(schema.names)
    encodings: Dict[str, str] = {}
    texts: List[str] = []
    for column in {column for table in TABLE_COLUMNS for column in _columns(table)}:
        if column.name not in names:
            continue
        if column.kind in ("text", "json"):
            texts.append(column.name)
        elif column.kind in ("float", "timing"):
            encodings[column.name] = "BYTE_STREAM_SPLIT"
        elif column.kind == "int":
            encodings[column.name] = "DELTA_BINARY_PACKED"
        elif column.kind == "floats":
            encodings[f"{column.name}.list.element"] = "BYTE_STREAM_SPLIT"
        elif column.kind == "ints":
            encodings[f"{column.name}.list.element"] = "DELTA_BINARY_PACKED"
    return {
        "compression": "zstd",
        "use_dictionary": texts,
        "column_encoding": encodings,
        "version": "2.6",
    }


def _columns(table: TableName) -> Iterable[Any]:
    return TABLE_COLUMNS[table] + EXTRA_COLUMNS[table]
