"""An operator's order to a run of a fleet: signed, sent, and its answer awaited."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

from plarv.fleet.record_files import RecordFiles
from plarv_schemas.events import Action, ControlEvent
from plarv_schemas.kafka_clients import producer_client
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.messages import decode_action, decode_events
from plarv_schemas.records import paused_by
from plarv_schemas.signatures import Order, run_key, sign, verify
from plarv_schemas.topic_reader import Record, open_topic
from plarv_schemas.topics import SIGNATURE_HEADER, TABLE_HEADER, Topics, header, make_headers

__all__ = ["Answer", "give_order", "new_order", "note_resumed"]

_ACKNOWLEDGED_S = 10.0
_GRACE_S = 2.0  # that a living training process has to write down what it was told


class Answer(NamedTuple):
    """What became of an order."""

    order: Order
    action: Optional[Action] = None  # by which the policy obeys; None: there is none (yet)
    refused: str = ""  # why the policy's worker refused the order; "": it did not say so


def new_order(
    run_id: str, kind: str, operator: str, *, expires_s: float, attempt: Optional[int] = None
) -> Order:
    """An order that was given now. ``kind`` is pause, resume or stop."""
    now = time.time_ns()
    expires = now + int(expires_s * 1e9)
    return Order(secrets.token_hex(8), run_id, kind, operator, now, expires, attempt)


def give_order(
    order: Order, connection: Connection, topics: Topics, master_key: str, *, wait_s: float
) -> Answer:
    """Sends the order and waits up to ``wait_s`` for the action that answers it.

    ValueError: the master key is none. BrokerError: it could not be sent, or nobody can say whether
    it was.
    """
    key = run_key(master_key, order.run_id)
    value = order.to_bytes()
    headers = make_headers(table="order", signature=sign(key, "order", value))
    with ExitStack() as stack:
        # Where both topics end now: the answer can only come behind.
        actions = stack.enter_context(open_topic(connection, topics.actions))
        steps = stack.enter_context(open_topic(connection, topics.steps))
        partition = actions.partition_of(order.run_id)
        answers = actions.follow({partition: actions.ranges([partition])[partition].end})
        partition = steps.partition_of(order.run_id)
        refusals = steps.follow({partition: steps.ranges([partition])[partition].end})
        producer = stack.enter_context(producer_client(connection))
        sending = producer.send(
            topics.orders, key=order.run_id.encode("utf-8"), value=value, headers=headers
        )
        sending.get(timeout=_ACKNOWLEDGED_S)
        return _await_answer(order, key, answers, refusals, wait_s)


def note_resumed(folder: Path, action: Action) -> bool:
    """Writes a RESUME down in the run's folder, where nobody else does; whether no pause is left.

    While a training process lives, its helper writes what the policy says. Where none does, the
    next attempt would still find the pause that stopped the last one. OSError: no room, no right.
    """
    files = RecordFiles(folder)
    deadline = time.monotonic() + _GRACE_S
    try:
        while not files.lead():  # somebody lives who writes there
            if action.id in files.seen or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        else:
            files.add(action)
    finally:
        files.close()
    return paused_by(folder) is None


def _await_answer(
    order: Order,
    key: bytes,
    answers: Iterator[Optional[Record]],
    refusals: Iterator[Optional[Record]],
    wait_s: float,
) -> Answer:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        for record in answers:
            if record is None:
                break
            action = _answer(record, order, key)
            if action is not None:
                return Answer(order, action)
        for record in refusals:
            if record is None or time.monotonic() >= deadline:
                break
            why = _refusal(record, order)
            if why:
                return Answer(order, refused=why)
    return Answer(order)


def _answer(record: Record, order: Order, key: bytes) -> Optional[Action]:
    """The signed action by which the policy obeys this very order."""
    value = record.value or b""
    if not verify(key, "action", value, header(record.headers, SIGNATURE_HEADER)):
        return None
    try:
        action = decode_action(value)
    except ValueError:
        return None
    return action if action.parameters.get("id") == order.id else None


def _refusal(record: Record, order: Order) -> str:
    """Why the order was refused, where the record says that; else ""."""
    if header(record.headers, TABLE_HEADER) != "events":
        return ""
    if record.key != order.run_id.encode("utf-8"):
        return ""
    try:
        events = decode_events(record.headers, record.value or b"")
    except ValueError:
        return ""
    for event in events:
        if isinstance(event, ControlEvent) and event.kind == "action_refused":
            if event.data.get("order") == order.id:
                return str(event.data.get("why", "it does not say why"))
    return ""
