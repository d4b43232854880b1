"""Two ranks over gloo that keep checkpoints: DDP, of which rank 0 writes, and FSDP's shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, List

import pytest
from tests.integration import rank_checkpoints
from tests.integration.law import controls, live_records, replayed_records
from tests.integration.test_ranks import only_run, spawn

pytest.importorskip("torch")


def written(folder: Path, what: str) -> List[Any]:
    return [json.loads((folder / f"{what}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_all_ranks_go_back_at_one_step_and_a_new_job_recovers_the_same_bits(
    tmp_path: Path, wrapper: str
) -> None:
    assert spawn(f"{wrapper} poisoned", tmp_path, rank_checkpoints.spawned) == [0, 0]
    found = written(tmp_path, "poisoned")
    assert found[0]["back"] == found[1]["back"] >= 0
    run = only_run(tmp_path)
    applied = [e for e in controls(run, "action_applied") if e.data["kind"] == "ROLLBACK"]
    assert sorted(event.rank or 0 for event in applied) == [0, 1]
    assert len({event.step for event in applied}) == 1
    recovered = controls(run, "recovered")
    assert {event.step for event in recovered} == {found[0]["back"]}
    verdicts, actions = live_records(run)
    assert (verdicts, actions) == replayed_records(run)
    folders = sorted(path.name for path in (tmp_path / "ring").iterdir() if path.is_dir())
    if wrapper == "ddp":
        assert set(folders) <= {"slot-0", "slot-1", "slot-2"}
    else:
        assert folders == ["rank-00000", "rank-00001"]
    os.environ.pop("ARGUS_RUN_ID", None)
    assert spawn(f"{wrapper} recover", tmp_path, rank_checkpoints.spawned) == [0, 0]
    again = written(tmp_path, "recover")
    assert again[0]["step"] == again[1]["step"]
    for rank in range(2):
        assert again[rank]["finite"]
        assert again[rank]["state"] == found[rank]["states"][str(again[rank]["step"])]
