"""One run's tables, its timeline, and what stands side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, List

import pytest
from tests.processors.logs import log_of
from tests.sinks.forensics.recorded import as_dict, keep, kept, steps_of

from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_sinks.forensics import Run, open_store

pl = pytest.importorskip("polars")
pytest.importorskip("pyarrow")

NAN = math.nan


def texts(run: Run, kind: str) -> List[str]:
    found: List[str] = run.timeline().filter(pl.col("kind") == kind)["text"].to_list()
    return found


def test_its_frames_hold_what_the_log_held(tmp_path: Path) -> None:
    log = log_of("spike")
    run = kept(tmp_path, log)
    steps = [event for event in log if isinstance(event, StepEvent)]
    assert run.steps()["loss"].to_list() == [event.loss for event in steps]
    assert run.steps(("step", "loss")).columns == ["step", "loss"]
    assert run.events()["kind"].to_list() == ["session_started", "order", "session_finished"]
    verdicts, recorded = run.verdicts(), run.store.verdicts("run")
    assert verdicts["id"].to_list() == [found.id for found in recorded]
    assert as_dict(verdicts["evidence"].to_list()[0]) == dict(recorded[0].evidence)
    assert run.actions()["id"].to_list() == [found.id for found in run.store.actions("run")]


def test_an_attempt_alone_is_asked_for_by_its_number(tmp_path: Path) -> None:
    log = steps_of([3.0, 2.0, 1.0]) + steps_of([9.0, 8.0], session="b", first=1)
    run = kept(tmp_path, log)
    assert run.steps(attempt=2)["loss"].to_list() == [9.0, 8.0]
    assert run.events(("kind",), attempt=1)["kind"].to_list() == ["session_started"]


def test_the_timeline_stands_in_the_logs_order_with_a_sentence_each(tmp_path: Path) -> None:
    run = kept(tmp_path, log_of("explosion"))
    line = run.timeline()
    assert line["ordinal"].is_sorted()
    assert line["text"].null_count() == 0
    assert line["what"].unique().sort().to_list() == ["action", "event", "step", "verdict"]
    wanted = {*run.verdicts()["id"], *run.actions()["id"]}
    assert set(line["id"].drop_nulls()) == wanted
    first, last = line.row(0, named=True), line.row(-1, named=True)
    assert (first["kind"], last["kind"]) == ("session_started", "session_finished")
    at_once = line.filter(pl.col("ordinal") == line.filter(pl.col("what") == "action")[1, 0])
    assert at_once["what"].to_list()[0] == "verdict"  # and then what was done about it
    timed = line.filter(pl.col("what") == "verdict")
    assert timed["time"].null_count() == 0  # of the step that it was found at


def test_what_is_notable_about_the_steps_has_a_line(tmp_path: Path) -> None:
    losses = [3.0, 2.0, NAN, math.inf, 2.5, 1.5, NAN, 2.0]
    log = [
        event._replace(current_lr=0.1 if event.step < 5 else 0.02, grad_norm=float(event.step))
        if isinstance(event, StepEvent)
        else event
        for event in steps_of(losses)
    ]
    run = kept(tmp_path, log)
    assert texts(run, "first_step") == ["attempt 1 begins at step 0: loss 3, learning rate 0.1"]
    assert texts(run, "lowest_loss") == ["lowest loss of the attempt: 1.5"]
    assert texts(run, "highest_grad_norm") == ["highest gradient norm of the attempt: 7"]
    assert texts(run, "non_finite_loss") == [
        "loss is NaN, and not finite up to step 3 (2 reports)",
        "loss is NaN",
    ]
    assert texts(run, "learning_rate") == ["learning rate 0.1 -> 0.02"]
    assert texts(run, "no_end") == [
        "the run's end is not recorded: it still runs, was killed, or its end was lost"
    ]


def test_a_run_without_a_start_says_so(tmp_path: Path) -> None:
    run = kept(tmp_path, steps_of([2.0, 1.0])[1:])
    assert texts(run, "no_start") == ["the run's start is not recorded"]
    assert run.steps().height == 2


def test_a_run_that_never_made_a_step_still_has_a_story(tmp_path: Path) -> None:
    failed = ControlEvent("run", "a", 1, 0, "session_finished", data={"status": "failed"})
    run = kept(tmp_path, [*steps_of([])[:1], failed])
    assert run.timeline()["kind"].to_list() == ["session_started", "session_finished"]
    assert run.compare().height == 0
    assert "failed" in str(run)


def test_two_attempts_each_have_their_beginning_and_end(tmp_path: Path) -> None:
    log = steps_of([3.0, 2.0, 1.0]) + steps_of([2.0, 1.0, 0.5], session="b", first=1)
    run = kept(tmp_path, log)
    kinds = run.timeline().filter(pl.col("kind").is_in(["first_step", "last_step"]))
    assert kinds.select("attempt", "step", "kind").rows() == [
        (1, 0, "first_step"), (1, 2, "last_step"), (2, 1, "first_step"), (2, 3, "last_step"),
    ]  # fmt: skip


def fleet(clocks_s: List[float], steps: int = 6) -> List[Event]:
    """Ranks whose clocks are off by so much; rank r has loss r."""
    log: List[Event] = []
    for step in range(steps):
        for rank, off in enumerate(clocks_s):
            time_ns = 1_700_000_000_000_000_000 + int((step + off) * 1e9)
            log.append(
                StepEvent("run", f"s{rank}", step, rank, step, time_ns, len(clocks_s), loss=rank)
            )
    return log


def test_clocks_of_ranks_that_disagree_are_told_and_change_no_order(tmp_path: Path) -> None:
    run = kept(tmp_path, fleet([0.0, 3600.0, 0.5, -120.0]))
    assert texts(run, "clock") == [
        "the clock of rank 1 is 3,600 s ahead of that of rank 0",
        "the clock of rank 3 is 120 s behind that of rank 0",
    ]
    assert run.steps()["ordinal"].to_list() == list(range(24))


def test_a_clock_that_goes_back_and_a_long_pause_are_told(tmp_path: Path) -> None:
    log: List[Any] = steps_of([1.0] * 30)
    later = [event._replace(time_ns=event.time_ns + 7_200 * 10**9) for event in log[20:25]]
    run = kept(tmp_path, log[:20] + later + log[25:])
    assert texts(run, "pause") == ["7,201 s since the step before; 1 s are usual"]
    assert texts(run, "clock") == [
        "the clock goes back by 7,199 s; the log's order is the true one"
    ]


def test_nan_everywhere_is_read_like_anything_else(tmp_path: Path) -> None:
    numbers: Any = dict.fromkeys(("grad_norm", "current_lr", "val_loss", "step_time_ms"), NAN)
    run = kept(tmp_path, steps_of([NAN] * 50, **numbers))
    assert texts(run, "non_finite_loss") == [
        "loss is NaN, and not finite up to step 49 (50 reports)"
    ]
    assert run.compare(attempt=1, other_attempt=1)["loss_difference"].is_nan().all()
    assert run.verdicts().height > 0
    assert "nan" in run._repr_html_()


def test_a_comparison_is_aligned_by_step_and_has_the_differences(tmp_path: Path) -> None:
    keep(tmp_path, steps_of([5.0, 4.0, 3.0], run_id="one"))
    keep(tmp_path, steps_of([4.5, 3.5], run_id="other", first=1, grad_norm=1.0))
    store = open_store(tmp_path)
    found = store.run("one").compare(store.run("other"))
    assert found.columns == ["step", "loss", "loss_other", "loss_difference"]
    assert found.rows() == [
        (0, 5.0, None, None), (1, 4.0, 4.5, -0.5), (2, 3.0, 3.5, -0.5),
    ]  # fmt: skip
    asked = store.run("one").compare(store.run("other"), columns=("grad_norm",))
    assert asked["grad_norm_other"].to_list() == [None, 1.0, 1.0]


def test_where_a_step_repeats_the_last_attempt_counts_unless_one_is_named(tmp_path: Path) -> None:
    log = steps_of([5.0, 4.0, 3.0]) + steps_of([9.0, 8.0], session="b", first=1)
    run = kept(tmp_path, log)
    mine = run.compare(attempt=1)
    assert mine.select("loss", "loss_other").rows() == [(5.0, 5.0), (4.0, 9.0), (3.0, 8.0)]
    both = run.compare(attempt=1, other_attempt=2)
    assert both["loss_difference"].to_list() == [None, -5.0, -5.0]


def test_ranks_are_averaged_or_one_is_chosen(tmp_path: Path) -> None:
    run = kept(tmp_path, fleet([0.0, 0.0, 0.0]))
    assert run.compare()["loss"].to_list() == [1.0] * 6
    assert run.compare(rank=2)["loss"].to_list() == [2.0] * 6


def test_a_step_reported_twice_has_each_columns_last_value(tmp_path: Path) -> None:
    log: List[Any] = steps_of([5.0, 4.0])
    log.append(log[-1]._replace(record=9, loss=None, val_loss=4.5))
    run = kept(tmp_path, log)
    assert run.compare().select("step", "loss", "val_loss").rows() == [
        (0, 5.0, None), (1, 4.0, 4.5),
    ]  # fmt: skip


def test_it_knows_what_began_it_and_how_good_its_data_are(tmp_path: Path) -> None:
    run = kept(tmp_path, log_of("explosion"))
    cause = run.first_cause()
    assert cause.verdict is not None
    assert cause.verdict.step == 600
    assert cause.ranking[0].verdict == cause.verdict
    total = run.adqi().total
    assert total is None or 0.0 <= total <= 1.0


def test_a_store_is_also_named_by_a_uri(tmp_path: Path) -> None:
    keep(tmp_path, steps_of([2.0, 1.5]))
    run = open_store(tmp_path.as_uri()).run("run")
    assert run.steps()["loss"].to_list() == [2.0, 1.5]
    assert run.timeline().height == 5


def test_it_shows_its_verdicts_in_a_terminal_and_in_a_notebook(tmp_path: Path) -> None:
    run = kept(tmp_path, log_of("spike"))
    assert repr(run).startswith("Run('run': completed, 1 attempt, 900 step reports")
    assert "loss_spike/transient" in str(run)
    shown = run._repr_html_()
    assert "loss_spike/transient" in shown
    assert "http" not in shown


def test_a_message_that_holds_markup_is_shown_as_text(tmp_path: Path) -> None:
    run = kept(
        tmp_path, log_of("spike"), change=lambda each: each._replace(message="<script>\x1b[1m")
    )
    assert "<script>" not in run._repr_html_()
    assert "\x1b" not in str(run)
    assert "\x1b" not in "".join(run.timeline()["text"])
