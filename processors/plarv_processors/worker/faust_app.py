"""A Faust app set up for the log: raw bytes, no tables, quick to fetch and to rejoin."""

from __future__ import annotations

import asyncio
import importlib
import logging
from typing import Any, Dict, List, Optional, Sequence, Tuple

from plarv_processors.worker.config import WorkerConfig
from plarv_schemas.messages import Message
from plarv_schemas.topics import MAX_MESSAGE_BYTES

__all__ = ["FleetApp", "new_app", "send", "send_all"]

faust: Any = importlib.import_module("faust")
importlib.import_module("faust.tables.manager")
_driver: Any = importlib.import_module("faust.transport.drivers.aiokafka")

_NotReady: Any = importlib.import_module("faust.exceptions").NotReady

_log = logging.getLogger("plarv.worker")

_FETCH_WAIT_MS = 50
_RETRY_S = 0.5
_MAX_RETRY_S = 5.0
_BUFFER = 64  # messages that wait for an agent; more would only be memory
_FETCH_BYTES = 1024 * 1024  # of a partition at once: what is fetched ahead is memory, too
_HELD_BACK_S = 0.02
_START_S = 0.05
_PENDING = 200  # of a bulk send


class _Thread(_driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """Faust asks the broker to hold a fetch for 1.5 s, a literal there is no setting for. While
    one partition is idle, that holds up the others on the same broker: a third of the speed.
    """

    def _create_worker_consumer(self, transport: Any) -> Any:
        made: Any = _driver.AIOKafkaConsumerThread._create_worker_consumer(self, transport)
        made._fetch_max_wait_ms = _FETCH_WAIT_MS
        return made


class _Consumer(_driver.Consumer):  # type: ignore[misc]
    def _new_consumer_thread(self) -> Any:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def sleep(self, n: Any, **options: Any) -> None:
        """While its partitions are held back Faust looks once a second whether they still are: the
        literal 1 there, which is no float as its intervals are. A restart would wait for that.
        """
        seconds = _HELD_BACK_S if type(n) is int and n == 1 else n
        await _driver.Consumer.sleep(self, seconds, **options)


class _Transport(_driver.Transport):  # type: ignore[misc]
    Consumer = _Consumer


class _Monitor(faust.Monitor):  # type: ignore[misc]
    """Faust's own, without what it notes of every event and agent: we count what matters."""

    def on_message_in(self, tp: Any, offset: int, message: Any) -> None:
        """Nothing."""

    def on_message_out(self, tp: Any, offset: int, message: Any) -> None:
        """Nothing."""

    def on_stream_event_in(self, tp: Any, offset: int, stream: Any, event: Any) -> None:
        """Nothing."""

    def on_stream_event_out(
        self, tp: Any, offset: int, stream: Any, event: Any, state: Any = None
    ) -> None:
        """Nothing."""


class _NoTables(faust.tables.manager.TableManager):  # type: ignore[misc]
    """Faust waits a second for tables to be declared; there are none."""

    async def on_start(self) -> None:
        """Goes on at once."""
        if not self.should_stop:
            await self._update_channels()
            await self.recovery.start()


class FleetApp(faust.App):  # type: ignore[misc]
    """A Faust app whose fetches wait 50 ms at most."""

    def _new_transport(self) -> Any:
        return _Transport(self.conf.broker_consumer, self)


def new_app(group: str, config: WorkerConfig) -> FleetApp:
    """An app of that consumer group.

    Static membership (``consumer_group_instance_id``) lets a worker that was killed rejoin in two
    seconds instead of waiting out its old session.
    """
    connection = config.connection
    options: Dict[str, Any] = {}
    credentials = _credentials(config)
    if credentials is not None:
        options["broker_credentials"] = credentials
    return FleetApp(
        group,
        Monitor=_Monitor,
        TableManager=_NoTables,
        broker=[f"kafka://{address}" for address in connection.brokers],
        broker_session_timeout=30.0,
        broker_heartbeat_interval=3.0,
        broker_commit_interval=1.0,
        broker_max_poll_interval=3600.0,  # a long rebuild is not a dead worker
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=f"{group}-{config.name}",
        consumer_max_fetch_size=_FETCH_BYTES,
        datadir=str(config.state_dir / group),
        key_serializer="raw",
        producer_acks=-1,
        producer_max_request_size=4 * MAX_MESSAGE_BYTES,
        store="memory://",
        stream_buffer_maxsize=_BUFFER,
        stream_wait_empty=False,
        table_standby_replicas=0,
        topic_allow_declare=False,  # they are created before, see plarv_processors.kafka_topics
        topic_disable_leader=True,
        value_serializer="raw",
        web_enabled=False,
        **options,
    )


async def send(app: Any, topic: str, partition: Optional[int], message: Message) -> None:
    """Sends and waits until the broker has it, however long that takes."""
    pause = _RETRY_S
    while True:
        try:
            await app.producer.send_and_wait(
                topic, message.key, message.value, partition, None, dict(message.headers)
            )
            return
        except _NotReady:  # the app is just starting
            await asyncio.sleep(_START_S)
        except Exception as error:  # noqa: BLE001 - aiokafka and Faust raise kinds of their own
            _log.warning("no broker took a record of %s (%s): trying again", topic, error)
            await asyncio.sleep(pause)
            pause = min(_MAX_RETRY_S, 2.0 * pause)


async def send_all(
    app: Any, topic: str, partition: int, records: Sequence[Tuple[bytes, Optional[bytes]]]
) -> None:
    """Sends (key, value) pairs in their order and waits for all of them; None removes a key."""
    for begin in range(0, len(records), _PENDING):
        waiting: List[Any] = []
        for key, value in records[begin : begin + _PENDING]:
            waiting.append(await app.producer.send(topic, key, value, partition, None, None))
        await asyncio.gather(*waiting)


def _credentials(config: WorkerConfig) -> Any:
    connection = config.connection
    context = connection.ssl_context()
    if connection.uses_sasl:
        return faust.SASLCredentials(
            username=connection.username,
            password=connection.password,
            mechanism=connection.mechanism,
            ssl_context=context,
        )
    return None if context is None else faust.SSLCredentials(context)
