"""What the demo says: a few numbers side by side, what Argus did, and whether replay agrees."""

from __future__ import annotations

import math
import shutil
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from plarv.demo.plan import Curve, Plan, typical_loss
from plarv.demo.replay_check import ReplayCheck
from plarv_schemas.events import to_json_value

__all__ = ["Outcome", "as_json", "tell"]

_COLOUR = {"red": "31", "yellow": "33", "green": "32", "bold": "1", "dim": "2"}
_LEVEL_COLOUR = {"ok": "green", "warn": "yellow", "critical": "red"}


class Outcome(NamedTuple):
    """Both runs, what Argus recorded, and what came of checking it."""

    plan: Plan
    alone: Curve
    watched: Curve
    check: ReplayCheck
    picture: Path
    run_dir: Path
    seconds: float

    @property
    def acted_at(self) -> Optional[int]:
        """The first step that was made with a lower learning rate than the schedule's."""
        for step, (one, other) in enumerate(zip(self.alone.rates, self.watched.rates)):
            if other < one:
                return step
        return None

    @property
    def same_until(self) -> int:
        """How many losses from the start are bitwise equal in both runs."""
        count = 0
        for one, other in zip(self.alone.losses, self.watched.losses):
            if one != other:
                break
            count += 1
        return count

    @property
    def rescued(self) -> bool:
        """Whether Argus acted, the run went on to its end, and ended far better than alone."""
        under, alone = self.watched.final_loss, self.alone.final_loss
        better = math.isfinite(under) and not alone < 1.25 * under  # also where alone is NaN
        return self.acted_at is not None and not self.watched.stopped and better


def as_json(outcome: Outcome) -> Dict[str, Any]:
    """All of it as one JSON object; non-finite numbers as strings."""
    plan, check = outcome.plan, outcome.check
    summary: Dict[str, Any] = {
        "steps": len(outcome.watched.losses),
        "injury_step": plan.injury_step,
        "injury_factor": plan.injury_factor,
        "learning_rate": plan.learning_rate,
        "alone": _summary(plan, outcome.alone),
        "argus": {**_summary(plan, outcome.watched), "acted_at": outcome.acted_at},
        "same_until": outcome.same_until,
        "rescued": outcome.rescued,
        "verdicts": check.verdicts,
        "actions": check.actions,
        "replay": {
            "identical": check.identical,
            "verdicts": len(check.verdicts),
            "actions": len(check.actions),
            "difference": check.difference,
        },
        "picture": str(outcome.picture),
        "run_dir": str(outcome.run_dir),
        "seconds": round(outcome.seconds, 1),
    }
    return {name: to_json_value(value) for name, value in summary.items()}


def _summary(plan: Plan, curve: Curve) -> Dict[str, Any]:
    return {
        "loss_untrained": curve.losses[0],
        "loss_before": typical_loss(curve.losses[: plan.injury_step + 1]),
        "loss_worst": max((x for x in curve.losses if not math.isnan(x)), default=math.nan),
        "loss_final": curve.final_loss,
        "steps": len(curve.losses),
        "milliseconds_a_step": 1e3 * curve.seconds / len(curve.losses),
        "writes": curve.writes,
        "stopped": curve.stopped,
    }


def tell(outcome: Outcome, *, colour: bool) -> Iterator[str]:
    """The lines for a person."""
    paint = _Paint(colour)
    yield ""
    yield from _compare(outcome, paint)
    yield ""
    yield paint("What Argus saw and did", "bold")
    yield from _timeline(outcome, paint)
    yield ""
    yield f"picture  {outcome.picture}"
    yield f"journal  {outcome.run_dir}"
    check = outcome.check
    if check.identical:
        counts = f"{len(check.verdicts)} verdicts and {len(check.actions)} actions"
        yield f"replay   {paint('identical', 'green')}: {counts}, every field, in a fresh process"
    else:
        yield f"replay   {paint('NOT identical', 'red')}: {check.difference}"
    yield paint(_verdict_on_it_all(outcome), "bold")


def _compare(outcome: Outcome, paint: _Paint) -> Iterator[str]:
    plan = outcome.plan
    one, other = _summary(plan, outcome.alone), _summary(plan, outcome.watched)
    yield paint(f"{'loss':<31}{'alone':>12}{'under Argus':>16}", "bold")
    before = f"before the injury at step {plan.injury_step}"
    for label, name in ((before, "loss_before"), ("at its worst", "loss_worst")):
        yield f"  {label:<29}{_number(one[name]):>12}{_number(other[name]):>16}"
    alone, under = f"{_number(one['loss_final']):>12}", f"{_number(other['loss_final']):>16}"
    hue = "green" if outcome.rescued else "red"
    yield f"  {'at the end':<29}{paint(alone, 'red')}{paint(under, hue)}"
    yield paint(
        f"  an untrained network has {_number(one['loss_untrained'])}; the first "
        f"{outcome.same_until} losses of both runs are the same, bit for bit",
        "dim",
    )
    fewest = min(len(outcome.alone.losses), len(outcome.watched.losses))
    if fewest < plan.steps and not outcome.watched.stopped:
        yield f"  {fewest} steps instead of {plan.steps}: this machine needs its time"
    yield ""
    yield f"  alone it writes        {outcome.alone.writes}"
    yield f"  under Argus it writes  {outcome.watched.writes}"


def _timeline(outcome: Outcome, paint: _Paint) -> Iterator[str]:
    plan = outcome.plan
    injured = plan.learning_rate * plan.injury_factor
    entries: List[Tuple[int, int, str, str, str]] = [
        (plan.injury_step, 0, "injury", "red", f"the learning rate goes to {injured:.3g} and stays")
    ]
    for verdict in outcome.check.verdicts:
        word = verdict["level"] if verdict["state"] != "resolved" else "resolved"
        what = f"{verdict['detector']} ({verdict['kind']}): {verdict['message']}"
        entries.append((verdict["step"], 1, word, _LEVEL_COLOUR[verdict["level"]], what))
    for action in outcome.check.actions:
        if action["kind"] != "WARN":  # the verdict behind it says it all
            entries.append((action["step"], 2, action["kind"], "bold", action["reason"]))
    if outcome.acted_at is not None:
        rate = outcome.watched.rates[outcome.acted_at]
        what = f"from here on the optimizer uses {rate:.3g}, whatever the schedule sets"
        entries.append((outcome.acted_at, 3, "applied", "green", what))
    for step, _, word, hue, what in sorted(entries, key=lambda entry: entry[:2]):
        yield from _wrapped(f"  step {step:>4}  ", paint(f"{word:<10}", hue), 22, what)


def _wrapped(start: str, word: str, indent: int, what: str) -> Iterator[str]:
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    lines = textwrap.wrap(what, width - indent - 1) or [""]
    yield f"{start}{word} {lines[0]}"
    for line in lines[1:]:
        yield " " * (indent + 1) + line


def _verdict_on_it_all(outcome: Outcome) -> str:
    took = f"{outcome.seconds:.0f} s"
    if outcome.watched.stopped:
        return f"Argus stopped the run ({took}): {outcome.watched.stopped}"
    final = f"{_number(outcome.watched.final_loss)} instead of "
    final += _number(outcome.alone.final_loss)
    if not outcome.rescued:
        return f"The run was not saved: {final} ({took})."
    return f"The run was saved: {final} ({took})."


def _number(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and value >= 100 else f"{value:.2f}"


class _Paint:
    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, text: str, hue: str) -> str:
        return f"\x1b[{_COLOUR[hue]}m{text}\x1b[0m" if self._colour else text
