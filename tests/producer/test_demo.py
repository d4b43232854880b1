"""The demo: it saves its run, says what happened, and its own journal replays to the same."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import pytest

from plarv.demo import main
from plarv.demo.plan import Curve, Plan
from plarv.demo.progress import ProgressBar
from plarv.demo.replay_check import ReplayCheck, check_replay, first_difference
from plarv.demo.story import Outcome, as_json, tell
from plarv.demo.text import read_text


class Played(NamedTuple):
    code: int
    outcome: Dict[str, Any]
    stderr: str


def run_python(arguments: List[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if name[:6] != "ARGUS_"},
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=280,
    )


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    for name in ("torch", "matplotlib"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("demo")
    done = run_python(["-m", "plarv", "demo", "--quick", "--json", "--output", "a/b.png"], folder)
    assert done.stdout, done.stderr
    outcome = json.loads(done.stdout)
    outcome["picture"] = str(folder / outcome["picture"])
    outcome["run_dir"] = str(folder / outcome["run_dir"])
    return Played(done.returncode, outcome, done.stderr)


def test_a_run_that_is_lost_alone_is_saved_under_argus(played: Played) -> None:
    alone, under = played.outcome["alone"], played.outcome["argus"]
    assert played.code == 0, played.outcome
    assert played.outcome["rescued"]
    assert alone["loss_before"] == under["loss_before"] < alone["loss_untrained"] - 1.0
    assert under["loss_final"] < under["loss_before"] + 0.5
    assert alone["loss_final"] > alone["loss_untrained"]


def test_both_runs_are_the_same_up_to_what_argus_did(played: Played) -> None:
    # The loss of the step in which the learning rate is set back stems from the weights before.
    assert played.outcome["same_until"] == played.outcome["argus"]["acted_at"] + 1


def test_the_learning_rate_is_set_back_to_what_it_was_before_the_injury(played: Played) -> None:
    actions = [action for action in played.outcome["actions"] if action["kind"] == "SET_LR"]
    assert actions
    assert actions[0]["parameters"]["lr"] == played.outcome["learning_rate"]
    assert actions[0]["step"] > played.outcome["injury_step"]


def test_its_journal_replays_to_the_same_records(played: Played) -> None:
    replay = played.outcome["replay"]
    assert replay["identical"], replay["difference"]
    assert replay["verdicts"] == len(played.outcome["verdicts"]) >= 3
    assert replay["actions"] == len(played.outcome["actions"]) >= 1


def test_it_draws_a_png(played: Played) -> None:
    data = Path(played.outcome["picture"]).read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") >= 1000  # pixels wide


def test_it_shows_its_progress_on_stderr(played: Played) -> None:
    assert "300/300" in played.stderr


@pytest.mark.parametrize(
    ("file", "field", "noun"),
    [("verdicts.jsonl", "score", "verdict"), ("actions.jsonl", "reason", "action")],
)
def test_one_altered_field_is_found(
    played: Played, tmp_path: Path, file: str, field: str, noun: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(played.outcome["run_dir"], folder)
    lines = (folder / file).read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    record[field] = "altered"
    (folder / file).write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n", encoding="utf-8")
    difference = check_replay(folder).difference
    assert difference.startswith(f"{noun} 1 of {len(lines)}: {field} was 'altered' live")


def test_too_few_records_are_no_proof(played: Played) -> None:
    check = check_replay(Path(played.outcome["run_dir"]), least_verdicts=1000)
    assert not check.identical
    assert "at least were expected" in check.difference


def test_a_replay_that_fails_is_a_difference(tmp_path: Path) -> None:
    check = check_replay(tmp_path / "nothing here")
    assert check.difference.startswith("the replay ended with 2: ")


@pytest.mark.parametrize(
    ("live", "replayed", "expected"),
    [
        ([], [], ""),
        ([{"a": 1}], [{"a": 1}], ""),
        ([{"a": 1}], [{"a": 2}], "thing 1 of 1: a was 1 live and is 2 in the replay"),
        ([{"a": None}], [{}], "thing 1 of 1: a was None live and is None in the replay"),
        ([{"a": 1}], [{"a": 1}, {"a": 1}], "1 things live, 2 in the replay"),
        ([{"a": 1}, {"a": 1}], [{"a": 1}], "2 things live, 1 in the replay"),
    ],
)
def test_records_are_compared_whole(
    live: List[Dict[str, Any]], replayed: List[Dict[str, Any]], expected: str
) -> None:
    assert first_difference("thing", live, replayed) == expected


@pytest.mark.parametrize("module", ["torch", "matplotlib"])
def test_without_torch_or_matplotlib_it_says_what_to_install(module: str, tmp_path: Path) -> None:
    if module == "matplotlib":
        pytest.importorskip("torch")
    program = (
        f"import sys; sys.modules['{module}'] = None; from plarv.cli import main; "
        "sys.exit(main(['demo']))"
    )
    done = run_python(["-c", program], tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    hint = f"the demo needs {module}, which is not here: pip install 'plarv-argus-sdk[demo]'"
    assert done.stderr == f"argus: {hint}\n"


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "12"]) == 2
    assert capsys.readouterr().err == "argus: --steps must be at least 300, not 12\n"


def test_a_disabled_argus_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_DISABLED", "1")
    assert main([]) == 2
    assert "ARGUS_DISABLED is set" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("torch", "matplotlib"):
        pytest.importorskip(name)
    assert main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"argus: --output {tmp_path}: ")


def test_the_text_is_long_and_its_alphabet_is_small() -> None:
    text = read_text()
    assert len(text.characters) > 100_000
    assert text.alphabet == "".join(sorted(set(text.characters)))
    assert text.alphabet.isascii()
    assert "\n" not in text.alphabet


def test_training_is_deterministic_and_leaves_the_number_of_threads_alone() -> None:
    torch = pytest.importorskip("torch")
    from plarv.demo.training import train

    plan = Plan(steps=6, injury_step=3, width=16, batch=2, context=8)
    threads = torch.get_num_threads()
    seen: List[int] = []
    first = train(plan, read_text(), lambda step, loss, rate: seen.append(step))
    second = train(plan, read_text(), lambda step, loss, rate: None)
    assert first.losses == second.losses
    assert first.writes == second.writes
    assert first.rates == [plan.rate(step) for step in range(6)]
    assert seen == [0, 1, 2, 3, 4, 5]
    assert torch.get_num_threads() == threads


def test_a_slow_machine_leaves_out_the_tail() -> None:
    pytest.importorskip("torch")
    from plarv.demo.training import train

    plan = Plan(steps=400, injury_step=2, width=16, batch=1, context=4, time_limit_s=0.0)
    curve = train(plan, read_text(), lambda step, loss, rate: None)
    assert len(curve.losses) == plan.least_steps == 162


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    bar = ProgressBar(stream, "alone", 10, ordinary_rate=0.1)
    bar.step(4, 2.5, 6.0)
    bar.finish(10, 2.0, 0.1)
    first, second = stream.getvalue().split("\r\x1b[K")[1:]
    assert "5/10" in first
    assert "\x1b[31mlr 6\x1b[0m" in first
    assert "\n" not in first
    assert "10/10" in second
    assert second.endswith("\n")


def test_a_file_sees_a_line_now_and_then() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream, "alone", 10, ordinary_rate=0.1)
    for step in range(10):
        bar.step(step, 2.5, 0.1)
    bar.finish(10, 2.0, 6.0)
    (line,) = stream.getvalue().splitlines()
    assert "10/10" in line
    assert line.endswith("lr 6 (!)")
    assert "\x1b" not in line
    assert line.isascii()


def outcome_of(alone: List[float], under: List[float], difference: str = "") -> Outcome:
    plan = Plan(steps=100, injury_step=40)
    verdict = {
        "step": 41, "rank": None, "detector": "loss_spike", "kind": "transient", "level": "warn",
        "state": "opened", "message": "loss 9 is high",
    }  # fmt: skip
    action = {"step": 42, "kind": "SET_LR", "parameters": {"lr": 8e-4}, "reason": "because"}
    rates = [plan.rate(step) for step in range(100)]
    held = rates[:44] + [8e-4] * 56
    return Outcome(
        plan,
        Curve(alone, rates, 1000, 1.0, "qqq", ""),
        Curve(under, held, 1000, 1.0, "The end", ""),
        ReplayCheck([verdict], [action], difference),
        Path("a.png"),
        Path("runs/demo"),
        12.0,
    )


def test_the_story_names_what_happened_in_order() -> None:
    outcome = outcome_of([2.0] * 41 + [50.0] * 59, [2.0] * 41 + [50.0] * 9 + [1.5] * 50)
    lines = list(tell(outcome, colour=False))
    words = [line.split()[2] for line in lines if line.startswith("  step ")]
    assert words == ["injury", "warn", "SET_LR", "applied"]
    assert "replay   identical: 1 verdicts and 1 actions, every field, in a fresh process" in lines
    assert lines[-1] == "The run was saved: 1.50 instead of 50.00 (12 s)."
    assert not any("\x1b" in line for line in lines)
    assert outcome.rescued
    assert outcome.acted_at == 44


def test_a_replay_that_differs_is_said_to() -> None:
    outcome = outcome_of([2.0] * 100, [2.0] * 100, difference="verdict 1 of 1: score was 1 live")
    lines = list(tell(outcome, colour=False))
    assert "replay   NOT identical: verdict 1 of 1: score was 1 live" in lines
    assert not outcome.check.identical
    assert not outcome.rescued
    assert lines[-1].startswith("The run was not saved")


def test_a_run_that_ends_in_nan_alone_is_told_and_written_as_json() -> None:
    outcome = outcome_of([2.0] * 41 + [math.nan] * 59, [2.0] * 100)
    assert outcome.rescued
    assert any("nan" in line for line in tell(outcome, colour=True))
    assert json.loads(json.dumps(as_json(outcome), allow_nan=False))["alone"]["loss_final"] == "nan"


def test_a_run_that_ends_in_nan_under_argus_is_not_saved() -> None:
    assert not outcome_of([2.0] * 100, [2.0] * 41 + [math.nan] * 59).rescued


def test_the_picture_is_drawn_also_where_the_loss_is_nan(tmp_path: Path) -> None:
    for name in ("torch", "matplotlib"):
        pytest.importorskip(name)
    from plarv.demo.picture import draw

    outcome = outcome_of([2.0] * 41 + [math.nan] * 59, [2.0] * 100)
    check = outcome.check
    path = tmp_path / "deep" / "a.png"
    draw(path, outcome.plan, outcome.alone, outcome.watched, check.verdicts, check.actions)
    assert path.stat().st_size > 10_000
