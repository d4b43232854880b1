"""`argus sync`: what is left in folders goes to the brokers, as often as one likes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.fleets import TopicsOnTest
from tests.producer.fleet.fleet_runs import arrived, distinct, journal_of, shipped
from tests.producer.processes import run
from tests.producer.runs import folder_of, healthy

from plarv.cli import main
from plarv.client import Argus

pytest.importorskip("kafka")
pytest.importorskip("pyarrow")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a run without a fleet: its folder."""

    def make(run_id: str, count: int = 50) -> Path:
        brokers = os.environ.pop("ARGUS_BROKERS")
        try:
            argus = Argus(run_id=run_id, silent=True)
            healthy(argus, count)
            argus.complete()
        finally:
            monkeypatch.setenv("ARGUS_BROKERS", brokers)
        return folder_of(argus)

    return make


def synced(capsys: pytest.CaptureFixture[str], *arguments: str) -> List[Dict[str, Any]]:
    capsys.readouterr()
    assert main(["sync", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_that_nobody_shipped_is_shipped(
    fleet: TopicsOnTest, embedded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded("a-run")
    (line,) = synced(capsys, str(folder))
    assert (line["run"], line["events"], line["sessions"], line["held"]) == ("a-run", 52, 1, 0)
    assert shipped(fleet, folder)


def test_a_second_time_there_is_nothing_left(
    fleet: TopicsOnTest, embedded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded("a-run")
    assert main(["sync", str(folder)]) == 0
    assert capsys.readouterr().out == "a-run: 52 events shipped\n"
    assert main(["sync", str(folder)]) == 0
    assert capsys.readouterr().out == "a-run: nothing left to ship\n"
    assert sum(len(message) for message in arrived(fleet, "a-run")) == 52


def test_every_run_below_argus_dir_is_shipped(
    fleet: TopicsOnTest, embedded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [embedded(name) for name in ("one", "two", "three")]
    lines = synced(capsys, os.environ["ARGUS_DIR"])
    assert sorted(line["run"] for line in lines) == ["one", "three", "two"]
    assert all(shipped(fleet, folder) for folder in folders)
    assert sum(line["events"] for line in synced(capsys, str(folders[0].parent))) == 0


def test_while_the_run_goes_on_its_session_is_left_to_its_shipper(
    fleet: TopicsOnTest, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = Argus(run_id="a-run", silent=True)
    healthy(argus, 20)
    folder = folder_of(argus)
    assert main(["sync", str(folder)]) == 0
    assert "1 session is being shipped by a living process" in capsys.readouterr().out
    healthy(argus, 20, start=20)
    argus.complete()
    assert shipped(fleet, folder)
    assert sum(len(message) for message in arrived(fleet, "a-run")) == 42


def test_a_copy_that_was_synced_elsewhere_counts_for_nothing(
    fleet: TopicsOnTest, embedded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded("a-run")
    copy = shutil.copytree(folder, tmp_path / "a-run")
    assert synced(capsys, str(folder))[0]["events"] == 52
    assert synced(capsys, str(copy))[0]["events"] == 52
    assert distinct(arrived(fleet, "a-run")) == journal_of(folder)


def test_a_damaged_journal_is_named_and_the_others_are_shipped(
    fleet: TopicsOnTest, embedded: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = embedded("bad"), embedded("good")
    (segment,) = bad.glob("*.journal")
    segment.write_bytes(b"no journal" + segment.read_bytes()[10:])
    assert main(["sync", str(bad.parent)]) == 1
    said = capsys.readouterr()
    assert "not an Argus journal" in said.err
    assert "good: 52 events shipped" in said.out
    assert shipped(fleet, good)


def test_where_there_is_no_run_it_says_so(
    fleet: TopicsOnTest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet.address
    assert main(["sync", str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err
    assert main(["sync", str(tmp_path / "nowhere")]) == 2


def test_without_brokers_it_says_which_setting_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = Argus(run_id="a-run", silent=True)
    argus.complete()
    assert main(["sync", str(folder_of(argus))]) == 2
    assert "ARGUS_BROKERS" in capsys.readouterr().err


def test_where_nobody_listens_it_fails_and_nothing_is_noted(tmp_path: Path) -> None:
    argus = Argus(run_id="a-run", silent=True)
    argus.complete()
    folder = folder_of(argus)
    # In a process of its own: kafka-python leaves it to chance when such a socket is closed.
    program = "import sys; from plarv.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run(tmp_path, program, "sync", str(folder), "--brokers", "127.0.0.1:1")
    assert done.returncode == 1
    assert "no answer from the brokers at 127.0.0.1:1" in done.stderr
    assert not list(folder.glob("shipped-*[0-9a-f]"))


def test_missing_topics_fail_it(
    broker_address: str,
    topic_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argus = Argus(run_id="a-run", silent=True)
    argus.complete()
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    assert main(["sync", str(folder_of(argus)), "--brokers", broker_address]) == 1
    assert f"no topic {topic_prefix}.steps" in capsys.readouterr().err
