"""What goes into a message comes out of it; what is damaged is a ValueError and nothing worse."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Callable, Dict, List

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schemas.test_arrow import ACTIONS, CONTROLS, STEPS, TEXTS, VERDICTS, bits

from plarv_schemas import arrow
from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.messages import (
    LeftOut,
    Message,
    Watermark,
    action_message,
    decode_action,
    decode_events,
    decode_verdict,
    decode_watermark,
    event_messages,
    verdict_message,
    watermark_message,
)
from plarv_schemas.pyarrow_types import require_pyarrow
from plarv_schemas.topics import (
    ID_HEADER,
    MAX_MESSAGE_BYTES,
    OFFSET_HEADER,
    SCHEMA_HEADER,
    TABLE_HEADER,
    header,
)
from plarv_schemas.versions import SCHEMA_VERSION

OFFSETS = st.integers(0, 2**62)
EVENTS = st.lists(STEPS | CONTROLS, min_size=1, max_size=8).map(
    lambda events: [event._replace(run_id="run") for event in events]
)
WATERMARKS = st.builds(
    Watermark,
    st.dictionaries(TEXTS, OFFSETS, max_size=4),
    st.lists(st.builds(LeftOut, TEXTS, TEXTS, st.integers(0, 999), OFFSETS), max_size=3).map(tuple),
)


def _rows(events: List[Event]) -> List[Any]:
    return [tuple(event) for event in events]


@given(EVENTS)
def test_events_come_back_in_their_order(events: List[Event]) -> None:
    messages = event_messages(events)
    assert {message.key for message in messages} == {b"run"}
    found = [e for each in messages for e in decode_events(each.headers, each.value)]
    assert bits(_rows(found)) == bits(_rows(events))


@given(EVENTS)
def test_steps_and_control_events_go_apart_under_their_names(events: List[Event]) -> None:
    for message in event_messages(events):
        kinds = {type(event) for event in decode_events(message.headers, message.value)}
        table = header(message.headers, TABLE_HEADER)
        assert kinds == ({StepEvent} if table == "steps" else {ControlEvent})
        assert header(message.headers, SCHEMA_HEADER) == str(SCHEMA_VERSION)


@given(VERDICTS, OFFSETS)
def test_a_verdict_comes_back_with_the_place_of_its_event(verdict: Any, offset: int) -> None:
    message = verdict_message(verdict, offset)
    assert bits(tuple(decode_verdict(message.value))) == bits(tuple(verdict))
    assert message.key == verdict.run_id.encode()
    assert header(message.headers, OFFSET_HEADER) == str(offset)
    assert header(message.headers, ID_HEADER) == verdict.id


@given(ACTIONS, OFFSETS)
def test_an_action_comes_back_with_the_place_of_its_event(action: Any, offset: int) -> None:
    message = action_message(action, offset)
    assert bits(tuple(decode_action(message.value))) == bits(tuple(action))
    assert header(message.headers, TABLE_HEADER) == "actions"
    assert header(message.headers, ID_HEADER) == action.id


@given(WATERMARKS)
def test_a_watermark_comes_back(watermark: Watermark) -> None:
    message = watermark_message(watermark)
    assert message.key == b""
    assert decode_watermark(message.value) == watermark


def test_a_message_stays_below_its_bound_however_many_events_there_are() -> None:
    losses = tuple(0.1 * number for number in range(2000))
    events = [
        StepEvent("run", "a", number, 0, number, sample_losses=losses) for number in range(256)
    ]
    messages = event_messages(events)
    assert len(messages) > 1
    assert all(len(message.value) <= MAX_MESSAGE_BYTES for message in messages)
    found = [e for each in messages for e in decode_events(each.headers, each.value)]
    assert found == events


def test_a_single_event_that_is_longer_travels_alone() -> None:
    losses = tuple(0.1 * number for number in range(MAX_MESSAGE_BYTES // 8))
    events = [
        StepEvent("run", "a", number, 0, number, sample_losses=losses if number == 1 else None)
        for number in range(3)
    ]
    messages = event_messages(events)
    sizes = [len(decode_events(each.headers, each.value)) for each in messages]
    assert 1 in sizes
    assert sum(sizes) == 3


MESSAGES: Dict[str, Callable[[], Message]] = {
    "steps": lambda: event_messages([StepEvent("run", "a", 0, 0, 0, loss=1.0)])[0],
    "events": lambda: event_messages(
        [ControlEvent("run", "a", 0, 0, "order", data={"order": "stop", "of": [1, 2.5, None]})]
    )[0],
}


@pytest.mark.parametrize("table", sorted(MESSAGES))
@given(data=st.data())
def test_damaged_events_are_a_value_error(table: str, data: st.DataObject) -> None:
    message = MESSAGES[table]()
    value = bytearray(message.value)
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(value[: data.draw(st.integers(0, len(value)))])
    for damaged in (bytes(value), cut):
        with contextlib.suppress(ValueError):
            assert decode_events(message.headers, damaged)


@given(VERDICTS, ACTIONS, st.data())
def test_damaged_findings_are_a_value_error(verdict: Any, action: Any, data: st.DataObject) -> None:
    for message, decode in (
        (verdict_message(verdict, 0), decode_verdict),
        (action_message(action, 0), decode_action),
    ):
        value = bytearray(message.value)
        value[data.draw(st.integers(0, len(value) - 1))] ^= data.draw(st.integers(1, 255))
        with contextlib.suppress(ValueError):
            decode(bytes(value))


@given(st.binary(max_size=300))
def test_other_bytes_are_a_value_error(value: bytes) -> None:
    for table in (b"steps", b"events"):
        with pytest.raises(ValueError):  # noqa: PT011
            decode_events([(TABLE_HEADER, table)], value)
    for decode in (decode_verdict, decode_action, decode_watermark):
        with pytest.raises(ValueError):  # noqa: PT011
            decode(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(st.fixed_dictionaries({"next": JSON}, optional={"left_out": JSON}) | JSON)
def test_any_json_is_a_watermark_or_a_value_error(data: Any) -> None:
    with contextlib.suppress(ValueError):
        decode_watermark(json.dumps(data).encode())


def test_json_nested_without_end_is_a_value_error() -> None:
    deep = "[" * 100_000
    with pytest.raises(ValueError, match="not a watermark"):
        decode_watermark(deep.encode())
    (message,) = event_messages([ControlEvent("run", "a", 0, 0, "order")])
    with pytest.raises(ValueError, match="JSON that is nested too deeply"):
        decode_events(message.headers, with_data(message.value, deep))


def test_half_a_surrogate_pair_is_replaced_for_no_text_could_hold_it() -> None:
    (message,) = event_messages([ControlEvent("run", "a", 0, 0, "order")])
    value = with_data(message.value, '{"operator":"\\ud800","\\uDFFF":["\\ud83d\\ude00 whole"]}')
    (event,) = decode_events(message.headers, value)
    assert isinstance(event, ControlEvent)
    assert event.data == {"operator": "?", "?": ["\U0001f600 whole"]}
    assert decode_events(message.headers, event_messages([event])[0].value) == (event,)


def with_data(value: bytes, text: str) -> bytes:
    """The message of one control event, with other JSON in it."""
    pa = require_pyarrow()
    batch: Any = arrow.from_ipc(value)
    place = batch.schema.get_field_index("data")
    columns = [*batch.columns]
    columns[place] = pa.array([text], type=columns[place].type)
    return arrow.to_ipc(pa.RecordBatch.from_arrays(columns, schema=batch.schema))


@pytest.mark.parametrize(
    "headers", [None, [], [(TABLE_HEADER, b"verdicts")], [(TABLE_HEADER, b"\xff")]]
)
def test_a_message_that_says_something_else_holds_no_events(headers: Any) -> None:
    (message,) = event_messages([StepEvent("run", "a", 0, 0, 0)])
    with pytest.raises(ValueError, match="a message of steps or events is wanted"):
        decode_events(headers, message.value)


def test_a_message_of_several_runs_or_of_none_is_refused() -> None:
    two = arrow.to_ipc(arrow.encode_steps([StepEvent(run, "a", 0, 0, 0) for run in ("x", "y")]))
    none = arrow.to_ipc(arrow.encode_steps([]))
    headers = [(TABLE_HEADER, b"steps")]
    with pytest.raises(ValueError, match="several runs"):
        decode_events(headers, two)
    with pytest.raises(ValueError, match="holds no event"):
        decode_events(headers, none)
