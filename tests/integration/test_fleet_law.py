"""Workers on a real Kafka give what the fold of the log gives, whatever happens to the log."""

from __future__ import annotations

import random
import secrets
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import pytest

pytest.importorskip("faust")
pytest.importorskip("kafka")

from tests.fleets import MASTER_KEY, TopicsOnTest, going_wrong
from tests.integration.fleet import (
    WorkerProcess,
    assert_log_and_results_agree,
    controls,
    drain,
    folded_runs,
    interleaved,
    messages_of,
    named,
    sessions_of,
    side_by_side,
    until,
    workers,
)
from tests.processors.logs import names

from plarv_processors.detectors import BUILTIN
from plarv_processors.snapshot import unpack
from plarv_schemas import arrow
from plarv_schemas.messages import Message, decode_action, event_messages
from plarv_schemas.signatures import Order, run_key, sign, verify
from plarv_schemas.topic_reader import open_topic
from plarv_schemas.topics import SIGNATURE_HEADER, TABLE_HEADER, header
from plarv_schemas.versions import SCHEMA_VERSION

RANKS = ("fleet", "straggler", "disagreement")


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str) -> TopicsOnTest:
    """Topics of this test's own."""
    return TopicsOnTest(broker_address, topic_prefix)


def _load(rng: random.Random, copies: int = 1) -> List[Message]:
    """All logs, packed by chance, runs in an order by chance, ranks at about the same pace."""
    queues: List[List[Message]] = []
    for copy in range(copies):
        for stream in names:
            sessions = sessions_of(named(stream, f"{stream}-{copy}"))
            if len(sessions) == 1:
                queues.append(messages_of(rng, sessions[0]))
            else:
                queues.append(side_by_side(rng, sessions))
    return interleaved(rng, queues)


def test_live_equals_replay_for_all_logs_in_random_packings_and_orders(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    rng = random.Random(4)
    messages = _load(rng)
    twice = rng.sample(range(len(messages)), len(messages) // 10)
    for at in sorted(twice, reverse=True):  # each comes again, at once or much later
        messages.insert(rng.randint(at + 1, len(messages)), messages[at])
    with workers(WorkerProcess(fleet, tmp_path)):
        fleet.put(fleet.topics.steps, messages)
        drain(fleet)
    records = assert_log_and_results_agree(fleet)
    assert len(records) > 100
    assert {each["detector"] for each in records.values() if "detector" in each} >= {
        "loss_spike", "fleet_skew", "non_finite",
    }  # fmt: skip


def test_ranks_late_missing_and_twice_give_what_a_replay_gives(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    rng = random.Random(5)
    queues: List[List[Message]] = []
    for stream in RANKS:
        for way in ("late", "missing", "stops", "twice"):
            sessions = sessions_of(named(stream, f"{stream}-{way}"))
            rest = sessions[-1]
            if way == "missing":
                sessions.pop()
            elif way == "stops":
                sessions[-1] = rest[: len(rest) // 2]
            packed = [messages_of(rng, session) for session in sessions]
            if way == "late":  # a rank whose network is slow: it comes after all the others
                last = packed.pop()
                queues.append(interleaved(rng, packed) + last)
                continue
            if way == "twice":  # two shippers of one journal
                packed.append(messages_of(rng, rest))
            queues += packed
    with workers(WorkerProcess(fleet, tmp_path)):
        fleet.put(fleet.topics.steps, interleaved(rng, queues))
        drain(fleet)
    assert_log_and_results_agree(fleet)


def test_detectors_split_over_two_workers_give_the_same(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    some = "loss_spike,fleet_skew,loss_plateau"
    rest = ",".join(cls.name for cls in BUILTIN if cls.name not in some.split(","))
    one = WorkerProcess(fleet, tmp_path, "w1", "--detectors", some, "--no-policy")
    other = WorkerProcess(fleet, tmp_path, "w2", "--detectors", rest)
    with workers(one, other):
        fleet.put(fleet.topics.steps, _load(random.Random(6)))
        drain(fleet)
    records = assert_log_and_results_agree(fleet)
    found_by = {each.get("detector") for each in records.values()}
    assert found_by & set(some.split(","))
    assert found_by & set(rest.split(","))


def test_a_message_that_cannot_be_read_goes_to_the_dead_letters_once(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    healthy = event_messages(going_wrong("good"))
    newer = _of_a_newer_version(event_messages(going_wrong("good", session="newer"))[1])
    foreign = event_messages(going_wrong("stranger"))[0]._replace(key=b"good")
    steps = [(TABLE_HEADER, b"steps")]
    poison = {
        "garbage": Message(b"good", b"\x00garbage\xff" * 9, steps),
        "empty": Message(b"good", b"", steps),
        "newer": newer,
        "key": foreign,
        "cut": healthy[1]._replace(value=healthy[1].value[:-70]),
    }
    with workers(WorkerProcess(fleet, tmp_path)):
        messages = [healthy[0], *poison.values(), *healthy[1:]]
        fleet.put(fleet.topics.steps, messages)
        drain(fleet)
    letters = fleet.records(fleet.topics.dead_letters)
    assert sorted(letter.value or b"" for letter in letters) == sorted(
        message.value for message in poison.values()
    )
    reasons = {letter.value: header(letter.headers, "argus-reason") or "" for letter in letters}
    assert all(reasons.values())
    assert "is newer than this Argus" in reasons[newer.value]
    assert "the message's key is not the run id" in reasons[foreign.value]
    places = [header(letter.headers, "argus-source-offset") for letter in letters]
    assert len(set(places)) == len(poison)
    records = assert_log_and_results_agree(fleet)
    assert any(each["run_id"] == "good" for each in records.values())


def test_an_attempt_after_the_end_goes_on_in_a_worker_that_was_killed(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    first = named("spike", "run")
    second = [event._replace(session="again") for event in named("divergence", "run")]
    worker = WorkerProcess(fleet, tmp_path, "w1", "--snapshot-every", "0.2")
    with workers(worker):
        fleet.put_events(first)
        drain(fleet, "first")
        until("the runs that ended are freed", lambda: _ended(worker) >= 4)
        worker.kill()
        worker.start().ready()
        fleet.put_events(second)
        drain(fleet, "second")
    records = assert_log_and_results_agree(fleet)
    attempts = {each["attempt"] for each in records.values() if each["run_id"] == "run"}
    assert attempts == {1, 2}


def test_a_rank_that_falls_silent_is_ended_by_an_event(fleet: TopicsOnTest, tmp_path: Path) -> None:
    events = going_wrong("quiet")
    with workers(WorkerProcess(fleet, tmp_path, "w1", "--silent-after", "2")):
        fleet.put_events(events)
        until("the silence is told", lambda: len(controls(fleet, "quiet", "rank_silent")) == 1)
        drain(fleet)
    (silent,) = controls(fleet, "quiet", "rank_silent")
    assert silent.data == {"session": events[0].session, "rank": 0}
    assert_log_and_results_agree(fleet)


@pytest.mark.slow
def test_a_worker_goes_on_from_its_snapshots_when_the_log_before_them_is_gone(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    first, second = _halves(random.Random(7))
    worker = WorkerProcess(fleet, tmp_path, "w1", "--snapshot-every", "0.2")
    with workers(worker):
        ends = _judged_and_saved(fleet, first)
        worker.kill()
        removed = folded_runs(fleet)
        _remove_log(fleet, ends)
        assert not folded_runs(fleet)
        worker.start().ready()
        fleet.put(fleet.topics.steps, second)
        drain(fleet, "second")
        assert worker.metric("argus_gaps_total") == 0
    assert_log_and_results_agree(fleet, removed=removed)


@pytest.mark.slow
def test_snapshots_that_cannot_be_read_cost_time_and_nothing_else(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    first, second = _halves(random.Random(8))
    worker = WorkerProcess(fleet, tmp_path, "w1", "--snapshot-every", "0.2")
    with workers(worker):
        ends = _judged_and_saved(fleet, first)
        worker.kill()
        keys = {(each.partition, each.key or b"") for each in fleet.records(fleet.topics.snapshots)}
        for partition in ends:
            garbage = [Message(key, b"garbage", []) for place, key in keys if place == partition]
            fleet.put(fleet.topics.snapshots, garbage, partition)
        worker.start().ready()
        assert "folding anew" in worker.said()
        fleet.put(fleet.topics.steps, second)
        drain(fleet, "second")
    assert_log_and_results_agree(fleet)


def test_an_order_becomes_an_event_and_its_answer_a_signed_action(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    with workers(WorkerProcess(fleet, tmp_path)):
        fleet.put_events(going_wrong("run"))
        drain(fleet, "before")
        order = _order("run", "stop")
        _give(fleet, order)
        _give(fleet, order)
        _give(fleet, _order("run", "resume"))  # after both, so both have been taken
        until("both orders stand in the log", lambda: len(controls(fleet, "run", "order")) == 2)
        drain(fleet, "after")
    events = controls(fleet, "run", "order")
    assert events[0].data == {"order": "stop", "operator": "ann", "id": order.id}
    answers = [
        (record, decode_action(record.value or b""))
        for record in fleet.records(fleet.topics.actions)
        if record.key == b"run"
    ]
    ordered = [(record, action) for record, action in answers if "id" in action.parameters]
    assert [action.parameters["order"] for _, action in ordered] == ["stop", "resume"]
    for record, _ in answers:
        signature = header(record.headers, SIGNATURE_HEADER)
        assert verify(run_key(MASTER_KEY, "run"), "action", record.value or b"", signature)
        assert not verify(run_key(MASTER_KEY, "other"), "action", record.value or b"", signature)
    assert_log_and_results_agree(fleet)


def test_orders_that_are_not_to_be_obeyed_are_refused_counted_and_told(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    worker = WorkerProcess(fleet, tmp_path)
    good, bare = _order("run", "stop"), _order("run", "stop")
    altered = good.to_bytes().replace(b"stop", b"pause")
    with workers(worker):
        fleet.put_events(going_wrong("run"))
        fleet.put_events(going_wrong("other"))
        drain(fleet, "before")
        _give(fleet, _order("run", "stop"), key="a master key of somebody else")
        _give(fleet, _order("run", "stop", expires_ns=time.time_ns() - 1))
        _give(fleet, _order("run", "stop", attempt=7))
        _give(fleet, _order("run", "explode"))
        _give(fleet, good, to="other")
        fleet.put(fleet.topics.orders, [Message(b"run", altered, _signed(good))])
        fleet.put(fleet.topics.orders, [Message(b"run", b"\xff{", _signed(good))])
        fleet.put(fleet.topics.orders, [Message(b"run", bare.to_bytes(), [])])
        until("all are refused", lambda: worker.metric("argus_orders_total") == 8)
        drain(fleet, "middle")
        told = {str(event.data["why"]) for event in controls(fleet, "run", "action_refused")}
        assert told == {
            "its signature is wrong", "it has expired", "it is for attempt 7, and this is 1",
            "there is no such order",
        }  # fmt: skip
        for _ in range(25):
            _give(fleet, _order("run", "stop"), key="a master key of somebody else")
        until("these too", lambda: worker.metric("argus_orders_total", result="refused") == 33)
        drain(fleet, "after")
    assert len(controls(fleet, "run", "action_refused")) == 20
    assert not controls(fleet, "run", "order")
    assert not controls(fleet, "other", "order")
    assert_log_and_results_agree(fleet)


def _of_a_newer_version(message: Message) -> Message:
    batch: Any = arrow.from_ipc(message.value)
    now, later = str(SCHEMA_VERSION).encode(), str(SCHEMA_VERSION + 1).encode()
    metadata = {
        name: later if value == now else value for name, value in batch.schema.metadata.items()
    }
    return message._replace(value=arrow.to_ipc(batch.replace_schema_metadata(metadata)))


def _ended(worker: WorkerProcess) -> float:
    return worker.metric("argus_runs", app="detectors", state="ended")


def _halves(rng: random.Random) -> List[List[Message]]:
    """Runs that stand in the middle of something when the second half begins."""
    halves: List[List[Message]] = [[], []]
    for stream in ("spike", "collapse", "corruption", "straggler", "repeated_batch"):
        events = named(stream, stream)
        middle = len(events) // 2
        for half, part in zip(halves, (events[:middle], events[middle:])):
            sessions = sessions_of(part)
            half += side_by_side(rng, sessions)
    return halves


def _ends(fleet: TopicsOnTest) -> Dict[int, int]:
    with open_topic(fleet.connection, fleet.topics.steps) as reader:
        return {partition: span.end for partition, span in reader.ranges().items()}


def _judged_and_saved(fleet: TopicsOnTest, messages: Sequence[Message]) -> Dict[int, int]:
    """Waits until the messages are judged and all states are in snapshots: where the log ends."""
    fleet.put(fleet.topics.steps, messages)
    drain(fleet, "first")
    ends = _ends(fleet)
    until("every lane is saved", lambda: _saved(fleet) == [ends] * 13)
    return ends


def _saved(fleet: TopicsOnTest) -> List[Dict[int, int]]:
    """By lane, the offsets that its newest markers say."""
    markers: Dict[bytes, Dict[int, int]] = {}
    for record in fleet.records(fleet.topics.snapshots):
        key, value = record.key or b"", record.value or b""
        if key.endswith(b"\0"):
            markers.setdefault(key, {})[record.partition] = unpack(value)[0]
    return list(markers.values())


def _remove_log(fleet: TopicsOnTest, ends: Dict[int, int]) -> None:
    from plarv_schemas.kafka_clients import admin_client, place_of

    with admin_client(fleet.connection) as client:
        admin: Any = client
        admin.delete_records({place_of(fleet.topics.steps, p): end for p, end in ends.items()})


def _order(run_id: str, what: str, **changes: Any) -> Order:
    now = time.time_ns()
    order = Order(secrets.token_hex(8), run_id, what, "ann", now, now + 600_000_000_000)
    return order._replace(**changes)


def _signed(order: Order, key: str = MASTER_KEY) -> List[Tuple[str, bytes]]:
    signature = sign(run_key(key, order.run_id), "order", order.to_bytes())
    return [(TABLE_HEADER, b"order"), (SIGNATURE_HEADER, signature.encode())]


def _give(fleet: TopicsOnTest, order: Order, *, key: str = MASTER_KEY, to: str = "") -> None:
    message = Message((to or order.run_id).encode(), order.to_bytes(), _signed(order, key))
    fleet.put(fleet.topics.orders, [message])
