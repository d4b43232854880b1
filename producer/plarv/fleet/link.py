"""The producer of a shipper: opened at need, thrown away when a send fails for good."""

from __future__ import annotations

import importlib.util
from typing import Any, Callable, Optional

from plarv_schemas.kafka_clients import BrokerError, broker_error, open_producer
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.kafka_types import Producer, Sending
from plarv_schemas.messages import Message
from plarv_schemas.topics import MAX_MESSAGE_BYTES

__all__ = ["Link"]

_FOR_EVER_MS = 2**31 - 1  # an outage is waited out: a batch that were given up would leave a hole
_REACH_S = 3.0
_METADATA_MS = 3000
_JOIN_S = 1.0
_REQUEST_MS = 10_000  # a broker that accepts and never answers is left after that


class Link:
    """Sends messages in order, each once as far as one producer can say.

    Where a send fails for good, nothing that was sent after it goes out any more: the producer is
    stopped on the spot, so that no record overtakes an earlier one, and the caller sends again
    from there over a new one.
    """

    def __init__(self, connection: Connection, on_answer: Callable[[], object]) -> None:
        self._connection = connection
        self._on_answer = on_answer  # called on the producer's thread
        self._producer: Optional[Producer] = None

    def open(self, reach_s: float = _REACH_S) -> None:
        """Reaches the brokers, if it is not open. BrokerError."""
        if self._producer is None:
            self._producer = open_producer(
                self._connection,
                reach_s=reach_s,
                delivery_timeout_ms=_FOR_EVER_MS,
                request_timeout_ms=_REQUEST_MS,
                max_block_ms=_METADATA_MS,
                max_in_flight_requests_per_connection=1,
                batch_size=MAX_MESSAGE_BYTES,  # what waits for an answer goes out as one request
                compression_type="lz4" if importlib.util.find_spec("lz4") else None,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )

    def send(self, topic: str, message: Message) -> Sending:
        """Sends a message; BrokerError: the link is no more, open it again."""
        self.open()
        producer = self._producer
        assert producer is not None
        try:
            sending = producer.send(
                topic, key=message.key, value=message.value, headers=message.headers
            )
        except Exception as error:
            raise broker_error(self._connection, error) or error from error
        sending.add_both(lambda _: self._answered(producer, sending))
        return sending

    def error_of(self, sending: Sending) -> Optional[BrokerError]:
        """Why a send that is done failed; None: it did not."""
        error = sending.exception
        if error is None:
            return None
        if isinstance(error, Exception):
            return broker_error(self._connection, error) or BrokerError(str(error))
        return BrokerError(repr(error))

    def close(self) -> None:
        """Lets go of the producer at once: what it has not sent is not sent any more."""
        producer, self._producer = self._producer, None
        if producer is not None:
            _stop(producer)
            _forget(producer)

    def _answered(self, producer: Producer, sending: Sending) -> None:
        if sending.exception is not None:
            _stop(producer)
        self._on_answer()


def _stop(producer: Any) -> None:
    """Ends the producer's thread without a wait; close() would wait for what is on its way."""
    producer._sender.force_close()


def _forget(producer: Any) -> None:
    """Waits until its thread has closed the sockets, and keeps it from flushing when collected."""
    producer._sender.join(_JOIN_S)
    producer._unregister_cleanup()
    producer._closed = True
