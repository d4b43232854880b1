"""A run as a picture: its curves over the steps, what was found, and what was done."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from plarv_schemas.events import Action, Verdict
from plarv_sinks.forensics.extras import require

if TYPE_CHECKING:
    import polars as pl

__all__ = ["PLOTTED", "plot"]

PLOTTED = ("loss", "grad_norm", "current_lr", "step_time_ms")
_LABELS = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "current_lr": "learning rate",
    "step_time_ms": "step time (ms)",
}
_HEIGHTS = {"loss": 3.0, "grad_norm": 1.7, "current_lr": 1.0, "step_time_ms": 1.2}
_ATTEMPTS = ("#1d4ed8", "#0f766e", "#7c3aed", "#be185d", "#a16207")  # the newest first
_LEVEL = {"warn": "#f59e0b", "critical": "#b91c1c"}
_ACTION = "#111827"
_INK = "#374151"
_GRID = "#e5e7eb"
_POINTS = 4_000  # of a curve; past that its lowest and highest of each stretch are drawn
_LOG_FROM = 8.0  # highest to lowest, for a logarithmic axis
_LOG_RANGE = (1e-100, 1e100)  # beyond, matplotlib's logarithms overflow
_MOST_LANES = 12
_FEW, _MANY = 40, 400  # points: each with a dot; a running median besides
_QUIET = ("WARN", "CHECKPOINT", "CERTIFY", "FREEZE")  # actions that change nothing in the run

Axes = Any  # matplotlib's own types leave its keyword arguments open


class _Span(NamedTuple):
    """How long a verdict stood at one level."""

    first: int
    last: int
    level: str


def plot(
    title: str, rows: pl.DataFrame, verdicts: Sequence[Verdict], actions: Sequence[Action]
) -> Any:
    """The figure; ``rows`` are those of ``by_step`` with the columns ``PLOTTED``."""
    require("matplotlib")
    shown = [name for name in PLOTTED if rows.get_column(name).null_count() < rows.height]
    lanes = _lanes(verdicts, rows)
    heights = [_HEIGHTS[name] for name in shown] or [1.0]
    findings = 0.35 + 0.24 * (len(lanes) + bool(actions)) if lanes or actions else 0.0
    figure: Any = _figure_class()(
        figsize=(11, 0.6 + 1.15 * sum(heights) + findings), dpi=110, layout="constrained"
    )
    ratios = [1.15 * height for height in heights] + ([findings] if findings else [])
    panels: List[Axes] = list(
        figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    )
    panels[0].set_title(title, loc="left", fontsize=12, color=_ACTION)
    if not shown:
        panels[0].text(0.5, 0.5, "no step with numbers", ha="center", transform=panels[0].transAxes)
    for axes, name in zip(panels, shown):
        _draw_curves(axes, name, rows)
    curves = panels[: len(heights)]
    _mark(curves, lanes, actions, rows)
    low, high = _range(rows)
    panels[0].set_xlim(low, high)
    if findings:
        _draw_findings(panels[-1], lanes, actions, high - low)
    for axes in panels:
        _dress(axes)
    panels[-1].set_xlabel("step", color=_INK)
    return figure


def _range(rows: pl.DataFrame) -> Tuple[float, float]:
    """The first and last step, with a margin."""
    steps = rows.get_column("step")
    first: Any = steps.min() if rows.height else 0
    last: Any = steps.max() if rows.height else 0
    margin = max(0.5, (last - first) * 0.01)
    return first - margin, last + margin


@lru_cache(maxsize=None)
def _figure_class() -> Any:
    """A figure that a notebook shows whatever backend it has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas: Any = FigureCanvasAgg

    class RunFigure(Figure):
        """A figure that shows itself as a PNG."""

        def _repr_png_(self) -> bytes:
            stream = BytesIO()
            figure: Any = self
            canvas(figure)
            figure.savefig(stream, format="png")
            return stream.getvalue()

    return RunFigure


def _draw_curves(axes: Axes, name: str, rows: pl.DataFrame) -> None:
    import polars as pl

    attempts: List[int] = rows.get_column("attempt").unique().sort().to_list()
    for attempt in attempts:
        mine = rows.filter((pl.col("attempt") == attempt) & pl.col(name).is_not_null())
        if mine.is_empty():
            continue
        colour = _ATTEMPTS[(attempts[-1] - attempt) % len(_ATTEMPTS)]
        _draw_curve(axes, name, mine, colour, f"attempt {attempt}")
        odd = mine.filter(~pl.col(name).is_finite()).get_column("step").to_list()[:_POINTS]
        if odd:
            axes.plot(
                odd, [0.03] * len(odd), "x", color=_LEVEL["critical"], markersize=5, zorder=4,
                transform=axes.get_xaxis_transform(), clip_on=False, label="not finite",
            )  # fmt: skip
    axes.set_ylabel(_LABELS[name], color=_INK)
    _scale(axes, rows.get_column(name))
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles))
    if name == "loss" and len(entries) > 1:
        axes.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, loc="upper right")


def _draw_curve(axes: Axes, name: str, rows: pl.DataFrame, colour: str, label: str) -> None:
    """The numbers as they are; where there are many, pale, with their running median on top."""
    steps, values = _points(rows, name)
    if len(steps) < _MANY:
        few = {"marker": "o", "markersize": 3} if len(steps) < _FEW else {}
        axes.plot(steps, values, color=colour, linewidth=1.3, label=label, zorder=3, **few)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35, zorder=2)
    finite = rows.filter(rows.get_column(name).is_finite())
    width = max(5, finite.height // 150)
    middle = finite.get_column(name).rolling_median(width, min_samples=1, center=True)
    each = max(1, finite.height // _POINTS)
    axes.plot(
        finite.get_column("step").gather_every(each).to_list(),
        middle.gather_every(each).to_list(),
        color=colour, linewidth=1.6, label=label, zorder=3,
    )  # fmt: skip


def _points(rows: pl.DataFrame, name: str) -> Tuple[List[int], List[float]]:
    """Steps and values; of a long curve the lowest and highest of each stretch, in order."""
    import polars as pl

    finite = pl.when(pl.col(name).is_finite()).then(pl.col(name)).otherwise(float("nan"))
    rows = rows.select("step", finite.alias(name))
    if rows.height > _POINTS:
        each = 2 * rows.height // _POINTS
        place = pl.int_range(pl.len()) // each
        ends = [pl.col(name).arg_min(), pl.col(name).arg_max()]
        parts = rows.filter(pl.col(name).is_not_nan()).group_by(place, maintain_order=True)
        picked = parts.agg(pl.col("step", name).gather(pl.concat_list(ends).explode().sort()))
        rows = picked.select("step", name).explode("step", name)
    return rows.get_column("step").to_list(), rows.get_column(name).to_list()


def _scale(axes: Axes, values: pl.Series) -> None:
    """Logarithmic where all is positive and it spans much; plain numbers as labels."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    finite = values.drop_nulls()
    finite = finite.filter(finite.is_finite())
    if finite.is_empty():
        return
    low: Any = finite.min()
    high: Any = finite.max()
    if low > _LOG_RANGE[0] and high < _LOG_RANGE[1] and high / low >= _LOG_FROM:
        axes.set_yscale("log")
        wide = high / low >= 100.0
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter() if wide else FuncFormatter(_between))


def _plain(value: float, _: object) -> str:
    return f"{value:,g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.0e}"


def _between(value: float, _: object) -> str:
    """Labels 2 and 5 between the powers of ten."""
    leading = f"{value:.0e}"[0]
    return _plain(value, None) if leading in "25" else ""


def _mark(
    panels: Sequence[Axes],
    lanes: Mapping[str, Sequence[_Span]],
    actions: Sequence[Action],
    rows: pl.DataFrame,
) -> None:
    """Where verdicts stood, shaded; what was done to the run and where attempts begin, as lines."""
    spans = [span for each in lanes.values() for span in each]
    for axes in panels:
        for first, last, level in _merged(spans):
            colour = _LEVEL.get(level, _INK)
            axes.axvspan(first, last, color=colour, alpha=0.12, linewidth=0, zorder=0)
        for first, level in {(span.first, span.level) for span in spans}:
            colour = _LEVEL.get(level, _INK)
            axes.axvline(first, color=colour, linewidth=0.8, alpha=0.45, zorder=1)
        for step in {action.step for action in actions if action.kind not in _QUIET}:
            axes.axvline(step, color=_ACTION, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        for start in _starts(rows)[1:]:
            axes.axvline(start, color=_INK, linewidth=0.8, linestyle=(0, (6, 4)), alpha=0.6)


def _merged(spans: Sequence[_Span]) -> List[_Span]:
    """Of each level the stretches in which any verdict stood: shades must not add up."""
    merged: List[_Span] = []
    for level in _LEVEL:
        last: Optional[int] = None
        for span in sorted(each for each in spans if each.level == level):
            if last is None or span.first > last:
                merged.append(span)
            elif span.last > last:
                merged[-1] = merged[-1]._replace(last=span.last)
            last = merged[-1].last
    return merged


def _starts(rows: pl.DataFrame) -> List[int]:
    import polars as pl

    firsts = rows.group_by("attempt").agg(pl.col("step").first()).sort("attempt")
    found: List[int] = firsts.get_column("step").to_list()
    return found


def _lanes(verdicts: Sequence[Verdict], rows: pl.DataFrame) -> Dict[str, List[_Span]]:
    """Of each detector, when its verdicts stood; an attempt's end ends them."""
    import polars as pl

    lasts = dict(rows.group_by("attempt").agg(pl.col("step").max()).iter_rows())
    lanes: Dict[str, List[_Span]] = {}
    standing: Dict[Tuple[int, str, Optional[int]], Verdict] = {}
    for found in verdicts:
        key = (found.attempt, found.detector, found.rank)
        spans = lanes.setdefault(found.detector, [])
        before = standing.pop(key, None)
        if before is not None:
            spans.append(_Span(before.step, found.step, before.level))
        if found.state != "resolved":
            standing[key] = found
    for (attempt, detector, _), found in standing.items():
        last = max(found.step, lasts.get(attempt, found.step))
        lanes[detector].append(_Span(found.step, last, found.level))
    return dict(list(lanes.items())[:_MOST_LANES])


def _draw_findings(
    axes: Axes, lanes: Mapping[str, Sequence[_Span]], actions: Sequence[Action], span: float
) -> None:
    names = list(lanes)
    for place, spans in enumerate(lanes.values()):
        for each in spans:
            colour = _LEVEL.get(each.level, _INK)
            axes.plot([each.first, each.last], [place, place], color=colour, linewidth=6,
                      solid_capstyle="butt")  # fmt: skip
            axes.plot([each.first], [place], "|", color=colour, markersize=11, markeredgewidth=2)
    if actions:
        place = len(names)
        names.append("actions")
        axes.plot([action.step for action in actions], [place] * len(actions), "v",
                  color=_ACTION, markersize=6)  # fmt: skip
        _name_actions(axes, actions, place, span)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _name_actions(axes: Axes, actions: Sequence[Action], place: int, span: float) -> None:
    """Their kinds beside their marks; those that stand close have one label, as room allows."""
    groups: List[List[Action]] = []
    for action in sorted(actions, key=lambda each: each.step):
        if groups and action.step - groups[-1][-1].step <= 0.02 * span:
            groups[-1].append(action)
        else:
            groups.append([action])
    free = float("-inf")
    high = axes.get_xlim()[1]
    for group in groups:
        text = ", ".join(dict.fromkeys(action.kind for action in group))
        width = (0.02 + 0.007 * len(text)) * span
        step, left = group[-1].step, group[-1].step + width > high
        step = group[0].step if left else step
        if step - (width if left else 0.0) >= free:
            axes.annotate(text, (step, place), xytext=(-7 if left else 7, 0), va="center",
                          ha="right" if left else "left", fontsize=8,
                          textcoords="offset points", color=_ACTION)  # fmt: skip
            free = step if left else step + width


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=_INK, labelsize=9)
