"""A sample of each weight matrix from step to step: which updates were lost to rounding."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from plarv.local.multi_tensor import Named, flat_view
from plarv.tensors import local_part

__all__ = ["UpdateSample"]

_SIZE = 256  # elements of each tensor
_LOW_BITS = 0x1FFF  # of float32 that float16 does not have; bfloat16 lacks these and three more

Put = Callable[[Tuple[str, ...], Any], None]


class _Taken(NamedTuple):
    layers: Tuple[str, ...]
    weights: Any  # (tensors, 256), in their own type
    moved: Any  # where the gradient was not 0: an update was due


class UpdateSample:
    """Compares 256 elements of each weight tensor before one step and before the next.

    ``put`` gets 2 n shares for n tensors: first of weights that had a gradient and did not change
    (NaN without gradient), then of float32 weights that a half type could hold (0 for others).
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._before: Dict[Any, _Taken] = {}

    def take(self, named: Sequence[Named], put: Put) -> None:
        """Just before a step, where the gradients lie in ``.grad``."""
        torch = self._torch
        groups: Dict[Any, List[Tuple[str, Any, Optional[Any]]]] = {}
        for layer, tensor in named:
            if local_part(tensor).numel() >= _SIZE and tensor.is_floating_point():
                weights = _strided(torch, tensor)
                gradient = tensor.grad
                if gradient is not None and gradient.layout is torch.strided:
                    gradient = _strided(torch, gradient)
                groups.setdefault((weights.device, weights.dtype), []).append(
                    (layer, weights, gradient)
                )
        now = {group: self._taken(group[1], found) for group, found in groups.items()}
        for (device, dtype), taken in now.items():
            before = self._before.get((device, dtype))
            if before is not None and before.layers == taken.layers:
                put(taken.layers, self._shares(before, taken, dtype))
        self._before = now

    def forget(self) -> None:
        """Nothing to compare with."""
        self._before = {}

    def _taken(self, dtype: Any, found: List[Tuple[str, Any, Optional[Any]]]) -> _Taken:
        torch = self._torch
        weights = torch.cat([each[1] for each in found]).view(-1, _SIZE)
        none = torch.zeros(_SIZE, dtype=dtype, device=weights.device)
        gradients = [
            none if gradient is None or gradient.dtype is not dtype else gradient
            for _, _, gradient in found
        ]
        moved = torch.cat(gradients).view(-1, _SIZE) != 0
        return _Taken(tuple(each[0] for each in found), weights, moved)

    def _shares(self, before: _Taken, after: _Taken, dtype: Any) -> Any:
        torch = self._torch
        due = before.moved.float()
        same = (before.weights == after.weights).float()
        lost = (same * due).sum(1) / due.sum(1)  # NaN where nothing was due
        coarse = torch.zeros_like(lost)
        if dtype is torch.float32:
            low = after.weights.view(torch.int32) & _LOW_BITS
            coarse = (low == 0).float().mean(1)
        return torch.cat((lost, coarse))


def _strided(torch: Any, tensor: Any) -> Any:
    flat = flat_view(torch, tensor)
    return flat[:: flat.numel() // _SIZE][:_SIZE]
