"""Packing follows the link: no broker, and the time is given."""

from __future__ import annotations

from typing import Dict, List

import pytest

from plarv.fleet.packing import Limits, Packer, approximate_bytes
from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.messages import event_messages


def step(number: int, **columns: object) -> StepEvent:
    event = StepEvent("run", "0" * 16, number, 0, number, time_ns=1, loss=2.0)
    return event._replace(**columns)  # type: ignore[arg-type]


def simulated(step_s: float, round_trip_s: float, num_steps: int = 2000) -> List[int]:
    """Events of each message when a step comes every ``step_s``."""
    packer, sizes = Packer(), []
    answers: List[float] = []
    for number in range(num_steps):
        now = number * step_s
        while answers and answers[0] <= now:
            packer.acknowledged(answers.pop(0))
        packer.add(step(number), now)
        for _ in range(10):
            events = packer.take(now)
            if not events:
                break
            sizes.append(len(events))
            answers.append(now + round_trip_s)
    return sizes


def test_a_quick_link_and_a_slow_loop_make_one_step_a_message() -> None:
    assert set(simulated(step_s=0.01, round_trip_s=0.003)) == {1}


def test_a_quick_loop_packs_what_25_ms_bring() -> None:
    sizes = simulated(step_s=0.001, round_trip_s=0.0005)
    assert set(sizes[2:-1]) <= {24, 25, 26}


def test_a_slow_link_packs_what_a_round_trip_brings() -> None:
    sizes = simulated(step_s=0.01, round_trip_s=0.1)
    assert 9 <= sum(sizes[2:-1]) / len(sizes[2:-1]) <= 11


def test_a_very_slow_link_still_sends_every_quarter_of_a_second() -> None:
    sizes = simulated(step_s=0.01, round_trip_s=1.0)
    assert max(sizes) <= 26
    assert sum(sizes[2:-1]) / len(sizes[2:-1]) >= 20


def test_a_message_is_full_with_512_steps() -> None:
    sizes = simulated(step_s=0.0001, round_trip_s=0.2, num_steps=20_000)
    assert max(sizes) == 512


def test_long_events_fill_a_message_by_their_bytes() -> None:
    pytest.importorskip("pyarrow")
    packer = Packer()
    long = tuple(float(number) for number in range(4000))
    for number in range(40):
        packer.add(step(number, sample_losses=long), 0.0)
    sent: List[List[Event]] = []
    while packer.waiting:
        events = packer.take(1.0 + len(sent))
        assert events
        sent.append(events)
        packer.acknowledged(1.0 + len(sent))
    assert len(sent) > 2
    for events in sent:  # none had to be cut in two
        (message,) = event_messages(events)
        assert 100_000 < len(message.value) <= 512 * 1024
    assert [event.record for events in sent for event in events] == list(range(40))


def test_only_so_many_messages_are_on_their_way() -> None:
    packer = Packer(Limits(events=2, unacknowledged=3))
    for number in range(20):
        packer.add(step(number), 0.0)
    sent = [packer.take(9.0) for _ in range(4)]
    assert [len(events) for events in sent] == [2, 2, 2, 0]
    packer.acknowledged(9.0)
    assert len(packer.take(9.0)) == 2


def test_nothing_more_is_read_while_a_message_waits() -> None:
    packer = Packer(Limits(events=4, unacknowledged=1))
    packer.add(step(0), 0.0)
    assert packer.take(0.0)
    for number in range(1, 5):
        assert packer.room == 5 - number
        packer.add(step(number), 0.0)
    assert packer.room == 0
    assert packer.take(99.0) == []


def test_nothing_more_is_read_while_the_bytes_of_a_message_wait() -> None:
    packer = Packer(Limits(size_bytes=1000))
    packer.add(step(0, sample_losses=(1.0,) * 200), 0.0)
    assert packer.room == 0


def test_an_event_longer_than_a_message_goes_out_alone() -> None:
    packer = Packer(Limits(size_bytes=1000))
    packer.add(step(0), 0.0)
    packer.add(step(1, sample_losses=(1.0,) * 500), 0.0)
    assert [event.record for event in packer.take(0.0)] == [0]
    assert [event.record for event in packer.take(0.0)] == [1]


def test_the_round_trip_is_measured() -> None:
    packer = Packer()
    assert packer.round_trip_s is None
    for number in range(50):
        packer.add(step(number), float(number))
        assert packer.take(float(number))
        assert packer.oldest_s(number + 0.25) == 0.25
        packer.acknowledged(number + 0.5)
    assert packer.round_trip_s == pytest.approx(0.5)
    assert packer.oldest_s(99.0) == 0.0


def test_a_packer_that_was_cleared_begins_anew() -> None:
    packer = Packer()
    packer.add(step(0), 0.0)
    assert packer.take(0.0)
    packer.add(step(1), 0.0)
    packer.clear()
    assert (packer.waiting, packer.unacknowledged) == (0, 0)
    packer.add(step(0), 1.0)
    assert [event.record for event in packer.take(1.0)] == [0]


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"sample_losses": (1.5,) * 300},
        {"sample_ids": tuple(range(300)), "sample_correct": (1,) * 300},
        {"local_layers": ("model.layers.17.self_attn",) * 10, "local_levels": (1,) * 10},
    ],
)
def test_the_estimate_of_an_event_is_about_right(columns: Dict[str, object]) -> None:
    pytest.importorskip("pyarrow")
    events = [step(number, **columns) for number in range(64)]
    (message,) = event_messages(events)
    own = len(message.value) / 64
    assert own <= approximate_bytes(events[0]) * 1.05 <= max(12 * own, 200)


def test_the_estimate_of_a_control_event_covers_its_data() -> None:
    pytest.importorskip("pyarrow")
    event = ControlEvent("run", "0" * 16, 0, 0, "session_started", data={"dtype": "x" * 2000})
    (message,) = event_messages([event])
    assert approximate_bytes(event) > 2000
    assert len(message.value) < approximate_bytes(event) + 2048
