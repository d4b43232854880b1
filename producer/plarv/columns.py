"""Brings per-sample lists and step numbers to their wire types, before anything folds them."""

from __future__ import annotations

import hashlib
import operator
import sys
from typing import Any, Dict, List, Mapping, Optional, Tuple

__all__ = ["INTEGER_COLUMNS", "LISTS", "MAX_STEP", "TIMINGS", "ColumnReader", "step_number"]

LISTS: Tuple[str, ...] = (
    "sample_ids", "sample_losses", "sample_confidences", "sample_margins", "sample_entropies",
    "sample_correct",
)  # fmt: skip
"""The per-sample columns that ``step()`` takes; all others are scalars."""

TIMINGS = frozenset({"forward_ms", "backward_ms"})
INTEGER_COLUMNS = frozenset({"batch_size"})

_MAX_SAMPLES = 65_536  # of one list; more are cut and counted
_INT64 = 1 << 63

MAX_STEP = (1 << 62) - 1
"""The largest step number that is taken: the wire has room for some more."""


class ColumnReader:
    """Turns the per-sample arguments of ``step()`` into columns.

    String sample ids become keyed 64-bit hashes: only who has ``key`` can tell which string it was.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def read(self, given: Mapping[str, Any], problems: List[str]) -> Dict[str, Any]:
        """The columns in ``given``; a line in ``problems`` for each that cannot be one."""
        columns: Dict[str, Any] = {}
        for name, values in given.items():
            try:
                columns[name] = self._list(name, values, problems)
            except _OnDeviceError:
                problems.append(f"{name} lay on a device: move it to the host, Argus would wait")
            except Exception:  # noqa: BLE001 - anybody's object
                problems.append(f"{name} was no list of numbers")
        return columns

    def _list(self, name: str, values: Any, problems: List[str]) -> Tuple[Any, ...]:
        if hasattr(values, "reshape"):  # a tensor or an array, of any shape
            values = _on_host(values.reshape(-1)[: _MAX_SAMPLES + 1]).tolist()
        if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
            raise TypeError(name)
        items: List[Any] = []
        for item in values:
            if len(items) >= _MAX_SAMPLES:
                problems.append(f"{name} was longer than {_MAX_SAMPLES} and was cut")
                break
            items.append(item)
        if name == "sample_ids":
            return tuple([self._identity(item) for item in items])
        if name == "sample_correct":
            return tuple([1 if _to_float(item) > 0.0 else 0 for item in items])
        return tuple([_to_float(item) for item in items])

    def _identity(self, item: Any) -> int:
        if isinstance(item, str):
            item = item.encode("utf-8", "surrogatepass")
        if isinstance(item, bytes):
            digest = hashlib.blake2b(item, digest_size=8, key=self._key).digest()
            return int.from_bytes(digest, "little", signed=True)
        return (int(item) + _INT64) % (2 * _INT64) - _INT64  # wraps, as a 64-bit integer does


def step_number(value: Any) -> Optional[int]:
    """A step as the caller gave it, or None where it is no whole number from 0 on."""
    try:
        number = operator.index(value) if hasattr(value, "__index__") else _to_float(value)
        whole = int(number)
    except Exception:  # noqa: BLE001 - anybody's object
        return None
    return whole if whole == number and 0 <= whole <= MAX_STEP else None


def _to_float(value: Any) -> float:
    """A number, a numpy scalar, or a tensor with one element. TypeError on anything else: a string
    is no number here, though ``float("1")`` would take it.
    """
    if isinstance(value, (str, bytes, bytearray, list, tuple, dict)) or value is None:
        raise TypeError("not a number")
    item = getattr(value, "item", None)
    return float(value if item is None else item())


class _OnDeviceError(Exception):
    """Reading it would wait for the device, which a step never does."""


def _on_host(values: Any) -> Any:
    """A tensor without its graph, on the CPU, in a dtype that can be listed."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values, torch.Tensor):
        values = values.detach()
        if values.device.type != "cpu":
            raise _OnDeviceError
        return values.float() if values.dtype == torch.bfloat16 else values
    return values
