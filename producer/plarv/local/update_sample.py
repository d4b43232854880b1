"""Samples of the weights from one step to the next: which updates were lost to rounding."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from plarv.local.flat_integers import flat_view
from plarv.local.multi_tensor import Named
from plarv.tensors import local_part

__all__ = ["UpdateSample"]

_SIZE = 256  # elements of each tensor
_RUNS = 16
_LOW_BITS = 0x1FFF  # of float32 that float16 does not have; bfloat16 lacks these and three more

Put = Callable[[Tuple[str, ...], Any], None]


class _Group(NamedTuple):
    """Tensors of one device and type."""

    layers: List[str]
    weights: List[Any]  # each (16, 16)
    gradients: List[Optional[Any]]


class _Taken(NamedTuple):
    layers: List[str]
    weights: Any  # (tensors, 256), in their own type
    due: Any  # 1.0 where the gradient was not 0


class UpdateSample:
    """Compares 256 elements of each weight tensor just before one step and just before the next.

    ``compare()`` gives 2 n shares for n tensors: first of weights that had a gradient and did not
    change (NaN without gradient), then of float32 weights that a half type could hold (0 for
    others).
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._taken: Dict[Any, _Taken] = {}

    def take(self, named: Sequence[Named]) -> None:
        """Before a step, where the gradients lie in ``.grad``."""
        torch = self._torch
        self._taken = {}
        for (device, dtype), group in self._groups(named, with_gradients=True).items():
            none = torch.zeros((_RUNS, _SIZE // _RUNS), dtype=dtype, device=device)
            gradients = [
                none if gradient is None or gradient.dtype is not dtype else gradient
                for gradient in group.gradients
            ]
            due = (torch.cat(gradients).view(-1, _SIZE) != 0).float()
            weights = torch.cat(group.weights).view(-1, _SIZE)
            self._taken[device, dtype] = _Taken(group.layers, weights, due)

    def compare(self, named: Sequence[Named], put: Put) -> None:
        """Before the next step: ``put(layers, shares)``, a vector a device and type."""
        taken, self._taken = self._taken, {}
        for key, group in self._groups(named, with_gradients=False).items():
            before = taken.get(key)
            if before is not None and before.layers == group.layers:
                weights = self._torch.cat(group.weights).view(-1, _SIZE)
                put(tuple(group.layers), self._shares(before, weights))

    def forget(self) -> None:
        """Nothing to compare with."""
        self._taken = {}

    def _groups(self, named: Sequence[Named], *, with_gradients: bool) -> Dict[Any, _Group]:
        torch = self._torch
        groups: Dict[Any, _Group] = {}
        for layer, tensor in named:
            if local_part(tensor).numel() < _SIZE or not tensor.is_floating_point():
                continue
            weights = _blocks(torch, tensor)
            gradient = tensor.grad if with_gradients else None
            if gradient is not None:  # a sparse one says little of the rows that are sampled
                is_dense = gradient.layout is torch.strided
                gradient = _blocks(torch, gradient) if is_dense else None
            group = groups.setdefault((weights.device, weights.dtype), _Group([], [], []))
            group.layers.append(layer)
            group.weights.append(weights)
            group.gradients.append(gradient)
        return groups

    def _shares(self, before: _Taken, weights: Any) -> Any:
        torch = self._torch
        same = (before.weights == weights).float()
        lost = (same * before.due).sum(1) / before.due.sum(1)  # NaN where nothing was due
        coarse = torch.zeros_like(lost)
        if weights.dtype is torch.float32:
            low = weights.view(torch.int32) & _LOW_BITS
            coarse = (low == 0).float().mean(1)
        return torch.cat((lost, coarse))


def _blocks(torch: Any, tensor: Any) -> Any:
    """(16, 16): runs of elements from all over the tensor; single ones would miss each cache."""
    flat = flat_view(torch, tensor)
    apart = flat.numel() // _RUNS
    return flat.narrow(0, 0, _RUNS * apart).view(_RUNS, apart)[:, : _SIZE // _RUNS]
