from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any, Dict, List

from hypothesis import given
from hypothesis import strategies as st

from plarv_schemas.events import LIST_COLUMNS, ControlEvent, StepEvent
from plarv_schemas.journal import pack_full
from plarv_schemas.journal_reader import SessionReader
from plarv_schemas.journal_writer import JournalWriter

SESSION = "0123456789abcdef"
SCALARS = (
    "epoch", "loss", "grad_norm", "current_lr", "update_norm", "val_loss", "perplexity",
    "grad_l1_norm", "grad_l2_norm", "forward_ms", "backward_ms", "loss_scale",
)  # fmt: skip

floats = st.floats(width=64)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
lists: Dict[str, Any] = {
    "sample_ids": int64,
    "sample_correct": st.integers(0, 1),
    "local_levels": st.integers(0, 2),
    "local_layers": st.text(max_size=20).filter(lambda text: text.isprintable()),
}
columns = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(SCALARS, floats),
        "batch_size": st.integers(0, (1 << 63) - 1),
        **{name: st.lists(lists.get(name, floats), max_size=8).map(tuple) for name in LIST_COLUMNS},
    },
)
json_data = st.dictionaries(
    st.text(max_size=5),
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(max_size=5),
    max_size=4,
)


def bits(value: Any) -> Any:
    """A value whose equality is that of its bits: NaN equals itself, -0.0 is not 0.0."""
    if isinstance(value, float):
        return "nan" if value != value else struct.pack("<d", value)
    return tuple(bits(item) for item in value) if isinstance(value, tuple) else value


@given(st.lists(st.tuples(int64.filter(lambda n: n >= 0), columns), min_size=1, max_size=5))
def test_steps_come_back_bit_for_bit_for_every_pattern_of_absence(
    steps: List[Any],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        writer = JournalWriter(
            Path(name), run_id="run", session=SESSION, rank=3, world_size=4, segment_bytes=65536
        )
        for number, given_columns in steps:
            packed, cut = pack_full(writer.record, 0, number, given_columns)
            assert not cut
            assert writer.append(packed)
        reader = SessionReader(Path(name), 3, SESSION)
        events = reader.read()
        reader.close()
    assert len(events) == len(steps)
    for record, (event, (number, given_columns)) in enumerate(zip(events, steps)):
        assert isinstance(event, StepEvent)
        assert (event.record, event.rank, event.step, event.world_size) == (record, 3, number, 4)
        for column in (*SCALARS, "batch_size", *LIST_COLUMNS):
            assert bits(getattr(event, column)) == bits(given_columns.get(column))


@given(st.lists(json_data, min_size=1, max_size=4), st.none() | st.integers(0, 1 << 60))
def test_control_events_come_back(data: List[Any], step: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        writer = JournalWriter(
            Path(name), run_id="run", session=SESSION, rank=0, world_size=1, segment_bytes=65536
        )
        for content in data:
            assert writer.control("action_applied", step=step, rank=0, data=content)
        reader = SessionReader(Path(name), 0, SESSION)
        events = reader.read()
        reader.close()
    assert [e.data for e in events if isinstance(e, ControlEvent)] == data
    assert all(event.step == step for event in events)
