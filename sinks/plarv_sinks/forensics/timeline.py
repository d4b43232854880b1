"""What happened in a run, in the log's order: facts of steps, control events, verdicts, actions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable, Sequence, Tuple

from plarv_schemas.events import Action, ControlEvent, Verdict
from plarv_sinks.forensics.sentences import action_sentence, control_sentence, printable
from plarv_sinks.forensics.step_facts import StepFact

if TYPE_CHECKING:
    import polars as pl

__all__ = ["timeline"]

_COLUMNS = ("ordinal", "time_ns", "attempt", "rank", "step", "what", "kind", "level", "text", "id")
_STEP, _EVENT, _VERDICT, _ACTION = range(4)  # at the same place in the log
_LAST = 1 << 62

_Line = Tuple[Any, ...]


def timeline(
    facts: Iterable[StepFact],
    controls: Iterable[Tuple[int, int, ControlEvent]],
    verdicts: Sequence[Verdict],
    actions: Sequence[Action],
    times: pl.DataFrame,
) -> pl.DataFrame:
    """One row a happening, each with a sentence.

    Columns: ``ordinal``, ``time`` (UTC, of the clock of whoever wrote the event), ``attempt``,
    ``rank`` (null: the run), ``step``, ``what`` (step, event, verdict, action), ``kind``,
    ``level``, ``text``, ``id`` (of verdicts and actions). ``controls`` come with ordinal and
    attempt; ``times`` has the columns ordinal and time_ns of the steps, for what carries none.
    """
    import polars as pl

    lines = [*_fact_lines(facts), *_control_lines(controls)]
    lines += [*_verdict_lines(verdicts), *_action_lines(actions)]
    lines.sort(key=lambda line: (line[0], line[1]))
    kinds = {**dict.fromkeys(_COLUMNS, pl.Int64), **dict.fromkeys(_COLUMNS[5:], pl.String)}
    frame = pl.DataFrame([line[2] for line in lines], schema=kinds, orient="row")
    known = times.filter(pl.col("ordinal").is_not_null()).select("ordinal", at="time_ns")
    frame = frame.join(known, on="ordinal", how="left", maintain_order="left")
    time = pl.coalesce("time_ns", "at").cast(pl.Datetime("ns", "UTC"))
    return frame.with_columns(time.alias("time")).select(
        [name if name != "time_ns" else "time" for name in _COLUMNS]
    )


def _fact_lines(facts: Iterable[StepFact]) -> Iterable[_Line]:
    for fact in facts:
        cells = (*fact[:5], "step", fact.kind, None, fact.text, None)
        yield _LAST if fact.ordinal is None else fact.ordinal, _STEP, cells


def _control_lines(controls: Iterable[Tuple[int, int, ControlEvent]]) -> Iterable[_Line]:
    for ordinal, attempt, event in controls:
        place = (ordinal, event.time_ns, attempt, event.rank, event.step)
        cells = (*place, "event", event.kind, None, control_sentence(event), None)
        yield ordinal, _EVENT, cells


def _verdict_lines(verdicts: Sequence[Verdict]) -> Iterable[_Line]:
    for found in verdicts:
        place = (found.ordinal, None, found.attempt, found.rank, found.step)
        kind = f"{found.detector}/{found.kind}/{found.state}"
        cells = (*place, "verdict", kind, found.level, printable(found.message), found.id)
        yield found.ordinal, _VERDICT, cells


def _action_lines(actions: Sequence[Action]) -> Iterable[_Line]:
    for action in actions:
        place = (action.ordinal, None, action.attempt, None, action.step)
        cells = (*place, "action", action.kind, None, action_sentence(action), action.id)
        yield action.ordinal, _ACTION, cells
