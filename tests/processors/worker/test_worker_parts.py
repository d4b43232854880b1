from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Tuple

import pytest

pytest.importorskip("faust")

from tests.processors.logs import log_of

from plarv_processors.app import take_name
from plarv_processors.detectors import BUILTIN
from plarv_processors.event_batch import EventBatch
from plarv_processors.policy_fold import PolicyFold
from plarv_processors.worker.config import WorkerConfig
from plarv_processors.worker.decoding import Decoder, Poison
from plarv_processors.worker.health import Health, serve
from plarv_processors.worker.orders import OrderDesk
from plarv_processors.worker.policy_lane import PolicyLane
from plarv_processors.worker.silence import Silence
from plarv_processors.worker.watchdog import Watchdog, forget_notes, read_notes
from plarv_schemas.events import ControlEvent
from plarv_schemas.kafka_connection import connect_to
from plarv_schemas.messages import LeftOut, event_messages
from plarv_schemas.signatures import Order, run_key, sign
from plarv_schemas.topics import Headers, make_headers

MASTER = "a master key of the tests"


class Record(NamedTuple):
    key: Optional[bytes]
    value: Optional[bytes]
    headers: Headers = ()
    partition: int = 0
    offset: int = 0


def _config(**changes: Any) -> WorkerConfig:
    return WorkerConfig(
        connection=connect_to("127.0.0.1:1"),
        detectors=BUILTIN,
        all_detectors=BUILTIN,
        **{"master_key": MASTER, **changes},
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": b"garbage"}, "not an Arrow"),
        ({"value": None}, "empty"),
        ({"key": b"other"}, "not the run id"),
        ({"key": None}, "not the run id"),
        ({"headers": make_headers(table="verdicts")}, "steps or events"),
        ({"headers": ()}, "steps or events"),
    ],
)
def test_a_message_that_cannot_be_read_is_poison_with_a_reason(change: Any, reason: str) -> None:
    message = event_messages(log_of("spike")[1:9])[0]
    good = Record(message.key, message.value, message.headers)
    assert isinstance(Decoder().decode(good), EventBatch)
    found = Decoder().decode(good._replace(**change))
    assert isinstance(found, Poison)
    assert reason in found.reason


def test_a_message_is_decoded_once() -> None:
    message = event_messages(log_of("spike")[1:9])[0]
    decoder = Decoder()
    first = decoder.decode(Record(message.key, message.value, message.headers))
    assert decoder.decode(Record(message.key, message.value, message.headers)) is first


def _order(**changes: Any) -> Order:
    now = time.time_ns()
    order = Order("0123456789abcdef", "run", "pause", "anna", now, now + 10**12)
    return order._replace(**changes)


def _take(
    order: Order, *, key: bytes = b"run", signed_as: Optional[Order] = None, config: Any = None
) -> Tuple[List[ControlEvent], Health]:
    lane = PolicyLane("policy", 0, PolicyFold, [])
    entry = lane.entry("run", 0)
    assert entry is not None
    entry.fold.fold(EventBatch(log_of("spike")[:30]), {})
    written: List[ControlEvent] = []

    async def write(event: ControlEvent, partition: int) -> None:
        written.append(event)

    health = Health([])
    desk = OrderDesk(config or _config(), health, write)
    value = (signed_as or order).to_bytes()
    signature = sign(run_key(MASTER, order.run_id), "order", value)
    record = Record(key, order.to_bytes(), make_headers(table="order", signature=signature))
    asyncio.run(desk.take(record, lane))
    return written, health


def test_an_order_becomes_an_event_whose_key_is_its_own() -> None:
    (event,), _ = _take(_order(attempt=1))
    assert (event.kind, event.run_id, event.record) == ("order", "run", 0)
    assert event.data == {"order": "pause", "operator": "anna", "id": "0123456789abcdef"}
    assert _take(_order())[0][0].session == event.session
    assert _take(_order(id="f" * 16))[0][0].session != event.session


@pytest.mark.parametrize(
    ("changes", "how", "why"),
    [
        ({}, {"signed_as": _order(order="resume")}, "its signature is wrong"),
        ({"expires_ns": 1}, {}, "it has expired"),
        ({"order": "dance"}, {}, "there is no such order"),
        ({"attempt": 2}, {}, "it is for attempt 2, and this is 1"),
        ({}, {"config": _config(master_key="")}, "no master key"),
    ],
)
def test_an_order_that_may_not_be_is_refused_and_written_down(
    changes: Any, how: Any, why: str
) -> None:
    (event,), health = _take(_order(**changes), **how)
    assert event.kind == "action_refused"
    assert why in str(event.data["why"])
    assert event.session != _take(_order())[0][0].session  # it must not stand in its way
    refused = health.registry.get_sample_value("argus_orders_total", {"result": "refused"})
    assert refused == 1.0


def test_an_order_under_another_runs_key_leaves_no_trace_in_a_log() -> None:
    assert _take(_order(), key=b"other")[0] == []
    assert _take(_order(run_id="other"), key=b"other")[0][0].run_id == "other"  # it is signed


def test_a_session_that_is_silent_is_told_once_and_a_finished_one_never() -> None:
    silence = Silence(10.0)
    silence.note(0, EventBatch(log_of("spike")[:30]))
    now = time.monotonic()
    assert list(silence.overdue(now + 9.0)) == []
    ((partition, event),) = silence.overdue(now + 11.0)
    assert (partition, event.kind) == (0, "rank_silent")
    assert event.data == {"session": "session-0", "rank": 0}
    assert list(silence.overdue(now + 12.0)) == []
    silence.note(0, EventBatch(log_of("spike")))
    assert list(silence.overdue(now + 1e6)) == []


def test_the_watchdog_notes_what_hangs_and_begins_anew(tmp_path: Path) -> None:
    restarted = threading.Event()
    watchdog = Watchdog(tmp_path, 0.2, restart=restarted.set)
    note = LeftOut("run", "loss_spike", 3, 77)

    def work() -> None:
        watchdog.start()
        watchdog.enter(note)
        until = time.monotonic() + 30.0
        while not restarted.is_set() and time.monotonic() < until:
            pass  # a detector that does not return

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert restarted.is_set()
    assert read_notes(tmp_path) == [note]
    forget_notes(tmp_path)
    assert read_notes(tmp_path) == []


def test_a_note_that_was_cut_does_not_hide_the_others(tmp_path: Path) -> None:
    line = b'{"run_id":"run","detector":"loss_spike","partition":3,"offset":77}\n'
    (tmp_path / "hung.jsonl").write_bytes(line + b'{"run_id":"r')
    assert read_notes(tmp_path) == [LeftOut("run", "loss_spike", 3, 77)]


def test_health_is_red_while_states_are_rebuilt_and_green_after() -> None:
    health = Health(["detectors"])
    port = serve(health, "127.0.0.1", 0)
    assert _get(port, "/healthz") == (503, ["detectors: rebuilding its states"])
    health.rebuilding("detectors", False)
    assert _get(port, "/healthz") == (200, [])
    health.judged(time.time() - 100.0)
    status, problems = _get(port, "/healthz")
    assert status == 503
    assert "behind" in problems[0]
    health.folded("loss_spike", 64, 0.5)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b'argus_steps_total{detector="loss_spike"} 64.0' in answer.read()


def _get(port: int, path: str) -> Tuple[int, List[str]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, json.loads(answer.read())["problems"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["problems"]


def test_no_two_living_workers_have_one_name(tmp_path: Path) -> None:
    first = take_name(tmp_path, "host")
    second = take_name(tmp_path, "host")
    assert (first[0], second[0]) == ("host-1", "host-2")
    with pytest.raises(ValueError, match="host-1 is at work"):
        take_name(tmp_path, "host", "host-1")
    first[2].release()
    assert take_name(tmp_path, "host")[0] == "host-1"
