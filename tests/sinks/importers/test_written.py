"""What the real writers wrote comes back as events: runs, steps, names, beginnings and ends."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest

from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import ControlEvent, StepEvent
from plarv_sinks.importers import ImportedRun, format_of, open_source
from plarv_sinks.replay import ReplayError, read_events

Written = Callable[[str], Path]


def opened(
    path: Path, columns: Optional[Dict[str, str]] = None
) -> Tuple[List[ImportedRun], List[str]]:
    told: List[str] = []
    return list(open_source(path, columns=columns, tell=told.append)), told


def steps_of(run: ImportedRun) -> List[StepEvent]:
    return [event for event in run.events() if isinstance(event, StepEvent)]


def controls_of(run: ImportedRun) -> List[ControlEvent]:
    return [event for event in run.events() if isinstance(event, ControlEvent)]


def attempts_of(events: Any) -> List[int]:
    engine = Engine(EngineConfig(detectors=()))
    found = []
    for event in events:
        engine.fold(event)
        found.append(engine.attempt)
    return sorted(set(found))


def is_the_series(steps: List[StepEvent]) -> bool:
    """Twenty steps with NaN at 7, as `writers` has them."""
    losses = [step.loss for step in steps if step.loss is not None]
    wrong = [number for number, loss in enumerate(losses) if math.isnan(loss)]
    return len(losses) == 20 and wrong == [7] and abs(losses[19] - 1.81) < 1e-6


@pytest.mark.parametrize(
    ("writer", "kind", "runs"),
    [
        ("tensorboard", "tensorboard", 3),
        ("torch", "tensorboard", 1),
        ("wandb", "wandb", 2),
        ("mlflow", "mlflow", 2),
        pytest.param("lightning", "lightning", 2, marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_runs_is_known_by_content_and_gives_the_same_events_each_time(
    written_by: Written, writer: str, kind: str, runs: int
) -> None:
    folder = written_by(writer)
    assert format_of(folder) == kind
    first, _ = opened(folder)
    again, _ = opened(folder)
    assert len(first) == runs
    assert len({run.run_id for run in first}) == runs
    assert is_the_series(steps_of(next(run for run in first if "newer" not in run.name)))
    for run, same in zip(first, again):
        events = list(run.events())
        assert repr(events) == repr(list(same.events()))
        assert [event.record for event in events] == list(range(len(events)))
        assert events[0].kind == "session_started"  # type: ignore[union-attr]
        assert {event.run_id for event in events} == {run.run_id}
        assert len({event.session for event in events}) == 1


def test_values_of_one_step_are_one_event_with_its_time(written_by: Written) -> None:
    runs, told = opened(written_by("tensorboard") / "one")
    steps = steps_of(runs[0])
    assert [step.step for step in steps] == list(range(20))
    assert steps[3].current_lr == 0.5
    assert steps[3].time_ns == (10**9 + 3) * 10**9
    assert [told_of.partition(": ")[2] for told_of in told] == ["left out 1 metric: reward"]


def test_an_evaluation_that_counts_epochs_opens_no_attempt(written_by: Written) -> None:
    runs, _ = opened(written_by("tensorboard") / "one")
    assert steps_of(runs[0])[-1].val_loss == 2.5
    assert attempts_of(runs[0].events()) == [1]


def test_a_resumed_run_goes_back_and_is_the_next_attempt(written_by: Written) -> None:
    runs, _ = opened(written_by("tensorboard") / "resumed")
    assert [step.step for step in steps_of(runs[0])] == [*range(10), *range(5, 10)]
    assert attempts_of(runs[0].events()) == [1, 2]


def test_an_event_file_cut_in_the_middle_is_read_up_to_the_cut(
    written_by: Written, tmp_path: Path
) -> None:
    (file,) = (written_by("tensorboard") / "one").iterdir()
    cut = tmp_path / file.name
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    runs, told = opened(cut)
    assert 5 < len(steps_of(runs[0])) < 15
    assert any("cut or broken after" in line for line in told)


def test_a_histogram_and_a_text_are_no_metrics(written_by: Written) -> None:
    runs, told = opened(written_by("torch"))
    assert steps_of(runs[0])[-1].val_loss == 2.5
    assert told == []


def test_an_offline_run_of_wandb_says_its_name_config_and_end(written_by: Written) -> None:
    runs, _ = opened(written_by("wandb"))
    assert [(run.run_id, run.name, run.project) for run in runs] == [
        ("run1", "seed 1", "digits"),
        ("run2", "seed 2", "digits"),
    ]
    started, finished = controls_of(runs[0])
    assert started.data["config"] == {"lr": 0.5}
    assert started.time_ns is not None
    assert (finished.kind, finished.data["status"]) == ("session_finished", "completed")
    assert controls_of(runs[1])[1].data["status"] == "failed"
    step = steps_of(runs[0])[-1]
    assert (step.step, step.val_loss) == (20, 2.5)
    assert step.time_ns is not None


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_an_offline_log_of_wandb_that_is_cut_is_read_up_to_the_cut(
    written_by: Written, tmp_path: Path, share: float
) -> None:
    (file,) = written_by("wandb").glob("wandb/offline-run-*-run1/*.wandb")
    data = file.read_bytes()
    (tmp_path / file.name).write_bytes(data[: int(share * len(data))])
    runs, told = opened(tmp_path / file.name)
    assert "cut or broken after" in told[0]
    assert 0 < len(steps_of(runs[0])) <= 21


def test_mlflow_says_when_a_run_began_and_counts_lines_where_no_step_was_given(
    written_by: Written,
) -> None:
    runs, told = opened(written_by("mlflow"))
    assert [(run.name, run.project) for run in runs] == [("first", "digits"), ("second", "digits")]
    started, finished = controls_of(runs[0])
    assert started.data["config"] == {"lr": "0.5"}
    assert finished.data["status"] == "completed"
    assert (finished.time_ns or 0) >= (started.time_ns or 0) > 0
    assert attempts_of(runs[0].events()) == [1]
    assert sum(step.grad_norm is not None for step in steps_of(runs[0])) == 3
    assert "left out 1 metric: reward" in told[0]


def test_a_line_of_mlflow_that_is_cut_is_left_out_and_told(
    written_by: Written, tmp_path: Path
) -> None:
    store = tmp_path / "mlruns"
    shutil.copytree(str(written_by("mlflow") / "mlruns"), str(store))
    loss = sorted(store.glob("*/*/metrics/train/loss"))[0]
    loss.write_bytes(loss.read_bytes()[:-4])
    runs, told = opened(loss.parents[2])
    assert sum(step.loss is not None for step in steps_of(runs[0])) == 19
    assert "left out 1 line that is no 'time value step'" in told[0]


@pytest.mark.slow  # its import takes half a minute
def test_the_sparse_rows_of_lightning_are_joined_by_step(written_by: Written) -> None:
    runs, told = opened(written_by("lightning"))
    assert [run.name for run in runs] == ["digits/version_0", "digits/version_1"]
    assert [run.run_id for run in runs] == ["digits-version_0", "digits-version_1"]
    steps = steps_of(runs[0])
    assert [step.step for step in steps] == list(range(20))
    assert (steps[19].val_loss, steps[19].current_lr) == (2.5, 0.5)
    assert controls_of(runs[0])[0].data["config"] == {"lr": "0.5"}
    assert "left out 1 metric: train_loss_epoch" in told[0]


def test_a_trainers_state_is_read_from_its_file_and_from_its_folder(written_by: Written) -> None:
    folder = written_by("huggingface")
    for place in (folder, folder / "digits", folder / "digits" / "trainer_state.json"):
        assert format_of(place) == "huggingface"
        runs, _ = opened(place)
        assert [run.run_id for run in runs] == ["digits"]
        steps = steps_of(runs[0])
        assert [step.step for step in steps] == list(range(1, 13))
        assert all(step.loss is not None and step.grad_norm is not None for step in steps)
        assert [step.step for step in steps if step.val_loss is not None] == [4, 8, 12]
        assert controls_of(runs[0])[-1].data["status"] == "completed"
    runs, _ = opened(folder / "digits" / "checkpoint-6")
    assert len(steps_of(runs[0])) == 6
    assert [event.kind for event in controls_of(runs[0])] == ["session_started"]


def test_one_of_several_runs_is_picked_by_its_name(written_by: Written) -> None:
    folder = written_by("wandb")
    events = list(read_events(folder, [].append, runs=("seed 2",)))  # type: ignore[arg-type]
    assert {event.run_id for event in events} == {"run2"}
    with pytest.raises(ReplayError, match="no run of that name; there are seed 1, seed 2"):
        list(read_events(folder, [].append, runs=("seed 3",)))  # type: ignore[arg-type]
