"""Live equals replay on other Pythons, with other hash seeds, and by way of Parquet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import List, Optional

import pytest
from tests.integration import fold_digest
from tests.integration.law import Records, live_records, replayed_records
from tests.integration.live import LiveRun, stream
from tests.processors.streams import FAULTY, HEALTHY

from plarv_processors.engine import EngineConfig
from plarv_processors.stored_fold import fold_rest

ROOT = Path(__file__).parents[2]
ROOTS = os.pathsep.join(str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks"))
VERSIONS = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]


def record_runs(place: Path) -> List[Path]:
    """A live run of each stream; of two ranks or more where the stream has them."""
    folders: List[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARGUS_DIR", str(place))
        for name, make in [*HEALTHY.items(), *((name, each[1]) for name, each in FAULTY.items())]:
            events = make(steps=700)
            run = LiveRun(patch, name, ranks=len(events[0].parts) or 1, mode="AUTO")
            run.feed(events)
            run.complete()
            fold_rest(run.folder)
            folders.append(run.folder)
    return folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> List[Path]:
    return record_runs(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def expected(folders: List[Path]) -> List[str]:
    digests = [fold_digest.digest(folder) for folder in folders]
    assert len(set(digests)) == len(digests)
    return digests


def find_python(version: str) -> Optional[str]:
    """An interpreter of this version that starts: on the path, or one of pyenv's."""
    candidates = [sys.executable] if sys.version.startswith(version + ".") else []
    candidates.extend(sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))))
    found = shutil.which(f"python{version}")
    if found is not None:
        candidates.append(found)
    for candidate in candidates:
        done = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version)"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0 and done.stdout.startswith(version + "."):
            return candidate
    return None


@pytest.mark.skipif("TESTS_ON_ANOTHER_PYTHON" in os.environ, reason="this is such a run")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_python_and_hash_seed_folds_to_the_same_bits(
    version: str, folders: List[Path], expected: List[str]
) -> None:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    for seed in ("0", "1"):
        done = subprocess.run(
            [python, fold_digest.__file__, *map(str, folders)],
            env={"PYTHONPATH": ROOTS, "PYTHONHASHSEED": seed, "PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == expected, f"Python {version}, hash seed {seed}"


def findings(folder: Path) -> Records:
    """What a replay of an export's folder finds."""
    from plarv_sinks.replay import engine_for, read_events, replay

    told: List[str] = []
    engine = engine_for(folder, EngineConfig(), told.append)
    found = list(replay(read_events(folder, told.append), engine))
    assert told == []
    records = [json.loads(json.dumps(each.to_dict(), allow_nan=False)) for each in found]
    return (
        [record for record in records if record["type"] == "verdict"],
        [record for record in records if record["type"] == "action"],
    )


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_an_export_replays_to_what_the_run_got_live(folders: List[Path], tmp_path: Path) -> None:
    from plarv_sinks.export import export

    told: List[str] = []
    for folder in folders:
        export(folder, tmp_path / folder.name, tell=told.append)
        assert findings(tmp_path / folder.name) == live_records(folder), folder.name
    assert told == []


@pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_an_export_of_what_nobody_has_folded_yet_settles_the_order_for_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from plarv.cli import main

    run = LiveRun(monkeypatch, ranks=2, leads=False)
    for event in stream("divergence", 620):
        run.step(run.ranks[event.step // 100 % 2], event)
        run.step(run.ranks[1 - event.step // 100 % 2], event)
    run.complete()
    assert live_records(run.folder) == ([], [])
    assert main(["export", str(run.folder), "--output", str(tmp_path)]) == 0
    (verdicts, actions) = live_records(run.folder)
    assert verdicts
    assert findings(tmp_path) == (verdicts, actions) == replayed_records(run.folder)
