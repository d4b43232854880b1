"""Norms of many tensors, on their device, without waiting."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from plarv.tensors import local_part

__all__ = ["Named", "Rolling", "each_norm"]


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
