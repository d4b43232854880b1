"""The three kinds of file that hold a curve: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, TextIO, cast

from plarv_schemas.pyarrow_types import require_pyarrow
from plarv_sinks.curve import ReplayError, first_line

__all__ = ["CsvCurve", "JsonLinesCurve", "ParquetCurve", "header_of"]

_LONGEST_CELL = 1 << 26  # characters; a list of a million samples as JSON in a cell
_BATCH_ROWS = 4096


def header_of(head: bytes) -> List[str]:
    """The column names of a CSV that begins so; none where it cannot be one."""
    lines = head.decode("utf-8-sig", "replace").splitlines()
    header = next((line for line in lines if line.strip()), "")
    try:
        for cells in csv.reader([header], delimiter=max(",;\t", key=header.count)):
            return cells
    except csv.Error:
        return []
    return []


class CsvCurve:
    """A CSV with a header; cells are divided by comma, semicolon or tab, as the header's are."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        with self._open() as file:
            header = next((line for line in file if line.strip()), "")
        self._delimiter = max(",;\t", key=header.count)
        self.columns: List[str] = []
        for cells in csv.reader([header], delimiter=self._delimiter):
            self.columns = cells

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[object]]:
        """Cells as text; a row that is too short lacks its last ones."""
        places = [self.columns.index(column) for column in columns]
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            with self._open() as file:
                lines = (line for line in file if line.strip())
                reader = csv.reader(lines, delimiter=self._delimiter)
                next(reader, None)
                for cells in reader:
                    yield [cells[place] if place < len(cells) else None for place in places]
        except csv.Error as error:
            raise ReplayError(f"{self.name}: not a CSV: {error}") from error
        finally:
            csv.field_size_limit(before)

    def _open(self) -> TextIO:
        return self._path.open(encoding="utf-8-sig", errors="replace", newline="")


class JsonLinesCurve:
    """One JSON object a line. A line that is none is left out; the last may be cut."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        found: Dict[str, None] = {}
        self.num_bad_lines = 0
        for row in self._objects():
            if row is None:
                self.num_bad_lines += 1
            else:
                found.update(dict.fromkeys(row))
        self.columns: List[str] = list(found)
        if not found:
            raise ReplayError(f"{self.name}: no line of it is a JSON object with columns")

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[object]]:
        """Cells as JSON has them; a column that is not in the object is None."""
        for row in self._objects():
            if row is not None:
                yield [row.get(column) for column in columns]

    def _objects(self) -> Iterator[Optional[Mapping[str, object]]]:
        with self._path.open(encoding="utf-8-sig", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    row: object = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield cast(Mapping[str, object], row) if isinstance(row, dict) else None


class ParquetCurve:
    """A Parquet file with one column a value; needs pyarrow."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        parquet = require_pyarrow("pyarrow.parquet")
        self._arrow_error = require_pyarrow().ArrowException
        try:
            self._file = parquet.ParquetFile(path)
        except (self._arrow_error, OSError) as error:
            raise ReplayError(f"{self.name}: unreadable Parquet: {first_line(error)}") from error
        self.columns: List[str] = list(self._file.schema_arrow.names)

    def rows(self, columns: Sequence[str]) -> Iterator[Sequence[object]]:
        """Cells as Python values; null is None, NaN is NaN."""
        try:
            for batch in self._file.iter_batches(_BATCH_ROWS, columns=list(columns)):
                cells = [batch.column(column).to_pylist() for column in columns]
                yield from zip(*cells)
        except (self._arrow_error, OSError) as error:
            raise ReplayError(f"{self.name}: broken Parquet file: {first_line(error)}") from error
