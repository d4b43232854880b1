"""What we use of pyarrow, typed, and its import at first use: it ships no types of its own."""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from types import ModuleType
from typing import (
    Any,
    Iterator,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    TypeVar,
)

__all__ = [
    "Array",
    "DataType",
    "Field",
    "RecordBatch",
    "Schema",
    "leave_pandas_out",
    "require_pyarrow",
]

_Self = TypeVar("_Self", bound="Schema")


class DataType(Protocol):
    """``pyarrow.DataType``."""


class Field(Protocol):
    """``pyarrow.Field``."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> DataType: ...


class Schema(Protocol):
    """``pyarrow.Schema``."""

    @property
    def names(self) -> List[str]: ...
    @property
    def metadata(self) -> Optional[Mapping[bytes, bytes]]: ...
    def field(self, name: str) -> Field: ...
    def with_metadata(self: _Self, metadata: Mapping[bytes, bytes]) -> _Self: ...
    def __iter__(self) -> Iterator[Field]: ...


class Array(Protocol):
    """``pyarrow.Array``."""

    @property
    def type(self) -> DataType: ...
    @property
    def null_count(self) -> int: ...
    def cast(self, target_type: DataType, *, safe: bool = True) -> Array: ...
    def flatten(self) -> Array: ...
    def to_pylist(self) -> List[Any]: ...
    def __len__(self) -> int: ...


class RecordBatch(Protocol):
    """``pyarrow.RecordBatch``: equal columns, one row an event."""

    @property
    def num_rows(self) -> int: ...
    @property
    def schema(self) -> Schema: ...
    def column(self, name: str) -> Array: ...
    def select(self, columns: Sequence[str]) -> RecordBatch: ...
    def validate(self, *, full: bool = False) -> None: ...
    @property
    def shape(self) -> Tuple[int, int]: ...


@lru_cache(maxsize=None)  # it is asked for a dozen times a message
def require_pyarrow(module: str = "pyarrow") -> ModuleType:
    """pyarrow, or one of its modules. ImportError says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "this needs pyarrow: pip install 'plarv-argus-sdk[forensics]' (Python 3.11 or later)"
        ) from error


def leave_pandas_out() -> None:
    """Keeps pyarrow from importing pandas, which takes a second, at its first list of numbers.

    For processes of our own alone: in this one, pyarrow can no longer make pandas' frames.
    ImportError: pyarrow is missing.
    """
    if "pandas" in sys.modules:
        return
    hidden: Any = _NoPandas()
    sys.meta_path.insert(0, hidden)
    try:
        require_pyarrow().array([0])  # it tries once, and remembers
    finally:
        sys.meta_path.remove(hidden)


class _NoPandas:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Finds nothing, and lets nobody else find pandas."""
        if name == "pandas":
            raise ImportError("pandas is left out here")
