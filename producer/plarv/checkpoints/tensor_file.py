"""Tensors in one file, in the safetensors format: any tool that knows it reads our checkpoints.

Written here and not by the library because the bytes must go from one flat buffer to the disk in
large pieces, without a copy and without the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Sequence, Tuple

__all__ = [
    "CODES", "Entry", "digest_of", "encode_header", "read_header", "read_tensors",
    "write_tensor_file",
]  # fmt: skip

CODES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32",
    "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""Name of a torch dtype -> its code in the file. Any other dtype travels as bytes (U8), with
``raw:NAME`` in the metadata telling dtype and shape."""

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_LENGTH = struct.Struct("<Q")
_PIECE = 4 << 20  # bytes of one write: long enough to amortise the call, short enough to stop soon
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_DIGEST_BYTES = 16
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)


class Entry(NamedTuple):
    """One tensor's place."""

    name: str
    dtype: str  # a code of the format
    shape: Tuple[int, ...]
    begin: int  # bytes from where the data begin
    size: int  # bytes


def encode_header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data. ``entries`` lie one behind the other, without holes."""
    table: Dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.begin + entry.size],
        }
    text = json.dumps(table, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def write_tensor_file(path: Path, header: bytes, data: memoryview) -> str:
    """Writes and syncs the file; the digest of its bytes. OSError: the disk does not take it."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for whole in (memoryview(header), data):
            for begin in range(0, len(whole), _PIECE):
                piece = whole[begin : begin + _PIECE]
                digest.update(piece)
                while len(piece):
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """Of a file's bytes, as :func:`write_tensor_file` gives it."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(_PIECE), b""):
            digest.update(piece)
    return digest.hexdigest()


def read_header(path: Path) -> Tuple[Tuple[Entry, ...], Dict[str, str], int]:
    """The entries in the order of their data, the metadata, and where the data begin.

    ValueError says what is wrong with the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else -1
        if not 0 <= length <= min(_MAX_HEADER, size - _LENGTH.size):
            raise ValueError(f"{path} is no tensor file, or is cut short")
        text = file.read(length)
    start = _LENGTH.size + length
    try:
        table: Dict[str, Any] = json.loads(text)
        metadata = {str(name): str(value) for name, value in table.pop("__metadata__", {}).items()}
        entries = [_entry(name, fields) for name, fields in table.items()]
    except _DAMAGE as error:
        raise ValueError(f"{path} has a damaged header") from error
    entries.sort(key=lambda entry: (entry.begin, entry.size))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise ValueError(f"{path}: {entry.name} does not begin where the last tensor ends")
        end += entry.size
    if start + end != size:
        raise ValueError(f"{path} has {size - start} bytes of tensors and should have {end}")
    return tuple(entries), metadata, start


def read_tensors(path: Path, torch: Any) -> Dict[str, Any]:
    """Name -> tensor, on the CPU. Shared ones (``alias:NAME`` in the metadata) are one tensor.

    ValueError: the file is damaged.
    """
    entries, metadata, start = read_header(path)
    data = bytearray(path.stat().st_size - start)
    with open(path, "rb") as file:
        file.seek(start)
        if file.readinto(data) != len(data):
            raise ValueError(f"{path} was cut while it was read")
    try:
        tensors = {entry.name: _tensor(entry, metadata, data, torch) for entry in entries}
        for name, other in metadata.items():
            if name.startswith("alias:"):
                tensors[name[len("alias:") :]] = tensors[other]
    except (*_DAMAGE, RuntimeError) as error:
        raise ValueError(
            f"{path}: what its header says of a tensor is damaged ({error})"
        ) from error
    return tensors


def _tensor(entry: Entry, metadata: Mapping[str, str], data: bytearray, torch: Any) -> Any:
    """Whatever it raises says that the header is damaged."""
    dtype, shape = _DTYPES.get(entry.dtype, ""), entry.shape
    raw = metadata.get(f"raw:{entry.name}")
    if raw is not None:
        dtype, sizes = json.loads(raw)
        shape = tuple(sizes)
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{entry.name} has a dtype that this torch does not know")
    if min(shape, default=0) < 0:
        raise ValueError(f"{entry.name} has the shape {shape}")
    if entry.size == 0:
        empty = torch.empty(shape, dtype=kind, device="meta")
        if empty.numel():
            raise ValueError(f"{entry.name} has a shape, and no data")
        return torch.empty(shape, dtype=kind)
    flat = torch.frombuffer(data, dtype=torch.uint8, offset=entry.begin, count=entry.size)
    return flat.view(kind).view(shape)


def _entry(name: str, fields: Mapping[str, Any]) -> Entry:
    begin, end = (int(offset) for offset in fields["data_offsets"])
    if end < begin:
        raise ValueError(name)
    shape = tuple([int(size) for size in fields["shape"]])
    return Entry(name, str(fields["dtype"]), shape, begin, end - begin)
