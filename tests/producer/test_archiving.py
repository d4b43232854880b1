"""A run that ends is kept as Parquet by a process of its own, which nobody waits for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Callable

import pytest
from tests.producer.processes import run
from tests.producer.runs import events_of, until

from plarv import Argus
from plarv.archiving import LOG_FILE, start_archive, store_location

pytest.importorskip("pyarrow")

TRAIN = """
import sys
from plarv import Argus
argus = Argus(run_id="kept", silent=True)
for step in range(400):
    argus.step(9.0 if 300 <= step < 310 else 2.0 + 0.01 * (step % 5), grad_norm=1.0)
if len(sys.argv) > 1:
    sys.exit(int(sys.argv[1]))
argus.complete()
"""


def kept(store: Path) -> Callable[[], bool]:
    """Whether the list of runs is there: it is written last."""
    return lambda: any(store.glob("table=runs/*/*.parquet"))


@pytest.mark.parametrize("arguments", [(), ("3",)])
def test_a_run_that_ends_or_exits_is_in_the_store_soon_after(
    tmp_path: Path, arguments: Any
) -> None:
    from plarv_sinks.store import Store

    done = run(tmp_path, TRAIN, *arguments, ARGUS_DIR=str(tmp_path / "argus"), ARGUS_STORE="")
    assert done.returncode == (3 if arguments else 0), done.stderr
    until(kept(tmp_path / "argus" / "store"))
    store = Store(tmp_path / "argus" / "store")
    folder = tmp_path / "argus" / "runs" / "kept"
    assert len(list(store.events("kept"))) == len(events_of(folder)) == 402
    assert store.verdicts("kept")
    until(lambda: "kept: 400 steps, 2 events" in (folder / LOG_FILE).read_text())


def test_a_store_elsewhere_is_named_by_the_setting(tmp_path: Path) -> None:
    done = run(tmp_path, TRAIN, ARGUS_DIR=str(tmp_path / "argus"), ARGUS_STORE="beside/store")
    assert done.returncode == 0, done.stderr
    until(kept(tmp_path / "beside" / "store"))
    assert not (tmp_path / "argus" / "store").exists()


def test_where_no_store_is_wanted_no_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_STORE", "none")
    assert store_location() == ""
    assert not start_archive(tmp_path)
    assert not (tmp_path / LOG_FILE).exists()


def test_a_store_that_cannot_be_written_costs_the_run_nothing_and_is_told_in_its_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "in the way").write_text("a file")
    done = run(
        tmp_path, TRAIN, ARGUS_DIR=str(tmp_path / "argus"),
        ARGUS_STORE=str(tmp_path / "in the way" / "store"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    log = tmp_path / "argus" / "runs" / "kept" / LOG_FILE
    until(lambda: log.exists() and "in the way" in log.read_text())


def test_without_an_interpreter_to_start_the_run_ends_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARGUS_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    monkeypatch.setattr("plarv.faults.RERAISE", False)
    argus = Argus(run_id="kept")
    argus.step(1.0)
    argus.complete()
    assert not (tmp_path / "store").exists()


def test_a_run_without_a_step_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARGUS_STORE", str(tmp_path / "store"))
    argus = Argus(run_id="empty")
    folder = argus.run_dir
    argus.complete()
    assert folder is not None
    assert not (folder / LOG_FILE).exists()


def test_no_process_is_left_behind_as_a_zombie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARGUS_STORE", str(tmp_path / "store"))
    argus = Argus(run_id="kept")
    argus.step(1.0)
    argus.complete()
    until(kept(tmp_path / "store"))

    def no_child() -> bool:
        found = subprocess.run(
            ["ps", "-o", "stat=", "--ppid", str(os.getpid())],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return "Z" not in found.stdout

    until(no_child)
