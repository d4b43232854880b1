"""A fleet's log is read back as it was written, and what was recorded is compared as a whole."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import pytest
from tests.fleets import TopicsOnTest, folded, going_wrong, started

from plarv_processors.engine import EngineConfig
from plarv_schemas.events import ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.kafka_clients import admin_client, place_of
from plarv_schemas.messages import Message, event_messages, verdict_message
from plarv_sinks.kafka_source import (
    FleetLog,
    RecordedFindings,
    compare,
    open_log,
    read_findings,
)

pytest.importorskip("kafka")
pytest.importorskip("pyarrow")


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str) -> TopicsOnTest:
    return TopicsOnTest(broker_address, topic_prefix)


def _mute(_: str) -> None:
    """Nobody listens."""


def read(
    fleet: TopicsOnTest, runs: Optional[Sequence[str]] = None
) -> Tuple[Dict[str, List[Event]], FleetLog, List[str]]:
    """Each run's events, the log, and what was told."""
    told: List[str] = []
    found: Dict[str, List[Event]] = {}
    with open_log(fleet.connection, fleet.topics, runs, told.append) as log:
        for partition in log.partitions():
            for event in log.events(partition):
                found.setdefault(event.run_id, []).append(event)
    return found, log, told


def test_runs_come_back_in_their_order_however_they_were_packed(fleet: TopicsOnTest) -> None:
    runs = {f"run-{number}": going_wrong(f"run-{number}", 40) for number in range(5)}
    for number, events in enumerate(runs.values()):
        fleet.put_events(events, packed=1 + 7 * number)
    found, log, told = read(fleet)
    assert found == runs
    assert log.found == set(runs)
    assert (log.poison, told) == (0, [])


def test_runs_that_are_interleaved_in_a_partition_are_told_apart(fleet: TopicsOnTest) -> None:
    with open_log(fleet.connection, fleet.topics, None, _mute) as log:
        one = log._reader.partition_of("x0")
        names = [f"x{n}" for n in range(40) if log._reader.partition_of(f"x{n}") == one][:3]
    runs = {name: going_wrong(name, 30) for name in names}
    mixed = [events[step] for step in range(31) for events in runs.values()]
    fleet.put(fleet.topics.steps, [event_messages([event])[0] for event in mixed])
    assert read(fleet, names)[0] == runs
    assert read(fleet, names[:1])[0] == {names[0]: runs[names[0]]}


def test_what_comes_after_the_opening_is_not_read(fleet: TopicsOnTest) -> None:
    events = going_wrong("run", 20)
    fleet.put_events(events)
    with open_log(fleet.connection, fleet.topics, ["run"], _mute) as log:
        fleet.put_events([StepEvent("run", "a", 999, 0, 999)])
        (partition,) = log.partitions()
        assert list(log.events(partition)) == events


def test_messages_that_cannot_be_read_are_dropped_and_counted(fleet: TopicsOnTest) -> None:
    events = going_wrong("run", 20)
    fleet.put_events(events[:10])
    (good,) = event_messages([events[10]])
    others = [
        Message(b"run", b"not arrow", good.headers),
        Message(b"run", good.value, [("argus-table", b"verdicts")]),
        Message(b"run", good.value[:100], good.headers),
        Message(b"run", event_messages(going_wrong("other", 1))[0].value, good.headers),
    ]
    fleet.put(fleet.topics.steps, others)
    fleet.put_events(events[10:])
    found, log, _ = read(fleet, ["run"])
    assert found == {"run": events}
    assert log.poison == len(others)


def test_a_detector_that_the_fleet_left_out_is_not_called_in_the_replay_either(
    fleet: TopicsOnTest,
) -> None:
    events = going_wrong("run")
    whole = folded(events)
    names = {finding.detector for finding in whole if isinstance(finding, Verdict)}
    assert "loss_spike" in names
    note = ControlEvent(
        "run", "0123456789abcdef", 0, None, "detector_left_out",
        data={"detector": "loss_spike", "ordinal": 50},
    )  # fmt: skip
    fleet.put_events([*events, note])  # it is written once the policy has come there, later
    told: List[str] = []
    with open_log(fleet.connection, fleet.topics, ["run"], told.append) as log:
        (partition,) = log.partitions()
        folding = log.events(partition)
        first = next(folding)
        assert log.left_out == {"run": {"loss_spike": 50}}
        engine = log.engine_for("run", EngineConfig())
        found = [f for event in _and(first, folding) for f in engine.fold(event)]
    assert {f.detector for f in found if isinstance(f, Verdict)} == names - {"loss_spike"}


def _and(first: Event, rest: Iterator[Event]) -> Iterator[Event]:
    yield first
    yield from rest


def test_a_note_of_no_sense_leaves_nothing_out(fleet: TopicsOnTest) -> None:
    data: List[Dict[str, Any]] = [{}, {"detector": 5, "ordinal": 1}, {"detector": "loss_spike"}]
    notes: List[Event] = [
        ControlEvent("run", f"{n:016x}", 0, None, "detector_left_out", data=each)
        for n, each in enumerate(data)
    ]
    fleet.put_events([started("run"), *notes])
    assert read(fleet)[1].left_out == {}


def test_a_log_that_no_longer_holds_the_beginning_says_so(fleet: TopicsOnTest) -> None:
    events = going_wrong("run", 40)
    places = fleet.put_events(events, packed=10)
    partition, offset = places[2]
    with admin_client(fleet.connection) as admin:
        admin.delete_records({place_of(fleet.topics.steps, partition): offset})  # type: ignore[attr-defined]
    found, _, told = read(fleet, ["run"])
    assert found["run"] == going_wrong("run", 40)[-len(found["run"]) :]
    assert len(found["run"]) < len(events)
    (line,) = told
    assert "no longer holds its beginning" in line
    fleet.put_events(started_only := [started("run", "b")])
    assert read(fleet, ["run"])[0]["run"][-1:] == started_only


def test_recorded_findings_come_once_each_in_a_replays_order(fleet: TopicsOnTest) -> None:
    findings = folded(going_wrong("run"))
    verdicts = [each for each in findings if isinstance(each, Verdict)]
    assert len(verdicts) > 2
    fleet.put_findings(reversed(findings))
    fleet.put_findings(findings)
    fleet.put_findings(folded(going_wrong("another")))
    recorded = read_findings(fleet.connection, fleet.topics, "run")["run"]
    assert list(recorded.verdicts) == verdicts
    assert list(recorded.actions) == [each for each in findings if not isinstance(each, Verdict)]
    assert recorded.copies == len(findings)
    assert recorded.conflicts == ()


def test_a_copy_that_differs_is_a_conflict(fleet: TopicsOnTest) -> None:
    verdict = next(each for each in folded(going_wrong("run")) if isinstance(each, Verdict))
    fleet.put_findings([verdict, verdict._replace(score=verdict.score + 1.0)])
    fleet.put(fleet.topics.verdicts, [verdict_message(verdict, 0)._replace(value=b"damaged")])
    recorded = read_findings(fleet.connection, fleet.topics, "run")["run"]
    assert recorded.verdicts == (verdict,)
    assert verdict.id in recorded.conflicts
    assert len(recorded.conflicts) == 2


def test_verdicts_of_a_detector_after_it_was_left_out_are_not_kept(fleet: TopicsOnTest) -> None:
    findings = folded(going_wrong("run"))
    fleet.put_findings(findings)
    left_out = {"run": {"loss_spike": 50}}
    recorded = read_findings(fleet.connection, fleet.topics, ["run"], left_out)["run"]
    wanted = [f for f in findings if isinstance(f, Verdict) and f.detector != "loss_spike"]
    assert list(recorded.verdicts) == wanted


def test_whole_records_are_compared_bit_for_bit() -> None:
    findings = folded(going_wrong("run"))
    verdicts = tuple(each for each in findings if isinstance(each, Verdict))
    actions = tuple(each for each in findings if not isinstance(each, Verdict))
    recorded = RecordedFindings(verdicts, actions)
    same = compare("run", findings, recorded)
    assert same.identical
    assert (same.num_verdicts, same.num_actions) == (len(verdicts), len(actions))
    nan = verdicts[0]._replace(evidence={"loss": float("nan"), "zero": 0.0})
    again = verdicts[0]._replace(evidence={"loss": float("nan"), "zero": 0.0})
    assert compare("run", [nan], RecordedFindings((again,))).identical
    negative = nan._replace(evidence={"loss": float("nan"), "zero": -0.0})
    assert compare("run", [nan], RecordedFindings((negative,))).changed == ((nan, negative),)
    later = compare("run", findings, RecordedFindings(verdicts[:-1], actions))
    assert later.only_replayed == (verdicts[-1],)
    assert not later.identical
    earlier = compare("run", findings[:-1], recorded)
    assert earlier.only_recorded == (findings[-1],)
    assert not compare("run", findings, recorded._replace(conflicts=("x",))).identical
