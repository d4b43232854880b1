"""Scalars from any device as Python floats, without ever waiting for a device.

``float(loss)`` on a CUDA tensor stops the training script until the device has caught up. Here the
value is copied to pinned host memory behind the work that computes it, and read when it has come.
"""

from __future__ import annotations

import time
from collections import deque
from numbers import Real
from typing import (
    Any,
    Deque,
    Dict,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

from plarv.background_scalars import BackgroundReader, Unreadable
from plarv.tensors import loaded_torch

__all__ = ["DeviceBackend", "DeviceEvent", "Pending", "ScalarReader"]

_SLOTS = 256  # steps whose copies may be under way at once: far more than a device runs behind
_WIDTH = 16  # scalars of one step
_POLL_S = 0.0005


class DeviceEvent(Protocol):
    """A mark in a device's queue of work, such as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether the device has come past the mark."""
        ...


class DeviceBackend(Protocol):
    """What is asked of a kind of accelerator. A test can put its own in place of torch's."""

    def allocate(self, slots: int, width: int) -> Any:
        """A float64 host tensor of this shape that the device can copy to without blocking."""
        ...

    def record(self, device: object, event: Optional[DeviceEvent]) -> DeviceEvent:
        """Mark the device's current stream, with ``event`` again where one is given."""
        ...

    def is_capturing(self) -> bool:
        """Whether a graph is being recorded, during which nothing may be asked of the device."""
        ...


class Pending:
    """The scalars of one ``begin()``, some of which are still on their way."""

    __slots__ = ("_parts", "_values")

    def __init__(self, values: List[Optional[float]], parts: List[_Part]) -> None:
        self._values = values
        self._parts = parts

    def ready(self) -> bool:
        """Whether all have arrived. Never blocks, never raises."""
        if self._parts:
            self._parts = [part for part in self._parts if not part.poll(self._values)]
        return not self._parts

    def values(self) -> Tuple[Optional[float], ...]:
        """The scalars as ``begin()`` had them; ``None`` for the unreadable and the late."""
        self.ready()
        return tuple(self._values)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the rest at the end of a run; False when the time was up first."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True


class _Part(Protocol):
    def poll(self, values: List[Optional[float]]) -> bool: ...


class ScalarReader:
    """Turns numbers, numpy scalars and one-element tensors into floats.

    ``begin()`` answers with a tuple of floats where all values are on the host, and else with a
    ``Pending``. What cannot be read becomes ``None``; the reason is counted in ``reasons`` and
    given to ``unreadable(index, reason)``. Never raises. Cost about 1 us a tensor, for a CUDA
    tensor some launches; at most 256 steps are under way at once, later ones are ``None``.

    >>> ScalarReader().begin((2.5, None, 3))
    (2.5, None, 3.0)
    >>> reader = ScalarReader()
    >>> reader.begin(("much", [1.0])), reader.reasons
    ((None, None), {'not a number': 1, 'not a scalar': 1})
    """

    def __init__(
        self,
        unreadable: Optional[Unreadable] = None,
        backends: Optional[Mapping[str, DeviceBackend]] = None,
    ) -> None:
        self.reasons: Dict[str, int] = {}
        self._unreadable = unreadable
        self._given = dict(backends or {})
        self._rings: Dict[object, Optional[_Ring]] = {}
        self._background = BackgroundReader()

    def begin(self, values: Sequence[object]) -> Union[Pending, Tuple[Optional[float], ...]]:
        """Start reading these values."""
        numbers: List[Optional[float]] = []
        on_device: Dict[object, List[Tuple[int, Any]]] = {}
        torch = loaded_torch()
        for index, value in enumerate(values):
            number: Optional[float] = None
            if value is not None:
                try:
                    if type(value) is float:
                        number = value
                    elif torch is not None and isinstance(value, torch.Tensor):
                        number = self._tensor(value, index, on_device)
                    else:
                        number = self._number(value, index, on_device)
                except Exception as error:  # noqa: BLE001 - anybody's objects come here
                    self._refuse(index, _reason_of(error))
            numbers.append(number)
        if not on_device:
            return tuple(numbers)
        parts: List[_Part] = []
        for device, found in on_device.items():
            parts.extend(self._start(torch, device, found))
        return Pending(numbers, parts) if parts else tuple(numbers)

    def close(self) -> None:
        """Let the background thread go, where there is one."""
        self._background.close()

    def _tensor(
        self, tensor: Any, index: int, on_device: Dict[object, List[Tuple[int, Any]]]
    ) -> Optional[float]:
        if hasattr(tensor, "_local_tensor"):
            if not all(placement.is_replicate() for placement in tensor.placements):
                raise _UnreadableError("sharded")  # its value needs a collective
            tensor = tensor._local_tensor
        if tensor.numel() != 1:
            raise _UnreadableError("not a scalar")
        if tensor.is_complex():
            raise _UnreadableError("not a number")
        device = tensor.device
        if device.type == "meta":
            raise _UnreadableError("no data")
        if device.type == "cpu" and "cpu" not in self._given:
            return float(tensor.item())
        on_device.setdefault(device, []).append((index, tensor.detach().reshape(())))
        return None

    def _number(
        self, value: object, index: int, on_device: Dict[object, List[Tuple[int, Any]]]
    ) -> Optional[float]:
        kind = type(value)
        if isinstance(value, Real) or kind.__module__ == "decimal":
            return float(value)  # type: ignore[arg-type]
        if isinstance(value, (str, bytes, bytearray)):
            raise _UnreadableError("not a number")
        if getattr(value, "size", getattr(value, "numel", None)) == 1:
            if kind.__module__.partition(".")[0] == "numpy":
                item: Any = value
                return self._number(item.item(), index, on_device)
            if hasattr(value, "__float__"):  # an array of jax or the like: reading it may wait
                on_device.setdefault(None, []).append((index, value))
                return None
        raise _UnreadableError("not a scalar" if hasattr(value, "__len__") else "not a number")

    def _start(self, torch: Any, device: Any, found: List[Tuple[int, Any]]) -> List[_Part]:
        """Send the copies off; what cannot go that way is left to the background thread."""
        try:
            ring = self._ring(torch, device)
            if ring is not None:
                return self._start_copies(torch, ring, found)
        except Exception:  # noqa: BLE001 - no pinned memory, no float64: never again there
            self._rings[device] = None
        parts: List[_Part] = []
        for index, value in found:
            part = self._background.submit(value, index, self._refuse)
            if part is None:
                self._refuse(index, "too many under way")
            else:
                parts.append(part)
        return parts

    def _start_copies(self, torch: Any, ring: _Ring, found: List[Tuple[int, Any]]) -> List[_Part]:
        reason = ""
        if ring.backend.is_capturing():
            reason = "graph capture"
        elif len(found) > _WIDTH or not ring.has_room():
            reason = "too many under way"
        if reason:
            for index, _ in found:
                self._refuse(index, reason)
            return []
        with torch.no_grad():
            return [ring.start(torch, found, self._refuse)]

    def _ring(self, torch: Any, device: Any) -> Optional[_Ring]:
        if device not in self._rings:
            backend = self._given.get(device.type) if device is not None else None
            if backend is None and device is not None:
                backend = _torch_backend(torch, device.type)
            self._rings[device] = None if backend is None else _Ring(backend, device)
        return self._rings[device]

    def _refuse(self, index: int, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self._unreadable is not None:
            self._unreadable(index, reason)


class _UnreadableError(Exception):
    """Why a value gives no float."""


def _reason_of(error: Exception) -> str:
    if isinstance(error, _UnreadableError):
        return str(error)
    return "too large" if isinstance(error, OverflowError) else "unreadable"


class _Ring:
    """Pinned rows of one device, each with the event that says when its copy is done."""

    def __init__(self, backend: DeviceBackend, device: object) -> None:
        self.backend = backend
        self._device = device
        buffer = backend.allocate(_SLOTS, _WIDTH)
        self._free: Deque[_Slot] = deque(_Slot(buffer[slot]) for slot in range(_SLOTS))

    def has_room(self) -> bool:
        return bool(self._free)

    def start(self, torch: Any, found: List[Tuple[int, Any]], refuse: Unreadable) -> _Part:
        scalars = [value for _, value in found]
        if any(value.dtype is not scalars[0].dtype for value in scalars):
            scalars = [value.to(torch.float64) for value in scalars]
        # The conversion to the row's float64, exact for every float type, is done on the device.
        # Its source may be freed at once: the allocator reuses it behind the copy in stream order.
        slot = self._free.popleft()
        try:
            source = torch.stack(scalars) if len(scalars) > 1 else scalars[0].reshape(1)
            slot.row[: len(scalars)].copy_(source, non_blocking=True)
            slot.event = self.backend.record(self._device, slot.event)
        except Exception:
            self._free.append(slot)
            raise
        return _CopyPart(self, slot, [index for index, _ in found], refuse)

    def release(self, slot: _Slot) -> None:
        self._free.append(slot)


class _Slot:
    __slots__ = ("event", "row")

    def __init__(self, row: Any) -> None:
        self.row = row
        self.event: Optional[DeviceEvent] = None


class _CopyPart:
    """Scalars that are being copied into a slot, which is free again once they are read."""

    __slots__ = ("_indices", "_refuse", "_ring", "_slot")

    def __init__(self, ring: _Ring, slot: _Slot, indices: List[int], refuse: Unreadable) -> None:
        self._ring = ring
        self._slot = slot
        self._indices = indices
        self._refuse = refuse

    def poll(self, values: List[Optional[float]]) -> bool:
        try:
            event = self._slot.event
            if event is not None and not event.query():
                return False
            arrived = self._slot.row[: len(self._indices)].tolist()
        except Exception:  # noqa: BLE001 - the device has failed: the slot is not used again
            for index in self._indices:
                self._refuse(index, "device error")
            return True
        for index, value in zip(self._indices, arrived):
            values[index] = value
        self._ring.release(self._slot)
        return True


class _TorchBackend:
    """An accelerator that torch knows as ``torch.<type>``: cuda, xpu, npu and the like."""

    def __init__(self, torch: Any, module: Any) -> None:
        self._torch = torch
        self._module = module
        self._capturing: Any = getattr(module, "is_current_stream_capturing", None)

    def allocate(self, slots: int, width: int) -> Any:
        return self._torch.empty((slots, width), dtype=self._torch.float64, pin_memory=True)

    def record(self, device: object, event: Optional[DeviceEvent]) -> DeviceEvent:
        mark: Any = self._module.Event() if event is None else event
        mark.record(self._module.current_stream(device))
        marked: DeviceEvent = mark
        return marked

    def is_capturing(self) -> bool:
        return self._capturing is not None and bool(self._capturing())


def _torch_backend(torch: Any, device_type: str) -> Optional[DeviceBackend]:
    """``None`` for devices without streams or without events that can be asked (mps, xla)."""
    module = getattr(torch, device_type, None)
    if module is None or not hasattr(module, "current_stream"):
        return None
    return _TorchBackend(torch, module) if hasattr(module, "Event") else None
