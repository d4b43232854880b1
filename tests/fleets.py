"""A fleet's topics on the tests' broker, and what workers and operators write into them."""

from __future__ import annotations

from typing import Iterable, List, Optional, Sequence, Tuple

from plarv_processors.engine import Engine, EngineConfig
from plarv_processors.kafka_topics import create_topics
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.kafka_clients import producer_client
from plarv_schemas.kafka_connection import connect_to
from plarv_schemas.messages import Message, action_message, event_messages, verdict_message
from plarv_schemas.signatures import run_key, sign
from plarv_schemas.topic_reader import Record, open_topic
from plarv_schemas.topics import SIGNATURE_HEADER, Topics

__all__ = ["MASTER_KEY", "TopicsOnTest", "signed", "started"]

MASTER_KEY = "a master key of these tests"
PARTITIONS = 3


class TopicsOnTest:
    """The topics under one prefix; ``put`` waits until the broker has everything."""

    def __init__(self, address: str, prefix: str) -> None:
        self.address = address
        self.connection = connect_to(address)
        self.topics = Topics(prefix)
        create_topics(self.connection, self.topics, PARTITIONS)

    def put(
        self, topic: str, messages: Iterable[Message], partition: Optional[int] = None
    ) -> List[Tuple[int, int]]:
        """Sends messages; the partition and offset of each."""
        with producer_client(self.connection) as producer:
            sent = [
                producer.send(
                    topic,
                    key=message.key,
                    value=message.value,
                    headers=message.headers,
                    partition=partition,
                )
                for message in messages
            ]
            return [(each.partition, each.offset) for each in (future.get(30) for future in sent)]

    def put_events(self, events: Sequence[Event], packed: int = 64) -> List[Tuple[int, int]]:
        """The log of a run, ``packed`` events a message."""
        messages: List[Message] = []
        for begin in range(0, len(events), packed):
            messages += event_messages(events[begin : begin + packed])
        return self.put(self.topics.steps, messages)

    def put_findings(self, findings: Iterable[Verdict | Action]) -> None:
        """What workers would have found."""
        found = list(findings)
        self.put(
            self.topics.verdicts,
            [verdict_message(each, 0) for each in found if isinstance(each, Verdict)],
        )
        self.put(self.topics.actions, [signed(each) for each in found if isinstance(each, Action)])

    def records(self, topic: str) -> List[Record]:
        """All that the topic holds."""
        with open_topic(self.connection, topic) as reader:
            return list(reader.read(reader.ranges()))


def signed(action: Action, master_key: str = MASTER_KEY) -> Message:
    """An action as the policy's worker writes it."""
    message = action_message(action, 0)
    signature = sign(run_key(master_key, action.run_id), "action", message.value)
    message.headers.append((SIGNATURE_HEADER, signature.encode()))
    return message


def started(run_id: str, session: str = "a", mode: str = "AUTO") -> ControlEvent:
    """The first event of a session."""
    return ControlEvent(run_id, session, 0, 0, "session_started", time_ns=1, data={"mode": mode})


def going_wrong(run_id: str, steps: int = 120, session: str = "a", first: int = 1) -> List[Event]:
    """A run whose loss leaps at step 100, and stays where it is."""
    events: List[Event] = [started(run_id, session)] if first == 1 else []
    for step in range(steps):
        loss = 2.0 + 0.01 * (step % 5) if step < 100 else 9.0 + 0.1 * step
        events.append(
            StepEvent(
                run_id, session, first + step, 0, step, time_ns=1_000_000 * step, loss=loss,
                grad_norm=1.0 + 0.01 * (step % 7), current_lr=0.001,
            )
        )  # fmt: skip
    return events


def folded(events: Iterable[Event]) -> List[Verdict | Action]:
    """What a replay finds in the run."""
    engine = Engine(EngineConfig())
    return [finding for event in events for finding in engine.fold(event)]
