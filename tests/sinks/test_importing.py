"""Logs of others go into the store, once, and are judged as if Argus had been there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest
from tests.producer.processes import ROOT, environment
from tests.sinks.stores import losses

from plarv_processors.engine import Engine
from plarv_sinks.importers import open_source
from plarv_sinks.importing import import_run
from plarv_sinks.store import Store

pytest.importorskip("pyarrow")
pytest.importorskip("polars")


@pytest.fixture
def trainer_state(tmp_path: Path) -> Path:
    history = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4}
        for step, loss in enumerate(losses(400, spike_at=300), 1)
    ]
    path = tmp_path / "checkpoint-400" / "trainer_state.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"log_history": history, "global_step": 400}))
    return path


def test_a_log_is_in_the_store_with_what_the_detectors_find_in_it(
    trainer_state: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", create=True)
    (run,) = open_source(trainer_state)
    (written,) = import_run(run, store)
    assert written.rows["steps"] == 400
    events = list(store.events(run.run_id))
    engine = Engine()
    found = [each.id for event in events for each in engine.fold(event)]
    recorded = [each.id for each in store.verdicts(run.run_id)]
    recorded += [each.id for each in store.actions(run.run_id)]
    assert sorted(recorded) == sorted(found)
    assert recorded


def test_the_same_log_again_adds_nothing_and_one_that_has_grown_its_new_part(
    tmp_path: Path,
) -> None:
    path, store = tmp_path / "losses.csv", Store(tmp_path / "store", create=True)
    lines = [f"{step},{loss}" for step, loss in enumerate(losses(400, spike_at=300))]

    def rows(number: int) -> List[int]:
        path.write_text("step,loss\n" + "\n".join(lines[:number]) + "\n")
        return [
            sum(each.rows.values()) for run in open_source(path) for each in import_run(run, store)
        ]

    first = rows(200)
    assert first[0] >= 200
    assert rows(200) == [0]
    assert rows(400)[0] >= 200
    whole = Store(tmp_path / "whole", create=True)
    for run in open_source(path):
        list(import_run(run, whole))
    assert store.frame("steps", "losses").equals(whole.frame("steps", "losses"))
    assert [v.id for v in store.verdicts("losses")] == [v.id for v in whole.verdicts("losses")]
    assert whole.verdicts("losses")


def argus(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plarv", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_imports_what_can_be_read_and_says_what_cannot(
    trainer_state: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("nothing of a run")
    store = str(tmp_path / "store")
    done = argus("import", str(trainer_state), str(tmp_path / "notes.txt"), "--into", store)
    assert done.returncode == 2
    assert "400 steps" in done.stdout
    assert "notes.txt" in done.stderr
    done = argus("import", str(trainer_state), "--into", store, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verdicts"] == 0
    done = argus("replay", "--from", store, "--compare", "--jobs", "1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--format", "zork"], "--format is one of"), (["--column", "loss"], "OURS=THEIRS")],
)
def test_options_that_cannot_be_are_refused(
    options: List[str], said: str, trainer_state: Path, tmp_path: Path
) -> None:
    done = argus("import", str(trainer_state), "--into", str(tmp_path / "store"), *options)
    assert done.returncode == 2
    assert said in done.stderr
