"""A run's subscription: its verdicts and actions from the brokers, checked, each once.

No consumer group: the partition of the run is assigned, so nobody else notices, and many training
processes may read it side by side.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Union

from plarv.fleet.positions import read_note
from plarv.fleet.record_files import SUBSCRIBED_FILE, RecordFiles
from plarv_schemas.events import Action, Verdict
from plarv_schemas.kafka_clients import (
    BrokerError,
    broker_error,
    open_consumer,
    partition_of,
    place_of,
)
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.kafka_types import Consumer, Place, Received
from plarv_schemas.messages import decode_action, decode_verdict
from plarv_schemas.signatures import verify
from plarv_schemas.topic_reader import NoTopicError
from plarv_schemas.topics import ID_HEADER, SIGNATURE_HEADER, TABLE_HEADER, Topics, header

__all__ = ["Subscriber", "Subscription"]

_POLL_MS = 100
_POLL_RECORDS = 500
_SETTLE_S = 0.02
_NOTE_EVERY_S = 5.0  # while nothing of this run comes
_LEAD_EVERY_S = 1.0
_MAX_SEEN = 16_384
_ID_LENGTH = 64  # of an id that somebody may have made up

Record = Union[Verdict, Action]


class Subscriber(NamedTuple):
    """Whose records these are, and by what they are checked."""

    run_id: str
    session: str
    folder: Path
    key: Optional[bytes]  # of the run; None: no action can be checked
    only_informs: bool  # MANUAL, and no operator is obeyed
    begin: Mapping[str, int]  # "topic/partition" -> offset, where an earlier process of this very
    # session stopped; empty: this is its first


class Subscription:
    """Reads the run's partition of the verdicts' and the actions' topics.

    What came before :meth:`open` returned is written down only: it belongs to the run's past. What
    comes later is also handed to ``deliver(record, binding)``; an action that must not be obeyed to
    ``refuse(id, why)``. ``binding``: whether the training process may carry it out. ``noted`` hears
    the offsets at which another process goes on, if this one dies.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        connection: Connection,
        topics: Topics,
        deliver: Callable[[Record, bool], None],
        refuse: Callable[[str, str], None],
        noted: Callable[[Dict[str, int]], None],
    ) -> None:
        self._subscriber = subscriber
        self._connection = connection
        self._topics = topics
        self._deliver = deliver
        self._refuse = refuse
        self._noted = noted
        self._key = subscriber.run_id.encode("utf-8")
        self._files = RecordFiles(subscriber.folder)
        self._consumer: Optional[Consumer] = None
        self._places: List[Place] = []
        self._next: Dict[str, int] = {}  # topic -> offset that is read next
        self._live: Dict[str, int] = {}  # topic -> offset from which on records are of this session
        self._seen: Dict[str, None] = {}
        self._noted_at = self._tried_at = -float("inf")
        self.unreadable = 0  # messages of this run that were no records

    def open(self, reach_s: float) -> None:
        """Reaches the brokers and fixes the place from which on records are live.

        BrokerError: they cannot be reached in time, or refuse us, or lack a topic.
        """
        until = time.monotonic() + reach_s
        if self._consumer is None:
            self._connect(reach_s)
        self._lead()
        if not self._subscriber.begin:
            self._seen.update(dict.fromkeys(self._files.seen))
        while any(self._next[topic] < end for topic, end in self._live.items()):
            self.poll()
            if time.monotonic() > until:
                raise BrokerError("the brokers gave nothing in time")
        self._note(True)
        while not self._settled() and time.monotonic() < until:
            time.sleep(_SETTLE_S)  # who starts now must see a pause that was lifted meanwhile

    def poll(self) -> int:
        """Takes in what is there; waits up to 0.1 s where nothing is. How much was the run's.

        BrokerError: the brokers refuse us. An outage is none: nothing comes.
        """
        consumer = self._consumer
        if consumer is None:
            self._connect(_LEAD_EVERY_S)
            consumer = self._consumer
            assert consumer is not None
        self._lead()
        count = 0
        try:
            found = consumer.poll(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except Exception as error:
            self._close_consumer()
            if type(error).__name__ == "OffsetOutOfRangeError":
                self._next = {}  # retention was quicker than we: on from where it begins
                return 0
            raise broker_error(self._connection, error) or error from error
        for place, records in found.items():
            for received in records:
                count += self._take(received)
            self._next[place.topic] = max(self._next[place.topic], consumer.position(place))
        self._note(count > 0)
        return count

    def close(self) -> None:
        """Notes how far it came, and ends."""
        self._note(True)
        self._files.close()
        self._close_consumer()

    def _connect(self, reach_s: float) -> None:
        consumer = open_consumer(
            self._connection,
            reach_s=reach_s,
            allow_auto_create_topics=False,
            request_timeout_ms=10_000,
            metrics_enabled=False,
        )
        self._consumer = consumer
        try:
            self._seek(consumer)
        except Exception as error:
            self._close_consumer()
            if isinstance(error, BrokerError):
                raise
            raise broker_error(self._connection, error) or error from error

    def _seek(self, consumer: Consumer) -> None:
        topics = self._topics
        counts = {name: consumer.partitions_for_topic(name) for name in self._topics.all()[:3]}
        for name in (topics.steps, topics.verdicts, topics.actions):
            if not counts.get(name):
                where = ", ".join(self._connection.brokers)
                raise NoTopicError(f"no topic {name} at {where}")
        names = (topics.verdicts, topics.actions)
        number = {name: partition_of(self._key, len(counts[name] or ())) for name in names}
        self._places = [place_of(name, number[name]) for name in names]
        consumer.assign(self._places)
        begins = consumer.beginning_offsets(self._places)
        ends = consumer.end_offsets(self._places)
        first = not self._live
        stored = self._stored(number) if first else self._next
        for place in self._places:
            begin = stored.get(place.topic, ends[place] if first else begins[place])
            begin = min(max(begin, begins[place]), ends[place])
            consumer.seek(place, begin)
            self._next[place.topic] = begin
            if first:
                self._live[place.topic] = begin if self._subscriber.begin else ends[place]

    def _stored(self, numbers: Mapping[str, int]) -> Dict[str, int]:
        """Where an earlier process of this run stopped reading."""
        who = self._subscriber
        note = who.begin or read_note(who.folder / SUBSCRIBED_FILE)
        found: Dict[str, int] = {}
        for name, number in numbers.items():
            offset: Any = note.get(f"{name}/{number}")
            if isinstance(offset, int):
                found[name] = offset
        return found

    def _take(self, received: Received) -> int:
        """One message; 1 where it is this run's."""
        if received.key != self._key:
            return 0
        value = received.value or b""
        is_live = received.offset >= self._live[received.topic]
        table = header(received.headers, TABLE_HEADER)
        if received.topic == self._topics.verdicts:
            if table == "verdicts":
                self._take_verdict(value, is_live)
        elif table == "actions":
            self._take_action(received, value, is_live)
        return 1

    def _take_verdict(self, value: bytes, is_live: bool) -> None:
        try:
            verdict = decode_verdict(value)
        except Exception:  # noqa: BLE001 - pyarrow's errors have no one base; anybody may write it
            self.unreadable += 1
            return
        if verdict.run_id == self._subscriber.run_id and self._is_new(verdict.id):
            self._pass_on(verdict, is_live, binding=False)

    def _take_action(self, received: Received, value: bytes, is_live: bool) -> None:
        who = self._subscriber
        signature = header(received.headers, SIGNATURE_HEADER)
        name = (header(received.headers, ID_HEADER) or "?")[:_ID_LENGTH]
        signed = who.key is not None and verify(who.key, "action", value, signature)
        if who.key is not None and not signed:
            why = "it is not signed" if signature is None else "its signature is not of this run"
            self._turn_away(name, why, is_live)
            return
        try:
            action = decode_action(value)
        except Exception:  # noqa: BLE001 - the same
            self.unreadable += 1
            self._turn_away(name, "it cannot be read", is_live)
            return
        why = self._objection(action, signed, is_live)
        if why:
            self._turn_away(action.id, why, is_live)
        elif self._is_new(action.id):
            self._pass_on(action, is_live, binding=signed)

    def _objection(self, action: Action, signed: bool, is_live: bool) -> str:
        """Why an action must not be obeyed; "" where it may."""
        who = self._subscriber
        if not signed and not (who.only_informs and action.parameters.get("dry_run")):
            return "there is no key to check it by"
        if action.run_id != who.run_id:
            return "it is of another run"
        if is_live and all(session != who.session for session, _ in action.sessions):
            return "it is of another attempt"
        return ""

    def _turn_away(self, name: str, why: str, is_live: bool) -> None:
        if is_live:
            self._refuse(name, why)

    def _is_new(self, name: str) -> bool:
        if name in self._seen:
            return False
        self._seen[name] = None
        if len(self._seen) > _MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return True

    def _pass_on(self, record: Record, is_live: bool, *, binding: bool) -> None:
        try:
            self._files.add(record)
        except OSError:  # the disk is full: kept, and tried again
            pass
        if is_live:
            self._deliver(record, binding)

    def _lead(self) -> None:
        now = time.monotonic()
        if now - self._tried_at >= _LEAD_EVERY_S:
            self._tried_at = now
            try:
                self._files.lead()
            except OSError:  # tried again
                pass

    def _settled(self) -> bool:
        try:
            return self._files.settled()
        except OSError:  # the disk is full: it will not be better in a moment
            return True

    def _note(self, changed: bool) -> None:
        now = time.monotonic()
        if not changed and now - self._noted_at < _NOTE_EVERY_S:
            return
        self._noted_at = now
        offsets = {f"{p.topic}/{p.partition}": self._next[p.topic] for p in self._places}
        self._noted(offsets)
        try:
            self._files.note(offsets)
        except OSError:  # an older note costs a second look
            pass

    def _close_consumer(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            try:
                consumer.close(autocommit=False)
            except Exception:  # noqa: BLE001 - it is thrown away
                return
