"""Stores as tests make them: logs as a topic's records, what must be in the store, and a digest."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Union

from tests.integration.fleet import interleaved, messages_of, sessions_of, side_by_side
from tests.processors.logs import log_of

from plarv_processors.engine import Engine
from plarv_schemas.events import Action, Event, Verdict
from plarv_schemas.journal import pack_full
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.messages import Message, action_message, decode_events, verdict_message
from plarv_schemas.topic_reader import Record
from plarv_sinks.sink.partitions import Partition, SourceTopic, load_partitions
from plarv_sinks.store import Store

__all__ = [
    "ACTIONS",
    "STEPS",
    "VERDICTS",
    "as_json",
    "assert_holds",
    "contents",
    "findings_records",
    "flush",
    "folded",
    "in_the_logs_order",
    "journal",
    "losses",
    "named",
    "packed",
    "records_of",
    "sink_into",
]  # fmt: skip

STEPS = SourceTopic("argus.steps", "5" * 12, 1, "steps")
VERDICTS = SourceTopic("argus.verdicts", "6" * 12, 1, "verdicts")
ACTIONS = SourceTopic("argus.actions", "7" * 12, 1, "actions")
_DAY_MS = 86_400_000
_BEGAN_MS = 20_000 * _DAY_MS


def named(stream: str, run_id: str, steps: int) -> List[Event]:
    """The log of a stream as the run ``run_id``."""
    return [event._replace(run_id=run_id) for event in log_of(stream, steps)]


def packed(rng: random.Random, runs: Mapping[str, Sequence[Event]], longest: int = 64) -> List[Any]:
    """The runs' messages, side by side."""
    each: List[List[Message]] = []
    for events in runs.values():
        sessions = sessions_of(events)
        if len(sessions) > 1:
            each.append(side_by_side(rng, sessions))
        else:
            each.append(messages_of(rng, events, longest))
    return interleaved(rng, each)


def records_of(messages: Iterable[Message], topic: SourceTopic = STEPS) -> List[Record]:
    """The messages as they lie in a topic's one partition, a second between two."""
    return [
        Record(
            topic.name, 0, offset, _BEGAN_MS + 1000 * offset, message.key, tuple(message.headers),
            message.value,
        )
        for offset, message in enumerate(messages)
    ]  # fmt: skip


def in_the_logs_order(records: Iterable[Record], run_id: str) -> List[Event]:
    """A run's events as the topic has them."""
    events: List[Event] = []
    for record in records:
        if record.key == run_id.encode():
            events += decode_events(record.headers, record.value or b"")
    return events


def folded(events: Sequence[Event]) -> List[Union[Verdict, Action]]:
    """What an engine finds in them."""
    engine = Engine()
    return [found for event in events for found in engine.fold(event)]


def findings_records(found: Iterable[Union[Verdict, Action]]) -> Dict[SourceTopic, List[Record]]:
    """Verdicts and actions as they lie in their topics."""
    listed = list(found)
    verdicts = [verdict_message(each, 0) for each in listed if isinstance(each, Verdict)]
    actions = [action_message(each, 0) for each in listed if isinstance(each, Action)]
    return {VERDICTS: records_of(verdicts, VERDICTS), ACTIONS: records_of(actions, ACTIONS)}


def sink_into(
    location: Union[str, Path], log: Mapping[SourceTopic, Sequence[Record]], every: int = 50
) -> None:
    """Writes a log into a store as a sink does, a flush every so many messages."""
    store = Store(location, create=True)
    for topic, records in log.items():
        (partition,) = load_partitions(store, [topic], {topic.name: {0}})
        for number, record in enumerate(records, 1):
            partition.take(record, 0.0)
            if number % every == 0 or number == len(records):
                flush(store, partition)


def flush(store: Store, partition: Partition) -> None:
    """One flush, as a sink makes it."""
    store.files.publish(partition.prepare(store))
    partition.published()


def assert_holds(store: Store, runs: Mapping[str, Sequence[Event]]) -> None:
    """The store has just the events that an engine accepts, each once, in the log's order."""
    assert set(store.run_rows()) == set(runs)
    for run_id, events in runs.items():
        engine = Engine()
        wanted: List[Event] = []
        for event in events:
            engine.fold(event)
            if engine.accepted:
                wanted.append(event)
        assert as_json(store.events(run_id)) == as_json(wanted)
        steps, controls = store.frame("steps", run_id), store.frame("events", run_id)
        ordinals = sorted([*steps["ordinal"].to_list(), *controls["ordinal"].to_list()])
        assert ordinals == list(range(len(wanted)))
        assert store.run_rows()[run_id].num_events == len(wanted)


def as_json(records: Iterable[Any]) -> List[str]:
    """Each record as text: equal texts are equal bits, NaN included."""
    return [json.dumps(each, default=str) for each in records]


def contents(store: Store) -> Dict[str, Any]:
    """All that the store holds of each run."""
    return {
        run_id: (
            as_json(store.events(run_id)),
            as_json(found.to_dict() for found in store.verdicts(run_id)),
            as_json(found.to_dict() for found in store.actions(run_id)),
            row,
        )
        for run_id, row in store.run_rows().items()
    }


def losses(num_steps: int, spike_at: int) -> List[float]:
    return [
        9.0 if spike_at <= step < spike_at + 5 else 2.0 + 0.01 * (step % 5)
        for step in range(num_steps)
    ]


def journal(
    folder: Path, session: str, values: List[float], first_step: int = 0, run_id: str = "run"
) -> None:
    """One session's journal, in segments of 16 KiB."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = JournalWriter(
        folder, run_id=run_id, session=session * 16, rank=0, world_size=1, segment_bytes=1 << 14
    )
    started = {"mode": "AUTO", "restart_count": 0}
    writer.control("session_started", step=None, rank=0, data=started)
    for step, loss in enumerate(values, first_step):
        writer.prepare()
        columns: Dict[str, Any] = {"loss": loss, "current_lr": 0.001, "grad_norm": 1.0}
        if step % 100 == 0:
            columns["sample_losses"] = (loss, loss)
        packed, _ = pack_full(writer.record, time.monotonic_ns(), step, columns)
        assert writer.append(packed)
    writer.control("session_finished", step=None, rank=0, data={"status": "completed"})
    writer.close()
