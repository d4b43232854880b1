"""``anchor_point.json``: the checkpoint that a run is gone back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Optional

from plarv.checkpoints.slots import Slot, read_json, write_json
from plarv_schemas.events import Action

__all__ = ["ANCHOR", "read_anchor", "write_anchor"]

ANCHOR = "anchor_point.json"
_NO_FAULT: Mapping[str, Any] = {
    "onset_step": None, "frozen_at_step": None, "verdicts": [],
    "reason": "the newest certified checkpoint",
}  # fmt: skip


def read_anchor(folder: Path) -> Mapping[str, Any]:
    """What it says; nothing where there is none yet, or somebody edited it."""
    try:
        return read_json(folder / ANCHOR)
    except (OSError, ValueError, RecursionError):
        return {}


def write_anchor(folder: Path, slot: Slot, freeze: Optional[Action] = None) -> None:
    """Makes ``slot`` the anchor; ``freeze``: because of which fault. OSError."""
    point = {
        "step": slot.step,
        "path": str(slot.path),
        "run_id": slot.run_id,
        "checksum": slot.checksum,
    }
    if freeze is None:
        write_json(folder / ANCHOR, {**point, **_NO_FAULT})
        return
    fault = {
        "onset_step": freeze.parameters["onset_step"],
        "frozen_at_step": freeze.step,
        "verdicts": list(freeze.verdict_ids),
        "reason": freeze.reason,
    }
    write_json(folder / ANCHOR, {**point, **fault})
