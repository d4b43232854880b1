"""A run's actions as they come, for programs: ``for action in plarv.actions(run_id)``."""

from __future__ import annotations

from typing import Callable, Dict, Generator, Iterator, Optional, Sequence, Union

from plarv.exceptions import (
    ArgusAuthenticationError,
    ArgusConfigurationError,
    ArgusConnectionError,
)
from plarv.fleet.connection import fleet_connection, fleet_topics, key_of_run
from plarv_schemas.events import Action
from plarv_schemas.kafka_clients import BrokerError, RefusedError
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.messages import decode_action
from plarv_schemas.signatures import verify
from plarv_schemas.topic_reader import Record, open_topic
from plarv_schemas.topics import SIGNATURE_HEADER, header

__all__ = ["ActionStream", "actions"]

_REMEMBERED = 4096  # ids; a run has a few hundred actions


def actions(
    run_id: str,
    *,
    brokers: Union[str, Sequence[str], None] = None,
    api_key: Optional[str] = None,
    run_key: Optional[str] = None,
    follow: bool = True,
    from_beginning: bool = False,
    refused: Optional[Callable[[str], None]] = None,
) -> ActionStream:
    """A run's actions, each once, in their order; only those that the fleet has signed.

    Args:
        run_id: of the run.
        brokers: ``host:port``, several separated by commas or in a list (default: ARGUS_BROKERS).
        api_key: ``id:secret``, the SASL name and password (default: ARGUS_API_KEY).
        run_key: from ``argus key for RUN`` (default: ARGUS_RUN_KEY, or made from ARGUS_MASTER_KEY).
        follow: go on and on, also through an outage; else end with what the topic holds now.
        from_beginning: with ``follow``, begin with what the topic holds, not with what comes next.
        refused: hears why an action was left out; ``refused`` of the stream counts them.

    Raises:
        ArgusConfigurationError: no brokers, no key, or they cannot be.
        ArgusConnectionError: the brokers do not answer, or have no such topic.
        ArgusAuthenticationError: they refuse the credentials.
        ImportError: kafka-python or pyarrow is missing.
    """
    connection, topic = fleet_connection(brokers, api_key), fleet_topics().actions
    key = key_of_run(run_id, run_key)
    if key is None:
        raise ArgusConfigurationError(
            "run_key: actions are checked with the run's key; set ARGUS_RUN_KEY to what "
            f"`argus key for {run_id}` prints, or ARGUS_MASTER_KEY"
        )
    records = _records(connection, topic, run_id, follow, from_beginning or not follow)
    return ActionStream(run_id, key, records, refused)


class ActionStream:
    """An iterator over actions; it holds a connection until it ends, or until ``close()``."""

    def __init__(
        self,
        run_id: str,
        key: bytes,
        records: Generator[Optional[Record], None, None],
        tell: Optional[Callable[[str], None]] = None,
    ) -> None:
        self.refused = 0  # that were not signed with the run's key, or could not be read
        self._run_id = run_id
        self._key = key
        self._records = records
        self._tell = tell
        self._seen: Dict[str, None] = {}
        next(self._records)  # connected, and the place is fixed

    def __iter__(self) -> Iterator[Action]:
        return self

    def __next__(self) -> Action:
        for record in self._records:
            if record is not None and record.key == self._run_id.encode("utf-8"):
                action = self._checked(record)
                if action is not None:
                    return action
        raise StopIteration

    def __enter__(self) -> ActionStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the connection; the stream has ended then."""
        self._records.close()

    def _checked(self, record: Record) -> Optional[Action]:
        """The record's action; None where it was seen before, or is refused."""
        value = record.value or b""
        if not verify(self._key, "action", value, header(record.headers, SIGNATURE_HEADER)):
            self._refuse(record, "its signature is wrong")
            return None
        try:
            action = decode_action(value)
        except ValueError as error:
            self._refuse(record, str(error))
            return None
        if action.run_id != self._run_id:
            self._refuse(record, "it is of another run")
            return None
        if action.id in self._seen:
            return None
        self._seen[action.id] = None
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return action

    def _refuse(self, record: Record, why: str) -> None:
        self.refused += 1
        if self._tell is not None:
            place = f"{record.topic}, partition {record.partition}, offset {record.offset}"
            self._tell(f"run {self._run_id}: an action was refused: {why} ({place})")


def _records(
    connection: Connection, topic: str, run_id: str, follow: bool, from_beginning: bool
) -> Generator[Optional[Record], None, None]:
    """First None, once the place to begin at is known; then the records of the run's partition."""
    try:
        with open_topic(connection, topic) as reader:
            partition = reader.partition_of(run_id)
            ranges = reader.ranges([partition])
            yield None
            if not follow:
                yield from reader.read(ranges)
                return
            begin, end = ranges[partition]
            yield from reader.follow({partition: begin if from_beginning else end})
    except RefusedError as error:
        raise ArgusAuthenticationError(str(error)) from error
    except BrokerError as error:
        raise ArgusConnectionError(str(error)) from error
