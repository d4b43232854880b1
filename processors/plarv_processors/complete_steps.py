"""Joins the ranks' events of one step into one: a function of the log, not of arrival times."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Tuple

from plarv_schemas.events import StepEvent

__all__ = ["CompleteSteps"]

_AHEAD = 8
"""Steps that one rank may be ahead before an incomplete step is closed without the others."""

_F = {name: place for place, name in enumerate(StepEvent._fields)}
_STEP, _RANK, _WORLD, _LOSS, _VAL = (
    _F["step"], _F["rank"], _F["world_size"], _F["loss"], _F["val_loss"],
)  # fmt: skip
_MEANS = tuple(
    _F[name]
    for name in (
        "loss", "grad_norm", "update_norm", "val_loss", "perplexity", "grad_l1_norm",
        "grad_l2_norm", "forward_ms", "backward_ms",
    )
)  # fmt: skip
_FIRSTS = tuple(_F[name] for name in ("time_ns", "epoch", "current_lr", "loss_scale"))
_SAMPLES = tuple(place for name, place in _F.items() if name.startswith("sample_"))
_STEP_TIME, _BATCH = _F["step_time_ms"], _F["batch_size"]
_LEVELS, _SCORES, _LAYERS = _F["local_levels"], _F["local_scores"], _F["local_layers"]
_PARTS = _F["parts"]
_MAX_LAYERS = 8


class CompleteSteps:
    """One event a complete step of all ranks, with the ranks' own events in ``parts``.

    A step is complete when ``world_size`` ranks have reported it, or one rank is 8 steps ahead of
    it. Steps come out in order; a report for a step that is out already is left to the detectors
    that see single ranks. The joined event holds means over the ranks that reported (non-finite
    where one of them is), the slowest rank's step time, the worst local report, and no per-sample
    signals. A run of one rank passes through untouched.

    Memory: 8 steps x ranks x some 300 bytes at most, and nothing where all ranks keep step.
    """

    __slots__ = ("_pending", "_done")

    def __init__(self) -> None:
        self._pending: Dict[int, Dict[int, Tuple[Any, ...]]] = {}  # step -> rank -> event
        self._done = -1  # last step that came out

    def add(self, event: StepEvent) -> Tuple[StepEvent, ...]:
        """The steps that this event completes, mostly one or none."""
        world_size = event.world_size
        if world_size is None or world_size <= 1:
            return (event,)
        if event.loss is None and event.val_loss is not None:  # an evaluation on its own
            return (event,) if event.rank == 0 else ()
        step = event.step
        if step <= self._done:
            return ()
        ranks = self._pending.setdefault(step, {})
        fields = list(event)
        for place in _SAMPLES:
            fields[place] = None
        before = ranks.get(event.rank)
        if before is not None:  # a second report of the same step adds what the first left out
            fields = [old if old is not None else new for old, new in zip(before, fields)]
        ranks[event.rank] = tuple(fields)
        upto = step if len(ranks) >= world_size else step - _AHEAD
        if min(self._pending) > upto:
            return ()
        out: List[StepEvent] = []
        for ready in sorted(pending for pending in self._pending if pending <= upto):
            out.append(_join(self._pending.pop(ready)))
            self._done = ready
        return tuple(out)


def _join(ranks: Dict[int, Tuple[Any, ...]]) -> StepEvent:
    rows = [ranks[rank] for rank in sorted(ranks)]
    fields = list(rows[0])
    fields[_RANK] = 0
    for place in _MEANS:
        fields[place] = _mean([row[place] for row in rows])
    for place in _FIRSTS:
        fields[place] = next((row[place] for row in rows if row[place] is not None), None)
    times = [row[_STEP_TIME] for row in rows if row[_STEP_TIME] is not None]
    fields[_STEP_TIME] = max(times) if times else None
    sizes = [row[_BATCH] for row in rows if row[_BATCH] is not None]
    fields[_BATCH] = sum(sizes) if sizes else None  # integers
    fields[_LEVELS] = _worst([row[_LEVELS] for row in rows if row[_LEVELS]])
    fields[_SCORES] = _worst([row[_SCORES] for row in rows if row[_SCORES]])
    layers = [name for row in rows for name in row[_LAYERS] or ()]
    fields[_LAYERS] = tuple(dict.fromkeys(layers))[:_MAX_LAYERS] if layers else None
    fields[_PARTS] = tuple([StepEvent(*row) for row in rows])
    return StepEvent(*fields)


def _mean(values: List[Optional[float]]) -> Optional[float]:
    given = [value for value in values if value is not None]
    if not given:
        return None
    try:
        return math.fsum(given) / len(given)
    except (OverflowError, ValueError):  # fsum refuses inf - inf and huge sums
        return math.nan


def _worst(rows: List[Tuple[Any, ...]]) -> Optional[Tuple[Any, ...]]:
    """The largest value at each place, over rows of different lengths."""
    if not rows:
        return None
    length = max(len(row) for row in rows)
    return tuple(max(row[at] for row in rows if at < len(row)) for at in range(length))
