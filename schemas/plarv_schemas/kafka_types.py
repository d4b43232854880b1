"""What we use of kafka-python, typed, and its import at first use: it ships no types of its own."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Protocol,
    Sequence,
    Set,
    Tuple,
)

__all__ = ["Admin", "Consumer", "Place", "Producer", "Received", "Sending", "require_kafka"]


class Place(Protocol):
    """``kafka.TopicPartition``."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...


class Received(Protocol):
    """``kafka.consumer.fetcher.ConsumerRecord``."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> Optional[bytes]: ...
    @property
    def value(self) -> Optional[bytes]: ...
    @property
    def headers(self) -> Sequence[Tuple[str, bytes]]: ...


class Consumer(Protocol):
    """``kafka.KafkaConsumer``."""

    def assign(self, partitions: Sequence[Place]) -> None: ...
    def seek(self, partition: Place, offset: int) -> None: ...
    def position(self, partition: Place) -> int: ...
    def poll(
        self, timeout_ms: int = 0, max_records: Optional[int] = None
    ) -> Mapping[Place, List[Received]]: ...
    def partitions_for_topic(self, topic: str) -> Optional[Set[int]]: ...
    def beginning_offsets(self, partitions: Sequence[Place]) -> Mapping[Place, int]: ...
    def end_offsets(self, partitions: Sequence[Place]) -> Mapping[Place, int]: ...
    def close(self, autocommit: bool = True) -> None: ...


class Sending(Protocol):
    """What a producer gives back for a record."""

    @property
    def is_done(self) -> bool: ...
    @property
    def exception(self) -> Optional[BaseException]: ...
    def add_both(self, f: Callable[[Any], object]) -> object: ...
    def get(self, timeout: Optional[float] = None) -> Any: ...


class Producer(Protocol):
    """``kafka.KafkaProducer``."""

    def send(
        self,
        topic: str,
        value: Optional[bytes] = None,
        key: Optional[bytes] = None,
        headers: Optional[List[Tuple[str, bytes]]] = None,
        partition: Optional[int] = None,
    ) -> Sending: ...
    def flush(self, timeout: Optional[float] = None) -> None: ...
    def close(self, timeout: Optional[float] = None) -> None: ...


class Admin(Protocol):
    """``kafka.admin.KafkaAdminClient``."""

    def create_topics(
        self,
        new_topics: Mapping[str, Mapping[str, Any]],
        timeout_ms: Optional[int] = None,
        raise_errors: bool = True,
    ) -> Mapping[str, Any]: ...
    def describe_topics(self, topics: Sequence[str]) -> List[Dict[str, Any]]: ...
    def describe_cluster(self) -> Mapping[str, Any]: ...
    def describe_configs(
        self, config_resources: Iterable[Any], config_filter: str = "modified"
    ) -> Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]: ...
    def close(self) -> None: ...


def require_kafka(module: str = "kafka") -> ModuleType:
    """kafka-python, or one of its modules. ImportError says which extra brings it."""
    try:
        with warnings.catch_warnings():
            # It reads its schemas in a way that Python 3.11 finds old: not for our callers to hear.
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "this needs kafka-python: pip install 'plarv-argus-sdk[kafka]'"
        ) from error
