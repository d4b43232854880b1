from __future__ import annotations

from typing import Any, List

import pytest

pytest.importorskip("faust")

from tests.processors.logs import log_of

from plarv_processors.detector_fold import DetectorFold
from plarv_processors.detectors.loss_spike import LossSpike
from plarv_processors.event_batch import EventBatch
from plarv_processors.worker.lane import Lane
from plarv_processors.worker.policy_lane import PolicyLane
from plarv_processors.worker.snapshots import take_up
from plarv_schemas.events import Event, Verdict
from plarv_schemas.messages import LeftOut, Watermark


def _lane() -> Lane[DetectorFold]:
    return Lane("group/loss_spike-1/2", 3, lambda: DetectorFold(LossSpike))


def _fold(lane: Lane[DetectorFold], offset: int, events: List[Event]) -> List[Verdict]:
    entry = lane.entry("run", offset)
    found = [] if entry is None else entry.fold.fold(EventBatch(events))
    lane.next = offset + 1
    return found


def _saved(lane: Lane[DetectorFold], start: int) -> dict[bytes, bytes]:
    return {
        b"group/loss_spike-1/2\0run": lane.packed("run"),
        b"group/loss_spike-1/2\0": lane.marker(start),
    }


def test_a_lane_goes_on_from_its_snapshots_as_if_nothing_had_been() -> None:
    log = log_of("spike")
    whole, lane = _lane(), _lane()
    expected = [v for at in range(len(log)) for v in _fold(whole, at, log[at : at + 1])]
    found: List[Verdict] = []
    for at in range(len(log)):
        if at % 37 == 0 and at:
            records, lane = _saved(lane, lane.next), _lane()
            take_up(lane, records, at)
            assert lane.next == at
        found += _fold(lane, at, log[at : at + 1])
    assert found == expected
    assert expected


def test_a_message_that_a_snapshot_holds_already_is_not_folded_again() -> None:
    log = log_of("spike")
    lane = _lane()
    for at in range(20):
        _fold(lane, at, log[at : at + 1])
    records = _saved(lane, 10)  # the round began at 10; the run was packed later
    again = _lane()
    take_up(again, records, 20)
    assert again.next == 10
    assert again.entry("run", 19) is None
    assert again.entry("run", 20) is not None


def test_a_snapshot_ahead_of_the_group_is_left_alone() -> None:
    lane = _lane()
    _fold(lane, 0, log_of("spike")[:1])
    again = _lane()
    assert take_up(again, _saved(lane, 8), 7) == ()
    assert (again.next, again.runs) == (0, {})


def test_damaged_snapshots_are_not_taken_up_in_part() -> None:
    lane = _lane()
    _fold(lane, 0, log_of("spike")[:1])
    records = _saved(lane, 1)
    records[b"group/loss_spike-1/2\0other"] = b"damaged"
    again = _lane()
    take_up(again, records, 1)
    assert (again.next, again.runs) == (0, {})


def test_only_runs_that_ended_and_left_the_log_are_forgotten() -> None:
    log = log_of("spike")
    lane = _lane()
    for at, event in enumerate(log):
        _fold(lane, at, [event])
    assert list(lane.past(len(log))) == ["run"]
    assert list(lane.past(len(log) - 1)) == []


def _policy_lane() -> PolicyLane:
    made: Any = lambda: None  # noqa: E731 - no fold is made here
    return PolicyLane("policy", 0, made, [("a", "a-1"), ("b", "b-1")])


def _verdict(detector: str, ordinal: int, step: int = 0) -> Verdict:
    return Verdict(
        "run", 1, None, step, ordinal, detector, "kind", "warn", "opened", 0, 1.0, 1.0, {}, "", "v"
    )


def test_the_policy_waits_for_the_slowest_detector() -> None:
    lane = _policy_lane()
    assert lane.watermark() == 0
    lane.take_watermark(Watermark({"a-1": 9}))
    assert lane.watermark() == 0
    assert lane.unheard() == ["b-1"]
    lane.take_watermark(Watermark({"b-1": 5, "c-9": 1}))
    assert lane.watermark() == 5
    lane.take_watermark(Watermark({"a-1": 3}))  # from before a restart
    assert lane.watermark() == 5


def test_verdicts_are_heard_in_the_fleets_order_and_once() -> None:
    lane = _policy_lane()
    b, a = _verdict("b", 7), _verdict("a", 7, step=1)
    for position, found in enumerate([b, a, b]):
        lane.take_verdict(found, 4, position)
    lane.take_verdict(_verdict("unknown", 7), 4, 3)
    assert lane.verdicts_at(4) == {7: [a, b]}
    lane.done(4)
    lane.take_verdict(a, 4, 9)  # a late copy
    assert lane.verdicts_at(4) == {}


def test_a_marker_keeps_the_place_of_the_oldest_verdict_that_waits() -> None:
    lane = _policy_lane()
    lane.verdicts_next, lane.orders_next = 30, 2
    assert lane.positions()[:2] == (30, 2)
    lane.take_verdict(_verdict("a", 1), 6, 11)
    lane.take_verdict(_verdict("b", 1), 6, 12)
    assert lane.positions()[:2] == (11, 2)
    lane.done(6)
    assert lane.positions()[:2] == (30, 2)


def test_who_is_left_out_is_known_until_its_message_is_folded() -> None:
    lane = _policy_lane()
    note = LeftOut("run", "a", 0, 4)
    for _ in range(2):
        lane.take_watermark(Watermark({"a-1": 1}, (note, LeftOut("run", "a", 1, 4))))
    assert list(lane.left_out_at(4)) == [note]
    lane.done(4)
    lane.take_watermark(Watermark({"a-1": 9}, (note,)))
    assert list(lane.left_out_at(4)) == []
