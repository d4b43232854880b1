"""The bits of tensors as flat integers, and exact checksums of them, on their device."""

from __future__ import annotations

from typing import Any, Dict, Hashable, List, NamedTuple, Optional, Sequence, Set, Tuple

from plarv.tensors import local_part

__all__ = ["Checksums", "Sums", "flat_view"]

_PARTED = 4096  # elements, from which a tensor is worth reading in parts
_ALONE = 2048  # integers, from which a tensor is worth a sum of its own
_ALIGNED = 16

Ends = Tuple[Any, ...]  # device, type of integer, sizes


class Sums(NamedTuple):
    """Checksums of tensors that were read in one way."""

    kind: Tuple[Any, ...]  # device, type of integer, whether each was read alone
    keys: List[Hashable]
    values: Any  # int64, on the device, in the order of the keys


class _Known(NamedTuple):
    pointer: int  # of the tensor
    likeness: Tuple[Any, ...]
    view: Any  # None: it lies elsewhere on each look
    view_pointer: int


class Checksums:
    """One exact checksum a tensor: any single flipped bit changes it.

    With ``parts`` above one only a part of each large tensor is read, another on each turn. Small
    tensors are read together. Views are made once, for as long as a tensor lies where it lay.
    """

    def __init__(self, torch: Any, parts: int = 1) -> None:
        self._torch = torch
        self._parts = parts
        self._part = 0
        self._views: Dict[Tuple[Hashable, int], _Known] = {}
        self._ends: Dict[Ends, Any] = {}
        self.moved: Set[Hashable] = set()  # keys of tensors that were found lying elsewhere

    @property
    def num_views(self) -> int:
        """How many are kept."""
        return len(self._views)

    def turn(self) -> None:
        """Goes on to the next part."""
        self._part = (self._part + 1) % self._parts

    def forget(self) -> None:
        """Lets go of all tensors."""
        self._views = {}
        self._ends = {}

    def of(self, keys: Sequence[Hashable], tensors: Sequence[Any]) -> List[Sums]:
        """Of all tensors, whichever device they are on."""
        torch = self._torch
        groups: Dict[Tuple[Any, ...], Tuple[List[Hashable], List[Any]]] = {}
        for key, tensor in zip(keys, tensors):
            view = self._view(key, local_part(tensor))
            alone = view.numel() >= _ALONE
            names, values = groups.setdefault((view.device, view.dtype, alone), ([], []))
            names.append(key)
            values.append(view.sum(dtype=torch.int64) if alone else view)
        return [
            Sums(kind, names, torch.stack(values) if kind[2] else self._together(values))
            for kind, (names, values) in groups.items()
        ]

    def _together(self, views: List[Any]) -> Any:
        torch = self._torch
        device, sizes = views[0].device, tuple(view.numel() for view in views)
        ends = self._ends.get((device, sizes))
        if ends is None:
            if len(self._ends) > 4 * self._parts:  # tensors that come and go
                self._ends = {}
            places: List[int] = [0]
            for size in sizes:
                places.append(places[-1] + size)
            ends = self._ends[device, sizes] = torch.tensor(places, device=device)
        sums = torch.cat([views[0].new_zeros(1), *views]).cumsum(0, dtype=torch.int64)[ends]
        return sums[1:] - sums[:-1]

    def _view(self, key: Hashable, tensor: Any) -> Any:
        pointer = tensor.data_ptr()
        likeness = (tensor.shape, tensor.dtype, tensor.stride())
        known = self._views.get((key, self._part))
        # a view whose memory was given back to the allocator has another pointer than it had
        if (
            known is not None
            and known.pointer == pointer
            and known.view is not None
            and known.likeness == likeness
            and known.view.data_ptr() == known.view_pointer
        ):
            return known.view
        if known is not None and known.pointer != pointer:
            self.moved.add(key)
        flat = flat_view(self._torch, tensor)
        lies_there = flat.data_ptr() == pointer  # else it is a copy
        view = self._integers(flat)
        moves = known is not None and known.likeness == likeness
        kept: Optional[Any] = view if lies_there and not moves else None
        self._views[key, self._part] = _Known(pointer, likeness, kept, view.data_ptr())
        return view

    def _integers(self, flat: Any) -> Any:
        torch = self._torch
        count = flat.numel()
        if self._parts > 1 and count >= _PARTED:
            chunk = -(-count // (self._parts * _ALIGNED)) * _ALIGNED
            flat = flat[self._part * chunk : (self._part + 1) * chunk]
        width = flat.element_size()
        size, offset = flat.numel() * width, flat.storage_offset() * width
        if size % 8 == 0 and offset % 8 == 0:
            return flat.view(torch.int64)
        if size % 4 == 0 and offset % 4 == 0:
            return flat.view(torch.int32)
        return flat.view(torch.uint8)


def flat_view(torch: Any, tensor: Any) -> Any:
    """All elements in the order of memory; a copy only where they do not lie in one piece."""
    tensor = local_part(tensor.detach())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_contiguous():
        return tensor.view(-1)
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=layout):
            return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return tensor.reshape(-1)
