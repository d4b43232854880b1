"""Logs that no writer makes on request: charts' exports, cut and foreign files, given names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

from plarv_schemas.events import StepEvent
from plarv_sinks.importers import format_of, open_source
from plarv_sinks.replay import ReplayError, read_events


def written(folder: Path, text: str, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> Tuple[List[StepEvent], List[str]]:
    told: List[str] = []
    events = list(read_events(path, told.append, **options))
    return [event for event in events if isinstance(event, StepEvent)], told


_CHART = (
    '"Step","big - run - loss","big - run - loss__MIN","big - run - loss__MAX","small - loss"\n'
    '"0","2.5","2.5","2.5",""\n"10","NaN","NaN","NaN","1.5"\n"20","Infinity","1","1","1.25"\n'
)


def test_a_chart_of_wandb_is_a_run_for_each_of_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path, _CHART, "chart.csv")
    assert format_of(path) == "wandb"
    big, small = open_source(path)
    assert (big.name, big.run_id, small.name) == ("big - run", "big-run", "small")
    steps, told = read(path)
    assert [(s.run_id, s.step) for s in steps] == [
        ("big-run", 0), ("big-run", 10), ("big-run", 20), ("small", 10), ("small", 20),
    ]  # fmt: skip
    assert math.isnan(steps[1].loss or 0.0)
    assert steps[2].loss == math.inf
    assert told == []


def test_a_history_of_wandb_counts_the_trainers_steps_where_it_has_them(tmp_path: Path) -> None:
    text = (
        ",_step,_timestamp,_runtime,train/global_step,train/loss,train/learning_rate\n"
        "0,0,1700000000.5,1.0,100,2.5,0.1\n1,1,1700000001.5,2.0,200,2.25,0.1\n"
    )
    steps, _ = read(written(tmp_path, text, "history.csv"))
    assert [(s.step, s.loss, s.current_lr, s.time_ns) for s in steps] == [
        (100, 2.5, 0.1, 1_700_000_000_500_000_000),
        (200, 2.25, 0.1, 1_700_000_001_500_000_000),
    ]


def state(num_steps: int, **fields: Any) -> str:
    history: List[Dict[str, Any]] = [
        {"step": step, "epoch": 0.5, "loss": 2.0 if step != 3 else math.nan, "grad_norm": 1.0}
        for step in range(1, num_steps + 1)
    ]
    return json.dumps({"global_step": num_steps, "log_history": history, **fields}, indent=2)


def test_a_trainers_state_cut_in_the_middle_is_read_up_to_the_cut(tmp_path: Path) -> None:
    text = state(10)
    path = written(tmp_path, text[: int(0.62 * len(text))], "gpt/trainer_state.json")
    steps, told = read(path)
    assert 3 < len(steps) < 10
    assert math.isnan(steps[2].loss or 0.0)
    assert f"cut in the middle; read the {len(steps)} entries before the cut" in told[0]


def test_a_broken_last_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    written(tmp_path, state(10), "gpt/checkpoint-10/trainer_state.json")
    written(tmp_path, "", "gpt/checkpoint-20/trainer_state.json")
    steps, _ = read(tmp_path / "gpt")
    assert [step.step for step in steps] == list(range(1, 11))
    assert {step.run_id for step in steps} == {"gpt"}


def test_a_summary_of_the_training_is_no_step(tmp_path: Path) -> None:
    rows = [{"step": 5, "loss": 2.0}, {"step": 9, "train_loss": 1.0, "train_runtime": 3.0}]
    path = written(tmp_path, json.dumps({"log_history": rows}), "trainer_state.json")
    steps, _ = read(path)
    assert [(step.step, step.loss) for step in steps] == [(5, 2.0)]


def test_a_given_name_goes_before_a_guess_and_must_be_there(tmp_path: Path) -> None:
    text = "step,loss,xent\n0,1.0,2.0\n"
    path = written(tmp_path, text, "run.csv")
    steps, told = read(path, columns={"loss": "xent"})
    assert [step.loss for step in steps] == [2.0]
    assert told == [f"{path}: ignored columns: loss"]
    with pytest.raises(ReplayError, match=r"--column loss=nll: no such column; its columns: step"):
        read(path, columns={"loss": "nll"})
    chart = written(tmp_path, _CHART.replace(" loss", " xent"), "chart.csv")
    with pytest.raises(ReplayError, match=r"no loss among its metrics \(xent\); name it with"):
        read(chart, runs=("small",))
    assert len(read(chart, columns={"loss": "xent"})[0]) == 5


def test_each_run_of_a_plain_table_is_a_run_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "run_id,step,loss\na,0,1\nb,0,2\na,1,3\n", "runs.csv")
    runs = list(open_source(path))
    assert [(run.run_id, run.format) for run in runs] == [("a", "plain"), ("b", "plain")]
    found = [[e.loss for e in run.events() if isinstance(e, StepEvent)] for run in runs]
    assert found == [[1.0, 3.0], [2.0]]


@pytest.mark.parametrize(
    ("name", "text", "kind", "words"),
    [
        ("other.json", '{"a": 1}', "huggingface", "it has no log_history"),
        ("table.csv", "step,loss\n0,1\n", "wandb", "no loss among its metrics|holds no run|values"),
        ("table.csv", "step,loss\n0,1\n", "mlflow", "holds no run in the format mlflow"),
        ("table.csv", "step,loss\n0,1\n", "excel", "no such format: excel; there are huggingface"),
    ],
)
def test_a_foreign_file_is_said_in_one_line(
    tmp_path: Path, name: str, text: str, kind: Optional[str], words: str
) -> None:
    path = written(tmp_path, text, name)
    with pytest.raises(ReplayError, match=words) as raised:
        read(path, format=kind)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no such file"):
        list(open_source(tmp_path / "nowhere"))


def test_the_sparse_rows_of_lightning_are_joined_by_step(tmp_path: Path) -> None:
    text = (
        "epoch,step,train_loss_epoch,train_loss_step,val_loss\n0,4,,2.5,\n0,9,,nan,\n0,9,,,2.75\n"
    )
    path = written(tmp_path, text + "0,9,2.5,,\n", "logs/version_3/metrics.csv")
    assert format_of(path) == "lightning"
    steps, told = read(tmp_path)
    assert [(s.run_id, s.step, s.val_loss) for s in steps] == [
        ("logs-version_3", 4, None),
        ("logs-version_3", 9, 2.75),
    ]
    assert math.isnan(steps[1].loss or 0.0)
    assert told == [f"{path}: left out 1 metric: train_loss_epoch"]
