"""A session's shipper against a real broker: all of it, in order, whatever happens meanwhile."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List, Tuple

import pytest
from tests.fleets import TopicsOnTest
from tests.producer.fleet.fleet_runs import (
    arrived,
    distinct,
    journal_of,
    shipped,
    transport_of,
    until,
)
from tests.producer.runs import folder_of
from tests.proxies import Proxy

from plarv.client import Argus
from plarv.fleet.link import Link
from plarv.fleet.positions import Shipped, read_shipped, write_shipped
from plarv.fleet.shipper import SessionShipper, sessions_to_ship
from plarv_schemas.journal import pack_full
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.kafka_connection import connect_to
from plarv_schemas.kafka_types import require_kafka

pytest.importorskip("kafka")
pytest.importorskip("pyarrow")

RUN, SESSION = "a-run", "0123456789abcdef"


class Journal:
    """A session's journal that nobody else ships."""

    def __init__(self, folder: Path, session: str = SESSION, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.writer = JournalWriter(
            folder, run_id=RUN, session=session, rank=rank, world_size=1, segment_bytes=1 << 20
        )
        self.step = 0

    def steps(self, count: int, **columns: Any) -> None:
        for _ in range(count):
            packed, _ = pack_full(
                self.writer.record,
                time.monotonic_ns(),
                self.step,
                {"loss": 2.0 + self.step / 7, **columns},
            )
            while not self.writer.append(packed):
                self.writer.prepare()
            self.step += 1
            if self.writer.ready == 0:
                self.writer.prepare()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / RUN)
    yield made
    made.writer.close()


@pytest.fixture
def link(fleet: TopicsOnTest) -> Iterator[Link]:
    made = Link(fleet.connection, lambda: None)
    yield made
    made.close()


def shipper_of(journal: Journal, fleet: TopicsOnTest, link: Link) -> SessionShipper:
    shipper = SessionShipper(journal.folder, 0, SESSION, fleet.topics.steps, link)
    assert shipper.acquire()
    return shipper


def all_sent(shipper: SessionShipper) -> None:
    until(lambda: not shipper.turn() and shipper.done)


def test_all_arrives_once_and_in_order_over_several_segments(
    journal: Journal, fleet: TopicsOnTest, link: Link
) -> None:
    chance = random.Random(4)
    shipper = shipper_of(journal, fleet, link)
    for _ in range(60):
        length = chance.choice([0, 1, 100, 3000])
        journal.steps(chance.randrange(1, 40), sample_losses=[0.5] * length)
        shipper.turn()
    all_sent(shipper)
    shipper.close()
    events = [event for message in arrived(fleet, RUN) for event in message]
    assert events == journal_of(journal.folder)
    assert journal.writer.segment > 1
    assert shipper.record == journal.writer.record
    assert shipper.round_trip_s is not None


def test_a_session_has_one_shipper(journal: Journal, fleet: TopicsOnTest, link: Link) -> None:
    first = shipper_of(journal, fleet, link)
    second = SessionShipper(journal.folder, 0, SESSION, fleet.topics.steps, link)
    assert not second.acquire()
    first.close()
    assert second.acquire()
    second.close()


def test_another_one_goes_on_where_it_stopped(
    journal: Journal, fleet: TopicsOnTest, link: Link
) -> None:
    for _ in range(4):
        journal.steps(700)
        shipper = shipper_of(journal, fleet, link)
        all_sent(shipper)
        shipper.close()
    events = [event for message in arrived(fleet, RUN) for event in message]
    assert events == journal_of(journal.folder)


def test_what_was_on_its_way_is_sent_again_and_nothing_is_missing(
    journal: Journal, fleet: TopicsOnTest
) -> None:
    journal.steps(5000)
    for limit in (700, 1500, 10**9):
        link = Link(fleet.connection, lambda: None)
        shipper = shipper_of(journal, fleet, link)
        until(lambda: shipper.turn() is None or shipper.record > limit or shipper.done)  # noqa: B023
        link.close()  # as a kill: no word of what is on its way
        shipper.close()
    assert distinct(arrived(fleet, RUN)) == journal_of(journal.folder)


def test_the_note_never_runs_ahead_of_the_brokers(
    journal: Journal, fleet: TopicsOnTest, link: Link
) -> None:
    journal.steps(3000)
    shipper = shipper_of(journal, fleet, link)
    while not shipper.done:
        shipper.turn()
        shipper.save()
        note = read_shipped(journal.folder, SESSION, fleet.topics.steps)
        assert note is not None
        there = distinct(arrived(fleet, RUN)) if note.record else []
        assert len(there) >= note.record
    shipper.close()


@pytest.mark.parametrize(
    "damage",
    [b"", b"nonsense", b"00000000 {}", b"\xff\xfe", b'{"record":5,"position":[9,9,9,9,9]}'],
)
def test_a_damaged_note_costs_copies_and_no_event(
    journal: Journal, fleet: TopicsOnTest, link: Link, damage: bytes
) -> None:
    journal.steps(50)
    shipper = shipper_of(journal, fleet, link)
    all_sent(shipper)
    shipper.close()
    journal.steps(5)
    (journal.folder / f"shipped-{SESSION}").write_bytes(damage)
    shipper = shipper_of(journal, fleet, link)
    all_sent(shipper)
    shipper.close()
    assert distinct(arrived(fleet, RUN)) == journal_of(journal.folder)
    assert sum(len(message) for message in arrived(fleet, RUN)) == 105


def test_a_note_of_another_fleet_counts_for_nothing(
    journal: Journal, fleet: TopicsOnTest, link: Link
) -> None:
    journal.steps(20)
    write_shipped(journal.folder, SESSION, Shipped("other.steps", 15, (0, 999, 15, 0, 0)))
    shipper = shipper_of(journal, fleet, link)
    all_sent(shipper)
    shipper.close()
    assert distinct(arrived(fleet, RUN)) == journal_of(journal.folder)


def test_it_goes_on_behind_segments_that_were_removed(
    journal: Journal, fleet: TopicsOnTest, link: Link
) -> None:
    journal.steps(60, sample_losses=[0.5] * 4000)
    first = sorted(journal.folder.glob("*.journal"))[0]
    first.unlink()
    shipper = shipper_of(journal, fleet, link)
    all_sent(shipper)
    shipper.close()
    events = distinct(arrived(fleet, RUN))
    assert events == journal_of(journal.folder)
    assert 0 < events[0].record < 60


def test_where_the_brokers_take_no_long_message_it_sends_short_ones(
    journal: Journal, fleet: TopicsOnTest, link: Link
) -> None:
    admin = require_kafka("kafka.admin")
    client = admin.KafkaAdminClient(bootstrap_servers=fleet.address)
    kind = admin.ConfigResourceType.TOPIC
    client.alter_configs(
        [admin.ConfigResource(kind, fleet.topics.steps, configs={"max.message.bytes": "20000"})]
    )
    client.close()
    journal.steps(2000, sample_losses=[random.random() for _ in range(20)])
    shipper = shipper_of(journal, fleet, link)
    all_sent(shipper)
    shipper.close()
    assert distinct(arrived(fleet, RUN)) == journal_of(journal.folder)


@pytest.mark.slow
def test_memory_stays_bounded_while_no_broker_answers(journal: Journal) -> None:
    deaf = Proxy()
    link = Link(connect_to(deaf.address), lambda: None)
    shipper = SessionShipper(journal.folder, 0, SESSION, "argus.steps", link)
    assert shipper.acquire()
    journal.steps(20_000)
    for _ in range(3):
        shipper.turn()
        assert shipper._packer.waiting <= 512
    assert "no answer from the brokers" in shipper.trouble
    assert not shipper.done
    shipper.close()
    deaf.close()


def test_sessions_are_shipped_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    folder = tmp_path / RUN
    names = ["f" * 16, "0" * 16, "8" * 16]
    for name in names:
        Journal(folder, session=name).writer.close()
    JournalWriter(
        folder, run_id=RUN, session="1" * 16, rank=-1, world_size=0, segment_bytes=16384
    ).close()
    assert sessions_to_ship(folder) == [(0, name) for name in names]  # an operator's is left out


@pytest.mark.slow
def test_a_broker_that_is_killed_for_a_while_loses_nothing(
    own_broker: Any,
    topic_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    fleet = TopicsOnTest(own_broker.address, topic_prefix)
    argus = Argus(run_id=RUN, brokers=own_broker.address)
    longest = 0.0

    def steps(count: int) -> None:
        nonlocal longest
        for _ in range(count):
            begin = time.monotonic()
            argus.step(2.0, 1.0)
            longest = max(longest, time.monotonic() - begin)
            time.sleep(0.002)

    steps(300)
    own_broker.kill()
    said: List[str] = []

    def told(what: str) -> bool:
        steps(20)
        said.append(capsys.readouterr().err)
        return what in "".join(said)

    until(lambda: told("the journal keeps everything until they answer"))
    steps(2000)
    own_broker.restart()
    until(lambda: told("the brokers answer again"))
    steps(300)
    argus.complete()
    assert shipped(fleet, folder_of(argus))
    assert "".join(said).count("until they answer") == 1
    assert longest < 1.0  # the loop notices nothing; a busy machine may


@pytest.mark.slow
def test_kill_9_of_child_and_broker_at_once_loses_nothing(
    own_broker: Any, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plarv import faults

    monkeypatch.setattr(faults, "RERAISE", False)
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    fleet = TopicsOnTest(own_broker.address, topic_prefix)
    argus = Argus(run_id=RUN, brokers=own_broker.address)
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(0.001):
            argus.step(2.0, 1.0)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        until(lambda: len(arrived(fleet, RUN)) > 5)
        child = transport_of(argus).child_pid
        assert child is not None
        own_broker.kill()
        os.kill(child, signal.SIGKILL)
        own_broker.restart()
        until(lambda: transport_of(argus).child_pid not in (None, child))
        count = len(arrived(fleet, RUN))
        until(lambda: len(arrived(fleet, RUN)) > count + 5)
    finally:
        stop.set()
        thread.join()
    argus.complete()
    until(lambda: shipped(fleet, folder_of(argus)))


def test_over_a_link_of_100_ms_a_message_holds_what_a_round_trip_brings(
    proxied: Tuple[TopicsOnTest, Proxy],
) -> None:
    fleet, proxy = proxied
    proxy.delay_s = 0.05  # each way
    argus = Argus(run_id=RUN, brokers=proxy.address)
    for _ in range(500):
        argus.step(2.0, 1.0)
        time.sleep(0.005)
    argus.complete()
    until(lambda: transport_of(argus).describe() == "")
    proxy.delay_s = 0.0
    messages = arrived(fleet, RUN)
    assert shipped(fleet, folder_of(argus))
    sizes = [len(message) for message in messages[2:-2]]
    assert 5 <= sum(sizes) / len(sizes) <= 60
