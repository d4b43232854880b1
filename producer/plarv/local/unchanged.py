"""Whether tensors are what they were: exact checksums, on their device."""

from __future__ import annotations

from typing import Any, Callable, Dict, Hashable, List, Mapping, NamedTuple, Tuple

from plarv.local.multi_tensor import Named, Rolling, checksums

__all__ = ["Unchanged"]

Put = Callable[[Tuple[str, ...], Any, int], None]


class _Kept(NamedTuple):
    checksum: Any
    likeness: Tuple[Any, ...]  # shape, type and device: a tensor that was converted is another
    version: int


class Unchanged:
    """Remembers checksums of tensors, by key, and compares: a part in turns for large models.

    With ``parts`` above one only such a part of each large tensor is read, another on each step.
    """

    def __init__(self, torch: Any, rolling: Rolling, parts: int = 1) -> None:
        self._part = 0
        self._parts = parts
        self._torch = torch
        self._rolling = rolling
        self._kept: Dict[Hashable, _Kept] = {}

    def remember(self, tensors: Mapping[Any, Named]) -> None:
        """What the next comparison starts from."""
        self._part = (self._part + 1) % self._parts
        keys = list(tensors)
        chosen = self._rolling.next([tensors[key].tensor.numel() for key in keys])
        self._keep({keys[index]: tensors[keys[index]] for index in chosen})

    def compare(self, tensors: Mapping[Any, Named], put: Put) -> None:
        """``put(layers, flags, by_code)``: 1.0 where a tensor changed, a vector a device.

        ``by_code`` counts tensors that torch knows to have been written. Each change shows once.
        """
        kept = self._kept
        same = {
            key: tensors[key]
            for key, known in kept.items()
            if key in tensors and _likeness(tensors[key].tensor) == known.likeness
        }
        if not same:
            return
        self._keep(same)
        groups: Dict[Any, List[Hashable]] = {}
        for key in same:
            groups.setdefault(kept[key].checksum.device, []).append(key)
        for keys in groups.values():
            before = self._torch.stack([kept[key].checksum for key in keys])
            after = self._torch.stack([self._kept[key].checksum for key in keys])
            by_code = sum(kept[key].version != self._kept[key].version for key in keys)
            put(tuple(same[key].layer for key in keys), (before != after).float(), by_code)

    def forget(self) -> None:
        """Nothing to compare with."""
        self._kept = {}

    def _keep(self, tensors: Mapping[Any, Named]) -> None:
        read = [named.tensor for named in tensors.values()]
        sums = checksums(self._torch, read, self._part, self._parts)
        self._kept = {
            key: _Kept(checksum, _likeness(named.tensor), _version(named.tensor))
            for (key, named), checksum in zip(tensors.items(), sums)
        }


def _likeness(tensor: Any) -> Tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _version(tensor: Any) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)
