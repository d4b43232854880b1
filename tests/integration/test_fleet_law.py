"""Workers on a real Kafka give what the fold of the log gives, whatever happens to the log."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Dict, List

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
    until,
    workers,
)
from tests.processors.logs import names

from plarv_processors.detectors import BUILTIN
from plarv_schemas.messages import Message, decode_action, event_messages
from plarv_schemas.signatures import Order, run_key, sign, verify
from plarv_schemas.topics import SCHEMA_HEADER, SIGNATURE_HEADER, TABLE_HEADER, header
from plarv_schemas.versions import SCHEMA_VERSION

RANKS = ("fleet", "straggler", "disagreement")


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str) -> TopicsOnTest:
    """Topics of this test's own."""
    return TopicsOnTest(broker_address, topic_prefix)


def _load(rng: random.Random, copies: int = 1) -> List[Message]:
    """All logs, sessions apart, packed by chance, in an order by chance."""
    queues: List[List[Message]] = []
    for copy in range(copies):
        for stream in names:
            for session in sessions_of(named(stream, f"{stream}-{copy}")):
                queues.append(messages_of(rng, session))
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
    some = "loss_spike,fleet_skew,plateau"
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
    (newer, *_) = event_messages(going_wrong("good", session="newer"))
    newer = newer._replace(
        headers=[
            (name, str(SCHEMA_VERSION + 1).encode() if name == SCHEMA_HEADER else value)
            for name, value in newer.headers
        ]
    )
    foreign = event_messages(going_wrong("stranger"))[0]._replace(key=b"good")
    steps = [(TABLE_HEADER, b"steps")]
    poison = {
        "garbage": Message(b"good", b"\x00garbage\xff" * 9, steps),
        "empty": Message(b"good", b"", steps),
        "key": foreign,
        "cut": healthy[1]._replace(value=healthy[1].value[:-70]),
    }
    with workers(WorkerProcess(fleet, tmp_path)) as _:
        messages = [healthy[0], *poison.values(), *healthy[1:]]
        fleet.put(fleet.topics.steps, messages)
        drain(fleet)
    letters = fleet.records(fleet.topics.dead_letters)
    assert sorted(letter.value or b"" for letter in letters) == sorted(
        message.value for message in poison.values()
    )
    assert all(header(letter.headers, "argus-reason") for letter in letters)
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
        until("the run that ended is freed", lambda: worker.metric("argus_runs", state="open") == 0)
        worker.kill()
        worker.start().ready()
        fleet.put_events(second)
        drain(fleet, "second")
    records = assert_log_and_results_agree(fleet)
    attempts = {each["attempt"] for each in records.values() if each["run_id"] == "run"}
    assert attempts == {1, 2}


def test_a_rank_that_falls_silent_is_ended_by_an_event(fleet: TopicsOnTest, tmp_path: Path) -> None:
    events = [event for event in going_wrong("quiet")]
    with workers(WorkerProcess(fleet, tmp_path, "w1", "--silent-after", "2")):
        fleet.put_events(events)
        until("the silence is told", lambda: len(controls(fleet, "quiet", "rank_silent")) == 1)
        drain(fleet)
    (silent,) = controls(fleet, "quiet", "rank_silent")
    assert silent.data == {"session": events[0].session, "rank": 0}
    assert_log_and_results_agree(fleet)
