"""The command `argus`: data on stdout, talk on stderr, and an exit code that means something."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from plarv import __version__
from plarv.cli import build_parser, main
from plarv.cli.export import ProgressBar
from plarv.cli.run_folders import find_run, state_of
from plarv_schemas.journal import pack_full
from plarv_schemas.journal_writer import JournalWriter

ROOT = Path(__file__).parents[2]
PUBLIC_RUNS = ROOT.parent / "shared" / "data" / "public-runs"
SOURCES = os.pathsep.join(
    str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks")
)

DETECTOR = '''
from dataclasses import dataclass
from plarv_processors.detectors.detector import fingerprint, verdict

class EveryTenth:
    """Fires on every tenth step."""

    name = "every_tenth"
    scope = "run"

    @dataclass(frozen=True)
    class Config:
        """No setting."""

    def __init__(self, config=None):
        self.config = config or self.Config()
        self.version = fingerprint(self.name, self.config)

    def update(self, event):
        if event.step % 10 or event.step == 0:
            return ()
        return (verdict(self, event, kind="tenth", level="warn", state="opened",
                        onset_step=event.step, score=float("inf"), threshold=1.0, evidence={},
                        message="a tenth step"),)

class Raises(EveryTenth):
    """A detector with a fault."""

    name = "raises"

    def update(self, event):
        return 1 // 0
'''


def calm(step: int) -> float:
    return 2.0 + 0.01 * (step % 5)


def spiky(step: int) -> float:
    return 9.0 if 60 <= step < 65 else calm(step)


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    """A run of 80 steps whose loss jumps at step 60 and stays high for five."""
    path = tmp_path / "curve.csv"
    rows = "".join(f"{step},{spiky(step)}\n" for step in range(80))
    path.write_text("step,loss\n" + rows)
    return path


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    path = tmp_path / "healthy.csv"
    path.write_text(
        "step,loss\n" + "".join(f"{step},{2.0 + 0.01 * (step % 5)}\n" for step in range(80))
    )
    return path


@pytest.fixture
def argus_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ARGUS_DIR with one finished run in it."""
    root = tmp_path / "argus"
    monkeypatch.setenv("ARGUS_DIR", str(root))
    folder = root / "runs" / "experiment-001"
    folder.mkdir(parents=True)
    writer = JournalWriter(folder, run_id="experiment-001", session="a" * 16, rank=0, world_size=1)
    writer.control("session_started", step=None, rank=0, data={"mode": "MANUAL"})
    for step in range(80):
        columns = {"loss": spiky(step), "current_lr": 0.001}
        packed, _ = pack_full(writer.record, time.monotonic_ns(), step, columns)
        assert writer.append(packed)
    writer.control("session_finished", step=None, rank=0, data={"status": "completed"})
    writer.close()
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_replay_prints_a_table_and_a_summary(
    curve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "replay", curve)
    lines = out.splitlines()
    assert code == 0
    assert err == ""
    assert lines[0].split() == ["step", "level", "finding", "rank", "message"]
    assert any(line.split()[:3] == ["60", "warn", "loss_spike/transient"] for line in lines)
    assert any(" =>  " in line for line in lines)
    assert lines[-1].startswith("curve: 80 steps, ")
    assert "\x1b" not in out


def test_replay_json_is_one_object_a_verdict_or_action(
    curve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "replay", curve, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert {record["type"] for record in records} == {"verdict", "action"}
    first = records[0]
    wanted = (
        "type id run_id attempt rank step onset_step detector kind level state score threshold "
        "evidence message"
    )
    assert set(wanted.split()) <= set(first)
    assert (first["run_id"], first["step"], first["level"]) == ("curve", 60, "warn")


@pytest.mark.parametrize(("level", "code"), [("warn", 3), ("critical", 3)])
def test_findings_at_the_level_asked_for_exit_with_3(
    curve: Path, healthy: Path, capsys: pytest.CaptureFixture[str], level: str, code: int
) -> None:
    assert run(capsys, "replay", curve, "--fail-on", level)[0] == code
    assert run(capsys, "replay", healthy, "--fail-on", level)[0] == 0
    assert run(capsys, "replay", curve)[0] == 0


def test_a_warning_is_below_critical(
    healthy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tenth_detectors.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    added = ("replay", healthy, "--detector", "tenth_detectors:EveryTenth")
    assert run(capsys, *added, "--fail-on", "critical")[0] == 0
    code, out, _ = run(capsys, *added, "--fail-on", "warn", "--json")
    assert code == 3
    found = [json.loads(line) for line in out.splitlines()]
    steps = [record["step"] for record in found if record.get("detector") == "every_tenth"]
    assert steps == [10, 20, 30, 40, 50, 60, 70]
    assert found[0]["score"] == "inf"


def test_a_detector_that_raises_is_named_and_the_others_go_on(
    curve: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raising_detectors.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = run(capsys, "replay", curve, "--detector", "raising_detectors:Raises")
    assert code == 0
    assert "loss_spike/transient" in out
    assert "detector raises raised and was left out: ZeroDivisionError" in err


def test_a_detector_can_be_left_out_by_name_and_only_by_a_name_that_is_there(
    curve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "replay", curve, "--without", "loss_spike")
    assert code == 0
    assert "loss_spike" not in out
    code, out, err = run(capsys, "replay", curve, "--without", "loss_spkie")
    assert (code, out) == (2, "")
    assert "no such detector; there are non_finite, loss_spike" in err


@pytest.mark.parametrize("path", ["nowhere", "nowhere.module:Class", "json:loads"])
def test_a_detector_that_is_none_is_said_in_one_line(
    curve: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    code, out, err = run(capsys, "replay", curve, "--detector", path)
    assert (code, out) == (2, "")
    assert err.startswith("argus: detector ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.csv", None),
        ("noloss.csv", b"step,reward\n0,1\n"),
        ("binary.bin", bytes(range(256))),
        ("empty.csv", b""),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(capsys, "replay", path)
    assert (code, out) == (2, "")
    assert err.startswith(f"argus: {path}: ")
    assert err.count("\n") == 1


def test_one_bad_file_does_not_keep_the_others_from_being_judged(
    tmp_path: Path, curve: Path, healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "replay", tmp_path / "no.csv", curve, healthy)
    assert code == 2
    assert "no such file" in err
    assert "curve: 80 steps" in out
    assert "healthy: 80 steps, 0 verdicts, 0 actions" in out


def test_several_runs_in_one_file_are_judged_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    rows = [
        f"calm,{step},{2.0 + 0.01 * (step % 5)}\nwild,{step},{spiky(step)}" for step in range(80)
    ]
    path.write_text("run_id,step,loss\n" + "\n".join(rows))
    _, out, _ = run(capsys, "replay", path, "--json")
    assert {json.loads(line)["run_id"] for line in out.splitlines()} == {"wild"}
    _, out, _ = run(capsys, "replay", path)
    assert "calm: 80 steps, 0 verdicts" in out
    assert "\nwild: 80 steps" in out


def test_the_mode_is_asked_for_where_the_recording_does_not_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dead.csv"
    rows = "".join(f"{step},{calm(step) if step < 60 else 'nan'}\n" for step in range(120))
    path.write_text("step,loss\n" + rows)

    def pauses(*mode: str) -> List[Dict[str, Any]]:
        _, out, _ = run(capsys, "replay", path, "--json", *mode)
        records = [json.loads(line) for line in out.splitlines()]
        return [record["parameters"] for record in records if record["kind"] == "PAUSE"]

    assert [each.get("dry_run") for each in pauses()] == [True]
    assert [each.get("dry_run", False) for each in pauses("--mode", "AUTO")] == [False]


def test_export_writes_beside_the_run_and_replays_to_the_same(
    argus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    code, out, err = run(capsys, "export", "experiment-001")
    folder = argus_dir / "runs" / "experiment-001"
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [
        f"{folder / 'export' / 'steps.parquet'}  80 rows",
        f"{folder / 'export' / 'events.parquet'}  2 rows",
    ]
    _, of_run, _ = run(capsys, "replay", folder, "--json")
    _, of_export, _ = run(capsys, "replay", folder / "export", "--json")
    assert of_run == of_export != ""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_fills_up_on_a_terminal_after_a_second_and_nowhere_else() -> None:
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        times = iter([0.0, 0.5, 1.5, 1.55, 2.0])
        bar = ProgressBar("export run", stream, lambda times=times: next(times))  # type: ignore[misc]
        for share in (0.1, 0.25, 0.3, 0.5):
            bar.show(share)
        bar.close()
        text = stream.getvalue()
        assert ("[##########" + "." * 30 + "]  25%" in text) is shown
        assert ("50%" in text) is shown
        assert "30%" not in text
        assert text.endswith("\r\x1b[K") is shown


def test_an_export_that_cannot_be_written_fails_with_1(
    argus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "file").write_text("in the way")
    code, out, err = run(capsys, "export", "experiment-001", "--output", tmp_path / "file")
    assert (code, out) == (1, "")
    assert str(tmp_path / "file") in err


def test_a_run_is_found_by_id_or_path_and_an_unknown_one_names_what_there_is(
    argus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = argus_dir / "runs" / "experiment-001"
    assert find_run("experiment-001") == folder
    assert find_run(str(folder)) == folder
    for command in ("status", "export", "resume", "pause", "stop"):
        code, out, err = run(capsys, command, "experiment-002")
        assert (code, out) == (2, "")
        assert "no run 'experiment-002'" in err
        assert "the newest are experiment-001" in err


def test_status_says_where_the_newest_run_stands(
    argus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "status")
    facts = dict(line.split(None, 1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert facts["run"] == "experiment-001"
    assert facts["state"] == "finished: completed"
    assert facts["step"] == "79, loss 2.04, lr 0.001"


def test_runs_are_listed(argus_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "runs")
    header, row = out.splitlines()
    assert code == 0
    assert header.split() == ["run", "started", "step", "loss", "verdicts", "size", "state"]
    assert row.startswith("experiment-001  20")
    assert row.endswith("finished: completed")


def test_without_runs_status_complains_and_runs_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path))
    assert run(capsys, "status")[0] == 2
    code, out, err = run(capsys, "runs")
    assert (code, out) == (0, "")
    assert f"no runs in {tmp_path / 'runs'}" in err


def test_a_session_that_died_is_open_and_says_when_it_was_heard_last(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, run_id="run", session="b" * 16, rank=0, world_size=1)
    writer.control("session_started", step=None, rank=0, data={})
    writer.close()
    state = state_of(tmp_path)
    assert state.progress_text(state.last_ns + 3 * 10**9) == "open, last event 3 s ago"
    assert state.progress_text(state.last_ns + 3 * 86_400 * 10**9) == "open, last event 3 d ago"


def test_a_resume_is_written_into_the_runs_log(
    argus_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "resume", "experiment-001")
    assert (code, err) == (0, "")
    assert "experiment-001" in out


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert "examples:\n  argus demo" in build_parser().format_help()
    for command in ("replay", "export"):
        with pytest.raises(SystemExit) as raised:
            main([command, "--help"])
        assert raised.value.code == 0
        assert f"  argus {command} " in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["replay", "x", "--fail-on", "ok"], ["replay", "x", "-z"]],
)
def test_a_wrong_call_exits_with_2(
    arguments: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().out == ""


def test_no_command_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "COMMAND" in err


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A shell command in which $ARGUS is the command."""
    environment = {**os.environ, "PYTHONPATH": SOURCES, "ARGUS": f"{sys.executable} -m plarv"}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_python_m_plarv_is_the_command(tmp_path: Path) -> None:
    done = shell("$ARGUS --version", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"argus {__version__}\n")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "detectors.py").write_text(DETECTOR)
    rows = "".join(f"{step},2.0\n" for step in range(20_000))
    (tmp_path / "long.csv").write_text("step,loss\n" + rows)
    done = shell(
        "$ARGUS replay long.csv --json --detector detectors:EveryTenth | head -n 1", tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["detector"] == "every_tenth"


def test_replay_needs_nothing_but_the_standard_library(curve: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from plarv.cli import main; main(['replay', 'curve.csv']); "
        "print({'pyarrow', 'numpy', 'torch', 'polars'} & set(sys.modules))"
    )
    done = shell(f'{sys.executable} -c "{program}"', tmp_path)
    assert done.stdout.splitlines()[-1] == "set()"


def public_files() -> List[Path]:
    return sorted(path for path in PUBLIC_RUNS.rglob("*") if path.is_file())


def test_every_public_file_gets_an_answer_and_never_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = public_files()
    if not files:
        pytest.skip(f"{PUBLIC_RUNS} is not here")
    for path in files:
        code, out, err = run(capsys, "replay", path)
        if path.suffix == ".csv":
            assert code == 0, (path, err)
            assert " steps, " in out.splitlines()[-1], path
            assert "Traceback" not in err
        else:
            assert code == 2, path
            assert err.count("\n") == 1, (path, err)
