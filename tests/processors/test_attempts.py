from __future__ import annotations

from typing import Any, Optional

from plarv_processors.attempts import Attempts
from plarv_schemas.events import ControlEvent, StepEvent


def step(session: str, record: int, at: int, rank: int = 0) -> StepEvent:
    return StepEvent("run", session, record, rank, at)


def control(
    session: str, record: int, kind: Any, rank: Optional[int] = 0, **data: Any
) -> ControlEvent:
    return ControlEvent("run", session, record, rank, kind, data=data)


def test_an_event_seen_again_is_a_duplicate() -> None:
    attempts = Attempts()
    assert attempts.place(step("a", 0, 0)) == 1
    assert attempts.place(step("a", 1, 1)) == 1
    assert attempts.place(step("a", 1, 1)) is None
    assert attempts.place(step("a", 0, 0)) is None
    assert attempts.place(step("a", 2, 2)) == 1


def test_a_new_session_after_steps_opens_the_next_attempt() -> None:
    attempts = Attempts()
    attempts.place(control("a", 0, "session_started"))
    attempts.place(step("a", 1, 0))
    assert attempts.place(control("b", 0, "session_started")) == 2
    assert attempts.place(step("b", 1, 0)) == 2
    assert attempts.sessions() == (("b", 0),)


def test_a_new_session_before_any_step_joins_the_attempt() -> None:
    attempts = Attempts()
    attempts.place(control("a", 0, "session_started"))
    assert attempts.place(control("b", 0, "session_started")) == 1


def test_the_ranks_of_one_start_join_one_attempt_whichever_comes_first() -> None:
    attempts = Attempts()
    assert attempts.place(step("a", 0, 0, rank=0)) == 1
    assert attempts.place(step("b", 0, 0, rank=1)) == 1
    assert attempts.place(step("d", 0, 0, rank=1)) == 2  # the second start
    assert attempts.place(step("b", 1, 1, rank=1)) == 1  # what the first still sends
    assert attempts.place(step("c", 0, 0, rank=0)) == 2
    assert attempts.sessions() == (("c", 0), ("d", 0))


def test_the_launchers_restart_count_tells_starts_apart() -> None:
    attempts = Attempts()
    attempts.place(control("a", 0, "session_started", rank=0, restart_count=0))
    attempts.place(step("a", 1, 0))
    assert attempts.place(control("b", 0, "session_started", rank=1, restart_count=1)) == 2
    assert attempts.place(control("c", 0, "session_started", rank=0, restart_count=1)) == 2


def test_a_step_that_goes_back_opens_the_next_attempt_and_the_other_ranks_join_it() -> None:
    attempts = Attempts()
    for at in range(5):
        attempts.place(step("a", at, at, rank=0))
        attempts.place(step("b", at, at, rank=1))
    assert attempts.place(step("a", 5, 2, rank=0)) == 2
    assert attempts.place(step("b", 5, 5, rank=1)) == 1  # has not gone back yet
    assert attempts.place(step("b", 6, 2, rank=1)) == 2
    assert attempts.place(step("a", 6, 3, rank=0)) == 2
    assert attempts.sessions() == (("a", 5), ("b", 6))


def test_a_repeated_step_does_not_open_an_attempt() -> None:
    attempts = Attempts()
    for record, at in enumerate((0, 1, 1, 2)):
        assert attempts.place(step("a", record, at)) == 1


def test_a_recovery_opens_the_next_attempt() -> None:
    attempts = Attempts()
    attempts.place(step("a", 0, 0))
    assert attempts.place(control("a", 1, "recovered")) == 2


def test_an_operators_session_changes_no_attempt() -> None:
    attempts = Attempts()
    attempts.place(step("a", 0, 0))
    assert attempts.place(control("o", 0, "order", rank=None, order="resume")) == 1
    assert attempts.sessions() == (("a", 0),)
