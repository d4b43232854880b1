"""What stands in a Kafka message: records of one kind as one Arrow batch, and its headers.

A message of ``steps`` or ``events`` is many events of one run; one of ``verdicts`` or ``actions``
is one record, with the offset of its event in a header. A *watermark* is how far the detectors of
one worker have read a partition of the steps topic.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, cast

from plarv_schemas import arrow
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.topics import (
    MAX_MESSAGE_BYTES,
    TABLE_HEADER,
    Headers,
    header,
    make_headers,
)
from plarv_schemas.versions import SCHEMA_VERSION

__all__ = [
    "LeftOut",
    "Message",
    "Watermark",
    "action_message",
    "decode_action",
    "decode_events",
    "decode_verdict",
    "decode_watermark",
    "event_messages",
    "verdict_message",
    "watermark_message",
]


class Message(NamedTuple):
    """What a producer is handed."""

    key: bytes  # the run's id; of a watermark empty
    value: bytes
    headers: List[Tuple[str, bytes]]


class LeftOut(NamedTuple):
    """A detector that hung on a run: it is not called for the run's events from ``offset`` on."""

    run_id: str
    detector: str
    partition: int
    offset: int  # of the message on which it hung


class Watermark(NamedTuple):
    """How far detectors have read a partition of the steps topic: all before ``next`` is judged."""

    next: Mapping[str, int]  # detector version -> first offset that it has not folded
    left_out: Tuple[LeftOut, ...] = ()  # in this partition


def event_messages(events: Sequence[Event]) -> List[Message]:
    """The messages that carry ``events`` of one run, in their order.

    Steps and control events go into messages of their own, and none is longer than 512 KiB unless a
    single event is.
    """
    messages: List[Message] = []
    begin = 0
    for end in range(1, len(events) + 1):
        if end == len(events) or _is_step(events[end]) != _is_step(events[begin]):
            _pack(events[begin:end], messages)
            begin = end
    return messages


def decode_events(headers: Optional[Headers], value: bytes) -> Tuple[Event, ...]:
    """The events of a message. ValueError: it holds none, or is of a newer version, or damaged."""
    table = header(headers, TABLE_HEADER)
    if table not in ("steps", "events"):
        raise ValueError(f"a message of steps or events is wanted, not {table!r}")
    batch = arrow.from_ipc(value)
    found = arrow.decode_steps(batch) if table == "steps" else arrow.decode_controls(batch)
    events: Tuple[Event, ...] = tuple(found)
    if not events:
        raise ValueError("the message holds no event")
    if len({event.run_id for event in events}) != 1:
        raise ValueError("the message holds events of several runs")
    return events


def verdict_message(verdict: Verdict, offset: int) -> Message:
    """One verdict; ``offset`` is that of its event in the steps topic."""
    value = arrow.to_ipc(arrow.encode_verdicts([verdict]))
    return Message(verdict.run_id.encode(), value, _headers("verdicts", offset, verdict.id))


def decode_verdict(value: bytes) -> Verdict:
    """The verdict of a message. ValueError: it holds none, or not one."""
    (verdict,) = arrow.decode_verdicts(arrow.from_ipc(value))
    return verdict


def action_message(action: Action, offset: int) -> Message:
    """One action, not signed yet; ``offset`` is that of its event in the steps topic."""
    value = arrow.to_ipc(arrow.encode_actions([action]))
    return Message(action.run_id.encode(), value, _headers("actions", offset, action.id))


def decode_action(value: bytes) -> Action:
    """The action of a message. ValueError: it holds none, or not one."""
    (action,) = arrow.decode_actions(arrow.from_ipc(value))
    return action


def watermark_message(watermark: Watermark) -> Message:
    """A watermark, as JSON: a few dozen bytes."""
    data: Dict[str, Any] = {"next": dict(watermark.next)}
    if watermark.left_out:
        data["left_out"] = [list(each) for each in watermark.left_out]
    value = json.dumps(data, separators=(",", ":")).encode("utf-8")
    return Message(b"", value, make_headers(table="watermark", schema=SCHEMA_VERSION))


def decode_watermark(value: bytes) -> Watermark:
    """The inverse of :func:`watermark_message`. ValueError: it is not one."""
    try:
        data = json.loads(value)
        following = {str(name): int(offset) for name, offset in data["next"].items()}
        left_out = tuple(
            LeftOut(str(run), str(name), int(partition), int(offset))
            for run, name, partition, offset in data.get("left_out", ())
        )
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a watermark: {error!r}") from error
    return Watermark(following, left_out)


def _headers(table: str, offset: int, name: str) -> List[Tuple[str, bytes]]:
    return make_headers(table=table, schema=SCHEMA_VERSION, offset=offset, id=name)


def _is_step(event: Event) -> bool:
    return isinstance(event, StepEvent)


def _pack(events: Sequence[Event], messages: List[Message]) -> None:
    """One message of events of one kind, or halves where it would be too long."""
    first = events[0]
    if isinstance(first, StepEvent):
        table = "steps"
        batch = arrow.encode_steps(cast(Sequence[StepEvent], events))
    else:
        table = "events"
        batch = arrow.encode_controls(cast(Sequence[ControlEvent], events))
    value = arrow.to_ipc(batch)
    if len(value) > MAX_MESSAGE_BYTES and len(events) > 1:
        middle = len(events) // 2
        _pack(events[:middle], messages)
        _pack(events[middle:], messages)
        return
    headers = make_headers(table=table, schema=SCHEMA_VERSION)
    messages.append(Message(first.run_id.encode("utf-8"), value, headers))
