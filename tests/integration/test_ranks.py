"""Several ranks of one node under the embedded engine alone: real processes, gloo, torchrun."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
from tests.integration import ranks
from tests.integration.law import controls, live_records, replayed_records

from plarv import Argus, ArgusPause
from plarv_processors.stored_fold import fold_rest
from plarv_schemas.events import StepEvent
from plarv_schemas.journal_reader import segments_of
from plarv_schemas.run_log import read_run

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0


def spawn(scenario: str, folder: Path, target: Any = ranks.spawned) -> List[int]:
    """Two processes, started by hand: how they ended."""
    distributed: Any = pytest.importorskip("torch.distributed")
    store = distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "torch._dynamo"])  # imported only once
    processes = [
        context.Process(target=target, args=(rank, scenario, str(folder), store.port))
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT_S)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def torchrun(scenario: str, folder: Path, *options: str) -> Tuple[Path, List[Dict[str, Any]]]:
    roots = [str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks")]
    environment = {
        **os.environ,
        "ARGUS_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # gloo cannot start again on a store it knows
        "PYTHONPATH": os.pathsep.join(roots),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    done = subprocess.run(
        [*command, ranks.__file__, scenario, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return only_run(folder), written_down(folder)


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def written_down(folder: Path) -> List[Dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def steps_of(run: Path) -> List[StepEvent]:
    return [event for event in read_run(run) if isinstance(event, StepEvent)]


def steps_applied(run: Path, kind: str) -> Dict[int, List[Tuple[int, Any]]]:
    """Rank -> (step, reason where there is one) of each control event of this kind."""
    found: Dict[int, List[Tuple[int, Any]]] = {}
    for event in controls(run, kind):
        assert event.rank is not None
        assert event.step is not None
        found.setdefault(event.rank, []).append((event.step, event.data.get("why")))
    return found


def test_a_rate_is_lowered_at_one_step_and_the_weights_stay_equal(tmp_path: Path) -> None:
    codes = spawn("lower", tmp_path)
    run, found = only_run(tmp_path), written_down(tmp_path)
    assert codes == [0, 0]
    ranks_of_files = [file.rank for files in segments_of(run).values() for file in files]
    assert sorted(ranks_of_files) == [0, 1]
    assert {each["run_id"] for each in found} == {run.name}
    assert found[0]["lrs"] == found[1]["lrs"]
    assert found[0]["lrs"][-1] == 1e-3 < 3.0 == max(found[0]["lrs"])
    assert found[0]["weights"] == found[1]["weights"]
    applied = steps_applied(run, "action_applied")
    assert applied[0] == applied[1]
    assert len(applied[0]) == 1
    verdicts, actions = live_records(run)
    assert "SET_LR" in [action["kind"] for action in actions]
    assert (verdicts, actions) == replayed_records(run)
    assert {event.world_size for event in steps_of(run)} == {2}


def test_spawned_ranks_share_a_run_and_all_leave_at_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = spawn("pause", tmp_path)
    run, found = only_run(tmp_path), written_down(tmp_path)
    assert codes == [0, 0]
    assert {each["run_id"] for each in found} == {run.name}
    assert found[0]["paused_at"] == found[1]["paused_at"]
    assert found[0]["paused_at"] is not None
    assert found[0]["weights"] == found[1]["weights"]
    assert live_records(run) == replayed_records(run)
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path))
    with pytest.raises(ArgusPause):
        Argus(run_id=run.name, silent=True)


def test_a_rank_that_hears_too_late_keeps_all_from_acting(tmp_path: Path) -> None:
    codes = spawn("late", tmp_path)
    run, found = only_run(tmp_path), written_down(tmp_path)
    assert codes == [0, 0]
    dropped = steps_applied(run, "action_dropped")
    assert {why for _, why in dropped[0]} == {"not all ranks had it in time"}
    assert {why for _, why in dropped[1]} == {"it came too late"}
    assert steps_applied(run, "action_applied") == {}
    assert found[0]["lrs"] == found[1]["lrs"]
    assert found[0]["lrs"][-1] == 3.0
    assert found[0]["weights"] == found[1]["weights"]
    assert live_records(run) == replayed_records(run)


@pytest.mark.parametrize("who", ["follower", "leader"])
def test_a_killed_rank_holds_up_no_other(tmp_path: Path, who: str) -> None:
    codes = spawn(f"{who}_killed", tmp_path)
    run, found = only_run(tmp_path), written_down(tmp_path)
    survivor, killed = (0, 1) if who == "follower" else (1, 0)
    assert codes[killed] == -signal.SIGKILL
    assert codes[survivor] == 0
    (end,) = found
    assert end["exit_s"] < 3.0
    assert end["lrs"][-1] == 3.0
    steps = {rank: [event.step for event in steps_of(run) if event.rank == rank] for rank in (0, 1)}
    assert steps[survivor] == list(range(ranks.FAULT_AT + 301))
    assert steps[killed] == list(range(ranks.FAULT_AT))
    assert steps_applied(run, "action_applied") == {}
    if who == "follower":
        assert {why for _, why in steps_applied(run, "action_dropped")[0]} == {
            "not all ranks had it in time"
        }
    assert fold_rest(run)
    verdicts, actions = live_records(run)
    assert "SET_LR" in [action["kind"] for action in actions]
    assert (verdicts, actions) == replayed_records(run)


def test_torchrun_restarts_the_ranks_into_the_runs_next_attempt(tmp_path: Path) -> None:
    """The rendezvous has no id of its own here, and gives the ranks a fresh store each time."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    run, found = torchrun("restart", tmp_path, "--max-restarts", "1", *rendezvous)
    assert {each["run_id"] for each in found} == {run.name}
    assert found[0]["paused_at"] == found[1]["paused_at"]
    assert found[0]["paused_at"] is not None
    started = controls(run, "session_started")
    places = [(event.rank, event.data["restart_count"]) for event in started]
    assert sorted(places) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    verdicts, actions = live_records(run)
    assert (verdicts, actions) == replayed_records(run)
    assert [action["attempt"] for action in actions if action["kind"] == "PAUSE"] == [2]
