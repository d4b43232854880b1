"""The report's tables: the timeline, and the ranks side by side. Every text is escaped here."""

from __future__ import annotations

import json
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from plarv_schemas.events import Action, ControlEvent, Verdict, to_json_value
from plarv_sinks.report.charts import GLYPHS, Chart, Curve, draw
from plarv_sinks.report.escaped import escaped
from plarv_sinks.report.run_facts import RankCurves, RunFacts
from plarv_sinks.report.scale import number_text
from plarv_sinks.report.story import Story, when_text

__all__ = ["ranks_html", "timeline_html"]

_ROWS = 300  # of the timeline: half from its beginning, half from its end
_LINES = 24  # ranks drawn
_SLOW = 1.1  # times the middle rank's step time, to be marked


class _Row(NamedTuple):
    """One line of the timeline."""

    place: Tuple[int, int]  # ordinal, and what comes first at one
    when: str
    attempt: int
    step: str
    level: str  # a key of GLYPHS, or ""
    what: str
    text: str


def timeline_html(story: Story) -> str:
    """Verdicts, actions and control events in their order; how many, where not all are shown."""
    rows = sorted(_rows(story), key=lambda row: row.place)
    total = len(rows) + story.facts.num_controls - len(story.facts.controls)
    if not rows:
        return '<p class="soft">Nothing happened that was worth a line.</p>'
    tries = any(row.attempt > 1 for row in rows)
    tried = "<th>attempt</th>" if tries else ""
    head = f'<th>time, UTC</th>{tried}<th class="number">step</th><th></th><th>what</th><th></th>'
    shown, note = rows, ""
    if len(rows) > _ROWS:
        shown = rows[: _ROWS // 2] + rows[-_ROWS // 2 :]
        note = f" The first and the last {_ROWS // 2} are shown."
    body = [_row_html(row, tries) for row in shown]
    if note:
        gap = f'<tr><td colspan="6" class="soft">… {total - _ROWS:,} left out …</td></tr>'
        body.insert(_ROWS // 2, gap)
    count = f'<p class="soft">{total:,} {"entry" if total == 1 else "entries"}.{note}</p>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'{count}<div class="scroll">{table}</div>'


def _rows(story: Story) -> List[_Row]:
    facts, recorded = story.facts, story.recorded
    rows: List[_Row] = []
    for ordinal, attempt, event in facts.controls:
        step = "" if event.step is None else f"{event.step:,}"
        what, text = event.kind.replace("_", " "), _control_text(event)
        when = when_text(event.time_ns)
        rows.append(_Row((ordinal, 0), when, attempt, step, "", what, text))
    for verdict in recorded.verdicts:
        rows.append(_verdict_row(verdict, when_text(facts.times.get(verdict.ordinal))))
    for action in recorded.actions:
        rows.append(_action_row(action, when_text(facts.times.get(action.ordinal))))
    return rows


def _verdict_row(verdict: Verdict, when: str) -> _Row:
    where = "" if verdict.rank is None else f", rank {verdict.rank}"
    what = f"{verdict.detector}/{verdict.kind} {verdict.state}{where}"
    place = (verdict.ordinal, 1)
    return _Row(
        place, when, verdict.attempt, f"{verdict.step:,}", verdict.level, what, verdict.message
    )


def _action_row(action: Action, when: str) -> _Row:
    # The verdict behind a warning stands right above it, with its numbers.
    text = action.reason.partition(":")[0] if action.kind == "WARN" else action.reason
    if action.parameters.get("dry_run"):
        text += " (MANUAL: not applied)"
    place = (action.ordinal, 2)
    return _Row(place, when, action.attempt, f"{action.step:,}", "action", action.kind, text)


def _control_text(event: ControlEvent) -> str:
    """What the event says, without what it leaves open."""
    data: Dict[str, Any] = to_json_value(dict(event.data))
    given = {name: value for name, value in data.items() if value not in (None, "", False)}
    where = [] if event.rank is None else [f"rank {event.rank}"]
    parts = [f"{name} {_value_text(value)}" for name, value in given.items()]
    return ", ".join(where + parts)


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _row_html(row: _Row, tries: bool) -> str:
    glyph = f'<span class="glyph {row.level}">{GLYPHS[row.level]}</span>' if row.level else ""
    attempt = f"<td>{row.attempt}</td>" if tries else ""
    return (
        f'<tr><td class="when">{row.when}</td>{attempt}<td class="number">{row.step}</td>'
        f"<td>{glyph}</td><td>{escaped(row.what)}</td>"
        f'<td class="text">{escaped(row.text)}</td></tr>'
    )


def ranks_html(story: Story) -> str:
    """The ranks of the newest attempt, beside each other; "" for a run of one."""
    facts = story.facts
    if len(facts.ranks) < 2:
        return ""
    odd = _odd_ranks(story)
    drawn = [
        _rank_chart(facts, odd, name, title)
        for name, title in (
            ("loss", "Loss by rank"),
            ("step_time_ms", "Step time by rank, ms"),
            ("forward_ms", "Forward time by rank, ms"),
            ("grad_norm", "Gradient norm by rank"),
        )
    ]
    note = ""
    if len(facts.ranks) > _LINES:
        note = f'<p class="soft">{_LINES} of {len(facts.ranks)} ranks are drawn.</p>'
    if facts.num_other_ranks:
        note += f'<p class="soft">Ranks past the first {len(facts.ranks)} are left out.</p>'
    key = '<p class="legend"><span class="key odd">named by a verdict, or far from the others'
    key = f"{key}</span></p>" if odd else ""
    charts = f'<div class="charts">{"".join(drawn)}</div>'
    return f"{key}{charts}{_rank_table(facts, odd)}{note}"


def _rank_chart(facts: RunFacts, odd: Set[int], name: str, title: str) -> str:
    ranks = sorted(facts.ranks.values(), key=lambda rank: (rank.rank not in odd, rank.rank))
    curves = [
        Curve(
            f"rank {rank.rank}",
            list(rank.curves[name].points()),
            "odd" if rank.rank in odd else "peer",
            band=False,
        )
        for rank in ranks[:_LINES]
    ]
    newest = facts.newest
    if newest is None or not any(curve.points for curve in curves):
        return ""
    return draw(Chart(title, newest.first_step, newest.last_step, list(reversed(curves))))


def _odd_ranks(story: Story) -> Set[int]:
    facts = story.facts
    found = {
        verdict.rank
        for verdict in story.recorded.verdicts
        if verdict.rank is not None
        and verdict.attempt == facts.ranks_of
        and verdict.detector == "fleet_skew"
    }
    if story.cause.rank is not None and story.cause.attempt == facts.ranks_of:
        found.add(story.cause.rank)
    last = max(rank.last_step for rank in facts.ranks.values())
    found.update(rank.rank for rank in facts.ranks.values() if rank.last_step < last - 8)
    return found


def _rank_table(facts: RunFacts, odd: Set[int]) -> str:
    ranks = sorted(facts.ranks.values(), key=lambda each: each.rank)
    took, ahead = _times(ranks, "step_time_ms"), _times(ranks, "forward_ms")
    names = ["rank", "steps", "last step", "loss", "gradient norm", "step time, ms", "to others"]
    names += ["forward, ms", "to others"] if ahead else []
    head = "".join(f'<th class="number">{name}</th>' for name in (*names, "not finite"))
    rows: List[str] = []
    for rank in ranks:
        cells = [
            str(rank.rank),
            f"{rank.num_steps:,}",
            f"{rank.last_step:,}",
            _number(rank.last.get("loss")),
            _number(rank.last.get("grad_norm")),
            *_time_cells(took, rank.rank),
            *(_time_cells(ahead, rank.rank) if ahead else ()),
            f"{rank.num_lost:,}" if rank.num_lost else "",
        ]
        ratios = [times[rank.rank][1] for times in (took, ahead) if rank.rank in times]
        style = "odd" if rank.rank in odd or max(ratios, default=0.0) >= _SLOW else "even"
        body = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f'<tr class="{style}">{body}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _times(ranks: Sequence[RankCurves], name: str) -> Dict[int, Tuple[float, float]]:
    """Rank -> its late mean of a time, and that over the middle rank's."""
    means = {rank.rank: _late_mean(rank, name) for rank in ranks}
    given = {rank: mean for rank, mean in means.items() if mean is not None and mean > 0.0}
    if not given:
        return {}
    middle = sorted(given.values())[(len(given) - 1) // 2]
    return {rank: (mean, mean / middle) for rank, mean in given.items()}


def _time_cells(times: Dict[int, Tuple[float, float]], rank: int) -> Tuple[str, str]:
    if rank not in times:
        return "", ""
    mean, ratio = times[rank]
    return number_text(mean), f"x{ratio:.2f}"


def _late_mean(rank: RankCurves, name: str) -> Optional[float]:
    """The middle of the last quarter's means: no pause for a checkpoint moves it."""
    points: Sequence[float] = [p.mean for p in rank.curves[name].points() if p.mean == p.mean]
    last = sorted(points[-max(1, len(points) // 4) :])
    return last[len(last) // 2] if last else None


def _number(value: Optional[float]) -> str:
    return "" if value is None else number_text(value)
