"""Which of a run's checkpoints are clean, and which one to go back to: a function of the log."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from plarv_schemas.events import CONFIRM_STEPS

__all__ = ["CONFIRM_STEPS", "Checkpoint", "Checkpoints"]

_NEVER = 1 << 62
_MAX_KEPT = 8  # of each sort; a ring has three slots


class Checkpoint(NamedTuple):
    """One that lies whole on disk, with all its ranks' parts."""

    step: int
    slot: int

    def place(self) -> Dict[str, Any]:
        """As an action names it."""
        return {"checkpoint_step": self.step, "slot": self.slot}


class Checkpoints:
    """The checkpoints of one attempt: saved, then certified or spoiled.

    One is certified when ``window`` steps have passed after it without a critical verdict; it is
    spoiled for good where one is open when it is saved, or opens before that. A checkpoint of
    several parts counts from when the last of them is saved.

    >>> checkpoints = Checkpoints()
    >>> checkpoints.save({"step": 100, "slot": 0}, 50, calm=True)
    >>> checkpoints.certify(149, 50), checkpoints.certify(150, 50)
    (None, Checkpoint(step=100, slot=0))
    >>> checkpoints.before(onset=130), checkpoints.before(onset=100)
    (Checkpoint(step=100, slot=0), None)

    Cost: O(1) a step while none is due; a few hundred bytes.
    """

    __slots__ = ("due", "_frozen_at", "_seen", "_waiting", "_certified", "_parts")

    def __init__(self) -> None:
        self.due = _NEVER  # the step at which the next one may be certified
        self._frozen_at = -1  # the onset for which the ring was last frozen; -1: it is not
        self._seen = False  # whether the run keeps checkpoints at all
        self._waiting: List[List[int]] = []  # [step, slot], oldest first
        self._certified: List[List[int]] = []
        self._parts: Dict[int, List[int]] = {}  # step -> parts that are saved

    def save(self, data: Mapping[str, Any], window: int, calm: bool) -> None:
        """A ``checkpoint_saved`` event's data. ``calm``: no critical verdict is open.

        What is ``certified`` already was so before this attempt began. Nonsense is passed over.
        """
        step, slot = data.get("step"), data.get("slot")
        if not isinstance(step, int) or not isinstance(slot, int):
            return
        if not self._is_whole(step, data):
            return
        self._seen = True
        for kept in (self._waiting, self._certified):  # what lay there is gone
            kept[:] = [found for found in kept if found[1] != slot and found[0] != step]
        if data.get("certified") is True:
            _add(self._certified, [step, slot])
        elif calm:
            _add(self._waiting, [step, slot])
        self._look_ahead(window)

    def certify(self, step: int, window: int) -> Optional[Checkpoint]:
        """The oldest one that is certified at ``step``, one at a time; None: none is."""
        if step < self.due or not self._waiting:
            return None
        found = self._waiting.pop(0)
        _add(self._certified, found)
        self._frozen_at = -1  # the run has got past what it was frozen for
        self._look_ahead(window)
        return Checkpoint(found[0], found[1])

    def spoil(self) -> None:
        """A critical verdict has opened: what waits is not certified any more."""
        if self._waiting:
            self._waiting.clear()
            self.due = _NEVER

    def freeze(self, onset: int) -> Optional[Tuple[Dict[str, Any], str]]:
        """What a FREEZE says of a fault that began at ``onset``, and why; None: it was said."""
        if not self._seen or 0 <= self._frozen_at <= onset:
            return None
        self._frozen_at = onset
        clean = self.before(onset)
        if clean is None:
            why = f"no certified checkpoint is older than step {onset}, where it began"
            return {"onset_step": onset}, why
        why = (
            f"the checkpoint of step {clean.step} is the last certified one before step {onset}, "
            "where it began"
        )
        return {"onset_step": onset, **clean.place()}, why

    def before(self, onset: int) -> Optional[Checkpoint]:
        """The newest certified one that was saved before step ``onset``."""
        for step, slot in reversed(self._certified):
            if step < onset:
                return Checkpoint(step, slot)
        return None

    def _is_whole(self, step: int, data: Mapping[str, Any]) -> bool:
        """Whether all parts of this step's checkpoint are saved now."""
        parts, part = data.get("parts", 1), data.get("part", 0)
        if not isinstance(parts, int) or parts <= 1:
            return True
        saved = self._parts.setdefault(step, [])
        if isinstance(part, int) and part not in saved:
            saved.append(part)
        if len(self._parts) > _MAX_KEPT:
            del self._parts[min(self._parts)]
        if len(saved) < parts:
            return False
        del self._parts[step]
        return True

    def _look_ahead(self, window: int) -> None:
        self.due = self._waiting[0][0] + window if self._waiting else _NEVER


def _add(kept: List[List[int]], found: List[int]) -> None:
    """In its place by step; the newest are kept."""
    kept.append(found)
    kept.sort()
    del kept[:-_MAX_KEPT]
