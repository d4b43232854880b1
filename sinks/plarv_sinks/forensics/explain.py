"""Explains a verdict: calls its detector again on what the store kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

from plarv_processors.detectors import registered
from plarv_processors.detectors.detector import Detector
from plarv_schemas.events import Action, StepEvent, Verdict
from plarv_sinks.forensics.aligned import PLACE_COLUMNS, by_step
from plarv_sinks.forensics.explanation import Explanation
from plarv_sinks.forensics.formula import formula_of, settings_of
from plarv_sinks.forensics.refold import Refold, refold
from plarv_sinks.forensics.sentences import action_sentence, number, printable
from plarv_sinks.store import Store, StoreError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["explain", "find_verdict"]

_WINDOW = 64  # reports shown before the onset, where a detector's settings name no window
_LATER = (10, 100)  # steps after a verdict at which the loss is looked up
_JUDGED = ("rank", "step", "kind", "level", "state", "onset_step", "score", "threshold")


def find_verdict(verdicts: Sequence[Verdict], wanted: str, run_id: str) -> Verdict:
    """The verdict of that id, or whose id alone begins so. StoreError: none, or several."""
    found = [each for each in verdicts if wanted and each.id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    hints = [f"{each.id} ({each.detector}/{each.kind}, step {each.step})" for each in verdicts]
    several = "several verdicts" if found else "no verdict"
    hint = ", ".join(hints[:5]) or "none"
    raise StoreError(f"run {run_id}: {several} with the id {wanted!r}; its verdicts are {hint}")


def explain(
    store: Store, verdict: Verdict, detector: Optional[Type[Detector]] = None
) -> Explanation:
    """See :meth:`Run.explain`."""
    if detector is None:
        installed = {each.name: each for each in registered()}
        detector = installed.get(verdict.detector)
    after = tuple(_next(store, verdict))
    if detector is None:
        note = f"detector {verdict.detector} is not installed here; hand its class over to explain"
        return Explanation(verdict, "", {}, _window([], verdict, ()), None, (), (note,), after)
    again = refold(detector, store.placed_events(verdict.run_id), verdict.ordinal)
    fresh = detector()
    recomputed = _same(again.verdicts, verdict)
    return Explanation(
        verdict,
        formula_of(detector),
        settings_of(fresh),
        _window(_seen(again, verdict, fresh), verdict, again.read),
        recomputed,
        tuple(_differences(verdict, recomputed)) if recomputed is not None else (),
        tuple(_notes(verdict, again, fresh, recomputed)),
        after,
    )


def _same(verdicts: Sequence[Verdict], wanted: Verdict) -> Optional[Verdict]:
    """What was found at the same place: the one that is most alike."""
    there = [found for found in verdicts if found.ordinal == wanted.ordinal]
    return max(there, key=lambda found: _likeness(found, wanted), default=None)


def _likeness(found: Verdict, wanted: Verdict) -> Tuple[bool, bool, bool]:
    return found.state == wanted.state, found.kind == wanted.kind, found.rank == wanted.rank


def _differences(recorded: Verdict, recomputed: Verdict) -> Iterator[str]:
    for name in _JUDGED:
        yield from _difference(name, getattr(recorded, name), getattr(recomputed, name))
    names = dict.fromkeys([*recorded.evidence, *recomputed.evidence])
    for name in names:
        before, now = recorded.evidence.get(name), recomputed.evidence.get(name)
        yield from _difference(f"evidence {name}", before, now)


def _difference(name: str, recorded: object, recomputed: object) -> Iterator[str]:
    if recorded == recomputed or (_is_nan(recorded) and _is_nan(recomputed)):
        return
    yield f"{name}: recorded {recorded}, recomputed {recomputed}"


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _notes(
    verdict: Verdict, again: Refold, detector: Detector, recomputed: Optional[Verdict]
) -> Iterator[str]:
    if detector.version != verdict.version:
        yield (
            f"recorded by version {verdict.version}, recomputed by {detector.version}: "
            "other settings may give other numbers"
        )
    if again.missing:
        yield f"{again.missing:,} events before it are not in the store (any more)"
    if again.fault:
        yield f"the detector failed on the stored events: {again.fault}"
    if recomputed is None:
        near = [found for found in again.verdicts if found.state != "resolved"]
        last = f"; its last finding before is at step {near[-1].step}" if near else ""
        yield f"from the stored steps it finds nothing at this place of the log{last}"


def _seen(again: Refold, verdict: Verdict, detector: Detector) -> List[StepEvent]:
    """From one window before the onset on, of the verdict's rank where it is about one."""
    seen = list(again.seen)
    if verdict.rank is not None and detector.scope == "rank":
        seen = [event for event in seen if event.rank == verdict.rank]
    window = getattr(getattr(detector, "config", None), "window", None)
    before = window if isinstance(window, int) else _WINDOW
    onset = next((i for i, each in enumerate(seen) if each.step >= verdict.onset_step), len(seen))
    seen = seen[max(0, onset - before) :]
    if again.by_rank:
        seen = [part for event in seen for part in event.parts or (event,)]
    return seen


def _window(seen: Sequence[StepEvent], verdict: Verdict, read: Sequence[str]) -> pl.DataFrame:
    import polars as pl

    columns: Dict[str, List[object]] = {"step": [event.step for event in seen]}
    if verdict.rank is not None or len({event.rank for event in seen}) > 1:
        columns["rank"] = [event.rank for event in seen]
    for name in read:
        values: List[object] = [getattr(event, name) for event in seen]
        if any(value is not None for value in values):
            columns[name] = values
    return pl.DataFrame(columns, strict=False)


def _next(store: Store, verdict: Verdict) -> Iterator[str]:
    """What the log says after the verdict, in sentences."""
    run_id = verdict.run_id
    later = [each for each in store.verdicts(run_id) if each.ordinal > verdict.ordinal]
    later = [each for each in later if each.attempt == verdict.attempt]
    own = [each for each in later if (each.detector, each.rank) == (verdict.detector, verdict.rank)]
    if verdict.state != "resolved":
        yield from _own_end(verdict, own)
    for action in store.actions(run_id):
        if verdict.id in action.verdict_ids:
            yield from _answer(store, action)
    others = [each for each in later if each.detector != verdict.detector]
    others = [each for each in others if each.state != "resolved"]
    for each in others[:3]:
        yield (
            f"step {each.step} (+{each.step - verdict.step}): {each.detector}/{each.kind}, "
            f"{each.level}: {printable(each.message)}"
        )
    yield from _losses(store, verdict)


def _own_end(verdict: Verdict, own: Sequence[Verdict]) -> Iterator[str]:
    """Up to its end, which another episode of the same detector may follow."""
    for each in own:
        if each.state == "opened":
            break
        yield (
            f"step {each.step} (+{each.step - verdict.step}): {each.kind} {each.state}, "
            f"{each.level}: {printable(each.message)}"
        )
        if each.state == "resolved":
            return
    yield "it was not resolved in this attempt"


def _answer(store: Store, action: Action) -> Iterator[str]:
    yield f"step {action.step}: {action.kind}: {action_sentence(action)}"
    events = store.frame("events", action.run_id, ("step", "rank", "kind", "data"))
    for step, rank, kind, data in events.iter_rows():
        if f'"{action.id}"' in data:
            yield f"step {step}: {kind.replace('_', ' ')} on rank {rank}"


def _losses(store: Store, verdict: Verdict) -> Iterator[str]:
    """The loss at the verdict, some steps on, and at the attempt's end."""
    import polars as pl

    steps = store.frame("steps", verdict.run_id, (*PLACE_COLUMNS, "loss"))
    rows = by_step(steps.filter(pl.col("attempt") == verdict.attempt), ("loss",), verdict.rank)
    rows = rows.filter((pl.col("step") >= verdict.step) & pl.col("loss").is_not_null())
    if rows.is_empty():
        return
    known: Mapping[int, float] = dict(rows.select("step", "loss").iter_rows())
    last = int(rows.get_column("step")[-1])
    places = [verdict.step, *(verdict.step + ahead for ahead in _LATER), last]
    told = [f"{number(known[place])} at step {place}" for place in dict.fromkeys(places)
            if place in known]  # fmt: skip
    yield f"loss {', '.join(told)} (the attempt's last)"
