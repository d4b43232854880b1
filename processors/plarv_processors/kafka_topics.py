"""Creates the fleet's topics, and says how they stand."""

from __future__ import annotations

import time
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from plarv_schemas.kafka_clients import admin_client, consumer_client, place_of
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.kafka_types import Admin, require_kafka
from plarv_schemas.topics import DEFAULT_PARTITIONS, Topics, topic_settings

__all__ = ["TopicState", "TopicsError", "check_topics", "create_topics", "describe_topics"]

_MAX_REPLICATION = 3
_VISIBLE_S = 30.0  # until the metadata must show what was created


class TopicsError(Exception):
    """The topics are not as the fleet needs them; the message says what is missing or differs."""


class TopicState(NamedTuple):
    """One topic of the fleet."""

    name: str
    partitions: int  # 0: it does not exist
    records: int  # end less begin of all partitions; a compacted topic holds fewer
    retention: str  # in words


def create_topics(
    connection: Connection,
    topics: Topics,
    partitions: int = DEFAULT_PARTITIONS,
    replication: Optional[int] = None,
) -> List[str]:
    """Creates those topics that are missing: their names, the log first.

    Waits until the brokers' metadata shows all of them. Calling it twice, or from two places at
    once, does no harm. Topics that exist are left as they are, and those that are missing get
    as many partitions as the others have.

    Args:
        connection: how to reach the brokers.
        topics: their names.
        partitions: of each topic, where none exists yet.
        replication: copies of each partition; None: 3, or as many as there are brokers.

    Raises:
        BrokerError: the brokers cannot be reached, or do not allow it.
        TopicsError: the brokers refuse to create one, and why.
    """
    with admin_client(connection) as admin:
        found = _partition_counts(admin, topics)
        if replication is None:
            num_brokers = len(admin.describe_cluster()["brokers"])
            replication = max(1, min(_MAX_REPLICATION, num_brokers))
        same = [count for name, count in found.items() if name != topics.dead_letters]
        settings = topic_settings(topics)
        wanted = {
            name: {
                "num_partitions": same[0] if same else partitions,
                "replication_factor": replication,
                "configs": dict(settings[name]),
            }
            for name in topics.all()
            if name not in found
        }
        created = _create(admin, wanted) if wanted else []
        _wait_until_visible(admin, topics)
    return created


def check_topics(connection: Connection, topics: Topics) -> int:
    """The number of partitions that all topics but the dead letters have.

    TopicsError: a topic is missing, or the numbers differ. BrokerError: no broker was reached.
    """
    with admin_client(connection) as admin:
        found = _partition_counts(admin, topics)
    missing = [name for name in topics.all() if name not in found]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise TopicsError(f"{', '.join(missing)} {verb} missing: `argus topics create` makes them")
    counts = {name: count for name, count in found.items() if name != topics.dead_letters}
    if len(set(counts.values())) != 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise TopicsError(f"the topics differ in their number of partitions: {listed}")
    return counts[topics.steps]


def describe_topics(connection: Connection, topics: Topics) -> List[TopicState]:
    """How each topic stands; those that do not exist have 0 partitions. BrokerError."""
    with admin_client(connection) as admin:
        found = _partition_counts(admin, topics)
        kept = _retention(admin, list(found))
    records = _num_records(connection, found)
    return [
        TopicState(name, found.get(name, 0), records.get(name, 0), kept.get(name, "missing"))
        for name in topics.all()
    ]


def _partition_counts(admin: Admin, topics: Topics) -> Dict[str, int]:
    """Partitions of the topics that exist, in the order in which we name them."""
    counts: Dict[str, int] = {}
    for described in admin.describe_topics(list(topics.all())):
        if not described.get("error_code") and described.get("partitions"):
            counts[str(described["name"])] = len(described["partitions"])
    return {name: counts[name] for name in topics.all() if name in counts}


def _create(admin: Admin, wanted: Mapping[str, Mapping[str, Any]]) -> List[str]:
    errors = require_kafka("kafka.errors")
    reply = admin.create_topics(wanted, timeout_ms=20_000, raise_errors=False)
    created: List[str] = []
    for topic in reply["topics"]:
        error = errors.for_code(topic["error_code"])
        if error is errors.NoError:
            created.append(str(topic["name"]))
        elif error is not errors.TopicAlreadyExistsError:  # somebody else was quicker: fine
            why = topic.get("error_message") or error.__name__
            raise TopicsError(f"{topic['name']} could not be created: {why}")
    return [name for name in wanted if name in created]


def _wait_until_visible(admin: Admin, topics: Topics) -> None:
    """Waits until every partition of every topic has a leader."""
    deadline = time.monotonic() + _VISIBLE_S
    while True:
        waiting = set(topics.all())
        for described in admin.describe_topics(list(topics.all())):
            partitions: List[Dict[str, Any]] = described.get("partitions") or []
            leads = [partition.get("leader_id", -1) >= 0 for partition in partitions]
            if not described.get("error_code") and leads and all(leads):
                waiting.discard(str(described["name"]))
        if not waiting:
            return
        if time.monotonic() > deadline:
            names = ", ".join(sorted(waiting))
            raise TopicsError(f"{names}: created, but not ready after {_VISIBLE_S:.0f} s")
        time.sleep(0.1)


def _retention(admin: Admin, names: Sequence[str]) -> Dict[str, str]:
    if not names:
        return {}
    kafka_admin = require_kafka("kafka.admin")
    resources = [
        kafka_admin.ConfigResource(kafka_admin.ConfigResourceType.TOPIC, name) for name in names
    ]
    described = admin.describe_configs(resources, config_filter="all")["topic"]
    return {name: _retention_text(described[name]) for name in names}


def _retention_text(config: Mapping[str, Mapping[str, Any]]) -> str:
    if config["cleanup.policy"]["value"] == "compact":
        return "the newest of each key"
    milliseconds = int(config["retention.ms"]["value"])
    if milliseconds < 0:
        return "for ever"
    days, rest = divmod(milliseconds, 86_400_000)
    return f"{days} d" if not rest else f"{milliseconds / 3_600_000:.3g} h"


def _num_records(connection: Connection, partitions: Mapping[str, int]) -> Dict[str, int]:
    places = [
        place_of(name, number) for name, count in partitions.items() for number in range(count)
    ]
    with consumer_client(connection) as consumer:
        begins, ends = consumer.beginning_offsets(places), consumer.end_offsets(places)
    counts = dict.fromkeys(partitions, 0)
    for place in places:
        counts[place.topic] += ends[place] - begins[place]
    return counts
