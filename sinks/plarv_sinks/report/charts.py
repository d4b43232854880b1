"""Charts as small hand-made SVG: a band from least to greatest, a line of means, marks beside it.

The drawing is stretched to the page's width and all text is HTML beside it, so that a telephone
shows the same letters as a wall. Every text is escaped here.
"""

from __future__ import annotations

import json
from typing import Dict, List, NamedTuple, Sequence, Tuple

from plarv_sinks.report.envelope import Bucket
from plarv_sinks.report.escaped import escaped
from plarv_sinks.report.scale import Scale, number_text, scale_of, step_ticks

__all__ = ["GLYPHS", "Chart", "Curve", "Mark", "draw", "legend"]

_WIDTH, _HEIGHT = 1000.0, 200.0  # of the drawing, before it is stretched
_DOTS = 40  # points up to which each is shown
_PLACES = 64  # marks beside each other; further ones are joined

GLYPHS: Dict[str, str] = {"critical": "●", "warn": "▲", "ok": "✓", "action": "◆", "cause": "★"}
"""What a mark looks like: by shape, and only then by colour."""

_VERDICTS = ("critical", "warn", "ok")
_ORDER = ("cause", "critical", "action", "warn", "ok")


class Mark(NamedTuple):
    """Something that happened at a step."""

    step: int
    level: str  # a key of GLYPHS
    text: str


class Curve(NamedTuple):
    """One line; ``style`` is its class: main, past, odd or peer."""

    name: str
    points: Sequence[Bucket]
    style: str = "main"
    band: bool = True


class Chart(NamedTuple):
    """What is drawn in one frame."""

    title: str
    first: int  # step at the left edge
    last: int  # step at the right edge
    curves: Sequence[Curve]
    marks: Sequence[Mark] = ()


def draw(chart: Chart) -> str:
    """The chart as one HTML figure; "" where it has no value at all."""
    points = [point for curve in chart.curves for point in curve.points]
    if not points:
        return ""
    scale = scale_of(value for point in points for value in (point.least, point.most))
    body = [_lost(chart, points)]
    if scale is not None:
        body = [_grid(scale), *body]
        for curve in chart.curves:
            body.append(_curve(curve, scale, chart))
    body += [_line(mark, chart) for mark in chart.marks if mark.level in _ORDER[:3]]
    title = escaped(chart.title)
    kind = ", logarithmic" if scale is not None and scale.is_log else ""
    size = f'viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" preserveAspectRatio="none"'
    return (
        f'<figure class="chart"><figcaption><b>{title}</b><span class="unit">{kind[2:]}</span>'
        f"{_end(chart)}<output></output></figcaption>"
        f'<div class="frame">{_labels(scale)}<div class="plot" {_data(chart)}>'
        f'<svg {size} role="img" aria-label="{title} by step">{"".join(body)}</svg>'
        f'<i class="cursor"></i>{_causes(chart)}</div>{_lanes(chart)}{_steps(chart)}</div>'
        "</figure>"
    )


def legend(chart: Chart) -> str:
    """Which line is which, for a chart of several that are told apart."""
    items = [
        f'<span class="key {curve.style}">{escaped(curve.name)}</span>'
        for curve in chart.curves
        if curve.style in ("main", "odd", "past")
    ]
    return f'<p class="legend">{" ".join(items)}</p>' if items else ""


def _x(step: float, chart: Chart) -> float:
    span = max(1, chart.last - chart.first)
    return min(1.0, max(0.0, (step - chart.first) / span))


def _at(step: float, chart: Chart) -> str:
    return f"{_x(step, chart) * _WIDTH:.1f}"


def _y(value: float, scale: Scale) -> str:
    return f"{(1.0 - scale.share(value)) * _HEIGHT:.1f}"


def _curve(curve: Curve, scale: Scale, chart: Chart) -> str:
    """Band and line; broken where nothing finite was."""
    drawn: List[str] = []
    for run in _runs(curve.points):
        line = " ".join(f"{_at(p.step, chart)} {_y(p.mean, scale)}" for p in run)
        if curve.band and any(p.most > p.least for p in run):
            upper = [f"{_at(p.step, chart)} {_y(p.most, scale)}" for p in run]
            lower = [f"{_at(p.step, chart)} {_y(p.least, scale)}" for p in reversed(run)]
            path = " ".join((*upper, *lower))
            drawn.append(f'<path class="band {curve.style}" d="M{path}Z"/>')
        drawn.append(f'<path class="line {curve.style}" d="M{line}"/>')
        if len(curve.points) <= _DOTS:
            dots = "".join(f"M{_at(p.step, chart)} {_y(p.mean, scale)}h.01" for p in run)
            drawn.append(f'<path class="dots {curve.style}" d="{dots}"/>')
    return "".join(drawn)


def _runs(points: Sequence[Bucket]) -> List[List[Bucket]]:
    runs: List[List[Bucket]] = [[]]
    for point in points:
        if point.mean == point.mean:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _lost(chart: Chart, points: Sequence[Bucket]) -> str:
    """Where values were not finite: a red foot."""
    width = max(2.0, _WIDTH / max(1, chart.last - chart.first + 1))
    places = sorted({f"{_x(p.step, chart) * (_WIDTH - width):.1f}" for p in points if p.lost})
    foot = [
        f'<rect class="lost" x="{place}" y="{_HEIGHT - 14:.0f}" width="{width:.1f}" height="14"/>'
        for place in places
    ]
    return "".join(foot)


def _grid(scale: Scale) -> str:
    lines = "".join(f"M0 {_y(tick, scale)}H{_WIDTH:.0f}" for tick in scale.ticks())
    return f'<path class="grid" d="{lines}"/>'


def _line(mark: Mark, chart: Chart) -> str:
    return f'<path class="mark {mark.level}" d="M{_at(mark.step, chart)} 0V{_HEIGHT:.0f}"/>'


def _labels(scale: object) -> str:
    if not isinstance(scale, Scale):
        return '<div class="values"><span style="bottom:0%">not finite</span></div>'
    spans = [
        f'<span style="bottom:{100.0 * scale.share(tick):.1f}%">{number_text(tick)}</span>'
        for tick in scale.ticks()
    ]
    return f'<div class="values">{"".join(spans)}</div>'


def _steps(chart: Chart) -> str:
    spans = [
        f'<span style="left:{100.0 * _x(step, chart):.1f}%">{step:,}</span>'
        for step in step_ticks(chart.first, chart.last)
    ]
    return f'<div class="steps">{"".join(spans)}</div>'


def _lanes(chart: Chart) -> str:
    """Under the drawing a lane of verdicts and one of actions."""
    verdicts = _lane(chart, [mark for mark in chart.marks if mark.level in _VERDICTS])
    actions = _lane(chart, [mark for mark in chart.marks if mark.level == "action"])
    return f'<div class="lane">{verdicts}</div><div class="lane">{actions}</div>'


def _lane(chart: Chart, marks: Sequence[Mark]) -> str:
    """The marks, those at one place joined under the gravest."""
    places: Dict[int, List[Mark]] = {}
    for mark in marks:
        places.setdefault(round(_x(mark.step, chart) * _PLACES), []).append(mark)
    spans: List[str] = []
    for _, joined in sorted(places.items()):
        first = min(joined, key=lambda mark: (_ORDER.index(mark.level), mark.step))
        shown = [f"step {mark.step:,}: {mark.text}" for mark in joined[:6]]
        if len(joined) > len(shown):
            shown.append(f"and {len(joined) - len(shown):,} more")
        spans.append(
            f'<span class="{first.level}" style="left:{100.0 * _x(first.step, chart):.1f}%" '
            f'title="{escaped(chr(10).join(shown))}" data-mark="{first.level}">'
            f"{GLYPHS[first.level]}</span>"
        )
    return "".join(spans)


def _causes(chart: Chart) -> str:
    """At the top of the drawing, where it all began."""
    marks = [mark for mark in chart.marks if mark.level == "cause"]
    return f'<div class="began">{_lane(chart, marks)}</div>' if marks else ""


def _end(chart: Chart) -> str:
    """The newest value, for the eye that reads no axis."""
    for curve in reversed(chart.curves):
        finite = [point for point in curve.points if point.mean == point.mean]
        if curve.style in ("main", "odd") and curve.points:
            if curve.points[-1].lost and curve.points[-1].mean != curve.points[-1].mean:
                return '<span class="end critical">not finite at the end</span>'
            if finite:
                return f'<span class="end">{number_text(finite[-1].mean)} at the end</span>'
    return ""


def _data(chart: Chart) -> str:
    """What the hover script reads: the means of the newest attempt, or of each rank."""
    found: List[Tuple[str, List[Tuple[float, str]]]] = [
        (curve.name, [(p.step, number_text(p.mean)) for p in curve.points])
        for curve in chart.curves
        if curve.style in ("main", "odd")
    ]
    text = escaped(json.dumps(found, separators=(",", ":"), ensure_ascii=True))
    return f'data-first="{chart.first}" data-last="{chart.last}" data-curves="{text}"'
