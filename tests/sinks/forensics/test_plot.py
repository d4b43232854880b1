"""The picture of a run: what is on it, whatever the run was."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, List

import pytest
from tests.processors.logs import log_of
from tests.sinks.forensics.recorded import kept, steps_of

from plarv_schemas.events import ControlEvent, StepEvent

pytest.importorskip("polars")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")


def labels(figure: Any) -> List[str]:
    return [axes.get_ylabel() for axes in figure.axes]


def test_each_signal_has_a_panel_and_the_findings_one_more(tmp_path: Path) -> None:
    figure: Any = kept(tmp_path, log_of("explosion")).plot()
    assert labels(figure) == ["loss", "gradient norm", "learning rate", "step time (ms)", ""]
    assert figure.axes[1].get_yscale() == "log"
    lanes = [each.get_text() for each in figure.axes[-1].get_yticklabels()]
    assert lanes[-1] == "actions"
    assert {"loss_spike", "gradient_explosion"} <= set(lanes)
    named = " ".join(each.get_text() for each in figure.axes[-1].texts)
    assert "SET_LR" in named
    assert figure.axes[0].get_title(loc="left").startswith("run: completed")


def test_a_signal_that_was_never_reported_has_no_panel(tmp_path: Path) -> None:
    assert labels(kept(tmp_path, steps_of([2.0, 1.9])).plot()) == ["loss"]


def test_attempts_have_colours_and_names_of_their_own(tmp_path: Path) -> None:
    log = steps_of([3.0, 2.0, 1.0]) + steps_of([2.0, 1.0, 0.5], session="b", first=1)
    figure: Any = kept(tmp_path, log).plot()
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert [each.get_text() for each in legend.get_texts()] == ["attempt 1", "attempt 2"]
    lines = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("attempt")]
    assert len({line.get_color() for line in lines}) == 2


@pytest.mark.parametrize(
    "losses",
    [[math.nan] * 100, [math.inf, 2.0, -math.inf], [0.0] * 5, [-1.0, -2.0], [1e300, 1e-300], [2.0]],
    ids=["NaN", "infinite", "zero", "negative", "huge", "one"],
)
def test_any_numbers_make_a_picture(losses: List[float], tmp_path: Path) -> None:
    figure: Any = kept(tmp_path, steps_of(losses)).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_run_without_a_step_makes_a_picture_that_says_so(tmp_path: Path) -> None:
    ended = ControlEvent("run", "a", 1, 0, "session_finished", data={"status": "failed"})
    figure: Any = kept(tmp_path, [*steps_of([]), ended]).plot()
    assert [each.get_text() for each in figure.axes[0].texts] == ["no step with numbers"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_where_numbers_are_not_finite_there_is_a_mark(tmp_path: Path) -> None:
    figure: Any = kept(tmp_path, steps_of([2.0, math.nan, 2.0, math.inf])).plot()
    (marks,) = [line for line in figure.axes[0].lines if line.get_label() == "not finite"]
    assert list(marks.get_xdata()) == [1, 3]


def test_a_long_curve_is_thinned_and_keeps_its_peaks(tmp_path: Path) -> None:
    log = [
        event._replace(grad_norm=500.0 if event.step == 12_345 else 1.0)
        if isinstance(event, StepEvent)
        else event
        for event in steps_of([2.0 + 0.01 * (step % 7) for step in range(20_000)])
    ]
    figure: Any = kept(tmp_path, log).plot()
    raw = figure.axes[1].lines[0]
    assert len(raw.get_xdata()) < 5_000
    points = dict(zip(raw.get_xdata(), raw.get_ydata()))
    assert points[12_345] == 500.0


def test_one_rank_is_drawn_alone_where_it_is_named(tmp_path: Path) -> None:
    run = kept(tmp_path, log_of("straggler"))
    mean: Any = run.plot().axes[3].lines[0]
    alone: Any = run.plot(rank=2).axes[3].lines[0]
    assert list(mean.get_ydata()) != list(alone.get_ydata())


def test_without_matplotlib_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kept(tmp_path, steps_of([2.0]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib.*plarv-argus-sdk\[forensics\]"):
        run.plot()
