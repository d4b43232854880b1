"""Numbers on their way from the device: one vector a step, copied once, read when it is there."""

from __future__ import annotations

from collections import deque
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Tuple

from plarv.faults import Guard

__all__ = ["Readings", "Taker"]

Taker = Callable[[List[float]], None]
_MAX_UNDER_WAY = 8  # steps; a device further behind loses the oldest


class _UnderWay(NamedTuple):
    host: Any
    event: Any  # None: nothing to wait for
    takers: Tuple[Tuple[int, Taker], ...]


class Readings:
    """Collects tensors of a step, each with who takes its values, and hands the values over.

    What lies on the CPU is handed over by ``deliver()`` of the same step. An accelerator's goes by
    one ``cat`` into a preallocated vector and one copy into pinned memory; ``deliver()`` of a later
    step finds it, and never waits.
    """

    def __init__(self, torch: Any, guard: Guard) -> None:
        self._torch = torch
        self._guard = guard
        self._queued: Dict[Any, List[Tuple[Any, Taker]]] = {}
        self._buffers: Dict[Any, Any] = {}
        self._free: List[Any] = []
        self._under_way: Deque[_UnderWay] = deque()

    def put(self, tensor: Any, taker: Taker) -> None:
        """``taker`` gets the values of a 0-d or 1-d tensor as floats, soon."""
        self._queued.setdefault(tensor.device, []).append((tensor.detach().reshape(-1), taker))

    def deliver(self) -> None:
        """Sends what was put, and calls the takers of all that has come."""
        queued, self._queued = self._queued, {}
        for device, pieces in queued.items():
            with self._guard:
                self._send(device, pieces)
        while self._under_way:
            first = self._under_way[0]
            if first.event is not None and not first.event.query():
                if len(self._under_way) <= _MAX_UNDER_WAY:
                    return
                self._under_way.popleft()
                continue
            self._under_way.popleft()
            self._hand_over(first)

    def close(self) -> None:
        """Forgets what is under way."""
        self._queued = {}
        self._under_way.clear()
        self._buffers = {}
        self._free = []

    def _send(self, device: Any, pieces: List[Tuple[Any, Taker]]) -> None:
        torch = self._torch
        takers = tuple((tensor.numel(), taker) for tensor, taker in pieces)
        flat = [tensor.float() for tensor, _ in pieces]
        size = sum(count for count, _ in takers)
        if device.type == "cpu":
            self._under_way.append(_UnderWay(torch.cat(flat), None, takers))
            return
        vector = self._buffers.get(device)
        if vector is None or vector.numel() < size:
            vector = self._buffers[device] = torch.empty(2 * size, device=device)
        torch.cat(flat, out=vector[:size])
        host = self._host(size)
        host[:size].copy_(vector[:size], non_blocking=True)
        self._under_way.append(_UnderWay(host, _event(torch, device), takers))

    def _host(self, size: int) -> Any:
        for place, host in enumerate(self._free):
            if host.numel() >= size:
                return self._free.pop(place)
        return self._torch.empty(2 * size, pin_memory=bool(self._torch.cuda.is_available()))

    def _hand_over(self, came: _UnderWay) -> None:
        size = sum(count for count, _ in came.takers)
        values: List[float] = came.host[:size].tolist()
        if came.event is not None and len(self._free) < _MAX_UNDER_WAY:
            self._free.append(came.host)
        start = 0
        for count, taker in came.takers:
            with self._guard:
                taker(values[start : start + count])
            start += count


def _event(torch: Any, device: Any) -> Optional[Any]:
    """Marks the place in the device's queue; without events a copy is there when it returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
