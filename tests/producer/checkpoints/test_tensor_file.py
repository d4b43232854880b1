"""Files of tensors: what was written is read, and damage is told."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plarv.checkpoints.contents import Training
from plarv.checkpoints.snapshot import MODEL_FILE, Snapshot
from plarv.checkpoints.tensor_file import (
    Entry,
    digest_of,
    encode_header,
    read_header,
    read_tensors,
    write_tensor_file,
)  # fmt: skip

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "d": torch.tensor([True, False]),
    "e": torch.empty(0, 4),
    "f": torch.ones(2, dtype=torch.complex64),
    "g": torch.ones(3).to(torch.float8_e4m3fn),
    "h": torch.ones(5).to(torch.float8_e5m2),
    "i": torch.ones(2, dtype=torch.complex128),  # the format has no code for it
}


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, tensor in TENSORS.items():
            self.register_buffer(name, tensor)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    snapshot = Snapshot(Training(Holder()))
    snapshot.survey()
    assert snapshot.prepare() is None
    assert snapshot.take(0)
    name, header, data = snapshot.files()[0]
    assert name == MODEL_FILE
    digest = write_tensor_file(tmp_path / name, header, data)
    assert digest == digest_of(tmp_path / name)
    return tmp_path / name


def test_every_dtype_is_read_as_it_was_written(path: Path) -> None:
    found = read_tensors(path, torch)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)


def bits(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


@pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)
def test_the_safetensors_library_reads_it_and_we_read_the_librarys(path: Path) -> None:
    library: Any = importlib.import_module("safetensors.torch")
    found = library.load_file(str(path))
    for name in "abcdefgh":
        assert found[name].dtype == TENSORS[name].dtype
        assert bits(found[name]) == bits(TENSORS[name])
    mine = {name: TENSORS[name] for name in "abcdefgh"}
    library.save_file(mine, str(path.parent / "theirs"))
    theirs = read_tensors(path.parent / "theirs", torch)
    assert all(bits(theirs[name]) == bits(tensor) for name, tensor in mine.items())


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_file_that_is_cut_anywhere_is_told(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"cut short|bytes of tensors|damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        (1 << 60).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"not json",
        (2).to_bytes(8, "little") + b"[]",
        encode_header([Entry("a", "F32", (1,), 4, 4)], {}) + bytes(8),
    ],
    ids=["length", "json", "list", "hole"],
)
def test_a_damaged_header_is_told(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(header)
    with pytest.raises(ValueError, match=str(path)):
        read_header(path)


def file_of(path: Path, table: Any, size: int) -> Path:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), end: Any = 8) -> Dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "table",
    [
        {"a": entry(shape=[3])},
        {"a": entry(shape=[-1])},
        {"a": entry(shape=[-1, -2])},
        {"a": entry(shape=[1 << 70])},
        {"a": entry(shape="ab")},
        {"a": entry(dtype="F99")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(dtype="F64", shape=[2])},
        {"a": {"dtype": "F32"}},
        {"a": entry(), "__metadata__": ["b"]},
        {"a": entry(), "__metadata__": {"alias:b": "c"}},
        {"a": entry(), "__metadata__": {"raw:a": "["}},
        {"a": entry(), "__metadata__": {"raw:a": "[]"}},
        {"a": entry(), "__metadata__": {"raw:a": '["nn", [2]]'}},
        {"a": entry(), "__metadata__": {"raw:a": '["float32", 5]'}},
        {"a": entry(), "__metadata__": {"raw:a": '[["float32"], [2]]'}},
        "[" * 100_000,
    ],
    ids=range(17),
)
def test_whatever_is_wrong_in_a_header_is_one_kind_of_error(tmp_path: Path, table: Any) -> None:
    path = file_of(tmp_path / "file", table, 8)
    with pytest.raises(ValueError, match=str(path)):
        read_tensors(path, torch)


def test_a_tensor_with_a_shape_and_no_data_is_told(tmp_path: Path) -> None:
    path = file_of(tmp_path / "file", {"a": entry(end=0)}, 0)
    with pytest.raises(ValueError, match="no data"):
        read_tensors(path, torch)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=json_values, shape=json_values, end=json_values, metadata=json_values)
def test_a_header_of_anything_is_read_or_refused(
    tmp_path: Path, dtype: Any, shape: Any, end: Any, metadata: Any
) -> None:
    table = {"a": entry(dtype, shape, end), "__metadata__": metadata}
    path = file_of(tmp_path / "file", table, 8)
    said = str(path)
    try:
        read_tensors(path, torch)
    except ValueError as error:
        said = str(error)
    assert str(path) in said


def test_a_file_that_is_there_is_not_overwritten(path: Path) -> None:
    with pytest.raises(FileExistsError):
        write_tensor_file(path, b"", memoryview(b""))


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def short(descriptor: int, data: memoryview) -> int:
        return write(descriptor, bytes(data[:1000]))

    monkeypatch.setattr(os, "write", short)
    data = bytes(range(256)) * 40
    write_tensor_file(tmp_path / "file", b"head", memoryview(data))
    assert (tmp_path / "file").read_bytes() == b"head" + data
