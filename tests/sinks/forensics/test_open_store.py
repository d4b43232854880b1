"""A store is found where one says, and its runs stand in one frame."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.processors.logs import log_of
from tests.sinks.forensics.recorded import DATE, keep, steps_of

from plarv_sinks import forensics
from plarv_sinks.forensics import StoreError, open_store

pl = pytest.importorskip("polars")
pytest.importorskip("pyarrow")


def test_the_argument_comes_before_the_environment_and_that_before_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argument", "store", "dir/store"):
        keep(tmp_path / name, steps_of([1.0, 2.0], run_id=name.replace("/", "-")))
    with pytest.raises(StoreError, match="ARGUS_STORE is none"):
        open_store()
    monkeypatch.delenv("ARGUS_STORE")
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path / "dir"))
    assert forensics.runs()["run_id"].to_list() == ["dir-store"]
    monkeypatch.setenv("ARGUS_STORE", str(tmp_path / "store"))
    assert forensics.runs()["run_id"].to_list() == ["store"]
    assert forensics.run("store").id == "store"
    assert open_store(tmp_path / "argument").runs()["run_id"].to_list() == ["argument"]


def test_without_a_store_the_error_says_where_none_was(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere: no such folder"):
        open_store(tmp_path / "nowhere")


def test_a_run_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path) -> None:
    keep(tmp_path, steps_of([1.0], run_id="mine"))
    with pytest.raises(StoreError, match="no run theirs; the newest are mine"):
        open_store(tmp_path).run("theirs")


@pytest.mark.parametrize("package", ["polars", "pyarrow"])
def test_a_missing_package_is_an_error_that_names_the_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*plarv-argus-sdk\[forensics\]"):
        open_store(tmp_path)


def test_the_frame_of_runs_says_of_each_how_it_went(tmp_path: Path) -> None:
    keep(tmp_path, [each._replace(run_id="spiky") for each in log_of("spike")])
    keep(tmp_path, steps_of([3.0, 2.5], run_id="quiet"))
    runs = {row["run_id"]: row for row in open_store(tmp_path).runs().iter_rows(named=True)}
    quiet, spiky = runs["quiet"], runs["spiky"]
    assert (quiet["status"], quiet["steps"], quiet["last_step"], quiet["last_loss"]) == (
        None, 2, 1, 2.5,
    )  # fmt: skip
    assert (quiet["verdicts"], quiet["actions"], quiet["worst_level"]) == (0, 0, None)
    assert (quiet["last_time"] - quiet["first_time"]).total_seconds() == 2.0
    run = open_store(tmp_path).run("spiky")
    assert spiky["status"] == "completed"
    assert spiky["verdicts"] == run.verdicts().height > 0
    assert spiky["actions"] == run.actions().height > 0
    assert spiky["worst_level"] == "critical"


def test_a_store_without_runs_is_an_empty_frame(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.runs().height == 0
    assert store.runs().schema["last_time"] == pl.Datetime("ns", "UTC")
    assert "0 runs" in store._repr_html_()
    assert "0 runs" in repr(store)


def test_a_run_that_the_list_has_lost_is_still_found_by_its_tables(tmp_path: Path) -> None:
    for name in ("kept", "lost"):
        keep(tmp_path, [each._replace(run_id=name) for each in log_of("spike")])
    (tmp_path / f"table=runs/date={DATE}/lost.parquet").write_bytes(b"PAR1 torn")
    told: list[str] = []
    store = open_store(tmp_path, told.append)
    runs = {row["run_id"]: row for row in store.runs().iter_rows(named=True)}
    assert runs["lost"]["steps"] is None
    assert runs["lost"]["verdicts"] == runs["kept"]["verdicts"]
    run, whole = store.run("lost"), store.run("kept")
    assert run.row[3:11] == whole.row[3:11]
    assert run.timeline().height == whole.timeline().height + 1  # its end is not known
    assert len(told) == 1
    assert "lost.parquet: left out" in told[0]


def test_it_shows_itself_escaped_and_fetches_nothing(tmp_path: Path) -> None:
    keep(tmp_path, steps_of([1.0], run_id="<b>&run"))
    shown = open_store(tmp_path)._repr_html_()
    assert "&lt;b&gt;&amp;run" in shown
    assert "<b>&run" not in shown
    assert "http" not in shown
    assert "src=" not in shown
