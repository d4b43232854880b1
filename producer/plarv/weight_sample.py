"""A fixed sample of the weights, from which L1 norm, L2 norm and update size are estimated."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from plarv.tensors import local_part

__all__ = ["WeightSample"]

# 32,768 elements are what torch's CPU kernels do on one thread: a sample up to there never wakes
# the thread pool, which on a busy machine costs milliseconds.
_DEFAULT_SIZE = 32_768
# Biases and scales are few but carry gradients much larger than those of matrices, so they are
# sampled apart, with a quarter of the elements: a common sample would mostly miss them.
_VECTOR_SHARE = 4
_VECTOR_BLOCKS = 32
_MATRIX_BLOCKS = 64  # so a sample costs at most 96 narrow views and two small copies


class _Block(NamedTuple):
    parameter: int
    start: int
    length: int


class _Stratum(NamedTuple):
    blocks: Tuple[_Block, ...]
    total: int  # elements that the blocks stand for


class WeightSample:
    """Equally spaced blocks of the parameters, always the same ones: at most ``size`` elements.

    What is summed over the n sampled elements of a stratum (vectors, matrices), absolute values or
    squares, is extrapolated to all its N elements by N / n. Blocks lie on the device that holds
    most weights. A missing gradient counts as zeros; a tensor whose elements are not contiguous in
    memory is left out of n. Nothing is copied but the sample, and nothing waits for the device.
    """

    __slots__ = ("_strata", "_torch")

    def __init__(self, torch: Any, parameters: Sequence[Any], size: int = _DEFAULT_SIZE) -> None:
        self._torch = torch
        usable = [
            (index, local_part(parameter))
            for index, parameter in enumerate(parameters)
            if parameter is not None and _is_trainable(torch, parameter)
        ]
        vectors = [(index, tensor) for index, tensor in usable if tensor.dim() < 2]
        matrices = [(index, tensor) for index, tensor in usable if tensor.dim() >= 2]
        device = _largest_device(usable)
        share = size // _VECTOR_SHARE
        self._strata = (
            _stratum(vectors, device, share, _VECTOR_BLOCKS),
            _stratum(matrices, device, size - share, _MATRIX_BLOCKS),
        )

    def weights(self, parameters: Sequence[Any]) -> Tuple[Optional[Any], ...]:
        """A copy of the sampled weights in at least float32, one tensor a stratum."""
        return tuple(self._gather(each, parameters, False)[0] for each in self._strata)

    def gradient_norms(self, parameters: Sequence[Any]) -> Optional[Tuple[Any, Any]]:
        """Estimated (L1, L2) norms of the whole gradient as 0-d tensors, ``None`` without any."""
        sums: List[Any] = []
        squares: List[Any] = []
        for stratum in self._strata:
            sample, seen = self._gather(stratum, parameters, True)
            if sample is not None:
                ratio = stratum.total / seen
                # abs().sum(), for the general 1-norm kernel is ten times slower on a CPU
                sums.append(sample.abs().sum() * ratio)
                squares.append(self._torch.dot(sample, sample) * ratio)
        return (_added(sums), _added(squares).sqrt()) if sums else None

    def distance(
        self, before: Sequence[Optional[Any]], after: Sequence[Optional[Any]]
    ) -> Optional[Any]:
        """Estimated L2 norm of the change of all weights between two samples, as a 0-d tensor."""
        squares: List[Any] = []
        for stratum, old, new in zip(self._strata, before, after):
            if old is not None and new is not None:
                if old.shape != new.shape or old.device != new.device:
                    return None  # the model was moved or changed in between
                change = new - old
                squares.append(self._torch.dot(change, change) * (stratum.total / new.numel()))
        return _added(squares).sqrt() if squares else None

    def _gather(
        self, stratum: _Stratum, parameters: Sequence[Any], gradients: bool
    ) -> Tuple[Optional[Any], int]:
        """The stratum's sample, and how many elements it speaks for: n."""
        torch = self._torch
        pieces: List[Any] = []
        seen = 0
        for index, start, length in stratum.blocks:
            tensor = parameters[index]
            if tensor is not None and gradients:
                tensor = tensor.grad
            if tensor is None:
                seen += length  # no gradient reached it: zeros
                continue
            tensor = local_part(tensor)
            if start + length <= tensor.numel() and _is_dense(torch, tensor):
                offset = tensor.storage_offset() + start
                pieces.append(tensor.as_strided((length,), (1,), offset))
                seen += length
        if not pieces:
            return None, 0
        sample = torch.cat(pieces)
        return (sample if sample.dtype is torch.float64 else sample.float()), seen


def _is_trainable(torch: Any, parameter: Any) -> bool:
    return bool(
        parameter.requires_grad
        and parameter.dtype.is_floating_point
        and parameter.layout is torch.strided
        and local_part(parameter).numel() > 0
    )


def _is_dense(torch: Any, tensor: Any) -> bool:
    """Whether the elements lie in one piece of memory, in whatever order."""
    if tensor.layout is not torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(tensor.dim())
    return layout is not None and bool(tensor.is_contiguous(memory_format=layout))


def _largest_device(usable: Sequence[Tuple[int, Any]]) -> Optional[object]:
    """The device that holds most elements."""
    held: Dict[object, int] = {}
    for _, tensor in usable:
        held[tensor.device] = held.get(tensor.device, 0) + tensor.numel()
    return max(held, key=lambda device: held[device]) if held else None


def _stratum(
    tensors: Sequence[Tuple[int, Any]], device: Optional[object], limit: int, blocks: int
) -> _Stratum:
    """All of the tensors where they are few, else blocks on one device that stand for all."""
    here = [(index, tensor.numel()) for index, tensor in tensors if tensor.device == device]
    found = sum(count for _, count in here)
    total = sum(tensor.numel() for _, tensor in tensors)
    if found <= limit and len(here) <= blocks:
        return _Stratum(tuple(_Block(index, 0, count) for index, count in here), total)
    return _Stratum(tuple(_spread(here, found, min(limit, found) // blocks, blocks)), total)


def _spread(sizes: Sequence[Tuple[int, int]], total: int, length: int, blocks: int) -> List[_Block]:
    """Blocks of ``length`` at equal distances over all elements, cut at their tensors' ends."""
    spread: List[_Block] = []
    first = 0  # elements before the tensor in hand
    walk = iter(sizes)
    index, count = next(walk)
    for block in range(blocks):
        place = max(0, (2 * block + 1) * total // (2 * blocks) - length // 2)
        while place >= first + count:
            first += count
            index, count = next(walk)
        start = place - first
        spread.append(_Block(index, start, min(max(1, length), count - start)))
    return spread


def _added(parts: List[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
