"""The topics are made once, whoever comes first, and one is told what is wrong with them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import List, Mapping, Set

import pytest

from plarv_processors.kafka_topics import (
    TopicsError,
    check_topics,
    create_topics,
    describe_topics,
)
from plarv_schemas.kafka_clients import admin_client, producer_client
from plarv_schemas.kafka_connection import Connection, connect_to
from plarv_schemas.topics import Topics, topic_settings

pytest.importorskip("kafka")


def _make(connection: Connection, partitions: Mapping[str, int]) -> None:
    """Creates topics as anybody might, and waits until the brokers' metadata shows them."""
    wanted = {
        name: {"num_partitions": count, "replication_factor": 1}
        for name, count in partitions.items()
    }
    with admin_client(connection) as admin:
        admin.create_topics(wanted)
        until = time.monotonic() + 60.0
        shown: Set[str] = set()
        while shown != set(partitions):
            assert time.monotonic() < until
            described = admin.describe_topics(list(partitions))
            shown = {each["name"] for each in described if each.get("partitions")}


def test_topics_are_created_once_and_found_again(broker_address: str, topic_prefix: str) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    assert create_topics(connection, topics, 3) == list(topics.all())
    assert create_topics(connection, topics, 5) == []
    assert check_topics(connection, topics) == 3
    with admin_client(connection) as admin:
        described = {each["name"]: each for each in admin.describe_topics(list(topics.all()))}
    assert {len(described[name]["partitions"]) for name in topics.all()} == {3}


def test_those_that_are_missing_get_as_many_partitions_as_the_others(
    broker_address: str, topic_prefix: str
) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    _make(connection, {topics.steps: 2})
    assert topics.steps not in create_topics(connection, topics, 7)
    assert check_topics(connection, topics) == 2


def test_two_who_create_them_at_once_do_no_harm(broker_address: str, topic_prefix: str) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    with ThreadPoolExecutor(3) as pool:
        created: List[List[str]] = list(
            pool.map(lambda _: create_topics(connection, topics, 3), range(3))
        )
    assert sorted(name for names in created for name in names) == sorted(topics.all())
    assert check_topics(connection, topics) == 3


def test_what_is_missing_or_differs_is_said(broker_address: str, topic_prefix: str) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    with pytest.raises(TopicsError, match=rf"{topics.steps}, .* are missing: `argus topics create"):
        check_topics(connection, topics)
    differing = {topics.verdicts: 2, topics.dead_letters: 5}
    _make(connection, {name: differing.get(name, 1) for name in topics.all()})
    with pytest.raises(TopicsError, match=f"differ in .*{topics.verdicts} 2") as error:
        check_topics(connection, topics)
    assert topics.dead_letters not in str(error.value)  # it may differ


def test_their_settings_are_the_documented_ones(broker_address: str, topic_prefix: str) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    create_topics(connection, topics, 1)
    from kafka.admin import ConfigResource, ConfigResourceType

    with admin_client(connection) as admin:
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in topics.all()]
        found = admin.describe_configs(resources, config_filter="all")["topic"]
    for name, settings in topic_settings(topics).items():
        assert {key: found[name][key]["value"] for key in settings} == dict(settings)


def test_each_is_described_with_its_records_and_retention(
    broker_address: str, topic_prefix: str
) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    assert {state.partitions for state in describe_topics(connection, topics)} == {0}
    create_topics(connection, topics, 2)
    with producer_client(connection) as producer:
        for number in range(5):
            producer.send(topics.orders, value=b"x", partition=number % 2).get(30)
    states = {state.name: state for state in describe_topics(connection, topics)}
    assert list(states) == list(topics.all())
    assert states[topics.orders][1:] == (2, 5, "7 d")
    assert states[topics.verdicts][1:] == (2, 0, "30 d")
    assert states[topics.snapshots].retention == "the newest of each key"


def test_a_topic_that_the_brokers_refuse_is_an_error_that_says_why(
    broker_address: str, topic_prefix: str
) -> None:
    connection, topics = connect_to(broker_address), Topics(topic_prefix)
    with pytest.raises(TopicsError, match=r"could not be created: .*replication"):
        create_topics(connection, topics, 1, replication=99)
