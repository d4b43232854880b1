"""The Arrow codec: encode then decode is the identity, and strangers are turned away in words."""

from __future__ import annotations

import contextlib
import math
import struct
from typing import Any, Dict

import pytest

pa = pytest.importorskip("pyarrow")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from plarv_schemas import arrow  # noqa: E402
from plarv_schemas.events import (  # noqa: E402
    ACTION_KINDS,
    LEVELS,
    LIST_COLUMNS,
    SCALAR_COLUMNS,
    Action,
    ControlEvent,
    StepEvent,
    Verdict,
)
from plarv_schemas.versions import SCHEMA_VERSION  # noqa: E402

Strategy = st.SearchStrategy[Any]
INTEGERS: Strategy = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
DOUBLES = st.floats(width=64)
SINGLES = st.floats(width=32)
TIMINGS = ("forward_ms", "backward_ms", "step_time_ms")
INTEGER_COLUMNS = ("time_ns", "world_size", "batch_size")
LIST_CELLS = {
    "sample_ids": INTEGERS,
    "sample_correct": st.integers(0, 1),
    "local_levels": st.integers(0, 2),
    "local_layers": TEXTS,
}


def scalar_cells(name: str) -> Strategy:
    if name in INTEGER_COLUMNS:
        return INTEGERS
    return SINGLES if name in TIMINGS else st.one_of(DOUBLES, SINGLES)


def list_cells(name: str) -> Strategy:
    cells = LIST_CELLS.get(name, st.one_of(DOUBLES, SINGLES))
    return st.lists(cells, max_size=4).map(tuple)


COLUMNS = {
    **{name: st.none() | scalar_cells(name) for name in SCALAR_COLUMNS},
    **{name: st.none() | list_cells(name) for name in LIST_COLUMNS},
}
STEPS = st.builds(
    StepEvent,
    run_id=TEXTS,
    session=TEXTS,
    record=INTEGERS,
    rank=INTEGERS,
    step=INTEGERS,
    **COLUMNS,
    parts=st.just(()),
)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | DOUBLES | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=3)
CONTROLS = st.builds(
    ControlEvent,
    TEXTS,
    TEXTS,
    INTEGERS,
    st.none() | INTEGERS,
    st.sampled_from(["session_started", "order"]),
    st.none() | INTEGERS,
    st.none() | INTEGERS,
    OBJECTS,
)
VERDICTS = st.builds(
    Verdict,
    run_id=TEXTS,
    attempt=INTEGERS,
    rank=st.none() | INTEGERS,
    step=INTEGERS,
    ordinal=INTEGERS,
    detector=TEXTS,
    kind=TEXTS,
    level=st.sampled_from(LEVELS),
    state=st.sampled_from(["opened", "escalated", "resolved"]),
    onset_step=INTEGERS,
    score=DOUBLES,
    threshold=DOUBLES,
    evidence=st.dictionaries(TEXTS, DOUBLES, max_size=4),
    message=TEXTS,
    version=TEXTS,
)
ACTIONS = st.builds(
    Action,
    run_id=TEXTS,
    attempt=INTEGERS,
    sessions=st.lists(st.tuples(TEXTS, INTEGERS), max_size=3).map(tuple),
    step=INTEGERS,
    ordinal=INTEGERS,
    kind=st.sampled_from(ACTION_KINDS),
    parameters=OBJECTS,
    reason=TEXTS,
    verdict_ids=st.lists(TEXTS, max_size=3).map(tuple),
    harm_pressure=DOUBLES,
    expiry_step=INTEGERS,
)
CODECS = [
    ("steps", STEPS, arrow.encode_steps, arrow.decode_steps),
    ("events", CONTROLS, arrow.encode_controls, arrow.decode_controls),
    ("verdicts", VERDICTS, arrow.encode_verdicts, arrow.decode_verdicts),
    ("actions", ACTIONS, arrow.encode_actions, arrow.decode_actions),
]


def bits(value: Any) -> Any:
    """The value with floats as their bytes, so that NaN equals NaN and 0.0 is not -0.0."""
    if isinstance(value, float):
        return "nan" if value != value else struct.pack("<d", value)
    if isinstance(value, tuple):
        return tuple(bits(each) for each in value)
    if isinstance(value, list):
        return [bits(each) for each in value]
    if isinstance(value, dict):
        return [(name, bits(each)) for name, each in value.items()]
    return value


def event(step: int = 0, **columns: Any) -> StepEvent:
    return StepEvent("run", "s", step, 0, step, **columns)


@pytest.mark.parametrize(
    ("table", "events", "encode", "decode"), CODECS, ids=[each[0] for each in CODECS]
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_encoding_then_decoding_gives_back_every_bit(
    table: str, events: Strategy, encode: Any, decode: Any, data: st.DataObject
) -> None:
    sent = data.draw(st.lists(events, max_size=5))
    batch = encode(sent)
    assert arrow.table_of(batch.schema) == table
    assert bits([tuple(each) for each in decode(arrow.from_ipc(arrow.to_ipc(batch)))]) == bits(
        [tuple(each) for each in sent]
    )
    fixed = encode(sent, schema=arrow.file_schema(table))
    assert fixed.schema.equals(arrow.file_schema(table))
    assert bits([tuple(each) for each in decode(fixed)]) == bits([tuple(each) for each in sent])


def test_an_empty_list_and_an_absent_one_stay_apart() -> None:
    sent = [event(0, sample_losses=()), event(1), event(2, sample_losses=(math.nan,))]
    assert [each.sample_losses for each in arrow.decode_steps(arrow.encode_steps(sent))][:2] == [
        (),
        None,
    ]


def test_a_float_column_travels_as_float32_only_where_every_value_survives() -> None:
    narrow = arrow.encode_steps([event(loss=0.5), event(loss=math.nan), event(loss=None)])
    wide = arrow.encode_steps([event(loss=0.5), event(loss=0.1)])
    huge = arrow.encode_steps([event(loss=1e300), event(loss=math.inf)])
    assert str(narrow.column("loss").type) == "float"
    assert str(wide.column("loss").type) == "double"
    assert str(huge.column("loss").type) == "double"
    lists: Any = arrow.encode_steps([event(sample_losses=(0.5,), sample_margins=(0.1,))])
    assert str(lists.column("sample_losses").type.value_type) == "float"
    assert str(lists.column("sample_margins").type.value_type) == "double"


def test_timings_always_travel_as_float32() -> None:
    batch = arrow.encode_steps([event(forward_ms=0.1)])
    assert str(batch.column("forward_ms").type) == "float"
    single = struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert arrow.decode_steps(batch)[0].forward_ms == single


def test_columns_without_a_value_are_not_sent() -> None:
    assert arrow.encode_steps([event(loss=1.0)]).schema.names == [
        "run_id",
        "session",
        "record",
        "rank",
        "step",
        "loss",
    ]


def test_ordinals_and_attempts_travel_beside_the_events() -> None:
    batch = arrow.encode_steps([event(0), event(1)], ordinals=[7, 8], attempts=[1, 2])
    assert arrow.extra_column(batch, "ordinal") == [7, 8]
    assert arrow.extra_column(batch, "attempt") == [1, 2]
    assert arrow.decode_steps(batch) == [event(0), event(1)]
    assert arrow.extra_column(arrow.encode_steps([event(0)]), "ordinal") is None


def test_a_newer_schema_version_is_refused_in_words_and_earlier_ones_are_read() -> None:
    batch: Any = arrow.encode_steps([event(loss=1.0)])

    def versioned(version: bytes) -> Any:
        metadata = {**batch.schema.metadata, b"argus.schema_version": version}
        return batch.replace_schema_metadata(metadata)

    for version in range(1, SCHEMA_VERSION + 1):
        earlier = versioned(str(version).encode())
        assert arrow.decode_steps(arrow.from_ipc(arrow.to_ipc(earlier))) == [event(loss=1.0)]
    assert arrow.decode_steps(batch.replace_schema_metadata(None)) == [event(loss=1.0)]
    with pytest.raises(ValueError, match="version 99 is newer than this Argus"):
        arrow.from_ipc(arrow.to_ipc(versioned(b"99")))
    with pytest.raises(ValueError, match="'x' is not a number"):
        arrow.decode_steps(versioned(b"x"))


def test_another_table_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="holds steps, not verdicts"):
        arrow.decode_verdicts(arrow.encode_steps([event()]))


def test_broken_columns_are_named() -> None:
    batch: Any = arrow.encode_steps([event(loss=1.0)])
    with pytest.raises(ValueError, match="column step is missing"):
        arrow.decode_steps(batch.drop_columns(["step"]))
    text = batch.set_column(5, "loss", pa.array(["high"]))
    with pytest.raises(ValueError, match="column loss holds string"):
        arrow.decode_steps(text)
    missing = batch.set_column(4, pa.field("step", pa.int64()), pa.array([None], pa.int64()))
    with pytest.raises(ValueError, match="column step has 1 missing"):
        arrow.decode_steps(missing)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"loss": "high"}, "loss"),
        ({"batch_size": 2**70}, "batch_size"),
        ({"local_layers": ("\ud800",)}, "local_layers"),
    ],
)
def test_a_value_that_its_column_cannot_hold_names_the_column(
    columns: Dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"column {name}"):
        arrow.encode_steps([event(**columns)])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_or_altered_message_is_a_value_error_and_never_a_crash(
    data: st.DataObject,
) -> None:
    whole = arrow.to_ipc(arrow.encode_steps([event(loss=1.0, sample_ids=(1, 2)), event(1)]))
    cut = data.draw(st.integers(0, len(whole) - 1))
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    for message in (whole[:cut], whole[:place] + bytes([byte]) + whole[place + 1 :]):
        with contextlib.suppress(ValueError):
            arrow.decode_steps(arrow.from_ipc(message))


def test_a_message_of_no_batch_or_of_two_is_refused() -> None:
    batch = arrow.encode_steps([event()])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="this one holds 2"):
        arrow.from_ipc(sink.getvalue().to_pybytes())
    with pytest.raises(ValueError, match="not an Arrow record batch"):
        arrow.from_ipc(b"")
