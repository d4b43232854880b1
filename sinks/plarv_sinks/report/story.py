"""What happened in a run: the three sentences, and the facts under them."""

from __future__ import annotations

import math
import time
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from plarv_processors.responses import harm_of
from plarv_schemas.events import Event, Level, StepEvent, Verdict, to_json_value
from plarv_sinks.findings_table import duration_text
from plarv_sinks.forensics.first_cause import FirstCause, first_cause
from plarv_sinks.report.run_facts import RunFacts
from plarv_sinks.report.source import Recorded
from plarv_sinks.run_quality import RunQuality

__all__ = ["Quality", "Story", "open_verdicts", "read_story", "when_text"]

_FINE = (None, "completed")
_JUDGED = 64  # steps from which on silence means something: most detectors' windows


class Quality(NamedTuple):
    """The data's quality as the trajectory shows it."""

    total: float
    components: Dict[str, float]
    sentence: str


class Story(NamedTuple):
    """All that the page shows."""

    recorded: Recorded
    facts: RunFacts
    cause: FirstCause
    quality: Optional[Quality]  # None: it could not be judged
    level: Level
    headline: str
    sentences: Sequence[str]  # three: what it was, what went wrong, what was done and what to do

    def to_dict(self) -> Dict[str, Any]:
        """The facts as JSON values."""
        facts, newest = self.facts, self.facts.newest
        return {
            "run_id": self.recorded.run_id,
            "level": self.level,
            "headline": self.headline,
            "sentences": list(self.sentences),
            "steps": facts.num_steps,
            "events": facts.num_events,
            "world_size": facts.world_size,
            "attempts": max(facts.attempts, default=0),
            "last_step": None if newest is None else newest.last_step,
            "status": None if newest is None else newest.status,
            "exception": None if newest is None else newest.exception,
            "duration_s": _duration_s(facts),
            "loss": {
                "first": to_json_value(facts.first_loss),
                "best": None if facts.best_loss is None else facts.best_loss[0],
                "best_step": None if facts.best_loss is None else facts.best_loss[1],
                "last": to_json_value(facts.last_loss),
            },
            "verdicts": len(self.recorded.verdicts),
            "actions": len(self.recorded.actions),
            "open": [found.to_dict() for found in open_verdicts(self.recorded, facts)],
            "first_cause": self.cause.to_dict(),
            "adqi": None
            if self.quality is None
            else {
                "total": to_json_value(self.quality.total),
                "components": to_json_value(self.quality.components),
                "sentence": self.quality.sentence,
            },
            "started": to_json_value(dict(facts.started)),
            "reproduce": list(self.recorded.commands),
        }


def read_story(recorded: Recorded) -> Story:
    """Reads the run's events once and says what happened.

    Cost: about 25 us an event; memory bounded by the number of ranks, verdicts and actions.
    """
    wanted = {found.ordinal for found in recorded.verdicts}
    wanted.update(found.ordinal for found in recorded.actions)
    facts = RunFacts(recorded.first_ordinal, frozenset(wanted))
    judge = RunQuality()
    cause = first_cause(
        _watched(recorded.events, facts, judge), recorded.verdicts, recorded.actions
    )
    standing = open_verdicts(recorded, facts)
    level = _level(facts, standing, recorded.verdicts)
    return Story(
        recorded=recorded,
        facts=facts,
        cause=cause,
        quality=_quality(judge),
        level=level,
        headline=_headline(level, facts, standing),
        sentences=(
            _what_it_was(facts),
            cause.sentence,
            _what_was_done(facts, recorded, standing, cause),
        ),
    )


def open_verdicts(recorded: Recorded, facts: RunFacts) -> List[Verdict]:
    """What had not been resolved when the newest attempt ended; the most harmful first."""
    attempt = max(facts.attempts, default=0)
    standing: Dict[Tuple[str, Optional[int]], Verdict] = {}
    for found in recorded.verdicts:
        if found.attempt == attempt:
            standing.pop((found.detector, found.rank), None)
            if found.state != "resolved":
                standing[(found.detector, found.rank)] = found
    return sorted(standing.values(), key=lambda found: -harm_of(found))


def _quality(judge: RunQuality) -> Optional[Quality]:
    """None: it could not be judged."""
    found = judge.score()
    if found.total is None or not math.isfinite(found.total):
        return None
    return Quality(found.total, dict(found.components), found.sentence)


def _watched(events: Iterable[Event], facts: RunFacts, judge: RunQuality) -> Iterator[Event]:
    """The events, each shown to all who want to see it."""
    for event in events:
        facts.add(event)
        if isinstance(event, StepEvent):
            judge.add(event, facts.ranks_of)
        yield event


def _level(facts: RunFacts, standing: Sequence[Verdict], verdicts: Sequence[Verdict]) -> Level:
    newest = facts.newest
    status = None if newest is None else newest.status
    if status == "failed" or any(found.level == "critical" for found in standing):
        return "critical"
    if standing or status not in _FINE or any(found.level == "critical" for found in verdicts):
        return "warn"
    return "ok"


def _headline(level: Level, facts: RunFacts, standing: Sequence[Verdict]) -> str:
    newest = facts.newest
    if newest is None:
        return "No step was recorded"
    if level == "ok":
        return "Healthy" if facts.num_steps >= _JUDGED else "Nothing found, in few steps"
    if level == "critical":
        if standing and standing[0].level == "critical":
            return f"Went wrong: {_name(standing[0])}"
        return f"Ended: {newest.status}"
    if standing:
        return f"Needs a look: {_name(standing[0])}"
    if newest.status not in _FINE:
        return f"Ended: {newest.status}"
    return "Went wrong, and recovered"


def _name(found: Verdict) -> str:
    where = "" if found.rank is None else f" on rank {found.rank}"
    return f"{found.detector} ({found.kind.replace('_', ' ')}){where}"


def _what_it_was(facts: RunFacts) -> str:
    newest = facts.newest
    if newest is None:
        return f"{facts.num_events:,} events were recorded, and no step among them."
    steps = f"{facts.num_steps:,} step{'' if facts.num_steps == 1 else 's'}"
    ranks = f" on {facts.world_size} ranks" if facts.world_size > 1 else ""
    duration = _duration_s(facts)
    took = "" if duration is None else f" in {duration_text(duration)}"
    attempts = max(facts.attempts)
    tries = f", in {attempts} attempts" if attempts > 1 else ""
    ended = " and has not said that it ended"
    if newest.status is not None:
        why = f" ({newest.exception})" if newest.exception else ""
        ended = f" and ended as {newest.status}{why}"
    return (
        f"The run went {steps}{ranks}{took}{tries}, to step {newest.last_step:,},"
        f"{ended}{_loss_text(facts)}."
    )


def _loss_text(facts: RunFacts) -> str:
    first, best, last = facts.first_loss, facts.best_loss, facts.last_loss
    if first is None or last is None:
        return "; it reported no loss"
    if best is None:
        return "; no loss was ever finite"
    text = f"; the loss began at {first:.4g}, was least at step {best[1]:,} with {best[0]:.4g}"
    return f"{text} and is {last:.4g} at the end"


def _what_was_done(
    facts: RunFacts, recorded: Recorded, standing: Sequence[Verdict], cause: FirstCause
) -> str:
    asked = [action for action in recorded.actions if action.kind != "WARN"]
    applied = [event for _, _, event in facts.controls if event.kind == "action_applied"]
    if not recorded.verdicts and not asked:
        return "Argus had nothing to say and did nothing; there is nothing to do."
    told = _count(len(recorded.verdicts), "verdict")
    still = f", {len(standing):,} open at the end" if standing else ", none open at the end"
    text = f"Argus wrote {told}{still if recorded.verdicts else ''}"
    if asked:
        kinds = ", ".join(f"{action.kind} at step {action.step:,}" for action in asked[:3])
        more = f" and {len(asked) - 3:,} more" if len(asked) > 3 else ""
        text += f" and asked for {kinds}{more}"
        dry = all(action.parameters.get("dry_run") for action in asked)
        text += f" ({len(applied):,} applied{', in MANUAL it only reports' if dry else ''})"
    return f"{text}. {_advice(facts, cause)}"


def _advice(facts: RunFacts, cause: FirstCause) -> str:
    if cause.step is None or cause.verdict is None or not cause.lasted:
        return "There is nothing to do."
    found = cause.verdict
    if found.detector == "fleet_skew" and found.kind in ("straggler", "slowdown"):
        which = "the machines" if cause.rank is None else f"the machine of rank {cause.rank}"
        return f"It costs time and harms no weight: look at {which}."
    if found.detector == "generalization_gap":
        return f"By validation the best weights are those of step {cause.step:,}."
    before = [
        step for attempt, step, _ in facts.saved if attempt == cause.attempt and step < cause.step
    ]
    if before:
        return f"Go back to the checkpoint of step {max(before):,}, the last one before it began."
    return f"Whatever was saved from step {cause.step:,} on may carry the fault."


def _duration_s(facts: RunFacts) -> Optional[float]:
    if facts.first_ns is None or facts.last_ns is None:
        return None
    return max(0.0, (facts.last_ns - facts.first_ns) * 1e-9)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def when_text(time_ns: Optional[int]) -> str:
    """A time, UTC, to the second; "" where none is known."""
    if time_ns is None:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_ns * 1e-9))
    except (OverflowError, ValueError, OSError):
        return ""
