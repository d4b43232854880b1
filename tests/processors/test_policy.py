from __future__ import annotations

from typing import Any, List, Optional, Tuple

import pytest

from plarv_processors.detectors import BUILTIN
from plarv_processors.policy import Policy
from plarv_processors.responses import LADDER, RESPONSES
from plarv_schemas.events import Action, ControlEvent, StepEvent, Verdict


class Run:
    """A run of one rank, told to a policy step by step."""

    def __init__(self, mode: str = "AUTO", world_size: int = 1) -> None:
        self.policy = Policy(mode=mode)
        self.ordinal = self.step = -1
        self.attempt = 1
        self.world_size = world_size

    def sessions(self) -> Tuple[Tuple[str, int], ...]:
        return (("session", 0),)

    def advance(self, *verdicts: Verdict, lr: Optional[float] = 0.1) -> Tuple[Action, ...]:
        self.ordinal += 1
        self.step += 1
        event = StepEvent(
            "run", "session", self.ordinal, 0, self.step,
            current_lr=lr, world_size=self.world_size, step_time_ms=10.0,
        )  # fmt: skip
        found = [v._replace(step=self.step, ordinal=self.ordinal, attempt=1) for v in verdicts]
        return self.policy.step(event, found, self)

    def advance_by(self, steps: int, lr: Optional[float] = 0.1) -> List[Action]:
        return [action for _ in range(steps) for action in self.advance(lr=lr)]

    def control(self, what: Any, **data: Any) -> Tuple[Action, ...]:
        self.ordinal += 1
        event = ControlEvent("run", "session", self.ordinal, 0, what, data=data)
        return self.policy.control(event, self)


def verdict(
    detector: str, kind: str, level: Any = "critical", state: Any = "opened", onset: int = 0
) -> Verdict:
    return Verdict(
        "run", 0, None, 0, -1, detector, kind, level, state, onset, 9.0, 8.0, {"loss": 9.0},
        f"{detector} says loss 9 against 2", f"{detector}-1",
    )  # fmt: skip


DIVERGED = verdict("loss_divergence", "diverged")


@pytest.mark.parametrize("cls", BUILTIN, ids=lambda cls: cls.name)
def test_what_the_policy_answers_is_what_the_detector_can_find(cls: Any) -> None:
    for detector, kind in RESPONSES:
        if detector == cls.name:
            assert f"*{kind}*" in cls.__doc__ or f"``{kind}``" in cls.__doc__


def test_a_warning_is_given_once_per_cause() -> None:
    run = Run()
    transient = verdict("loss_spike", "transient", "warn", onset=3)
    (action,) = run.advance(transient)
    assert (action.kind, action.verdict_ids != ()) == ("WARN", True)
    assert run.advance(transient._replace(state="escalated")) == ()
    assert run.advance_by(50) == []


def test_one_spike_alone_is_no_reason_to_touch_the_learning_rate() -> None:
    run = Run()
    run.advance_by(100)
    (action,) = run.advance(verdict("loss_spike", "confirmed"))
    assert action.kind == "CHECKPOINT"


def test_a_spike_after_the_learning_rate_rose_sets_it_back_to_what_it_was() -> None:
    run = Run()
    run.advance_by(100, lr=0.001)
    run.advance_by(4, lr=0.06)
    (action,) = run.advance(verdict("loss_spike", "confirmed"), lr=0.06)
    assert action.kind == "SET_LR"
    assert action.parameters == {"lr": 0.001}
    assert "60-fold" in action.reason
    assert "0.06" in action.reason


def test_without_such_a_rise_the_learning_rate_is_halved() -> None:
    run = Run()
    run.advance_by(100, lr=0.4)
    (action,) = run.advance(DIVERGED, lr=0.4)
    assert action.kind == "SET_LR"
    assert action.parameters == {"lr": 0.2}


def test_where_the_learning_rate_is_unknown_a_factor_is_given() -> None:
    run = Run()
    run.advance_by(100, lr=None)
    (action,) = run.advance(DIVERGED, lr=None)
    assert action.parameters == {"factor": 0.5}


def test_a_warm_up_is_not_mistaken_for_a_learning_rate_that_jumped() -> None:
    run = Run()
    for step in range(200):
        run.advance(lr=1e-3 * (step + 1) / 200)
    (action,) = run.advance(DIVERGED, lr=1e-3)
    assert action.parameters == {"lr": 5e-4}


def test_a_jump_soon_after_the_warm_up_is_set_back_to_the_rate_before_it() -> None:
    run = Run()
    for step in range(40):
        run.advance(lr=8e-4 * (step + 1) / 40)
    run.advance_by(10, lr=8e-4)
    run.advance_by(3, lr=0.048)
    (action,) = run.advance(DIVERGED, lr=0.048)
    assert action.parameters == {"lr": 8e-4}


def test_the_first_steps_of_a_warm_up_are_no_jump() -> None:
    run = Run()
    for step in range(30):
        run.advance(lr=1e-5 * (step + 1))
    (action,) = run.advance(DIVERGED, lr=3e-4)
    assert action.parameters == {"lr": 1.5e-4}


def test_lowerings_keep_their_distance_and_have_a_budget() -> None:
    run = Run()
    run.advance_by(100)
    issued = []
    for number in range(400):
        cause = DIVERGED._replace(onset_step=number)
        issued += [a.step for a in run.advance(cause) if a.kind == "SET_LR"]
    assert len(issued) == Policy.Config().max_lowerings
    assert all(later - sooner >= 50 for sooner, later in zip(issued, issued[1:]))


def test_a_lowered_rate_is_given_its_time_from_when_it_was_applied() -> None:
    run = Run()
    run.advance_by(100)
    (lowered,) = run.advance(DIVERGED)
    assert run.advance_by(150) == []
    run.control("action_applied", kind="SET_LR", action=lowered.id)
    applied_at = run.step
    assert run.advance_by(199) == []
    (pause,) = run.advance_by(2)
    assert pause.kind == "PAUSE"
    assert pause.step == applied_at + 200
    assert "200 steps after the learning rate was lowered" in pause.reason


def test_what_is_cured_is_not_paused() -> None:
    run = Run()
    run.advance_by(100)
    run.advance(DIVERGED)
    run.control("action_applied", kind="SET_LR")
    run.advance(DIVERGED._replace(state="resolved", level="ok"))
    assert run.advance_by(500) == []


def test_a_refused_action_may_be_asked_for_again() -> None:
    run = Run()
    run.advance_by(100)
    run.advance(DIVERGED)
    run.control("action_refused", kind="SET_LR")
    run.advance_by(100)
    assert [a.kind for a in run.advance(DIVERGED._replace(state="escalated"))] == ["SET_LR"]


def test_a_dead_run_is_paused_at_once_and_once() -> None:
    run = Run()
    run.advance_by(10)
    dead = verdict("non_finite", "dead")
    assert [a.kind for a in run.advance(dead)] == ["PAUSE"]
    assert run.advance(dead._replace(onset_step=7)) == ()


def test_in_manual_mode_the_same_is_decided_and_marked_as_not_to_be_done() -> None:
    auto, manual = Run("AUTO"), Run("MANUAL")
    for run in (auto, manual):
        run.advance_by(100)
    (acted,), (reported,) = auto.advance(DIVERGED), manual.advance(DIVERGED)
    assert reported.parameters == {**acted.parameters, "dry_run": True}
    assert reported._replace(parameters={}) == acted._replace(parameters={})


def test_a_detector_of_the_users_own_never_goes_above_a_checkpoint() -> None:
    run = Run()
    run.advance_by(10)
    assert [a.kind for a in run.advance(verdict("my_detector", "anything"))] == ["CHECKPOINT"]


def test_several_ranks_are_told_a_step_ahead() -> None:
    run = Run(world_size=2)
    run.advance_by(100)
    (action,) = run.advance(DIVERGED)
    assert action.parameters["apply_step"] == action.step + 60  # 600 ms at 10 ms a step
    assert action.expiry_step >= action.parameters["apply_step"]


def test_an_order_is_answered_by_an_action_in_the_operators_name() -> None:
    run = Run()
    run.advance_by(3)
    kinds = [
        run.control("order", order=order, operator="ada")[0].kind
        for order in ("pause", "resume", "stop")
    ]
    assert kinds == ["PAUSE", "RESUME", "HALT"]
    assert run.control("order", order="dance") == ()


def test_an_order_in_manual_mode_is_marked_unless_the_sdk_accepts_operators() -> None:
    run = Run("MANUAL")
    run.advance()
    assert run.control("order", order="pause")[0].parameters["dry_run"] is True
    run.control("session_started", mode="MANUAL", accept_operator=True)
    assert "dry_run" not in run.control("order", order="pause")[0].parameters


def test_the_harm_pressure_rises_at_once_falls_slowly_and_stays_between_0_and_3() -> None:
    run = Run()
    run.advance_by(10)
    run.advance(DIVERGED, verdict("non_finite", "dead"), verdict("loss_spike", "confirmed"))
    peak = run.policy.harm_pressure
    assert peak == 3.0
    for found in ("loss_divergence", "non_finite", "loss_spike"):
        run.advance(verdict(found, "x", "ok", "resolved"))
    run.advance_by(30)
    assert 1.0 < run.policy.harm_pressure < 3.0
    run.advance_by(2000)
    assert run.policy.harm_pressure == 0.0


def test_the_recommendation_is_the_gravest_thing_that_is_open() -> None:
    run = Run()
    assert run.policy.recommendation() == "CONTINUE"
    run.advance(verdict("loss_plateau", "no_progress", "warn"))
    assert run.policy.recommendation() == "WARN"
    run.advance(DIVERGED)
    assert run.policy.recommendation() == "SET_LR"
    assert LADDER.index("SET_LR") > LADDER.index("CHECKPOINT")


def test_warnings_have_a_budget_per_detector() -> None:
    run = Run()
    issued: List[Action] = []
    for number in range(100):
        issued += run.advance(verdict("loss_spike", "transient", "warn", onset=number))
        issued += run.advance(verdict("loss_spike", "transient", "ok", "resolved", onset=number))
    assert len(issued) == Policy.Config().warn_budget


def test_nonsense_in_the_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="lr_factor"):
        Policy.Config(lr_factor=1.5)
    with pytest.raises(ValueError, match="lr_jump"):
        Policy.Config(lr_jump=0.5)
