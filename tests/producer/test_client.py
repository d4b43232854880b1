"""The object beside the loop: its arguments, what it records of a step, and how a run ends."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import pickle
import random
import sys
from array import array
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from tests.producer.runs import (
    caught_up,
    controls_of,
    events_of,
    folder_of,
    healthy,
    recorded,
    replayed,
    steps_of,
    until,
)

from plarv import Argus, ArgusConfigurationError, ArgusError, ArgusHalt, ArgusPause, settings
from plarv.decision import CONTINUE, Decision
from plarv_schemas.events import LOCAL_CHECKS, StepEvent

# Every argument that the README of the published SDK lists, and those that Argus adds, as they are
# meant to be given.
PUBLISHED: Dict[str, Any] = {
    "api_key": "your-key",
    "run_id": "experiment-001",
    "model": SimpleNamespace(parameters=list),
    "optimizer": SimpleNamespace(param_groups=[{"lr": 0.1, "params": []}]),
    "tokenizer": SimpleNamespace(model_max_length=128, vocab_size=100),
    "mode": "MANUAL",
    "sequence_length": 2048,
    "vocab_size": 32000,
    "num_layers": 32,
    "hidden_dim": 4096,
    "dtype": "bfloat16",
    "checkpoint_dir": "./argus-checkpoints",
    "silent": False,
    "fail_open": False,
    "catch_exceptions": True,
    "step0_timeout": 12.0,
    "on_pause": print,
}
ADDED: Dict[str, Any] = {
    "url": "http://127.0.0.1:9",
    "brokers": [],  # named ones are reached for: tests/producer/fleet
    "dataloader": [1, 2, 3],
    "total_steps": 1000,
    "start_step": 7,
    "project": "tests",
    "accept_operator": True,
    "scheduler": SimpleNamespace(step=print),
    "scaler": SimpleNamespace(unscale_=print),
    "run_key": "00",
    "raise_checkpoint": True,
}

SCALARS = (
    "perplexity", "forward_ms", "backward_ms", "grad_l1_norm", "grad_l2_norm", "epoch",
    "update_norm", "val_loss", "current_lr", "loss_scale",
)  # fmt: skip
SAMPLES: Dict[str, Tuple[Any, ...]] = {
    "sample_ids": (3, -(1 << 63), (1 << 63) - 1),
    "sample_losses": (0.5, math.inf),
    "sample_confidences": (0.25,),
    "sample_margins": (),
    "sample_entropies": (1.5, 2.5, 3.5, 4.5),
    "sample_correct": (1, 0, 1),
}
UNREADABLE: List[Any] = ["2.5", b"2.5", [2.5], [1.0, 2.0], {"loss": 1.0}, 1j, object(), 10**400]


class Hostile:
    """Raises at every touch."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("do not touch")

    def __float__(self) -> float:
        raise RuntimeError("do not touch")


def the_step(argus: Argus) -> StepEvent:
    """The one step of a run, once it has ended."""
    argus.complete()
    (step,) = steps_of(argus)
    return step


# -- arguments


@pytest.mark.parametrize("name", [*PUBLISHED, *ADDED])
def test_every_argument_is_taken_on_its_own(name: str) -> None:
    argus = Argus(**{name: {**PUBLISHED, **ADDED}[name]})
    argus.step(2.5)
    argus.complete()
    assert len(steps_of(argus)) == 1


def test_all_arguments_are_taken_together_and_there_are_no_others() -> None:
    every = {**PUBLISHED, **ADDED}
    assert list(inspect.signature(Argus).parameters) == list(every)
    argus = Argus(**every)
    argus.complete()
    (started,) = controls_of(argus, "session_started")
    assert {
        name: started.data[name] for name in ("sequence_length", "vocab_size", "num_layers")
    } == {
        "sequence_length": 2048,
        "vocab_size": 32000,
        "num_layers": 32,
    }
    assert (started.data["dtype"], started.data["hidden_dim"]) == ("bfloat16", 4096)
    assert (started.data["total_steps"], started.data["start_step"]) == (1000, 7)
    assert (started.data["project"], started.data["accept_operator"]) == ("tests", True)


def test_keys_never_reach_the_disk() -> None:
    argus = Argus(api_key="key-in-clear", run_key="run-key-in-clear", silent=True)
    argus.step(2.5)
    argus.complete()
    for path in folder_of(argus).iterdir():
        assert b"in-clear" not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", 5),
        ("run_id", 5),
        ("run_id", "../up"),
        ("run_id", ".hidden"),
        ("run_id", "a/b"),
        ("run_id", "x" * 129),
        ("model", "gpt2"),
        ("model", SimpleNamespace(parameters=[])),
        ("optimizer", "adam"),
        ("mode", "FAST"),
        ("mode", 5),
        ("mode", ["AUTO"]),
        ("sequence_length", 0),
        ("sequence_length", 2.5),
        ("sequence_length", True),
        ("vocab_size", -1),
        ("num_layers", "12"),
        ("hidden_dim", math.nan),
        ("dtype", 16),
        ("checkpoint_dir", 5),
        ("silent", "yes"),
        ("fail_open", None),
        ("catch_exceptions", 1),
        ("step0_timeout", 0),
        ("step0_timeout", -1.0),
        ("step0_timeout", math.nan),
        ("step0_timeout", math.inf),
        ("step0_timeout", "12"),
        ("on_pause", "call me"),
        ("url", 8080),
        ("brokers", 9092),
        ("total_steps", 0),
        ("start_step", -1),
        ("start_step", None),
        ("start_step", 1.0),
        ("start_step", 1 << 63),
        ("project", 5),
        ("accept_operator", "yes"),
        ("scheduler", 0.1),
        ("run_key", b"key"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule_and_its_value(name: str, value: Any) -> None:
    with pytest.raises(ArgusConfigurationError) as raised:
        Argus(**{name: value})
    error = raised.value
    assert error.parameter == name
    assert error.value is value
    assert error.rule.startswith("must ")
    assert str(error) == f"{name} {error.rule}, not {value!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ARGUS_MODE", "FAST"),
        ("ARGUS_RUN_ID", "../up"),
        ("ARGUS_JOURNAL_MAX_MB", "much"),
        ("ARGUS_JOURNAL_MAX_MB", "-1"),
        ("ARGUS_SHUTDOWN_TIMEOUT", "nan"),
    ],
)
def test_a_wrong_variable_is_named_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ArgusConfigurationError) as raised:
        Argus()
    assert (raised.value.parameter, raised.value.value) == (name, value)


def test_an_argument_goes_before_the_environment_and_that_before_the_project_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def project_of(**arguments: Any) -> Optional[str]:
        argus = Argus(**arguments)
        argus.complete()
        (started,) = controls_of(argus, "session_started")
        name = started.data["project"]
        assert name is None or isinstance(name, str)
        return name

    assert project_of() is None
    if sys.version_info >= (3, 11):  # no older Python can read TOML
        table = '[tool.argus]\nproject = "file"\n'
        (tmp_path / "pyproject.toml").write_text(table, encoding="utf-8")
        settings._read.clear()
        assert project_of() == "file"
    monkeypatch.setenv("ARGUS_PROJECT", "environment")
    assert project_of() == "environment"
    assert project_of(project="argument") == "argument"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no TOML reader before Python 3.11")
def test_a_project_file_that_is_no_toml_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.argus", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with Argus(silent=True) as argus:
        argus.step(1.0)
    assert len(steps_of(argus)) == 1


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings.SETTINGS:
        if name != "ARGUS_DIR":  # that one is the test's own
            monkeypatch.setenv(name, "")
    with Argus() as argus:
        argus.step(1.0)
    assert len(steps_of(argus)) == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ({}, {}, None),
        ({"api_key": "key"}, {}, "an api_key without an address: using the embedded engine"),
        ({}, {"ARGUS_API_KEY": "key"}, "an api_key without an address: using the embedded engine"),
        ({"url": "http://127.0.0.1:9"}, {}, "the HTTP transport is not in this version"),
        ({}, {"ARGUS_URL": "http://127.0.0.1:9"}, "the HTTP transport is not in this version"),
    ],
)
def test_where_nothing_answers_one_line_says_that_the_embedded_engine_is_used(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Dict[str, Any],
    variables: Dict[str, str],
    said: Optional[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Argus(**arguments).complete()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if said is None else 3), lines  # one at the start, one at the end
    assert said is None or said in lines[1]


def test_silent_says_nothing_and_the_argument_goes_before_the_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Argus(silent=True, api_key="key") as argus:
        argus.step("no number")
    monkeypatch.setenv("ARGUS_SILENT", "1")
    Argus().complete()
    assert capsys.readouterr() == ("", "")
    Argus(silent=False).complete()
    assert "[argus] run " in capsys.readouterr().err


def test_disabled_does_nothing_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARGUS_DISABLED", "1")
    with Argus(mode="FAST", run_id="../up") as argus:  # not even its arguments are looked at
        assert argus.step(2.5, 1.0) == CONTINUE
        assert argus.step(Hostile()) == CONTINUE
    argus.complete()
    assert (argus.run_id, argus.run_dir, argus.decision) == ("", None, CONTINUE)
    assert not Path(os.environ["ARGUS_DIR"]).exists()
    assert capsys.readouterr() == ("", "")


# -- what is recorded of a step


@pytest.mark.parametrize("grad_norm", [None, 1.5])
@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (2.5, 2.5),
        (-2.5, -2.5),
        (3, 3.0),
        (True, 1.0),
        (Decimal("2.5"), 2.5),
        (Fraction(5, 2), 2.5),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (math.nan, math.nan),
        (5e-324, 5e-324),
    ],
)
def test_a_loss_is_any_number(loss: Any, value: float, grad_norm: Optional[float]) -> None:
    argus = Argus(silent=True)
    argus.step(loss, grad_norm)
    step = the_step(argus)
    assert step.loss is not None
    assert repr(step.loss) == repr(value)  # NaN is like itself here
    assert step.grad_norm == grad_norm
    assert step.current_lr is None


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["loss", "grad_norm", "epoch", "batch_size", "val_loss"])
def test_what_is_no_number_is_left_out_counted_and_said_once(
    capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    argus = Argus()
    for step in range(3):
        argus.step(**{"loss": 2.5, "perplexity": 12.0, name: value, "step": step})
    argus.complete()
    assert len(steps_of(argus)) == 3
    for recorded_step in steps_of(argus):
        assert getattr(recorded_step, name) is None
        assert recorded_step.perplexity == 12.0
    err = capsys.readouterr().err
    assert err.count(f"3 x {name} was no number") == 1


def test_no_loss_at_all_is_a_validation_only_event() -> None:
    argus = Argus(silent=True)
    argus.step(None, val_loss=1.5)
    step = the_step(argus)
    assert (step.loss, step.val_loss) == (None, 1.5)


def test_a_hostile_object_costs_its_own_column_alone() -> None:
    argus = Argus(silent=True)
    names = ("grad_norm", *SCALARS, *SAMPLES, "local_report", "batch_size")
    hostile: Dict[str, Any] = {name: Hostile() for name in names}
    argus.step(2.5, **hostile)
    step = the_step(argus)
    assert step.loss == 2.5
    assert [getattr(step, name) for name in (*SCALARS, *SAMPLES)] == [None] * 16


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("value", [0.25, -1e300, math.nan, math.inf, 7])
def test_every_scalar_column_comes_back(name: str, value: float) -> None:
    argus = Argus(silent=True)
    column: Dict[str, Any] = {name: value}
    argus.step(2.5, 1.5, **column)
    step = the_step(argus)
    expected: float = value
    if name in ("forward_ms", "backward_ms") and abs(value) > 1e39:
        expected = math.copysign(math.inf, value)  # timings travel as float32
    assert repr(getattr(step, name)) == repr(float(expected))
    others = [each for each in SCALARS if each != name]
    assert [getattr(step, each) for each in others] == [None] * len(others)
    assert (step.loss, step.grad_norm) == (2.5, 1.5)


def test_timings_are_of_single_precision_before_anything_folds_them() -> None:
    argus = Argus(silent=True)
    argus.step(2.5, forward_ms=33.3)
    assert the_step(argus).forward_ms == array("f", [33.3])[0]


@pytest.mark.parametrize(
    ("value", "found"), [(32, 32), (32.0, 32), (-1, None), (math.nan, None), (1e300, None)]
)
def test_a_batch_size_is_a_whole_number(value: Any, found: Optional[int]) -> None:
    argus = Argus(silent=True)
    argus.step(2.5, batch_size=value)
    assert the_step(argus).batch_size == found


def test_the_batch_size_of_a_loader_is_recorded_where_none_is_given() -> None:
    argus = Argus(silent=True, dataloader=SimpleNamespace(batch_size=16))
    argus.step(2.5)
    argus.step(2.5, batch_size=8)
    argus.complete()
    assert [step.batch_size for step in steps_of(argus)] == [16, 8]


@pytest.mark.parametrize("kind", [tuple, list, iter], ids=lambda kind: kind.__name__)
def test_lists_of_unequal_lengths_come_back(kind: Callable[[Any], Any]) -> None:
    argus = Argus(silent=True)
    argus.step(2.5, **{name: kind(values) for name, values in SAMPLES.items()})
    step = the_step(argus)
    assert {name: getattr(step, name) for name in SAMPLES} == SAMPLES


def test_an_array_of_the_standard_library_is_a_list_too() -> None:
    argus = Argus(silent=True)
    argus.step(2.5, sample_losses=array("d", [1.0, 2.0]), sample_ids=range(3))
    step = the_step(argus)
    assert (step.sample_losses, step.sample_ids) == ((1.0, 2.0), (0, 1, 2))


def test_string_ids_become_hashes_that_are_the_same_in_every_attempt_of_one_run_only() -> None:
    def ids(run_id: str, *names: Any) -> Any:
        argus = Argus(run_id=run_id, silent=True)
        argus.step(2.5, sample_ids=names)
        argus.complete()
        return steps_of(argus)[-1].sample_ids

    first = ids("one", "train/0001.png", "train/0002.png", b"train/0001.png")
    assert first[0] == first[2] != first[1]
    assert ids("one", "train/0001.png") == first[:1]
    assert ids("two", "train/0001.png") != first[:1]


def test_a_local_report_comes_back_also_as_a_mapping() -> None:
    report = {
        "checks": {"gradient_flow": {"level": "critical", "score": 0.75}, "unknown": {}},
        "top_affected_layers": ["h.0", "h.1"],
    }
    argus = Argus(silent=True)
    argus.step(2.5, local_report=report)
    argus.step(2.5, local_report=SimpleNamespace(to_dict=lambda: report))
    argus.complete()
    place = LOCAL_CHECKS.index("gradient_flow")
    for step in steps_of(argus):
        assert step.local_levels is not None
        assert step.local_scores is not None
        assert step.local_levels[place] == 2
        assert step.local_scores[place] == 0.75
        assert step.local_layers == ("h.0", "h.1")


def test_with_errors_let_out_a_bad_value_raises_and_the_step_is_recorded_all_the_same() -> None:
    argus = Argus(silent=True, catch_exceptions=False)
    with pytest.raises(ArgusError, match="epoch was no number"):
        argus.step(2.5, epoch="first")
    with pytest.raises(ArgusError, match="step was no whole number"):
        argus.step(2.5, step=-1)
    argus.complete()
    assert steps_of(argus)[0].loss == 2.5


# -- step numbers


def test_steps_count_from_zero_or_from_start_step_on() -> None:
    for start in (0, 1000):
        argus = Argus(silent=True, start_step=start)
        for _ in range(3):
            argus.step(2.5)
        argus.step(2.5, epoch=1.0)  # by the long way
        argus.complete()
        assert [step.step for step in steps_of(argus)] == list(range(start, start + 4))


@pytest.mark.parametrize("by_the_long_way", [False, True])
def test_counting_goes_on_from_a_step_that_was_given(by_the_long_way: bool) -> None:
    more: Dict[str, Any] = {"epoch": 1.0} if by_the_long_way else {}
    argus = Argus(silent=True)
    argus.step(2.5, **more)
    argus.step(2.5, step=100, **more)
    argus.step(2.5, **more)
    argus.step(2.5, step=101, **more)  # again
    argus.step(2.5, step=7, **more)  # back
    argus.complete()
    assert [step.step for step in steps_of(argus)] == [0, 100, 101, 101, 7]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (5, 5),
        (5.0, 5),
        (True, 1),
        ((1 << 62) - 1, (1 << 62) - 1),
        (-1, 0),
        (2.5, 0),
        (math.nan, 0),
        ("5", 0),
        ([5], 0),
        (1 << 63, 0),
        (Hostile, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_step_that_is_none_is_counted_instead(
    capsys: pytest.CaptureFixture[str], given: Any, found: int
) -> None:
    argus = Argus()
    number: Any = Hostile() if given is Hostile else given
    argus.step(2.5, step=number)
    assert the_step(argus).step == found
    said = "1 x step was no whole number from 0 on" in capsys.readouterr().err
    assert said == (found == 0)


def test_steps_at_the_end_of_all_numbers_are_recorded_and_judged() -> None:
    argus = Argus(silent=True)
    for step in ((1 << 63) - 1, None, None):
        argus.step(2.5, step=step)
    argus.complete()
    assert len(steps_of(argus)) == 3
    assert recorded(folder_of(argus)) == replayed(folder_of(argus))


# -- learning rates that the short way meets


@pytest.mark.parametrize("lr", [1e-3, 1, 0.0, math.inf])
def test_the_learning_rate_of_an_optimizer_is_recorded_at_every_step(lr: float) -> None:
    argus = Argus(silent=True, optimizer=SimpleNamespace(param_groups=[{"lr": lr}]))
    argus.step(2.5, 1.0)
    assert the_step(argus).current_lr == lr


@pytest.mark.parametrize("lr", ["fast", None, [0.1], Hostile, "gone"])
def test_an_odd_learning_rate_costs_itself_alone(lr: Any) -> None:
    group: Dict[str, Any] = {"lr": 0.1}
    argus = Argus(silent=True, optimizer=SimpleNamespace(param_groups=[group]))
    argus.step(2.5, 1.0)
    if lr == "gone":
        del group["lr"]
    else:
        group["lr"] = Hostile() if lr is Hostile else lr
    argus.step(2.0, 1.0)
    group["lr"] = 0.2
    argus.step(1.5, 1.0)
    argus.complete()
    assert [step.loss for step in steps_of(argus)] == [2.5, 2.0, 1.5]
    assert [step.current_lr for step in steps_of(argus)] == [0.1, None, 0.2]


def test_a_rate_is_followed_into_the_groups_that_load_state_dict_makes() -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    argus = Argus(silent=True, optimizer=optimizer)
    argus.step(2.5, 1.0)
    optimizer.param_groups = [{"lr": 0.3}]
    until(lambda: argus._lr_group is optimizer.param_groups[0])
    argus.step(2.5, 1.0)
    argus.complete()
    assert [step.current_lr for step in steps_of(argus)] == [0.1, 0.3]


# -- decisions


def test_a_decision_says_which_step_it_stands_on_and_what_is_open() -> None:
    argus = Argus(silent=True)
    assert argus.step(2.5) == CONTINUE
    last = healthy(argus, 100)
    argus.step(9.0, step=last + 1)
    caught_up(argus, last + 1)
    decision = argus.step(2.5)
    assert isinstance(decision, Decision)
    assert decision == argus.decision
    assert (decision.step, decision.attempt, decision.ok) == (last + 1, 1, False)
    (verdict,) = [v for v in decision.verdicts if v.detector == "loss_spike"]
    assert verdict.step == last + 1
    assert 0.0 < decision.harm_pressure <= 3.0
    assert decision.newest_action is not None
    assert decision.reason == decision.newest_action.reason
    data = decision.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == set(Decision._fields)
    assert verdict.id in [each["id"] for each in data["verdicts"]]


def test_what_the_engine_found_live_is_what_a_replay_finds() -> None:
    argus = Argus(silent=True)
    chance = random.Random(1)
    for step in range(400):
        loss = 9.0 if step == 300 else 2.5 + 0.1 * chance.random()
        more: Dict[str, Any] = {"sample_losses": [loss] * 8} if step % 3 == 0 else {}
        argus.step(loss, None if step % 7 == 0 else 1.0 + 0.1 * chance.random(), **more)
    argus.complete()
    found = recorded(folder_of(argus))
    assert any(record["type"] == "verdict" for record in found.values())
    assert found == replayed(folder_of(argus))


# -- how a run begins and ends


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "completed"),
        (ArgusPause("enough"), "paused"),
        (ArgusHalt("no more"), "halted"),
        (ZeroDivisionError("a fault of the loop"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_leaving_the_block_ends_the_run_with_its_status(
    error: Optional[BaseException], status: str
) -> None:
    argus = Argus(silent=True)

    def train() -> None:
        with argus as entered:
            assert entered is argus
            argus.step(2.5)
            if error is not None:
                raise error

    if error is None:
        train()
    else:
        with pytest.raises(type(error)):
            train()
    (finished,) = controls_of(argus, "session_finished")
    name = None if error is None else type(error).__name__
    assert finished.data == {"status": status, "exception": name}


def test_complete_takes_a_status_and_its_second_call_changes_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argus = Argus()
    argus.step(2.5)
    argus.complete("stopped early")
    argus.complete()
    with argus:
        pass
    (finished,) = controls_of(argus, "session_finished")
    assert finished.data["status"] == "stopped early"
    err = capsys.readouterr().err
    assert err.count("stopped early: 3 events") == 1
    assert len(err.splitlines()) == 2


def test_a_step_after_the_end_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    argus = Argus()
    argus.step(2.5)
    argus.complete()
    for _ in range(5):
        argus.step(2.5, 1.0)
    argus.complete()  # as the interpreter's exit does
    assert len(steps_of(argus)) == 1
    err = capsys.readouterr().err
    assert err.count("step() after complete()") == 1
    assert err.count("5 steps after complete() were not recorded") == 1


def test_a_run_has_an_id_of_its_own_or_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Argus(silent=True), Argus(silent=True)
    assert first.run_id != second.run_id
    assert folder_of(first).name == first.run_id
    assert Argus(silent=True, run_id="mine").run_id == "mine"
    monkeypatch.setenv("ARGUS_RUN_ID", "theirs")
    assert Argus(silent=True).run_id == "theirs"
    assert Argus(silent=True, run_id="mine2").run_id == "mine2"


def test_events_are_numbered_without_a_hole() -> None:
    argus = Argus(silent=True)
    healthy(argus, 50)
    argus.step(2.5, epoch=1.0)
    argus.complete()
    events = events_of(argus)
    assert [event.record for event in events] == list(range(53))
    assert {event.session for event in events} == {events[0].session}
    assert {event.run_id for event in events} == {argus.run_id}


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda argus: pickle.loads(pickle.dumps(argus))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_is_inert(copied: Callable[[Argus], Argus]) -> None:
    argus = Argus(silent=True)
    other = copied(argus)
    assert other.step(2.5, 1.0) == CONTINUE
    other.complete()
    argus.complete()
    assert steps_of(argus) == []
    assert other.run_dir is None
