from __future__ import annotations

import math
import struct
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

from plarv_schemas.events import LIST_COLUMNS, ControlEvent, Event, StepEvent
from plarv_schemas.journal import (
    CORE,
    CORE_SIZE,
    CORE_STRUCT,
    HAS_GRAD_NORM,
    HAS_LOSS,
    MAX_RECORD_BYTES,
    SegmentHeader,
    pack_control,
    pack_full,
    segment_name,
)
from plarv_schemas.journal_reader import SessionReader, segments_of
from plarv_schemas.journal_writer import JournalWriter

SESSION = "0123456789abcdef"
FULL_SCALARS = (
    "epoch",
    "loss",
    "grad_norm",
    "current_lr",
    "update_norm",
    "val_loss",
    "perplexity",
    "grad_l1_norm",
    "grad_l2_norm",
    "forward_ms",
    "backward_ms",
    "loss_scale",
)


def make_writer(
    folder: Path, session: str = SESSION, rank: int = 0, segment_bytes: int = 65536
) -> JournalWriter:
    return JournalWriter(
        folder, run_id="run", session=session, rank=rank, world_size=1, segment_bytes=segment_bytes
    )


def pack_core(writer: JournalWriter, step: int, loss: float = 1.0, grad_norm: float = 2.0) -> bytes:
    mask = HAS_LOSS | HAS_GRAD_NORM
    clock, number = time.monotonic_ns(), writer.record + 1
    return CORE_STRUCT.pack(
        CORE_SIZE, CORE, mask, 0, clock, step, loss, grad_norm, math.nan, number
    )


def write_core(writer: JournalWriter, step: int, loss: float = 1.0, grad_norm: float = 2.0) -> None:
    assert writer.append(pack_core(writer, step, loss, grad_norm))


def write_full(writer: JournalWriter, step: int, columns: Dict[str, Any]) -> None:
    assert writer.append(pack_full(writer.record, time.monotonic_ns(), step, columns)[0])


def read_all(folder: Path) -> List[Event]:
    reader = SessionReader(folder, 0, SESSION)
    events = reader.read()
    reader.close()
    return events


def test_a_core_record_comes_back_with_its_columns_and_no_others(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    write_core(writer, 7, loss=1.25, grad_norm=math.inf)
    (event,) = read_all(tmp_path)
    assert isinstance(event, StepEvent)
    assert (event.run_id, event.session, event.record, event.step) == ("run", SESSION, 0, 7)
    assert (event.loss, event.grad_norm, event.current_lr) == (1.25, math.inf, None)
    assert event.time_ns is not None
    assert abs(event.time_ns - time.time_ns()) < 60e9
    assert all(getattr(event, name) is None for name in LIST_COLUMNS)


@pytest.mark.parametrize("absent", FULL_SCALARS)
def test_every_scalar_column_can_be_absent_on_its_own(tmp_path: Path, absent: str) -> None:
    values = {name: place + 0.5 for place, name in enumerate(FULL_SCALARS) if name != absent}
    values["batch_size"] = 32
    writer = make_writer(tmp_path)
    write_full(writer, 3, values)
    (event,) = read_all(tmp_path)
    found = {name: getattr(event, name) for name in (*FULL_SCALARS, "batch_size")}
    assert found == {**values, absent: None}


def test_lists_of_different_lengths_and_empty_ones_come_back(tmp_path: Path) -> None:
    columns = {
        "sample_ids": (-(1 << 63), (1 << 63) - 1),
        "sample_losses": (),
        "sample_margins": (math.nan, -math.inf, 0.0),
        "sample_correct": (1, 0, 1),
        "local_levels": (0, 2),
        "local_layers": ("layer.0", "schicht-\u00fc"),
    }
    writer = make_writer(tmp_path)
    write_full(writer, 1, columns)
    (event,) = read_all(tmp_path)
    assert isinstance(event, StepEvent)
    assert event.sample_entropies is None
    assert repr({name: getattr(event, name) for name in columns}) == repr(columns)


def test_a_control_event_comes_back(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    writer.control("session_started", step=None, rank=0, data={"mode": "AUTO", "world_size": 1})
    (event,) = read_all(tmp_path)
    assert isinstance(event, ControlEvent)
    assert (event.kind, event.step, event.rank) == ("session_started", None, 0)
    assert event.data == {"mode": "AUTO", "world_size": 1}


def test_records_go_on_over_segments_and_numbers_have_no_hole(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for step in range(5000):
        write_core(writer, step)
        if step % 500 == 0:
            writer.prepare()
    writer.close()
    events = read_all(tmp_path)
    assert [event.record for event in events] == list(range(5000))
    assert len(segments_of(tmp_path)[SESSION]) > 3
    assert all(e.step_time_ms is not None for e in events[1:] if isinstance(e, StepEvent))


def test_a_reader_follows_a_writer_that_is_still_at_work(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    reader = SessionReader(tmp_path, 0, SESSION)
    seen: List[Event] = []
    for step in range(3000):
        writer.prepare()
        write_core(writer, step)
        if step % 7 == 0:
            seen.extend(reader.read(limit=5))
    more = reader.read(limit=100)
    while more:
        seen.extend(more)
        more = reader.read(limit=100)
    reader.close()
    assert [event.record for event in seen] == list(range(3000))


def test_a_truncated_last_record_costs_that_record_alone(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for step in range(10):
        write_core(writer, step)
    writer.close()
    path = tmp_path / segment_name(0, SESSION, 0)
    path.write_bytes(path.read_bytes()[:-9])
    assert [event.record for event in read_all(tmp_path)] == list(range(9))


def test_a_record_whose_last_word_was_not_written_is_not_there(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for step in range(3):
        write_core(writer, step)
    writer.buffer[writer.position - 8 : writer.position] = bytes(8)
    assert [event.record for event in read_all(tmp_path)] == [0, 1]


def test_damage_in_the_middle_costs_the_damaged_records_alone(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    for step in range(3000):
        writer.prepare()
        write_core(writer, step)
    writer.close()
    path = segments_of(tmp_path)[SESSION][0].path
    data = bytearray(path.read_bytes())
    data[20_000:20_100] = b"\xff" * 100
    path.write_bytes(bytes(data))
    reader = SessionReader(tmp_path, 0, SESSION)
    events = reader.read()
    reader.close()
    assert 2996 <= len(events) < 3000
    assert reader.skipped == 3000 - len(events)
    assert events[-1].record == 2999


def test_an_event_that_is_too_long_is_cut_and_said_to_be(tmp_path: Path) -> None:
    packed, cut = pack_full(0, 0, 0, {"loss": 1.0, "sample_losses": tuple([0.5] * 200_000)})
    assert cut
    assert len(packed) <= MAX_RECORD_BYTES
    writer = make_writer(tmp_path, segment_bytes=1 << 20)
    assert writer.append(packed)
    (event,) = read_all(tmp_path)
    assert isinstance(event, StepEvent)
    assert event.sample_losses is not None
    assert 60_000 < len(event.sample_losses) < 200_000


def test_without_room_the_log_ends_and_has_no_hole(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)  # one segment, and nobody prepares another
    for step in range(40_000):
        writer.append(pack_core(writer, step))
    assert writer.lost > 0
    assert writer.ended
    writer.prepare()
    writer.close()
    events = read_all(tmp_path)
    assert [event.record for event in events] == list(range(len(events)))
    assert len(events) + writer.lost == 40_000


def test_a_newer_journal_version_is_refused_with_what_to_do() -> None:
    header = SegmentHeader("run", SESSION, 0, 1, 0, 0, 0, 0, 0, 0).pack()
    newer = header[:8] + struct.pack("<H", 99) + header[10:]
    with pytest.raises(ValueError, match="newer than this Argus"):
        SegmentHeader.unpack(newer)


def test_control_data_that_is_too_long_is_replaced_by_its_length() -> None:
    packed = pack_control(0, 0, None, 0, "session_started", {"text": "x" * MAX_RECORD_BYTES})
    assert len(packed) < 200
