"""CERTIFY, FREEZE and ROLLBACK: decided from the log alone."""

from __future__ import annotations

from typing import Any, List

import pytest
from tests.processors.test_policy import DIVERGED, Run, verdict

from plarv_processors.policy import Policy
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import Action

CONFIG = Policy.Config()
WINDOW = CONFIG.confirm_steps


def saved(run: Run, slot: int = 0, **data: Any) -> int:
    """A checkpoint of the step that the run stands at."""
    run.control("checkpoint_saved", step=run.step, slot=slot, **data)
    return run.step


def kinds(actions: List[Action]) -> List[str]:
    return [action.kind for action in actions]


def certified(run: Run, slot: int = 0) -> int:
    """Saves one and lets its window pass."""
    step = saved(run, slot)
    assert kinds(run.advance_by(WINDOW)) == ["CERTIFY"]
    return step


def dead(onset: int) -> Any:
    return verdict("non_finite", "dead", onset=onset)


def test_a_checkpoint_is_certified_once_its_window_has_passed_also_in_manual() -> None:
    run = Run(mode="MANUAL")
    run.advance_by(101)
    step = saved(run, slot=2)
    assert run.advance_by(WINDOW - 1) == []
    (action,) = run.advance()
    assert (action.kind, action.parameters) == ("CERTIFY", {"checkpoint_step": step, "slot": 2})
    assert action.verdict_ids == ()
    assert run.advance_by(500) == []


def test_a_warning_does_not_spoil_a_checkpoint_and_a_critical_verdict_does() -> None:
    run = Run()
    run.advance_by(10)
    saved(run)
    run.advance(verdict("loss_spike", "transient", "warn", onset=9))
    assert "CERTIFY" in kinds(run.advance_by(WINDOW))
    saved(run, slot=1)
    run.advance(verdict("loss_spike", "confirmed", onset=11))
    run.advance(verdict("loss_spike", "confirmed", state="resolved", onset=11))
    assert "CERTIFY" not in kinds(run.advance_by(WINDOW * 2))


def test_what_is_saved_while_a_critical_verdict_is_open_is_never_certified() -> None:
    run = Run()
    run.advance(verdict("loss_spike", "confirmed"))
    saved(run)
    run.advance(verdict("loss_spike", "confirmed", state="resolved"))
    assert "CERTIFY" not in kinds(run.advance_by(WINDOW * 2))


def test_several_that_wait_are_certified_one_after_another() -> None:
    run = Run()
    run.advance_by(5)
    saved(run, slot=0)
    run.advance_by(5)
    saved(run, slot=1)
    steps = [a.parameters["checkpoint_step"] for a in run.advance_by(WINDOW + 5)]
    assert steps == [4, 9]


def test_a_checkpoint_of_several_parts_counts_from_the_last_of_them() -> None:
    run = Run()
    run.advance_by(5)
    saved(run, parts=2, part=0)
    assert run.advance_by(WINDOW * 2) == []
    run.control("checkpoint_saved", step=4, slot=0, parts=2, part=1)
    (action,) = run.advance()
    assert action.parameters["checkpoint_step"] == 4


@pytest.mark.parametrize("data", [{}, {"step": "x", "slot": 0}, {"step": 3}, {"slot": None}])
def test_a_nonsense_event_of_a_checkpoint_is_passed_over(data: Any) -> None:
    run = Run()
    run.advance_by(5)
    run.control("checkpoint_saved", **data)
    assert run.advance_by(WINDOW * 2) == []


def test_a_dead_run_is_rolled_back_to_the_newest_certified_checkpoint_before_the_onset() -> None:
    run = Run()
    run.advance_by(10)
    first = certified(run, slot=0)
    second = certified(run, slot=1)
    onset = run.step + 1
    saved(run, slot=2)  # not certified when it happens
    freeze, action = run.advance(dead(onset))
    assert (freeze.kind, action.kind) == ("FREEZE", "ROLLBACK")
    assert freeze.parameters == {"onset_step": onset, "checkpoint_step": second, "slot": 1}
    assert action.parameters == {
        "checkpoint_step": second, "slot": 1, "onset_step": onset, "bad_steps": [onset, run.step],
    }  # fmt: skip
    assert action.verdict_ids == freeze.verdict_ids
    assert f"back to the certified checkpoint of step {second}" in action.reason
    assert first < second


def test_a_checkpoint_from_after_the_onset_is_none_to_go_back_to() -> None:
    run = Run()
    run.advance_by(10)
    first = certified(run, slot=0)
    onset = run.step - 5
    certified(run, slot=1)
    _, action = run.advance(dead(onset))
    assert (action.kind, action.parameters["checkpoint_step"]) == ("ROLLBACK", first)


def test_without_a_checkpoint_from_before_the_onset_the_run_is_paused() -> None:
    run = Run()
    run.advance_by(10)
    certified(run)
    freeze, action = run.advance(dead(onset=3))
    assert (freeze.kind, freeze.parameters) == ("FREEZE", {"onset_step": 3})
    assert "no certified checkpoint is older than step 3" in freeze.reason
    assert action.kind == "PAUSE"


def test_a_fault_of_the_machine_is_not_rolled_back() -> None:
    run = Run()
    run.advance_by(10)
    certified(run)
    actions = run.advance(verdict("fleet_skew", "hardware", onset=run.step))
    assert kinds(list(actions)) == ["FREEZE", "PAUSE"]


def test_in_manual_mode_a_rollback_is_only_told() -> None:
    run = Run(mode="MANUAL")
    run.advance_by(10)
    certified(run)
    freeze, action = run.advance(dead(run.step))
    assert action.kind == "ROLLBACK"
    assert action.parameters["dry_run"] is True
    assert "dry_run" not in freeze.parameters  # nothing in the run is touched by it


def test_a_rollback_that_was_refused_becomes_a_pause() -> None:
    run = Run()
    run.advance_by(10)
    certified(run)
    run.advance(dead(run.step))
    run.control("action_refused", kind="ROLLBACK")
    (action,) = run.advance()
    assert action.kind == "PAUSE"
    assert run.advance_by(20) == []


def test_only_one_rollback_is_asked_for_in_an_attempt_however_many_faults_show() -> None:
    run = Run()
    run.advance_by(10)
    certified(run)
    asked = list(run.advance(dead(run.step)))
    asked += run.advance(verdict("gradient_collapse", "vanished", onset=run.step))
    assert kinds(asked) == ["FREEZE", "ROLLBACK"]


def test_after_two_rollbacks_without_progress_the_run_is_paused() -> None:
    run = Run()
    run.advance_by(10)
    step = certified(run)
    for expected in ("ROLLBACK", "ROLLBACK", "PAUSE"):
        actions = run.advance(dead(run.step))
        assert kinds(list(actions)) == ["FREEZE", expected]
        run.policy.begin_attempt()
        run.control("checkpoint_saved", step=step, slot=0, certified=True)


def test_a_newly_certified_checkpoint_pays_for_further_rollbacks() -> None:
    run = Run()
    run.advance_by(10)
    step = certified(run)
    for _ in range(5):
        assert "ROLLBACK" in kinds(list(run.advance(dead(run.step))))
        run.policy.begin_attempt()
        run.control("checkpoint_saved", step=step, slot=0, certified=True)
        step = certified(run, slot=1)


def test_what_a_lowered_rate_does_not_cure_is_rolled_back() -> None:
    run = Run()
    run.advance_by(10)
    certified(run)
    freeze, lowered = run.advance(DIVERGED._replace(onset_step=run.step))
    assert (freeze.kind, lowered.kind) == ("FREEZE", "SET_LR")
    run.control("action_applied", kind="SET_LR")
    actions = run.advance_by(CONFIG.patience_steps + 1)
    assert kinds(actions) == ["ROLLBACK"]


def test_the_rings_state_goes_through_a_snapshot() -> None:
    run, other = Run(), Run()
    run.advance_by(10)
    certified(run)
    saved(run, slot=1)
    restore(other.policy, unpack(pack(dump(run.policy))))
    other.step, other.ordinal = run.step, run.ordinal
    for each in (run, other):
        each.advance_by(20)
    assert run.advance(dead(run.step)) == other.advance(dead(other.step))
    assert run.advance_by(WINDOW) == other.advance_by(WINDOW)
