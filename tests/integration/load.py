"""Runs that go on reporting while workers and brokers are killed."""

from __future__ import annotations

import gc
import logging
import random
import threading
import warnings
from typing import Dict, List

from tests.fleets import TopicsOnTest
from tests.integration.fleet import folded_runs, messages_of, named, sessions_of, side_by_side
from tests.processors.logs import names

from plarv_schemas.events import Event
from plarv_schemas.kafka_clients import open_producer
from plarv_schemas.kafka_types import Producer, Sending
from plarv_schemas.messages import Message, decode_events

__all__ = ["Load"]

_PAUSE_S = 0.02  # between two messages
_AT_ONCE = 3  # runs that go on beside each other
_END_S = 200.0  # longer than the producer tries
_LONGEST = 16  # events of a message


class Load:
    """An idempotent producer on a thread, one message after another until ``finish``.

    Runs follow each other, some of several ranks; none is cut short: the last ones are sent to
    their end.
    """

    def __init__(self, fleet: TopicsOnTest, rng: random.Random) -> None:
        self.sent = 0
        self.acknowledged = 0
        self.errors: List[Exception] = []
        self._fleet, self._rng = fleet, rng
        self._events: Dict[str, List[Event]] = {}
        self._is_last = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        # kafka-python leaves sockets that were refused to the collector, which warns of them, and
        # what it logs about them keeps them beyond the test.
        self._quiet = warnings.catch_warnings()
        self._log = logging.getLogger("kafka")
        self._log_level = self._log.level

    def __enter__(self) -> Load:
        self._log.setLevel(logging.CRITICAL + 1)
        self._quiet.__enter__()
        warnings.simplefilter("ignore", ResourceWarning)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_last.set()
        self._thread.join(_END_S)
        gc.collect()
        self._quiet.__exit__(None, None, None)
        self._log.setLevel(self._log_level)

    def finish(self) -> None:
        """No new runs; returns once all that was begun is acknowledged."""
        self._is_last.set()
        self._thread.join(_END_S)
        assert not self._thread.is_alive(), "the load did not come to its end"
        assert not self.errors, self.errors[0]
        assert self.acknowledged == self.sent

    def assert_complete(self, fleet: TopicsOnTest) -> None:
        """Every step that was sent is in the topic, in its session's order."""
        there = folded_runs(fleet)
        for run_id, events in self._events.items():
            for session in sessions_of(events):
                name = session[0].session
                kept = [each for each in there[run_id] if each.session == name]
                assert [repr(each) for each in kept] == [repr(each) for each in session], run_id

    def _run(self) -> None:
        producer = open_producer(self._fleet.connection, reach_s=60.0, delivery_timeout_ms=180_000)
        try:
            going: List[List[Message]] = []
            number = 0
            while going or not self._is_last.is_set():
                while len(going) < _AT_ONCE and not self._is_last.is_set():
                    going.append(self._begin(number))
                    number += 1
                if not going:
                    break
                queue = self._rng.choice(going)
                message = queue.pop(0)
                if not queue:
                    going.remove(queue)
                self._send(producer, message)
                self.sent += 1
                if not self._is_last.is_set():
                    self._is_last.wait(_PAUSE_S)
            producer.flush(timeout=180)
        except Exception as error:  # noqa: BLE001 - the test's thread raises it
            self.errors.append(error)
        finally:
            producer.close(timeout=10)

    def _begin(self, number: int) -> List[Message]:
        stream = self._rng.choice(names)
        events = named(stream, f"{stream}-{number}", 200 + 100 * self._rng.randint(0, 2))
        sessions = sessions_of(events)
        if len(sessions) > 1:
            messages = side_by_side(self._rng, sessions)
        else:
            messages = messages_of(self._rng, events, _LONGEST)
        # As a reader gets them: most columns are float32.
        self._events[events[0].run_id] = [
            event for each in messages for event in decode_events(each.headers, each.value)
        ]
        return messages

    def _send(self, producer: Producer, message: Message) -> None:
        sending = producer.send(
            self._fleet.topics.steps,
            key=message.key,
            value=message.value,
            headers=message.headers,
        )
        sending.add_both(lambda _: self._heard(sending))

    def _heard(self, sending: Sending) -> None:
        if isinstance(sending.exception, Exception):
            self.errors.append(sending.exception)
        else:
            self.acknowledged += 1
