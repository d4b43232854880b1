"""A copy in memory of all that a checkpoint holds, taken within a step."""

from __future__ import annotations

import ctypes
import io
import json
import threading
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from plarv.checkpoints.contents import Contents, Training, collect, rng_state
from plarv.checkpoints.host_memory import available_bytes
from plarv.checkpoints.tensor_file import CODES, Entry, encode_header, write_tensor_file
from plarv.tensors import loaded_torch

__all__ = ["MODEL_FILE", "OPTIMIZER_FILE", "REST_FILE", "Snapshot", "TensorFile"]

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
REST_FILE = "training_state.pt"
_SHARE = 0.7  # of the memory that is available: the training needs the rest


class TensorFile(NamedTuple):
    """One file to be written."""

    name: str
    header: bytes
    data: memoryview


class Snapshot:
    """Buffers of the size of the training's state, allocated once, and the copy in them.

    ``survey()`` and ``prepare()`` make them, the second on a background thread; ``take()`` fills
    them, on the training thread: one copy of each tensor, from accelerators without waiting.
    ``write()`` is for the background again. Between ``take()`` and ``release()`` it is not taken
    again: RuntimeError.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._contents: Optional[Contents] = None
        self._buffers: Tuple[_Buffer, ...] = ()
        self._rest: Dict[str, Any] = {}
        self._events: List[Any] = []
        self._busy = threading.Event()
        self.left_out: Tuple[str, ...] = ()  # names of what cannot be kept

    @property
    def is_prepared(self) -> bool:
        """Whether there are buffers."""
        return bool(self._buffers)

    @property
    def size_bytes(self) -> int:
        """Of the buffers."""
        return sum(buffer.size for buffer in self._buffers)

    def survey(self) -> None:
        """Training thread: looks at what there is, for prepare()."""
        self._contents = collect(self._training)
        self.left_out = self._contents.left_out

    def prepare(self) -> Optional[str]:
        """Background: makes the buffers for what survey() saw; why that cannot be, or None."""
        contents = self._contents
        if contents is None or self._busy.is_set():
            raise RuntimeError("there is nothing to prepare for, or a snapshot is being written")
        self._contents = None
        self._buffers = ()  # of an earlier layout: its memory first
        plans = {name: _Plan(tensors) for name, tensors in _by_file(contents).items()}
        needed = sum(plan.size for plan in plans.values())
        available = available_bytes()
        if available is not None and needed > _SHARE * available:
            return (
                f"a copy of the training's state needs {needed / 1e9:.1f} GB of memory, and "
                f"{available / 1e9:.1f} GB are available"
            )
        self._buffers = tuple([_Buffer(name, plan) for name, plan in plans.items()])
        return None

    def take(self, step: int) -> bool:
        """Copies the state after ``step``; False: its layout is another, prepare() again."""
        if self._busy.is_set():
            raise RuntimeError("the last snapshot is still being written")
        contents = collect(self._training)
        groups = _by_file(contents)
        if not self._buffers or not all(
            buffer.fits(groups[buffer.name]) for buffer in self._buffers
        ):
            return False
        self._events = []
        for buffer in self._buffers:
            self._events.extend(buffer.copy(groups[buffer.name]))
        self._rest = {**contents.rest, "rng": rng_state(), "step": step}
        self._busy.set()
        return True

    def write(self, folder: Path) -> Dict[str, str]:
        """Writes its files, once the device's copies have come; name -> digest. OSError: the disk
        does not take them.
        """
        for event in self._events:
            event.synchronize()
        digests = {
            name: write_tensor_file(folder / name, header, data)
            for name, header, data in self.files()
        }
        rest = memoryview(self.rest())
        return {**digests, REST_FILE: write_tensor_file(folder / REST_FILE, b"", rest)}

    def files(self) -> Sequence[TensorFile]:
        """The tensors."""
        return [TensorFile(buffer.name, buffer.header, buffer.bytes()) for buffer in self._buffers]

    def rest(self) -> bytes:
        """Everything else, as torch.save() writes it; ``weights_only`` reads it."""
        torch: Any = loaded_torch()
        out = io.BytesIO()
        torch.save(self._rest, out)
        return out.getvalue()

    def release(self) -> None:
        """It is written: the buffers may be filled again."""
        self._busy.clear()


class _Plan:
    """Where each tensor lies: every one once, the widest dtype first so that all are aligned."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.layout = _layout_of(tensors)
        self.entries, self.metadata, self.names = _entries(tensors)
        self.size = sum(entry.size for entry in self.entries)
        self.like = [(tensors[name].dtype, tensors[name].shape) for name in self.names]
        self.devices = {str(tensor.device.type) for tensor in tensors.values()}


class _Buffer:
    """One file's data."""

    def __init__(self, name: str, plan: _Plan) -> None:
        torch: Any = loaded_torch()
        self.name = name
        self.size = plan.size
        self.header = encode_header(plan.entries, plan.metadata)
        self._layout, self._names = plan.layout, plan.names
        # Only of these a copy can be known to have come without waiting for it.
        self._no_wait = plan.devices <= {"cpu", "cuda"}
        pinned = "cuda" in plan.devices
        self._flat = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned).zero_()  # touched
        self._views: List[Any] = []
        for entry, (dtype, shape) in zip(plan.entries, plan.like):
            piece = self._flat[entry.begin : entry.begin + entry.size]
            self._views.append(piece.view(dtype).view(shape))

    def fits(self, tensors: Mapping[str, Any]) -> bool:
        return _layout_of(tensors) == self._layout

    def copy(self, tensors: Mapping[str, Any]) -> List[Any]:
        """Fills the buffer; the events after which the copies from accelerators are there."""
        torch: Any = loaded_torch()
        sources = [tensors[name] for name in self._names]
        with torch.no_grad():
            if hasattr(torch, "_foreach_copy_") and sources:
                torch._foreach_copy_(self._views, sources, non_blocking=self._no_wait)
            else:
                for view, source in zip(self._views, sources):
                    view.copy_(source, non_blocking=self._no_wait)
        events: List[Any] = []
        for device in {source.device for source in sources if source.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return events

    def bytes(self) -> memoryview:
        if self.size == 0:
            return memoryview(b"")
        place: Any = (ctypes.c_ubyte * self.size).from_address(self._flat.data_ptr())
        place.owner = self._flat  # the memory lives as long as the view of it
        return memoryview(place).cast("B")


def _by_file(contents: Contents) -> Dict[str, Mapping[str, Any]]:
    return {MODEL_FILE: contents.model, OPTIMIZER_FILE: contents.optimizer}


def _layout_of(tensors: Mapping[str, Any]) -> List[Tuple[Any, ...]]:
    """What two sets of tensors must share to fit into the same buffer; ties are a part of it."""
    seen: Dict[Tuple[Any, ...], int] = {}
    return [
        (name, tensor.dtype, tensor.shape, seen.setdefault(_identity(name, tensor), at))
        for at, (name, tensor) in enumerate(tensors.items())
    ]


def _identity(name: str, tensor: Any) -> Tuple[Any, ...]:
    """Two names of one tensor share it; an empty one has no place of its own."""
    place = tensor.data_ptr()
    return (place, tensor.shape, tensor.stride(), tensor.dtype) if place else (name,)


def _entries(
    tensors: Mapping[str, Any],
) -> Tuple[List[Entry], Dict[str, str], List[str]]:
    """Entries, metadata, and each entry's tensor by name."""
    metadata = {"format": "pt"}
    first: Dict[Tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(_identity(name, tensor), name)
        if owner != name:
            metadata[f"alias:{name}"] = owner
    owners = sorted(first.values(), key=lambda name: -int(tensors[name].element_size()))
    entries: List[Entry] = []
    begin = 0
    for name in owners:
        tensor = tensors[name]
        dtype, shape = str(tensor.dtype).replace("torch.", ""), tuple(tensor.shape)
        size = tensor.numel() * tensor.element_size()
        code = CODES.get(dtype)
        if code is None:
            metadata[f"raw:{name}"] = json.dumps([dtype, shape])
            code, shape = "U8", (size,)
        entries.append(Entry(name, code, shape, begin, size))
        begin += size
    return entries, metadata, owners
