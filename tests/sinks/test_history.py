"""History is replayed, in one process or several, and compared with what was recorded live."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from tests.producer.processes import ROOT, environment
from tests.sinks.stores import STEPS, findings_records, folded, named, packed, records_of, sink_into

from plarv_schemas.events import Level, Verdict, VerdictState
from plarv_sinks.changes import changes_of
from plarv_sinks.curve import ReplayError
from plarv_sinks.history import History, replay_history
from plarv_sinks.history_table import history_table, summarise
from plarv_sinks.labels import Label, agreement, read_labels

pytest.importorskip("pyarrow")
pytest.importorskip("kafka")

RUNS = {"divergence": 900, "spike": 900, "sparse": 200, "repeated_batch": 200}

QUICK = '''
"""A detector that finds something in every run, one step after the other."""

from plarv_schemas.events import Verdict


class Quick:
    """Fires once, at step 50 or the first after it."""

    name = "quick"
    scope = "run"
    version = "quick-1"

    def __init__(self):
        self.fired = False

    def update(self, event):
        if self.fired or event.step < 50:
            return ()
        self.fired = True
        at = event.step
        return (Verdict(event.run_id, 0, None, at, 0, "quick", "fiftieth", "warn", "opened", at,
                        1.0, 1.0, {}, "the fiftieth step", self.version),)
'''


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history") / "store"
    runs = {name: named(name, name, steps) for name, steps in RUNS.items()}
    found = [each for events in runs.values() for each in folded(events)]
    log = {STEPS: records_of(packed(random.Random(1), runs)), **findings_records(found)}
    sink_into(folder, log)
    return folder


def verdict(
    step: int, state: VerdictState = "opened", level: Level = "warn", onset: Optional[int] = None
) -> Verdict:
    return Verdict(
        "run", 1, None, step, step, "loss_spike", "transient", level, state,
        step if onset is None else onset, 9.0, 8.0, {}, "loss 9", "loss_spike-1",
    )  # fmt: skip


def test_live_equals_replay_over_the_store_in_one_process_and_in_two(location: Path) -> None:
    for jobs in (1, 2):
        replayed = list(replay_history(History(str(location)), list(RUNS), jobs))
        assert sorted(run.run_id for run in replayed) == sorted(RUNS)
        for run in replayed:
            assert (run.error, run.told) == ("", ())
            assert run.num_steps >= RUNS[run.run_id]
            assert (run.only_replayed, run.only_recorded) == (0, 0)
            assert {change.kind for change in run.changes} <= {"same"}
        assert sum(run.same_records for run in replayed) > 10


def test_a_detector_that_was_not_there_is_new_and_one_that_is_left_out_is_not_compared(
    location: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quick_detector.py").write_text(QUICK)
    monkeypatch.syspath_prepend(str(tmp_path))
    history = History(str(location), ("quick_detector:Quick",), ("loss_spike",))
    replayed = list(replay_history(history, list(RUNS)))
    changes = [change for run in replayed for change in run.changes]
    assert [c.kind for c in changes if c.detector == "quick"] == ["new"] * len(RUNS)
    assert "loss_spike" not in {change.detector for change in changes}
    rows = {row.detector: row for row in summarise(replayed, {"sparse": Label("healthy")})}
    assert rows["quick"].runs == len(RUNS)
    agrees = rows["quick"].agreement
    assert agrees is not None
    assert (agrees.found, agrees.false, agrees.missed) == (0, 1, 0)
    assert history_table(list(rows.values()))[0][-2:] == ["precision", "recall"]


def test_a_run_that_cannot_be_read_is_told_and_the_others_are_replayed(location: Path) -> None:
    replayed = list(replay_history(History(str(location)), ["nobody", "sparse"]))
    assert [bool(run.num_events) for run in replayed] == [False, True]


def test_alarms_about_the_same_steps_are_the_same_alarm() -> None:
    live = [verdict(10), verdict(14, "resolved"), verdict(70, onset=50)]
    live += [verdict(90, "resolved"), verdict(200)]
    again = [
        verdict(7), verdict(9, "escalated", "critical"), verdict(12, "resolved"),
        verdict(60, onset=55), verdict(100, "resolved"),
    ]  # fmt: skip
    changes = changes_of(live, again)
    assert [(change.kind, change.steps) for change in changes] == [
        ("earlier", -3), ("earlier", -10), ("gone", 0),
    ]  # fmt: skip
    assert changes[0].replayed is not None
    assert changes[0].replayed.level == "critical"


def test_ranks_and_attempts_are_kept_apart() -> None:
    live = [verdict(10), verdict(10)._replace(rank=3), verdict(10)._replace(attempt=2)]
    changes = changes_of(live, [verdict(10)])
    assert sorted(change.kind for change in changes) == ["gone", "gone", "same"]


@pytest.mark.parametrize(
    "text",
    [
        "run_id,label,failure_step,detectors\na,nan,7,non_finite loss_spike\nb,healthy,,\n",
        (
            '{"run_id": "a", "label": "nan", "step": 7,'
            ' "detectors": ["non_finite", "loss_spike"]}\n'
            '{"run_id": "b", "label": "ok"}\n'
        ),
        (
            '[{"run_id": "a", "label": "nan", "failure_step": 7.0,\n'
            ' "detectors": "non_finite,loss_spike"}, {"run_id": "b", "label": "good"}]'
        ),
    ],
)
def test_labels_are_read_from_csv_json_lines_and_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    labels = read_labels(tmp_path / "labels")
    assert labels["a"] == Label("nan", 7, frozenset({"non_finite", "loss_spike"}))
    assert labels["b"].is_healthy
    assert not labels["a"].wants("loss_plateau")


@pytest.mark.parametrize("text", ["", "run,label\na,nan\n", "[1, 2]", "{broken", "run_id,label\n"])
def test_labels_that_cannot_be_read_are_an_error_that_names_the_file(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ReplayError, match="labels"):
        read_labels(tmp_path / "labels")


def test_without_an_alarm_there_is_no_precision_and_without_a_fault_no_recall() -> None:
    labels = {"a": Label("healthy"), "b": Label("nan", None, frozenset({"non_finite"}))}
    quiet = agreement("loss_spike", labels, [], ["a", "b", "unlabelled"])
    assert quiet.precision is None
    assert quiet.recall is None
    assert agreement("non_finite", labels, ["b"], ["a", "b"]).recall == 1.0


def argus(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plarv", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_shows_a_table_what_changed_and_the_labels(
    location: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv").write_text("run_id,label\ndivergence,bad\nsparse,healthy\n")
    done = argus(
        "replay", "--from", str(location), "--jobs", "1", "--compare", "--labels",
        str(tmp_path / "labels.csv"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 runs, ")
    assert "0 only in the replay, 0 only recorded" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("loss_divergence")]
    assert line.split()[-2:] == ["1.00", "1.00"]


def test_the_command_gives_every_change_as_json_and_exits_as_it_is_asked_to(
    location: Path,
) -> None:
    done = argus(
        "replay", "--from", str(location), "--runs", "spike,divergence", "--json", "--jobs", "1",
        "--fail-on", "critical",
    )  # fmt: skip
    lines: List[Dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 3
    assert [line["type"] for line in lines] == ["run", "run", "summary"]
    assert lines[-1]["steps"] == 1800
    assert all(change["recorded"] for change in lines[0]["changes"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--runs", "nobody"), "no run nobody; it has 4 runs"),
        (("--since", "2999-01-01"), "no run since 2999-01-01"),
        (("--since", "yesterday"), "--since is YYYY-MM-DD or a number of days"),
        (("--jobs", "0"), "--jobs is at least 1"),
        (("--only", "zorn"), "--only zorn: no such detector"),
        (("--labels", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    location: Path, arguments: List[str], said: str
) -> None:
    done = argus("replay", "--from", str(location), *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_options_of_a_store_without_one_are_refused(tmp_path: Path) -> None:
    done = argus("replay", "losses.csv", "--since", "3d")
    assert (done.returncode, done.stderr) == (2, "argus: --since goes with --from STORE\n")
    done = argus("replay", "--from", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "no such folder" in done.stderr
