"""State to bytes and back, for whatever a fold is made of.

An object's state is its ``__slots__`` (or instance attributes) but ``config``, ``version`` and the
class's own ``_derived`` names. :func:`restore` works in place: the object is first made by its
constructor with the same configuration, so the parts it owns are there and are filled in turn.

The bytes are a small tagged form of our own: doubles keep their bits, ``array`` contents cost their
own size, and it reads the same on every Python version (``marshal`` and ``pickle`` promise less).
"""

from __future__ import annotations

import struct
from array import array
from functools import lru_cache
from typing import Any, Dict, List, Sequence, Tuple, Type

__all__ = ["dump", "pack", "restore", "unpack"]

_STATIC = frozenset({"config", "version"})
_PLAIN = (type(None), bool, int, float, str, bytes)
_HELD: Tuple[type, ...] = (*_PLAIN, array, tuple, list, dict)


def _state_names(obj: object) -> Sequence[str]:
    cls: Any = type(obj)
    names = _slot_names(cls)
    if not hasattr(obj, "__dict__"):
        return names
    derived = _STATIC.union(getattr(cls, "_derived", ()))
    own = [name for name in obj.__dict__ if name not in derived and not name.startswith("__")]
    return sorted({*names, *own})


@lru_cache(maxsize=None)
def _slot_names(cls: type) -> Tuple[str, ...]:
    """The state in a class's slots, sorted: asked for with every object, and always the same."""
    derived = _STATIC.union(getattr(cls, "_derived", ()))
    names: List[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.extend([slots] if isinstance(slots, str) else slots)
    kept = {name for name in names if name not in derived and not name.startswith("__")}
    return tuple(sorted(kept))


def dump(obj: Any) -> Any:
    """The state of ``obj`` as plain data: None, numbers, strings, bytes, tuples, lists, dicts,
    arrays.
    """
    if isinstance(obj, _PLAIN):
        return obj
    kind: Type[object] = obj.__class__
    if issubclass(kind, array):
        return obj[:]
    if issubclass(kind, tuple):
        return tuple([dump(item) for item in obj])
    if issubclass(kind, list):
        return [dump(item) for item in obj]
    if issubclass(kind, dict):
        return {key: dump(value) for key, value in obj.items()}
    return tuple([dump(getattr(obj, name)) for name in _state_names(obj)])


def restore(obj: object, state: Any) -> None:
    """Puts ``state``, which :func:`dump` made of an object built alike, into ``obj``.

    A value whose place in ``obj`` holds an object of its own is put into that object. Raises
    ValueError when the state is of another shape.
    """
    names = _state_names(obj)
    values: Tuple[Any, ...] = state
    if state.__class__ is not tuple or len(values) != len(names):
        raise ValueError(f"the state is not one of {type(obj).__name__}")
    for name, value in zip(names, values):
        current: object = getattr(obj, name)
        if isinstance(current, _HELD):
            setattr(obj, name, dump(value))
        else:
            restore(current, value)


def pack(value: Any) -> bytes:
    """Plain data as bytes.

    >>> unpack(pack({"a": (1, 2.5, None), "b": array("d", [0.5])}))
    {'a': (1, 2.5, None), 'b': array('d', [0.5])}
    """
    out: List[bytes] = []
    _pack(value, out)
    return b"".join(out)


def unpack(data: bytes) -> Any:
    """The inverse of :func:`pack`. Raises ValueError on bytes that it did not write."""
    try:
        value, end = _unpack(data, 0)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"not a snapshot: {error}") from error
    if end != len(data):
        raise ValueError(f"not a snapshot: {len(data) - end} bytes too many")
    return value


def _pack(value: Any, out: List[bytes]) -> None:
    kind: Type[object] = value.__class__
    if value is None:
        out.append(b"N")
    elif value is True:
        out.append(b"T")
    elif value is False:
        out.append(b"F")
    elif isinstance(value, int):
        if -128 <= value < 128:
            out.append(struct.pack("<cb", b"b", value))
        elif -(1 << 63) <= value < 1 << 63:
            out.append(struct.pack("<cq", b"i", value))
        else:
            text = str(value).encode()
            out.append(struct.pack("<cI", b"I", len(text)) + text)
    elif isinstance(value, float):
        out.append(struct.pack("<cd", b"d", value))
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        out.append(struct.pack("<cI", b"s", len(text)) + text)
    elif isinstance(value, bytes):
        out.append(struct.pack("<cI", b"y", len(value)) + value)
    elif kind is array:
        raw: bytes = value.tobytes()
        out.append(struct.pack("<ccI", b"a", value.typecode.encode(), len(raw)) + raw)
    elif kind in (tuple, list):
        out.append(struct.pack("<cI", b"t" if kind is tuple else b"l", len(value)))
        for item in value:
            _pack(item, out)
    elif kind is dict:
        out.append(struct.pack("<cI", b"m", len(value)))
        for key, item in value.items():
            _pack(key, out)
            _pack(item, out)
    else:
        raise TypeError(f"a state may not hold {type(value).__name__}")


def _unpack(data: bytes, at: int) -> Tuple[Any, int]:
    tag = data[at : at + 1]
    at += 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag in _NUMBERS:
        number = _NUMBERS[tag]
        return number.unpack_from(data, at)[0], at + number.size
    if tag == b"a":
        typecode = data[at : at + 1].decode()
        (size,) = _SIZE.unpack_from(data, at + 1)
        values: array[Any] = array(typecode)
        values.frombytes(data[at + 5 : at + 5 + size])
        return values, at + 5 + size
    if tag not in (b"I", b"s", b"y", b"t", b"l", b"m"):
        raise ValueError(f"not a snapshot: unknown tag {tag!r}")
    (size,) = _SIZE.unpack_from(data, at)
    at += 4
    if size > len(data) - at:
        raise ValueError("not a snapshot: it ends early")
    if tag in (b"I", b"s", b"y"):
        return _unpack_text(tag, data[at : at + size]), at + size
    return _unpack_items(tag, size, data, at)


_CONSTANTS: Dict[bytes, Any] = {b"N": None, b"T": True, b"F": False}
_NUMBERS = {b"b": struct.Struct("<b"), b"i": struct.Struct("<q"), b"d": struct.Struct("<d")}
_SIZE = struct.Struct("<I")


def _unpack_text(tag: bytes, raw: bytes) -> Any:
    if tag == b"y":
        return raw
    text = raw.decode("utf-8", "surrogatepass")
    return int(text) if tag == b"I" else text


def _unpack_items(tag: bytes, count: int, data: bytes, at: int) -> Tuple[Any, int]:
    items: List[Any] = []
    for _ in range(2 * count if tag == b"m" else count):
        item, at = _unpack(data, at)
        items.append(item)
    if tag == b"m":
        return dict(zip(items[::2], items[1::2])), at
    return (tuple(items) if tag == b"t" else items), at
