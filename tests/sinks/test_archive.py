"""A run of this machine goes into the store: all of it once, however often it is written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import List

import pytest
from tests.producer.processes import environment
from tests.sinks.stores import as_json, contents, journal, losses

from plarv_processors.engine import Engine
from plarv_processors.stored_fold import StoredFold
from plarv_schemas.events import Action, Verdict
from plarv_schemas.locks import FileLock
from plarv_schemas.records import FOLD_LOCK
from plarv_schemas.run_log import read_run
from plarv_sinks.archive import archive
from plarv_sinks.replay import ReplayError
from plarv_sinks.store import Store

pytest.importorskip("pyarrow")
pytest.importorskip("polars")


def at(location: Path) -> Store:
    return Store(location, print, create=True)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "run"
    journal(folder, "0", losses(400, spike_at=300))
    return folder


def test_the_store_holds_the_run_as_its_journal_and_its_replay_have_it(
    run_dir: Path, tmp_path: Path
) -> None:
    journal(run_dir, "1", losses(400, spike_at=100), first_step=200)
    told: List[str] = []
    done = archive(run_dir, at(tmp_path / "store"), tell=told.append)
    assert done.rows["steps"] == 800
    assert told == []
    store, events = Store(tmp_path / "store"), list(read_run(run_dir))
    assert as_json(store.events("run")) == as_json(events)
    engine = Engine()
    found = [each for event in events for each in engine.fold(event)]
    recorded = [each.id for each in store.verdicts("run")]
    recorded += [each.id for each in store.actions("run")]
    assert sorted(recorded) == sorted(each.id for each in found)
    assert store.frame("steps", "run")["attempt"].to_list() == [1] * 400 + [2] * 400
    row = store.run_rows()["run"]
    assert (row.num_events, row.num_steps, row.attempt, row.last_step) == (804, 800, 2, 599)


def test_a_second_time_there_is_nothing_new_and_what_comes_later_is_added(
    run_dir: Path, tmp_path: Path
) -> None:
    archive(run_dir, at(tmp_path / "store"), tell=print)
    before = contents(Store(tmp_path / "store"))
    assert not any(archive(run_dir, at(tmp_path / "store"), tell=print).rows.values())
    assert contents(Store(tmp_path / "store")) == before
    journal(run_dir, "1", losses(400, spike_at=100), first_step=200)
    assert archive(run_dir, at(tmp_path / "store"), tell=print).rows["steps"] == 400
    archive(run_dir, at(tmp_path / "whole"), tell=print)
    assert contents(Store(tmp_path / "store")) == contents(Store(tmp_path / "whole"))


def test_what_was_removed_from_the_journal_stays_in_the_store(
    run_dir: Path, tmp_path: Path
) -> None:
    archive(run_dir, at(tmp_path / "store"), tell=print)
    before = contents(Store(tmp_path / "store"))
    lock = FileLock(run_dir / FOLD_LOCK)
    assert lock.acquire()
    fold = StoredFold(run_dir)
    while fold.advance()[0]:
        pass
    assert fold.trim() > 0
    fold.close()
    lock.release()
    told: List[str] = []
    archive(run_dir, at(tmp_path / "store"), tell=told.append)
    assert contents(Store(tmp_path / "store")) == before
    journal(run_dir, "1", losses(400, spike_at=100), first_step=200)
    assert archive(run_dir, at(tmp_path / "store"), tell=told.append).rows["steps"] == 400
    assert told == []
    whole = Store(tmp_path / "store")
    assert whole.frame("steps", "run").height == 800
    archive(run_dir, at(tmp_path / "late"), tell=told.append)
    assert told == [f"{run_dir}: 402 events were removed before the store had them"]
    late = Store(tmp_path / "late")
    assert late.verdicts("run") == whole.verdicts("run")
    kept = late.frame("steps", "run").rows()
    assert kept == whole.frame("steps", "run").rows()[-len(kept) :]  # their places are the same
    assert 400 <= len(kept) < 800


def test_a_run_that_another_process_folds_is_refused(run_dir: Path, tmp_path: Path) -> None:
    lock = FileLock(run_dir / FOLD_LOCK)
    assert lock.acquire()
    try:
        with pytest.raises(ReplayError, match="it is running"):
            archive(run_dir, at(tmp_path / "store"), tell=print)
    finally:
        lock.release()


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ReplayError, match="no journal"):
        archive(tmp_path / "run", at(tmp_path / "store"), tell=print)


def test_killed_anywhere_and_called_again_it_leaves_every_row_once(
    run_dir: Path, tmp_path: Path
) -> None:
    archive(run_dir, at(tmp_path / "whole"), tell=print)
    wanted, rng, kills = contents(Store(tmp_path / "whole")), random.Random(7), 0
    for number in range(6):
        location = tmp_path / f"store-{number}"
        kills += killed_while_archiving(run_dir, location, rng.uniform(0.0, 0.06))
        archive(run_dir, at(location), tell=print)
        store = Store(location)
        assert contents(store) == wanted
        assert sum(file.table == "steps" for file in store.files.listed("")) == 1
    assert kills > 0


_CHILD = """
import sys
from pathlib import Path
from plarv_sinks.archive import archive
from plarv_sinks.store import Store
import pyarrow.fs, pyarrow.parquet, plarv_sinks.store
print("ready", flush=True)
archive(Path(sys.argv[1]), Store(sys.argv[2], create=True), tell=print)
"""


def killed_while_archiving(run_dir: Path, location: Path, after_s: float) -> bool:
    """Whether the process was killed before it had ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(run_dir), str(location)],
        env=environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(after_s)  # it is the point of the test that nobody knows where this is
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()
    return process.returncode == -signal.SIGKILL


def test_findings_that_were_recorded_late_are_added(run_dir: Path, tmp_path: Path) -> None:
    archive(run_dir, at(tmp_path / "whole"), tell=print)
    verdicts = (run_dir / "verdicts.jsonl").read_bytes()
    (run_dir / "verdicts.jsonl").write_bytes(verdicts.splitlines(keepends=True)[0])
    archive(run_dir, at(tmp_path / "store"), tell=print)
    assert len(Store(tmp_path / "store").verdicts("run")) == 1
    (run_dir / "verdicts.jsonl").write_bytes(verdicts)
    archive(run_dir, at(tmp_path / "store"), tell=print)
    assert contents(Store(tmp_path / "store")) == contents(Store(tmp_path / "whole"))
    found = Store(tmp_path / "store")
    assert {type(each) for each in (*found.verdicts("run"), *found.actions("run"))} == {
        Verdict,
        Action,
    }


def test_a_store_of_many_runs_is_tidied_as_they_come(tmp_path: Path) -> None:
    from plarv.cli import main

    folders = []
    for number in range(52):
        folder = tmp_path / "runs" / f"run-{number}"
        journal(folder, "0", [1.0, 2.0, 3.0], run_id=f"run-{number}")
        folders.append(str(folder))
    assert main(["sink", *folders, "--store", str(tmp_path / "store")]) == 0
    store = Store(tmp_path / "store")
    assert len(store.files.listed("table=runs")) == 1
    assert len(store.run_rows()) == 52
    assert len(list(store.events("run-7"))) == 5
