"""The page itself: one HTML file that asks nobody for anything. Every text is escaped here."""

from __future__ import annotations

import platform
from typing import Iterator, List, Sequence, Tuple

from plarv_schemas.events import Verdict
from plarv_sinks.report.charts import GLYPHS, Chart, Curve, Mark, draw, legend
from plarv_sinks.report.escaped import escaped
from plarv_sinks.report.run_facts import SERIES, AttemptCurves, RunFacts
from plarv_sinks.report.scale import number_text
from plarv_sinks.report.story import Story, open_verdicts, when_text
from plarv_sinks.report.style import POLICY, SCRIPT, STYLE
from plarv_sinks.report.tables import ranks_html, timeline_html

__all__ = ["page"]

_SUSPECTS = 5  # shown
_ABOUT = {
    "loss": ("loss", "non_finite", "sample", "optimizer", "gradient", "canal", "fleet", "general"),
    "val_loss": ("general",),
    "grad_norm": ("gradient", "canal", "non_finite"),
    "current_lr": (),
    "update_norm": ("optimizer",),
    "step_time_ms": ("fleet",),
}
"""Column -> how the detectors' names begin whose verdicts are marked at it; all at the loss."""


def page(story: Story, made_by: str = "") -> str:
    """The whole report as HTML; ``made_by`` names the version that made it."""
    title = f"{escaped(story.recorded.run_id)}: {escaped(story.headline)}"
    sections = (
        ("First cause" if story.cause.lasted else "First warning", _cause_html(story)),
        ("Curves", _charts_html(story)),
        ("Ranks side by side", ranks_html(story)),
        ("Quality of the data (ADQI)", _quality_html(story)),
        ("Timeline", timeline_html(story)),
        ("How to reproduce", _reproduce_html(story, made_by)),
    )
    body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in sections if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="generator" content="Argus">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><main>{_top_html(story)}{body}{_footer_html(story)}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _top_html(story: Story) -> str:
    facts = story.facts
    project = facts.started.get("project")
    parts = [f"run <b>{escaped(story.recorded.run_id)}</b>"]
    if project:
        parts.append(f"project {escaped(str(project))}")
    if facts.first_ns is not None:
        parts.append(f"{when_text(facts.first_ns)} to {when_text(facts.last_ns)} UTC")
    glyph = {"critical": GLYPHS["critical"], "warn": GLYPHS["warn"], "ok": GLYPHS["ok"]}
    sentences = "".join(
        f"<li{' class=cause' if number == 1 and story.level != 'ok' else ''}>{escaped(each)}</li>"
        for number, each in enumerate(story.sentences)
    )
    return (
        f'<header class="top {story.level}"><h1>{glyph[story.level]} {escaped(story.headline)}</h1>'
        f"<p>{' · '.join(parts)}</p></header>"
        f'<ul class="story">{sentences}</ul>{_facts_html(story)}'
    )


def _facts_html(story: Story) -> str:
    pairs = "".join(
        f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in _pairs(story)
    )
    return f'<dl class="facts">{pairs}</dl>'


def _pairs(story: Story) -> Iterator[Tuple[str, str]]:
    facts, newest = story.facts, story.facts.newest
    if newest is None:
        return
    yield "last step", f"{newest.last_step:,}"
    total = facts.started.get("total_steps")
    if isinstance(total, int) and total > 0:
        yield "of the plan", f"{min(1.0, (newest.last_step + 1) / total):.0%} of {total:,}"
    if facts.last_loss is not None:
        yield "last loss", number_text(facts.last_loss)
    if facts.best_loss is not None:
        yield "least loss", f"{number_text(facts.best_loss[0])} at {facts.best_loss[1]:,}"
    yield "ranks", f"{facts.world_size:,}"
    yield "attempts", f"{max(facts.attempts):,}"
    yield from _throughput(facts)
    standing = open_verdicts(story.recorded, facts)
    yield "verdicts", f"{len(story.recorded.verdicts):,}, {len(standing):,} open"
    if story.quality is not None:
        yield "data quality", f"{story.quality.total:.2f} of 1"


def _throughput(facts: RunFacts) -> Iterator[Tuple[str, str]]:
    """Steps and samples a second of wall time, over all attempts."""
    if facts.first_ns is None or facts.last_ns is None or facts.last_ns <= facts.first_ns:
        return
    seconds = (facts.last_ns - facts.first_ns) * 1e-9
    yield "steps a second", number_text(facts.num_steps / seconds)
    if facts.num_samples:
        yield "samples a second", number_text(facts.num_samples / seconds)


def _cause_html(story: Story) -> str:
    cause = story.cause
    if cause.verdict is None:
        return ""
    items: List[str] = []
    for suspect in cause.ranking[:_SUSPECTS]:
        reasons = "".join(f"<li>{escaped(reason)}</li>" for reason in suspect.reasons)
        found = suspect.verdict
        name = escaped(f"{found.detector} ({found.kind.replace('_', ' ')})")
        where = "" if suspect.rank is None else f" on rank {suspect.rank}"
        layers = f" in {escaped(', '.join(suspect.layers))}" if suspect.layers else ""
        items.append(
            f'<li><b>{name}</b>{where}{layers} <span class="share">{suspect.score:.0%}</span>'
            f"<ul>{reasons}</ul></li>"
        )
    more = len(cause.ranking) - len(items)
    note = f'<p class="soft">{more:,} further suspects are left out.</p>' if more > 0 else ""
    others = ""
    if len(items) > 1:
        count = "1 other suspect" if len(items) == 2 else f"{len(items) - 1} other suspects"
        others = f'<ol class="suspects">{"".join(items[1:])}</ol>{note}'
        others = f"<details><summary>{count}, ranked</summary>{others}</details>"
    return f'<div class="card"><ol class="suspects first">{items[0]}</ol>{others}</div>'


def _charts_html(story: Story) -> str:
    facts = story.facts
    newest = facts.newest
    if newest is None:
        return ""
    tries = [facts.attempts[number] for number in sorted(facts.attempts)]
    first = min(attempt.first_step for attempt in tries)
    last = max(attempt.last_step for attempt in tries)
    drawn: List[str] = []
    key = ""
    for column, title in SERIES:
        curves = [
            Curve(
                f"attempt {attempt.attempt}" if len(tries) > 1 else title.lower(),
                list(attempt.curves[column].points()),
                "main" if attempt is newest else "past",
                band=attempt is newest,
            )
            for attempt in tries
        ]
        chart = Chart(title, first, last, curves, _marks(story, column))
        drawn.append(draw(chart))
        key = key or (legend(chart) if drawn[-1] and len(tries) > 1 else "")
    text = "".join(drawn)
    return f'{_key_html(tries, story)}{key}<div class="charts">{text}</div>' if text else ""


def _key_html(tries: Sequence[AttemptCurves], story: Story) -> str:
    names = {
        "cause": "first cause",
        "critical": "critical verdict",
        "warn": "warning",
        "ok": "resolved",
        "action": "action",
    }
    used = {mark.level for column, _ in SERIES for mark in _marks(story, column)}
    parts = [
        f'<span class="glyph {level}">{GLYPHS[level]}</span> {name}'
        for level, name in names.items()
        if level in used
    ]
    kept = max(story.facts.attempts)
    if kept > len(tries):
        parts.append(f"{len(tries)} of {kept} attempts are drawn")
    band = "band: least to greatest, line: mean"
    return f'<p class="legend">{" &nbsp; ".join([*parts, band])}</p>'


def _marks(story: Story, column: str) -> List[Mark]:
    """Verdicts that are about the column, actions above a warning, and where it all began."""
    marks: List[Mark] = []
    about = _ABOUT[column]
    for verdict in story.recorded.verdicts:
        if column == "loss" or verdict.detector.startswith(about or ("\0",)):
            marks.append(Mark(verdict.step, verdict.level, _verdict_text(verdict)))
    for action in story.recorded.actions:
        if action.kind != "WARN":
            dry = " (MANUAL: not applied)" if action.parameters.get("dry_run") else ""
            marks.append(Mark(action.step, "action", f"{action.kind}{dry}"))
    if story.cause.step is not None and story.cause.lasted:
        marks.append(Mark(story.cause.step, "cause", "first cause"))
    return marks


def _verdict_text(verdict: Verdict) -> str:
    where = "" if verdict.rank is None else f" on rank {verdict.rank}"
    return f"{verdict.detector}/{verdict.kind} {verdict.state}{where}"


def _quality_html(story: Story) -> str:
    quality = story.quality
    if quality is None:
        return ""
    rows = "".join(
        f"<tr><td>{escaped(name.replace('_', ' '))}</td><td>{_bar(value)}</td>"
        f'<td class="number">{value:.2f}</td></tr>'
        for name, value in quality.components.items()
    )
    return (
        f'<div class="card"><p><b>{quality.total:.2f}</b> of 1 {_bar(quality.total)}</p>'
        f"<p>{escaped(quality.sentence)}</p><table><tbody>{rows}</tbody></table></div>"
    )


def _bar(share: float) -> str:
    width = 100.0 * min(1.0, max(0.0, share))
    return f'<span class="bar"><i style="width:{width:.0f}%"></i></span>'


def _reproduce_html(story: Story, made_by: str) -> str:
    recorded = story.recorded
    commands = escaped("\n".join(recorded.commands))
    versions = [f"report by {made_by}" if made_by else "", f"Python {platform.python_version()}"]
    sdk = story.facts.started.get("sdk")
    if sdk:
        versions.append(f"run under SDK {sdk}")
    found = sorted({verdict.version for verdict in recorded.verdicts})
    if found:
        versions.append(f"detectors {', '.join(found)}")
    told = escaped("; ".join(version for version in versions if version))
    return f'<pre>{commands}</pre><pre>{escaped(recorded.snippet)}</pre><p class="soft">{told}</p>'


def _footer_html(story: Story) -> str:
    facts = story.facts
    return (
        f"<footer>{facts.num_events:,} events, {len(story.recorded.verdicts):,} verdicts and "
        f"{len(story.recorded.actions):,} actions were read. This file loads nothing.</footer>"
    )
