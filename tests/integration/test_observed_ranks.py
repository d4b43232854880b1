"""Jobs in which nobody can agree to act: AUTO observes them, says so, and gets in nobody's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.integration.law import controls, live_records, replayed_records
from tests.integration.live import LiveRun, stream

from plarv_processors.complete_steps import CompleteSteps
from plarv_schemas.events import StepEvent
from plarv_schemas.records import paused_by
from plarv_schemas.run_log import read_run


class Optimizer:
    def __init__(self) -> None:
        self.param_groups: List[Dict[str, Any]] = [{"lr": 0.5}]


def train(run: LiveRun) -> None:
    """A divergence, then NaN: AUTO would lower the learning rate, then pause."""
    for event in [*stream("divergence", 620), *_dying()]:
        run.feed([event])
        if event.step % 100 == 0:
            run.catch_up()
    run.complete()


def _dying() -> List[StepEvent]:
    return [event._replace(step=event.step + 620) for event in stream("dead", 640)]


def kinds(folder: Path) -> List[str]:
    return [action["kind"] for action in live_records(folder)[1]]


def test_without_a_store_auto_drops_what_it_decides_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = Optimizer()
    run = LiveRun(monkeypatch, ranks=2, mode="AUTO", optimizer=optimizer, silent=False)
    train(run)
    said = capsys.readouterr().err
    assert "torch.distributed is not initialised yet: until it is, AUTO only observes" in said
    assert "SET_LR dropped: no store to agree by" in said
    assert {"SET_LR", "PAUSE"} <= set(kinds(run.folder))
    assert not run.paused
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert controls(run.folder, "action_applied") == []
    dropped = controls(run.folder, "action_dropped")
    assert {event.data["why"] for event in dropped} == {"no store to agree by"}
    assert {event.data["kind"] for event in dropped} == {"SET_LR", "PAUSE"}
    assert live_records(run.folder) == replayed_records(run.folder)


def test_a_pause_that_all_ranks_dropped_does_not_hold_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = LiveRun(monkeypatch, ranks=2, mode="AUTO")
    train(run)
    assert "PAUSE" in kinds(run.folder)
    assert paused_by(run.folder) is None
    LiveRun(monkeypatch, ranks=2, mode="AUTO").complete()


def test_the_ranks_of_one_node_of_several_are_observed_as_if_they_were_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = Optimizer()
    run = LiveRun(
        monkeypatch, ranks=2, mode="AUTO", first_rank=2, world_size=4,
        optimizer=optimizer, accept_operator=True, silent=False,
    )  # fmt: skip
    train(run)
    said = capsys.readouterr().err
    assert "2 of 4 ranks are on this node, and the embedded engine sees only these" in said
    assert "AUTO only observes" in said
    assert not run.paused
    assert optimizer.param_groups[0]["lr"] == 0.5
    verdicts, actions = live_records(run.folder)
    assert (verdicts, actions) == replayed_records(run.folder)
    grave = [action for action in actions if action["kind"] in ("SET_LR", "PAUSE")]
    assert grave
    assert all(action["parameters"]["dry_run"] for action in grave)
    assert paused_by(run.folder) is None
    started = controls(run.folder, "session_started")[0].data
    assert (started["mode"], started["world_size"], started["local_world_size"]) == ("MANUAL", 4, 2)


def test_steps_are_complete_with_the_ranks_of_the_node_and_wait_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = LiveRun(monkeypatch, ranks=2, first_rank=2, world_size=4)
    steps_of_a_model = stream("language_model", 50)
    run.feed(steps_of_a_model[:4])
    run.catch_up()  # both ranks' journals are there: neither holds its steps back in memory
    run.feed(steps_of_a_model[4:])
    run.complete()
    events = [event for event in read_run(run.folder) if isinstance(event, StepEvent)]
    assert {(event.rank, event.world_size) for event in events} == {(2, 2), (3, 2)}
    steps = CompleteSteps()
    joined = [each for event in events for each in steps.add(event)]
    assert [(each.step, len(each.parts)) for each in joined] == [(step, 2) for step in range(50)]


def test_one_rank_of_each_node_is_a_run_of_one_rank_that_nobody_may_stop_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    run = LiveRun(monkeypatch, mode="AUTO", accept_operator=True)
    train(run)
    assert "PAUSE" in kinds(run.folder)
    assert not run.paused
    assert live_records(run.folder) == replayed_records(run.folder)
