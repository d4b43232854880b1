"""The picture: two loss curves, what Argus found and did, and the learning rates below."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from plarv.demo.plan import Curve, Plan

__all__ = ["draw", "smooth"]

_ALONE = "#c2410c"
_ARGUS = "#1d4ed8"
_INK = "#374151"
_LEVEL = {"warn": "#f59e0b", "critical": "#b91c1c"}
_REACH = 6  # steps on either side that a smoothed loss covers

Record = Mapping[str, Any]
Axes = Any  # matplotlib's own types leave its keyword arguments open


def draw(
    path: Path,
    plan: Plan,
    alone: Curve,
    watched: Curve,
    verdicts: Sequence[Record],
    actions: Sequence[Record],
) -> None:
    """Writes the PNG; its folder is made."""
    spans = _open_spans(verdicts, len(watched.losses) - 1)
    rows = max(1, len(spans))
    figure: Any = Figure(figsize=(11, 7.2 + 0.16 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 1, height_ratios=[4.6, 0.3 + 0.26 * rows, 1.3])
    top: Axes = figure.add_subplot(grid[0])
    middle: Axes = figure.add_subplot(grid[1], sharex=top)
    bottom: Axes = figure.add_subplot(grid[2], sharex=top)
    _draw_losses(top, plan, alone, watched)
    _draw_verdicts(middle, spans)
    _draw_rates(bottom, plan, alone, watched)
    for axes in (top, middle, bottom):
        axes.axvline(plan.injury_step, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=_INK, labelbottom=axes is bottom)
    _mark_actions(top, alone, watched, actions)
    top.set_xlim(0, max(len(alone.losses), len(watched.losses)) - 1)
    bottom.set_xlabel("step", color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(losses: Sequence[float], reach: int = _REACH) -> List[float]:
    """The geometric mean of each loss and its neighbours; NaN where none of them is finite.

    >>> smooth([1.0, 4.0, 4.0, float("nan")], reach=1)
    [2.0, 2.519842099789746, 4.0, 4.0]
    """
    smoothed: List[float] = []
    for place in range(len(losses)):
        near = losses[max(0, place - reach) : place + reach + 1]
        logs = [math.log(loss) for loss in near if math.isfinite(loss) and loss > 0.0]
        smoothed.append(math.exp(math.fsum(logs) / len(logs)) if logs else math.nan)
    return smoothed


def _draw_losses(axes: Axes, plan: Plan, alone: Curve, watched: Curve) -> None:
    highest = 0.0
    for curve, colour, name in ((alone, _ALONE, "alone"), (watched, _ARGUS, "under Argus")):
        smoothed = _smoothed_around(curve.losses, plan.injury_step)
        label = f"{name}: {curve.final_loss:.3g} at the end"
        axes.plot(curve.losses, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(smoothed, color=colour, linewidth=2.4, label=label)
        highest = max([highest, *(loss for loss in smoothed if math.isfinite(loss))])
    axes.set_yscale("log")
    axes.set_ylim(top=3.0 * highest)  # the raw curve's peaks may leave it
    axes.yaxis.set_major_formatter(FuncFormatter(_major_label))
    axes.yaxis.set_minor_formatter(FuncFormatter(_minor_label))
    axes.set_ylabel("loss (nats a character)", color=_INK)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.legend(loc="upper left", frameon=False, fontsize=11)
    axes.set_title(
        "The same run, seed and injury twice: alone, and under Argus in AUTO mode",
        loc="left",
        fontsize=13,
        color="#111827",
    )
    axes.annotate(
        f"injury at step {plan.injury_step}:\nlearning rate times {plan.injury_factor:g}",
        (plan.injury_step, 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=10,
        color=_INK,
    )


def _major_label(value: float, _: object) -> str:
    return f"{value:,g}"


def _minor_label(value: float, _: object) -> str:
    """Labels 2, 5, 20, 50, ... between the powers of ten."""
    leading = round(value / 10.0 ** math.floor(math.log10(value)))
    return f"{value:,g}" if leading in (2, 5) else ""


def _smoothed_around(losses: Sequence[float], injury_step: int) -> List[float]:
    """Smoothed before and after the injury, not across it: a jump stays a jump."""
    return smooth(losses[: injury_step + 1]) + smooth(losses[injury_step + 1 :])


def _open_spans(
    verdicts: Sequence[Record], last_step: int
) -> Dict[str, List[Tuple[int, int, str]]]:
    """(first step, last step, level) of each stretch in which a detector's verdict stood."""
    spans: Dict[str, List[Tuple[int, int, str]]] = {}
    standing: Dict[Tuple[str, Any], Tuple[int, str]] = {}
    for verdict in verdicts:
        detector, step = str(verdict["detector"]), int(verdict["step"])
        key = (detector, verdict["rank"])
        if key in standing:
            since, level = standing.pop(key)
            spans[detector].append((since, step, level))
        if verdict["state"] != "resolved":
            standing[key] = (step, str(verdict["level"]))
            spans.setdefault(detector, [])
    for (detector, _), (since, level) in standing.items():
        spans[detector].append((since, last_step, level))
    return spans


def _draw_verdicts(axes: Axes, spans: Mapping[str, Sequence[Tuple[int, int, str]]]) -> None:
    names = list(spans)
    for row, name in enumerate(names):
        for since, until, level in spans[name]:
            axes.barh(row, max(2, until - since), left=since, height=0.66, color=_LEVEL[level])
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_ylim(max(1, len(names)) - 0.4, -0.6)  # the first that fired on top
    axes.set_title("verdicts while they stood", loc="left", fontsize=10, color=_INK)
    for level, colour in _LEVEL.items():
        axes.barh([0], [0], color=colour, label=level)
    axes.legend(loc="upper left", frameon=False, ncols=2, fontsize=9)


def _draw_rates(axes: Axes, plan: Plan, alone: Curve, watched: Curve) -> None:
    axes.plot(alone.rates, color=_ALONE, linewidth=2.2)
    axes.plot(watched.rates, color=_ARGUS, linewidth=2.2)
    for rates, colour in ((alone.rates, _ALONE), (watched.rates, _ARGUS)):
        axes.annotate(
            f"{rates[-1]:.2g}",
            (len(rates) - 1, rates[-1]),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=10,
            color=colour,
        )
    axes.set_yscale("log")
    axes.set_ylim(plan.rate(0), plan.learning_rate * plan.injury_factor * 8)
    axes.set_ylabel("learning rate", color=_INK)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)


def _mark_actions(axes: Axes, alone: Curve, watched: Curve, actions: Sequence[Record]) -> None:
    """A star on the curve at what Argus did to the run: not where it only warned."""
    steps, ends = len(watched.losses), watched.final_loss * alone.final_loss
    between = math.sqrt(ends) if math.isfinite(ends) else 2.0 * watched.final_loss
    for action in actions:
        step = int(action["step"])
        if action["kind"] in ("WARN", "CHECKPOINT") or step >= steps:
            continue
        rate = action["parameters"].get("lr")
        what = action["kind"] + (f" to {rate:.2g}" if isinstance(rate, float) else "")
        loss = watched.losses[step]
        axes.plot([step], [loss], marker="*", markersize=17, color=_ARGUS, markeredgecolor="white")
        axes.annotate(
            f"Argus: {what}\nafter step {step}",
            (step, loss),
            xytext=(step + 0.06 * steps, between),
            va="center",
            fontsize=11,
            fontweight="bold",
            color=_ARGUS,
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            arrowprops={"arrowstyle": "-", "color": _ARGUS},
        )
