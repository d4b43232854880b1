"""Whether tensors are what they were: exact checksums, on their device."""

from __future__ import annotations

from typing import Any, Callable, Dict, Hashable, List, Mapping, NamedTuple, Sequence, Tuple

from plarv.local.flat_integers import Checksums, Sums
from plarv.local.multi_tensor import Named, Rolling

__all__ = ["Unchanged"]

Put = Callable[[Tuple[str, ...], Any, Sequence[bool]], None]

_SPARE = 64
_LOW_HALF = 0xFFFFFFFF


class _Likeness(NamedTuple):
    dtype: Any  # a tensor that was converted is another
    elements: int
    version: int


class Unchanged:
    """Remembers checksums of tensors, by key, and compares: a part in turns for large models.

    With ``parts`` above one only such a part of each large tensor is read, another on each step.
    """

    def __init__(self, torch: Any, rolling: Rolling, parts: int = 1) -> None:
        self._torch = torch
        self._rolling = rolling
        self._checksums = Checksums(torch, parts)
        self._parts = parts
        self._kept: Dict[Hashable, _Likeness] = {}
        self._groups: List[Sums] = []

    def remember(self, tensors: Mapping[Any, Named]) -> None:
        """What the next comparison starts from."""
        self._checksums.turn()
        if self._checksums.num_views > self._parts * len(tensors) + _SPARE:
            self._checksums.forget()  # most were of tensors that are gone
        keys = list(tensors)
        chosen = self._rolling.next([tensors[key].tensor.numel() for key in keys])
        chosen_keys = [keys[index] for index in chosen]
        read = [tensors[key].tensor for key in chosen_keys]
        self._kept = {key: _likeness(tensor) for key, tensor in zip(chosen_keys, read)}
        self._groups = self._checksums.of(chosen_keys, read)

    def compare(self, tensors: Mapping[Any, Named], put: Put) -> None:
        """``put(layers, changes, written)``: what changed, and what torch knows to be written.

        A change is 0.0, or 1.0 for a single bit, 2.0 for a single element, 3.0 for more. A vector a
        device; each change shows once. What lies elsewhere than it lay counts as written.
        """
        now = {key: _likeness(tensors[key].tensor) for key in self._kept if key in tensors}
        same = [key for key, likeness in now.items() if likeness[:2] == self._kept[key][:2]]
        if not same:
            return
        written = {key for key in same if now[key].version != self._kept[key].version}
        self._checksums.moved.clear()
        after = self._checksums.of(same, [tensors[key].tensor for key in same])
        written |= self._checksums.moved
        before, self._groups = self._groups, after
        self._kept = {key: now[key] for key in same}
        for keys, flags in self._differences(before, after):
            put(tuple(tensors[key].layer for key in keys), flags, [key in written for key in keys])

    def forget(self) -> None:
        """Nothing to compare with."""
        self._kept = {}
        self._groups = []
        self._checksums.forget()

    def _differences(
        self, before: List[Sums], after: List[Sums]
    ) -> List[Tuple[List[Hashable], Any]]:
        """How each tensor changed; in one vector a device."""
        found: Dict[Any, Tuple[List[Hashable], List[Any]]] = {}
        known = {sums.kind: sums for sums in before}
        for now in after:
            then = known.get(now.kind)
            if then is None:
                continue
            if then.keys != now.keys:  # some came, went or lie otherwise
                there = set(now.keys)
                shared = [key for key in then.keys if key in there]
                then, now = self._picked(then, shared), self._picked(now, shared)
            if now.keys:
                names, flags = found.setdefault(now.kind[0], ([], []))
                names.extend(now.keys)
                flags.append(now.values - then.values)
        return [(names, _kinds_of_change(self._torch.cat(by))) for names, by in found.values()]

    def _picked(self, sums: Sums, keys: List[Hashable]) -> Sums:
        place = {key: index for index, key in enumerate(sums.keys)}
        values = [sums.values[place[key]] for key in keys]
        return sums._replace(keys=keys, values=self._torch.stack(values) if values else None)


def _kinds_of_change(differences: Any) -> Any:
    """One bit changes a sum by a power of two; one element of up to 32 bits leaves a half zero."""
    sizes = differences.abs()
    more_bits = (sizes & (sizes - 1)).bool()
    in_both = (sizes >> 32).bool() & (sizes & _LOW_HALF).bool()
    return sizes.bool().float() + more_bits.float() + (in_both & more_bits).float()


def _likeness(tensor: Any) -> _Likeness:
    version = 0 if tensor.is_inference() else int(tensor._version)
    return _Likeness(tensor.dtype, tensor.numel(), version)
