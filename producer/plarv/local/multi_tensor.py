"""Norms and checksums of many tensors, on their device, without waiting."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from plarv.tensors import local_part

__all__ = ["Named", "Rolling", "checksums", "each_norm", "flat_view"]

_LARGE = 4096  # elements, from which a tensor is worth reading in parts
_ALIGNED = 16


class Named(NamedTuple):
    """A tensor and the layer it belongs to."""

    layer: str
    tensor: Any


class Rolling:
    """A part of a list that moves on each turn, so that large models are seen in turns.

    >>> rolling = Rolling(elements=5)
    >>> [rolling.next([3, 3, 3]) for _ in range(3)]
    [[0], [1], [2]]
    """

    def __init__(self, elements: int, tensors: int = 512) -> None:
        self._elements = elements
        self._tensors = tensors
        self._at = 0

    def next(self, sizes: Sequence[int]) -> List[int]:
        """Indices of the part whose turn it is: all of them where they are few."""
        if not sizes:
            return []
        chosen: List[int] = []
        budget = self._elements
        start = self._at % len(sizes)
        for offset in range(len(sizes)):
            index = (start + offset) % len(sizes)
            if chosen and (budget < sizes[index] or len(chosen) >= self._tensors):
                break
            chosen.append(index)
            budget -= sizes[index]
        self._at = start + len(chosen)
        return chosen


def each_norm(
    torch: Any, named: Sequence[Named], put: Callable[[Tuple[str, ...], Any], None]
) -> None:
    """L2 norms, one a tensor: ``put(layers, vector)`` for each device and type of number."""
    groups: Dict[Tuple[Any, Any], List[Named]] = {}
    for layer, tensor in named:
        tensor = _numbers(torch, local_part(tensor))
        if tensor is not None:
            groups.setdefault((tensor.device, tensor.dtype), []).append(Named(layer, tensor))
    for (_, dtype), group in groups.items():
        tensors = [each.tensor for each in group]
        if dtype in (torch.float16, torch.bfloat16):
            norms = _half_norms(torch, tensors)
        else:
            norms = torch._foreach_norm(tensors)
        put(tuple(each.layer for each in group), torch.stack(list(norms)))


def checksums(torch: Any, tensors: Sequence[Any], part: int = 0, parts: int = 1) -> List[Any]:
    """One exact checksum a tensor, 0-d int64: any single flipped bit of the part changes it.

    Of tensors with many elements only the ``part``-th of ``parts`` is read.
    """
    sums: List[Any] = []
    for tensor in tensors:
        flat = flat_view(torch, tensor)
        count = flat.numel()
        if parts > 1 and count >= _LARGE:
            chunk = -(-count // (parts * _ALIGNED)) * _ALIGNED
            flat = flat[part * chunk : (part + 1) * chunk]
        size = flat.numel() * flat.element_size()
        offset = flat.storage_offset() * flat.element_size()
        if size % 8 == 0 and offset % 8 == 0:
            flat = flat.view(torch.int64)
        elif size % 4 == 0 and offset % 4 == 0:
            flat = flat.view(torch.int32)
        else:
            flat = flat.view(torch.uint8)
        sums.append(flat.sum(dtype=torch.int64))
    return sums


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


def _numbers(torch: Any, tensor: Any) -> Any:
    """Its floating-point numbers as a dense tensor, or None where there are none."""
    if tensor.device.type == "meta":
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return None
    if tensor.layout is not torch.strided:
        if not tensor.is_sparse:
            tensor = tensor.values()
        elif tensor.device.type == "cpu":
            tensor = tensor.coalesce().values()
        else:
            tensor = tensor._values()  # coalescing would wait
    return tensor if tensor.numel() else None


def _half_norms(torch: Any, tensors: List[Any]) -> Sequence[Any]:
    try:
        return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    except (AttributeError, TypeError):  # torch before 2.4 has no dtype there
        return [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
