"""What is done about an action: in AUTO mode or for an accepted order, once, and never else."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional, Tuple

import pytest
from tests.producer.runs import (
    caught_up,
    controls_of,
    folder_of,
    healthy,
    recorded,
    replayed,
    steps_of,
    until,
)

from plarv import Argus, ArgusCheckpoint, ArgusHalt, ArgusPause
from plarv.cli import main
from plarv.faults import Faults
from plarv.interventions import Interventions
from plarv.learning_rate import LearningRateCap
from plarv.orders import OrderError, order
from plarv_schemas.events import Action, ActionKind

Told = List[Tuple[str, int, Mapping[str, Any]]]


def action(kind: ActionKind, expiry_step: int = 1000, **parameters: Any) -> Action:
    return Action(
        run_id="run",
        attempt=1,
        sessions=(("0123456789abcdef", 0),),
        step=5,
        ordinal=6,
        kind=kind,
        parameters=parameters,
        reason="the loss left for good",
        verdict_ids=("0123",),
        harm_pressure=3.0,
        expiry_step=expiry_step,
    )


class Process:
    """A training process's side of the actions, and what it told of them."""

    def __init__(self, auto: bool = True, accept_operator: bool = False, **more: Any) -> None:
        self.told: Told = []
        self.optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.02}])
        self.faults = Faults()
        options: Dict[str, Any] = {
            "auto": auto,
            "accept_operator": accept_operator,
            "cap": LearningRateCap(),
            "find_optimizer": lambda: self.optimizer,
            "on_pause": None,
            "report": lambda *what: self.told.append(what),
            "faults": self.faults,
        }
        self.interventions = Interventions(**{**options, **more})

    def hears(self, given: Action, step: int = 10) -> None:
        self.interventions.take(given, step)
        self.interventions.apply(step)

    @property
    def kinds(self) -> List[str]:
        return [kind for kind, _, _ in self.told]

    @property
    def rates(self) -> List[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


def diverges(argus: Argus, group: Dict[str, Any]) -> int:
    """A run whose learning rate jumps and whose loss goes with it; its last step."""
    last = healthy(argus, 150)
    group["lr"] *= 60
    for step in range(last + 1, last + 41):
        argus.step(9.0 + 0.1 * (step % 3), 30.0, step=step)
    return last + 40


def dies(argus: Argus) -> int:
    """A run whose loss is NaN from some step on, long enough for a pause; its last step."""
    last = healthy(argus, 100)
    for step in range(last + 1, last + 21):
        argus.step(math.nan, math.nan, step=step)
    caught_up(argus, last + 20)
    return last + 20


# -- one process's side


def test_a_learning_rate_is_set_on_all_groups_in_proportion_and_told() -> None:
    process = Process()
    process.hears(action("SET_LR", lr=0.01))
    assert process.rates == pytest.approx([0.01, 0.002])
    ((kind, step, data),) = process.told
    assert (kind, step) == ("action_applied", 10)
    assert (data["kind"], data["lr"], data["lr_before"]) == ("SET_LR", 0.01, 0.1)


def test_a_factor_is_of_the_rate_that_is_in_force() -> None:
    process = Process()
    process.hears(action("SET_LR", factor=0.5))
    assert process.rates == pytest.approx([0.05, 0.01])


def test_the_cap_holds_against_whoever_sets_the_rate_again() -> None:
    process = Process()
    process.hears(action("SET_LR", lr=0.01))
    for step in range(11, 14):
        process.optimizer.param_groups[0]["lr"] = 0.5
        process.interventions.apply(step)
        assert process.rates[0] == 0.01
    assert process.interventions.busy  # so that every step passes by


@pytest.mark.parametrize(
    "optimizer",
    [None, SimpleNamespace(), SimpleNamespace(param_groups=[]), SimpleNamespace(param_groups=[{}])],
)
def test_without_a_rate_to_set_the_action_is_refused_and_told(optimizer: Any) -> None:
    process = Process()
    process.optimizer = optimizer
    process.hears(action("SET_LR", lr=0.01))
    assert process.kinds == ["action_refused"]


@pytest.mark.parametrize(("kind", "error"), [("PAUSE", ArgusPause), ("HALT", ArgusHalt)])
def test_what_stands_is_raised_at_every_step_with_the_action_behind_it(
    kind: ActionKind, error: Any
) -> None:
    process = Process()
    asked = action(kind)
    for step in (10, 11):
        with pytest.raises(error, match="the loss left for good") as raised:
            process.hears(asked, step)
        assert raised.value.step == step
        assert raised.value.response == asked.to_dict()
    assert process.kinds == ["action_applied"]


@pytest.mark.parametrize("kind", ["SET_LR", "PAUSE", "HALT", "RESUME"])
def test_in_manual_nothing_is_done_and_nothing_told(kind: ActionKind) -> None:
    process = Process(auto=False)
    process.hears(action(kind, lr=0.01))
    assert (process.told, process.rates, process.interventions.busy) == ([], [0.1, 0.02], False)


@pytest.mark.parametrize(
    ("auto", "accept_operator", "obeys"),
    [(True, False, True), (True, True, True), (False, True, True), (False, False, False)],
)
def test_an_operators_order_binds_in_auto_or_where_it_is_accepted(
    auto: bool, accept_operator: bool, obeys: bool
) -> None:
    process = Process(auto, accept_operator)
    asked = action("PAUSE", operator="jo", order="pause")
    if obeys:
        with pytest.raises(ArgusPause):
            process.hears(asked)
    else:
        process.hears(asked)
    assert process.kinds == (["action_applied"] if obeys else [])


def test_accepting_operators_makes_nobody_obey_the_policy() -> None:
    process = Process(auto=False, accept_operator=True)
    process.hears(action("PAUSE"))
    assert process.told == []


def test_resume_lifts_what_stands() -> None:
    process = Process()
    with pytest.raises(ArgusPause):
        process.hears(action("PAUSE"))
    process.hears(action("RESUME"), 11)
    process.interventions.apply(12)
    assert not process.interventions.busy
    assert process.kinds == ["action_applied", "action_applied"]


@pytest.mark.parametrize("kind", ["SET_LR", "PAUSE", "HALT", "RESUME"])
def test_an_action_that_comes_too_late_is_void_and_told(kind: ActionKind) -> None:
    process = Process()
    process.hears(action(kind, expiry_step=9, lr=0.01), 10)
    assert (process.kinds, process.rates) == (["action_expired"], [0.1, 0.02])


def test_each_action_is_carried_out_once_however_often_it_comes() -> None:
    process = Process()
    asked = action("SET_LR", factor=0.5)
    for step in range(10, 14):
        process.hears(asked, step)
    assert process.rates[0] == 0.05
    assert process.kinds == ["action_applied"]


def test_with_several_ranks_and_nothing_to_agree_by_an_action_is_dropped_and_told() -> None:
    process = Process()
    process.hears(action("SET_LR", lr=0.01, apply_step=20))
    assert process.kinds == ["action_dropped"]
    assert process.rates == [0.1, 0.02]


def test_kinds_that_are_none_of_the_processs_business_are_left_alone() -> None:
    process = Process()
    kinds: Tuple[ActionKind, ...] = ("WARN", "CHECKPOINT", "CERTIFY", "FREEZE")
    for kind in kinds:
        process.hears(action(kind))
    assert process.told == []


def test_a_checkpoint_is_raised_once_where_the_loop_asked_for_it_and_a_pause_comes_first() -> None:
    process = Process(raise_checkpoint=True)
    asked = action("CHECKPOINT")
    with pytest.raises(ArgusCheckpoint) as caught:
        process.hears(asked, 10)
    assert (caught.value.step, caught.value.response) == (10, asked.to_dict())
    process.hears(asked, 11)
    assert process.kinds == ["action_applied"]
    process.hears(action("SET_LR", lr=0.01), 12)
    process = Process(raise_checkpoint=True)
    process.interventions.take(action("CHECKPOINT"), 10)
    with pytest.raises(ArgusPause):
        process.hears(action("PAUSE"), 10)
    with pytest.raises(ArgusPause):
        process.hears(action("PAUSE"), 11)
    watching = Process(auto=False, raise_checkpoint=True)
    watching.hears(action("CHECKPOINT"), 10)
    assert watching.told == []


def test_a_rollback_without_checkpoints_is_refused_with_the_reason() -> None:
    process = Process()
    process.hears(action("ROLLBACK", checkpoint_step=3))
    assert process.kinds == ["action_refused"]
    assert "checkpoint_dir" in process.told[0][2]["why"]


@pytest.mark.parametrize("auto", [True, False])
def test_on_pause_hears_of_a_pause_once_in_either_mode(auto: bool) -> None:
    heard: List[Mapping[str, Any]] = []
    process = Process(auto, on_pause=heard.append)
    asked = action("PAUSE")
    for step in (10, 11):
        try:
            process.hears(asked, step)
        except ArgusPause:
            assert auto
    assert heard == [asked.to_dict()]


def test_an_on_pause_that_raises_is_counted_and_the_pause_stands() -> None:
    def handler(_: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    process = Process(on_pause=handler)
    with pytest.raises(ArgusPause):
        process.hears(action("PAUSE"))
    assert process.faults.describe() == "1 x on_pause raised ZeroDivisionError"


# -- whole runs


def test_in_auto_a_risen_learning_rate_is_set_back_and_held() -> None:
    group = {"lr": 1e-3}
    argus = Argus(optimizer=SimpleNamespace(param_groups=[group]), mode="AUTO", silent=True)
    last = diverges(argus, group)
    caught_up(argus, last)
    argus.step(9.0, 30.0)
    assert group["lr"] == 1e-3
    group["lr"] = 0.06  # a scheduler's doing
    argus.step(9.0, 30.0)
    assert group["lr"] == 1e-3
    argus.complete()
    assert group["lr"] == 0.06  # what it would be without us
    (applied,) = controls_of(argus, "action_applied")
    assert (applied.data["kind"], applied.data["lr"]) == ("SET_LR", 1e-3)
    assert recorded(folder_of(argus)) == replayed(folder_of(argus))


def test_in_manual_the_same_run_is_left_alone_and_told_what_would_be_done() -> None:
    group = {"lr": 1e-3}
    argus = Argus(optimizer=SimpleNamespace(param_groups=[group]), silent=True)
    last = diverges(argus, group)
    caught_up(argus, last)
    argus.step(9.0, 30.0)
    argus.complete()
    assert group["lr"] == 0.06
    assert controls_of(argus, "action_applied") == []
    asked = [r for r in recorded(folder_of(argus)).values() if r["kind"] == "SET_LR"]
    assert [record["parameters"]["dry_run"] for record in asked] == [True] * len(asked)
    assert asked


def test_in_auto_a_dead_run_is_paused_and_its_next_attempt_waits_for_resume(
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard: List[Mapping[str, Any]] = []
    argus = Argus(run_id="dead", mode="AUTO", on_pause=heard.append, silent=True)
    last = dies(argus)
    with pytest.raises(ArgusPause) as raised, argus:
        argus.step(math.nan)
    assert raised.value.step == last + 1
    assert raised.value.response["kind"] == "PAUSE"
    assert [pause["id"] for pause in heard] == [raised.value.response["id"]]
    (finished,) = controls_of(argus, "session_finished")
    assert finished.data == {"status": "paused", "exception": "ArgusPause"}

    for mode in ("AUTO", "MANUAL"):
        with pytest.raises(ArgusPause, match="Lift it with `argus resume dead`"):
            Argus(run_id="dead", mode=mode)
    assert main(["resume", "dead"]) == 0
    assert "its next attempt may start" in capsys.readouterr().out
    again = Argus(run_id="dead", mode="AUTO", silent=True)
    assert healthy(again, 60) == 59
    caught_up(again, 59)
    assert again.step(2.5, 1.0).attempt == 2
    again.complete()
    assert recorded(folder_of(again)) == replayed(folder_of(again))


def test_an_on_pause_that_raises_in_a_run_is_said_at_its_end_and_the_pause_stands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def handler(_: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    argus = Argus(mode="AUTO", on_pause=handler)
    dies(argus)
    for _ in range(3):
        with pytest.raises(ArgusPause):
            argus.step(math.nan)
    argus.complete("paused")
    assert capsys.readouterr().err.count("1 x on_pause raised ZeroDivisionError") == 1


def test_in_manual_a_dead_run_goes_on_and_its_next_attempt_may_start() -> None:
    heard: List[Mapping[str, Any]] = []
    argus = Argus(run_id="dead", on_pause=heard.append, silent=True)
    dies(argus)
    assert argus.step(math.nan).action == "PAUSE"
    argus.complete()
    assert [pause["parameters"] for pause in heard] == [{"dry_run": True}]
    Argus(run_id="dead", silent=True).complete()
    assert len(steps_of(argus)) == 121


def stepping(argus: Argus, kind: type) -> BaseException:
    """What a loop that goes on is stopped by."""
    error: Optional[BaseException] = None

    def stopped() -> bool:
        nonlocal error
        try:
            argus.step(2.5, 1.0)
        except (ArgusPause, ArgusHalt) as raised:
            error = raised
        return error is not None

    until(stopped)
    assert error is not None
    assert isinstance(error, kind)
    return error


@pytest.mark.parametrize("options", [{"mode": "AUTO"}, {"accept_operator": True}])
def test_an_operator_pauses_a_run_and_lets_it_go_on(options: Dict[str, Any]) -> None:
    argus = Argus(run_id="ordered", silent=True, **options)
    last = healthy(argus, 20)
    caught_up(argus, last)
    assert order("ordered", "pause", "jo").startswith("pause ordered")
    error = stepping(argus, ArgusPause)
    assert "jo ordered pause" in str(error)
    with pytest.raises(ArgusPause):
        argus.step(2.5, 1.0)  # it stands
    with pytest.raises(ArgusPause, match="was paused at step"):
        Argus(run_id="ordered")
    order("ordered", "resume", "jo")

    def resumed() -> bool:
        try:
            argus.step(2.5, 1.0)
        except ArgusPause:
            return False
        return True

    until(resumed)
    argus.step(2.5, 1.0)
    argus.complete()
    assert [c.data["kind"] for c in controls_of(argus, "action_applied")] == ["PAUSE", "RESUME"]
    assert recorded(folder_of(argus)) == replayed(folder_of(argus))


def test_an_operator_stops_a_run_for_good() -> None:
    argus = Argus(run_id="ordered", mode="AUTO", silent=True)
    caught_up(argus, healthy(argus, 20))
    order("ordered", "stop", "jo")
    with pytest.raises(ArgusHalt), argus:
        raise stepping(argus, ArgusHalt)
    (finished,) = controls_of(argus, "session_finished")
    assert finished.data == {"status": "halted", "exception": "ArgusHalt"}


def test_in_manual_an_operators_order_is_reported_and_nothing_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argus = Argus(run_id="ordered")
    caught_up(argus, healthy(argus, 20))
    order("ordered", "pause", "jo")
    until(lambda: argus.decision.newest_action)
    argus.step(2.5, 1.0)
    argus.complete()
    assert "jo ordered pause" in capsys.readouterr().err
    assert controls_of(argus, "action_applied") == []
    Argus(run_id="ordered", silent=True).complete()


def test_an_order_to_a_run_that_has_ended_waits_for_nobody() -> None:
    argus = Argus(run_id="ended", mode="AUTO", silent=True)
    healthy(argus, 20)
    argus.complete()
    assert order("ended", "pause", "jo") == "pause recorded: no engine is running for ended"
    with pytest.raises(ArgusPause):
        Argus(run_id="ended")
    assert order("ended", "resume", "jo") == "run ended is resumed: its next attempt may start"
    Argus(run_id="ended", silent=True).complete()


def test_an_order_that_cannot_be_given_says_why() -> None:
    with pytest.raises(OrderError, match="no run 'none'"):
        order("none", "pause")
    with pytest.raises(OrderError, match="an order is one of resume, pause, stop"):
        order("none", "dance")


def test_a_run_that_lies_in_the_fallback_folder_is_found_paused_and_resumed_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # it remembers what TMPDIR was
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("ARGUS_DIR", str(tmp_path / "file" / "below"))
    argus = Argus(run_id="dead", mode="AUTO", silent=True)
    assert tmp_path in folder_of(argus).parents
    dies(argus)
    with pytest.raises(ArgusPause), argus:
        argus.step(math.nan)
    with pytest.raises(ArgusPause, match="was paused"):
        Argus(run_id="dead")
    assert main(["resume", "dead"]) == 0
    Argus(run_id="dead", silent=True).complete()


def test_a_lone_spike_asks_the_loop_for_a_checkpoint_and_the_run_goes_on() -> None:
    argus = Argus(mode="AUTO", raise_checkpoint=True, silent=True)
    last = healthy(argus, 150)
    for step in range(last + 1, last + 5):
        argus.step(6.0, 1.0, step=step)
    caught_up(argus, last + 4)
    with pytest.raises(ArgusCheckpoint) as caught:
        argus.step(2.0, 1.0, step=last + 5)
    assert caught.value.step == last + 5
    assert caught.value.response["kind"] == "CHECKPOINT"
    argus.step(2.0, 1.0, step=last + 6)
    argus.complete()
    assert len(controls_of(argus, "action_applied")) == 1
