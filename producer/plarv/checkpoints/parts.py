"""Which checkpoints of a sharded model all ranks have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence, Set

from plarv.checkpoints.anchor import read_anchor
from plarv.checkpoints.slots import Slot, Slots

__all__ = ["anchor_of_all", "folder_of", "had_by_all"]


def folder_of(folder: Path, rank: int) -> Path:
    """Where a rank keeps its part, under the folder that was asked for."""
    return folder / f"rank-{rank:05d}"


def had_by_all(slots: Sequence[Slot], own: Path, parts: int) -> List[Slot]:
    """Those of ``slots``, the certified or all, whose step every rank has too, and as certified.

    A job that dies between two ranks' certificates leaves them one checkpoint apart. What lies on
    another machine's disk cannot be seen, and does not count: ``own`` is this rank's folder.
    """
    certified = bool(slots) and all(slot.certified for slot in slots)
    common: Optional[Set[int]] = None
    for folder in _folders(own, parts):
        steps = {slot.step for slot in Slots(folder).all() if slot.certified or not certified}
        common = steps if common is None else common & steps
    return [slot for slot in slots if common is None or slot.step in common]


def anchor_of_all(own: Path, parts: int) -> Mapping[str, Any]:
    """The oldest of the ranks' anchors, which is the same one wherever it is asked for."""
    anchors = [read_anchor(folder) for folder in _folders(own, parts)] or [read_anchor(own)]
    found = [anchor for anchor in anchors if isinstance(anchor.get("step"), int)]
    return min(found, key=_step_of) if found else {}


def _step_of(anchor: Mapping[str, Any]) -> int:
    return int(anchor["step"])


def _folders(own: Path, parts: int) -> List[Path]:
    """Of all ranks whose disk this is; none where nothing is sharded."""
    folders = [folder_of(own.parent, rank) for rank in range(parts if parts > 1 else 0)]
    return [folder for folder in folders if folder.is_dir()]
