"""What the tests of the fleet's transport share: runs on a real broker, and actions for them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable, List

from tests.fleets import MASTER_KEY, TopicsOnTest

from plarv.client import Argus
from plarv.transport.kafka import KafkaTransport
from plarv_schemas.events import Action, Event, Verdict
from plarv_schemas.messages import decode_events
from plarv_schemas.run_log import read_run
from plarv_schemas.signatures import run_key

__all__ = [
    "action_for",
    "arrived",
    "distinct",
    "journal_of",
    "key_for",
    "shipped",
    "transport_of",
    "until",
    "verdict_for",
]

DEADLINE_S = 60.0


def until(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> None:
    """Waits until ``condition()`` holds."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "it has not come to pass"
        time.sleep(0.01)


def key_for(run_id: str) -> str:
    return run_key(MASTER_KEY, run_id).hex()


def transport_of(argus: Argus) -> KafkaTransport:
    assert argus._session is not None
    transport = argus._session.transport
    assert isinstance(transport, KafkaTransport)
    return transport


def arrived(fleet: TopicsOnTest, run_id: str) -> List[List[Event]]:
    """The run's messages in the log's topic, in their order."""
    found: List[List[Event]] = []
    for record in fleet.records(fleet.topics.steps):
        if record.key == run_id.encode():
            found.append(list(decode_events(record.headers, record.value or b"")))
    return found


def distinct(messages: List[List[Event]]) -> List[Event]:
    """The events as a fold takes them: of two with one key the first, and none that comes late."""
    last: dict[str, int] = {}
    events: List[Event] = []
    for event in (event for message in messages for event in message):
        if event.record > last.get(event.session, -1):
            last[event.session] = event.record
            events.append(event)
    return events


def journal_of(folder: Path) -> List[Event]:
    return list(read_run(folder))


def shipped(fleet: TopicsOnTest, folder: Path) -> bool:
    """Whether the topic holds what the journal does, each session in its order."""
    there = distinct(arrived(fleet, folder.name))
    here = journal_of(folder)
    by_session = sorted(here, key=lambda event: (event.session, event.record))
    return sorted(there, key=lambda event: (event.session, event.record)) == by_session


def action_for(argus: Argus, kind: Any = "HALT", step: int = 0, **fields: Any) -> Action:
    """An action of the fleet's policy about this very session."""
    assert argus._session is not None
    values: dict[str, Any] = {
        "run_id": argus.run_id,
        "attempt": 1,
        "sessions": ((argus._session.writer.session, 0),),
        "step": step,
        "ordinal": 7,
        "kind": kind,
        "parameters": {},
        "reason": "a test asks for it",
        "verdict_ids": ("0123456789abcdef",),
        "harm_pressure": 2.5,
        "expiry_step": 10**9,
        **fields,
    }
    return Action(**values)


def verdict_for(argus: Argus, step: int = 3, **fields: Any) -> Verdict:
    values: dict[str, Any] = {
        "run_id": argus.run_id,
        "attempt": 1,
        "rank": None,
        "step": step,
        "ordinal": step + 1,
        "detector": "loss_spike",
        "kind": "confirmed",
        "level": "critical",
        "state": "opened",
        "onset_step": step,
        "score": 9.0,
        "threshold": 6.0,
        "evidence": {"loss": 9.5},
        "message": "the loss leapt",
        "version": "loss_spike-test",
        **fields,
    }
    return Verdict(**values)
