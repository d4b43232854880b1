"""A topic is read from its beginning to the end that it had, in order, by nobody's leave."""

from __future__ import annotations

import pytest
from tests.fleets import PARTITIONS, TopicsOnTest

from plarv_schemas.kafka_clients import producer_client
from plarv_schemas.messages import Message
from plarv_schemas.topic_reader import NoTopicError, TopicRange, open_topic

pytest.importorskip("kafka")


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str) -> TopicsOnTest:
    return TopicsOnTest(broker_address, topic_prefix)


def test_records_come_in_their_order_up_to_the_end_at_the_start(fleet: TopicsOnTest) -> None:
    orders = fleet.topics.orders
    fleet.put(orders, [Message(b"run", b"%d" % n, [("n", b"%d" % n)]) for n in range(1200)])
    with open_topic(fleet.connection, orders) as reader:
        partition = reader.partition_of("run")
        ranges = reader.ranges([partition])
        fleet.put(orders, [Message(b"run", b"later", [])])
        records = list(reader.read(ranges))
        assert reader.ranges([partition]) == {partition: TopicRange(0, 1201)}
    assert [int(record.value or b"") for record in records] == list(range(1200))
    assert [record.offset for record in records] == list(range(1200))
    assert {(record.partition, record.key) for record in records} == {(partition, b"run")}
    assert records[7].headers == (("n", b"7"),)


def test_a_range_begins_where_it_says_and_may_be_empty(fleet: TopicsOnTest) -> None:
    orders = fleet.topics.orders
    fleet.put(orders, [Message(b"run", b"%d" % n, []) for n in range(10)], partition=1)
    with open_topic(fleet.connection, orders) as reader:
        found = list(reader.read({1: TopicRange(4, 6), 2: TopicRange(0, 0)}))
        assert [record.value for record in found] == [b"4", b"5"]
        assert list(reader.read({})) == []


def test_all_partitions_are_read_in_one_go(fleet: TopicsOnTest) -> None:
    orders = fleet.topics.orders
    for partition in range(PARTITIONS):
        messages = [Message(b"k", b"%d" % n, []) for n in range(100 * partition + 1)]
        fleet.put(orders, messages, partition=partition)
    with open_topic(fleet.connection, orders) as reader:
        assert reader.num_partitions == PARTITIONS
        by_partition: dict[int, list[int]] = {}
        for record in reader.read(reader.ranges()):
            by_partition.setdefault(record.partition, []).append(int(record.value or b""))
    assert by_partition == {p: list(range(100 * p + 1)) for p in range(PARTITIONS)}


def test_a_run_lies_where_the_producers_default_puts_it(fleet: TopicsOnTest) -> None:
    runs = ("run", "läufer", "a" * 200, "0", "run-2026-01-01")
    with producer_client(fleet.connection) as producer:
        orders = fleet.topics.orders
        sent = [producer.send(orders, key=run.encode(), value=b"").get(30) for run in runs]
    with open_topic(fleet.connection, orders) as reader:
        assert [each.partition for each in sent] == [reader.partition_of(run) for run in runs]


def test_following_gives_what_comes_next_and_none_while_nothing_does(fleet: TopicsOnTest) -> None:
    orders = fleet.topics.orders
    fleet.put(orders, [Message(b"k", b"before", [])], partition=0)
    with open_topic(fleet.connection, orders) as reader:
        following = reader.follow({0: reader.ranges([0])[0].end})
        assert next(following) is None
        fleet.put(orders, [Message(b"k", b"after", [])], partition=0)
        record = next(each for each in following if each is not None)
        assert record.value == b"after"


def test_a_tombstone_has_no_value(fleet: TopicsOnTest) -> None:
    with producer_client(fleet.connection) as producer:
        producer.send(fleet.topics.snapshots, key=b"k", value=None, partition=0).get(30)
    assert [record.value for record in fleet.records(fleet.topics.snapshots)] == [None]


def test_a_topic_that_does_not_exist_is_a_clear_error(
    broker_address: str, fleet: TopicsOnTest
) -> None:
    reading = open_topic(fleet.connection, f"{fleet.topics.steps}-x")
    with pytest.raises(NoTopicError, match=f"no topic {fleet.topics.steps}-x at {broker_address}"):
        reading.__enter__()
