"""Opens kafka-python's clients, imported at first use; what goes wrong is told in our words."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any, Callable, Dict, Generator, List, Mapping, Optional, Union

from plarv_schemas.credential_check import refusal
from plarv_schemas.kafka_connection import RECONNECT_MAX_MS, Connection
from plarv_schemas.kafka_types import Admin, Consumer, Place, Producer, require_kafka

__all__ = [
    "BrokerError",
    "RefusedError",
    "admin_client",
    "broker_error",
    "consumer_client",
    "open_consumer",
    "open_producer",
    "partition_of",
    "place_of",
    "producer_client",
    "quiet_kafka_log",
]

REACH_S = 5.0  # to find the brokers; then they count as unreachable


class BrokerError(Exception):
    """The brokers cannot be reached, or refuse us; the message says which and why."""


class RefusedError(BrokerError):
    """They answer, and refuse the credentials, or the right to it. Trying again is no use."""


@contextmanager
def admin_client(
    connection: Connection, *, reach_s: float = REACH_S
) -> Generator[Admin, None, None]:
    """An admin client; it is closed at the end.

    BrokerError: no broker was reached within ``reach_s``, or one refused what was asked, at any
    place inside the ``with``.
    """
    client: Admin
    with _broker_errors(connection):
        client = _open(require_kafka("kafka.admin").KafkaAdminClient, connection, reach_s, {})
        try:
            yield client
        finally:
            client.close()


@contextmanager
def consumer_client(
    connection: Connection, *, reach_s: float = REACH_S, **options: Any
) -> Generator[Consumer, None, None]:
    """A consumer without a group: what it reads is assigned. BrokerError: as above."""
    client = open_consumer(connection, reach_s=reach_s, **options)
    with _broker_errors(connection):
        try:
            yield client
        finally:
            client.close(autocommit=False)


@contextmanager
def producer_client(
    connection: Connection, *, reach_s: float = REACH_S, **options: Any
) -> Generator[Producer, None, None]:
    """A producer whose sends all replicas acknowledge, each once. BrokerError: as above."""
    client = open_producer(connection, reach_s=reach_s, **options)
    with _broker_errors(connection):
        try:
            yield client
        finally:
            client.close(timeout=reach_s)


def open_consumer(connection: Connection, *, reach_s: float = REACH_S, **options: Any) -> Consumer:
    """The consumer of :func:`consumer_client`, for its caller to close."""
    options = {
        "group_id": None,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "fetch_max_wait_ms": 50,
        "max_partition_fetch_bytes": 4 * 1024 * 1024,
        **options,
    }
    client: Consumer
    with _broker_errors(connection):
        client = _open(require_kafka().KafkaConsumer, connection, reach_s, options)
    return client


def open_producer(connection: Connection, *, reach_s: float = REACH_S, **options: Any) -> Producer:
    """The producer of :func:`producer_client`, for its caller to close."""
    options = {
        "acks": "all",
        "enable_idempotence": True,
        "max_block_ms": int(1000 * reach_s),  # it looks for its brokers with the first send
        **options,
    }
    client: Producer
    with _broker_errors(connection):
        client = _open(require_kafka().KafkaProducer, connection, reach_s, options)
    return client


def place_of(topic: str, partition: int) -> Place:
    """A topic's partition, as kafka-python wants it named."""
    place: Place = require_kafka().TopicPartition(topic, partition)
    return place


def partition_of(key: Union[str, bytes], partitions: int) -> int:
    """The partition of a key among ``partitions``: every client's default, murmur2."""
    data = key.encode("utf-8") if isinstance(key, str) else key
    hashed: int = require_kafka("kafka.partitioner.default").murmur2(data)
    return (hashed & 0x7FFFFFFF) % partitions


def quiet_kafka_log() -> None:
    """Keeps the client's own log off the terminal: we say what matters in words of ours."""
    logger = logging.getLogger("kafka")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _open(kind: Any, connection: Connection, reach_s: float, more: Mapping[str, Any]) -> Any:
    """A client of this kind. One that fails to reach a broker leaves no socket open behind it."""
    inner: Callable[..., Any] = kind.DEFAULT_CONFIG["kafka_client"]
    made: List[Any] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(inner(*arguments, **options))
        return made[-1]

    options: Dict[str, Any] = {
        **connection.client_options(),
        "bootstrap_timeout_ms": int(1000 * reach_s),
        "reconnect_backoff_max_ms": RECONNECT_MAX_MS,
        "kafka_client": noted,
        **more,
    }
    why = refusal(connection, reach_s)
    if why is not None:
        where = ", ".join(connection.brokers)
        raise RefusedError(f"the brokers at {where} refuse the credentials ({why})")
    try:
        return kind(**options)
    except BaseException:
        for client in made:
            client.close()
        raise


@contextmanager
def _broker_errors(connection: Connection) -> Generator[None, None, None]:
    """What kafka-python raises as a BrokerError; anything else goes through as it is."""
    try:
        yield
    except Exception as error:
        said = broker_error(connection, error)
        if said is None:
            raise
        raise said from error


def broker_error(connection: Connection, error: Exception) -> Optional[BrokerError]:
    """An error of the client in our words; None: it is none of the client's."""
    errors = require_kafka("kafka.errors")
    if not isinstance(error, (errors.KafkaError, ConnectionError, TimeoutError)):
        return None
    where = ", ".join(connection.brokers)
    name, text = type(error).__name__, (str(error).splitlines() or [""])[0]
    said = text if name in text else f"{name}: {text}"
    if "Authentication" in said or "Sasl" in said:
        return RefusedError(f"the brokers at {where} refuse the credentials ({said})")
    if "Authorization" in said:
        return RefusedError(f"the brokers at {where} do not allow it ({said})")
    if isinstance(error, errors.BrokerResponseError) and not getattr(error, "retriable", False):
        return BrokerError(f"the brokers at {where} refuse it ({said})")
    return BrokerError(f"no answer from the brokers at {where} ({said})")
