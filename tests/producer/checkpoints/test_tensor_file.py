"""Files of tensors: what was written is read, and damage is told."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

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
}


class Holder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, tensor in TENSORS.items():
            self.register_buffer(name, tensor)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    snapshot = Snapshot(Holder())
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
        assert torch.equal(found[name], tensor)


@pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)
def test_the_safetensors_library_reads_it_and_we_read_the_librarys(path: Path) -> None:
    library: Any = importlib.import_module("safetensors.torch")
    found = library.load_file(str(path))
    for name in "abcde":
        assert torch.equal(found[name], TENSORS[name])
    mine = {name: TENSORS[name] for name in "abcde"}
    library.save_file(mine, str(path.parent / "theirs"))
    theirs = read_tensors(path.parent / "theirs", torch)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())


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
