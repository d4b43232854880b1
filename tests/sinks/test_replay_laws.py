"""Whatever bytes a file holds, it is replayed or turned away in words, and breaks no reader."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, List

from hypothesis import given, settings
from hypothesis import strategies as st

from plarv_processors.engine import Engine
from plarv_schemas.events import LIST_COLUMNS, SCALAR_COLUMNS, Event
from plarv_sinks.replay import ReplayError, read_events, replay

NAMES = ("step", "rank", "run_id", "attempt", "lr", "step_ms", *SCALAR_COLUMNS, *LIST_COLUMNS)
CELLS = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.sampled_from(["", "nan", "inf", "-inf", "null", "1e400", "[1, 2]", '"[1, ""a""]"', "["]),
    st.text(max_size=5),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def answer(content: bytes) -> List[Event]:
    """The events in a file of this content, folded; none where it was turned away."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.csv"
        path.write_bytes(content)
        told: List[str] = []
        events: List[Event] = []
        try:
            events.extend(read_events(path, told.append))
        except ReplayError as error:
            told.append(str(error))
        assert not any("\n" in line for line in told)
        list(replay(events, Engine()))
        return events


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_any_bytes_get_an_answer(content: bytes) -> None:
    answer(content)


@settings(max_examples=80)
@given(
    st.lists(st.sampled_from(NAMES), unique=True, max_size=6),
    st.lists(st.lists(CELLS, max_size=8), max_size=12),
)
def test_any_csv_gets_an_answer(names: List[str], rows: List[List[str]]) -> None:
    lines = [",".join(["loss", *names]), *(",".join(row) for row in rows)]
    answer("\n".join(lines).encode("utf-8", "surrogatepass"))


@settings(max_examples=80)
@given(st.lists(st.dictionaries(st.sampled_from(("loss", *NAMES)), JSON, max_size=6), max_size=8))
def test_any_json_lines_get_an_answer(rows: List[Any]) -> None:
    answer("\n".join(json.dumps(row) for row in [{"loss": 1.0}, *rows]).encode())
