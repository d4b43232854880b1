"""A store with all that can be wrong in it: what can be read is read, and what cannot is told."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.sinks.stores import (
    STEPS,
    as_json,
    assert_holds,
    contents,
    findings_records,
    folded,
    in_the_logs_order,
    named,
    packed,
    records_of,
    sink_into,
)

from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.messages import event_messages
from plarv_sinks.history import History, replay_run
from plarv_sinks.store import Store, StoreError

pyarrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")
polars: Any = pytest.importorskip("polars")
pytest.importorskip("kafka")

RUNS = {"divergence": 900, "fleet": 60, "with_samples": 60}


@pytest.fixture
def location(tmp_path: Path) -> Path:
    runs = {name: named(name, name, steps) for name, steps in RUNS.items()}
    found = [each for events in runs.values() for each in folded(events)]
    log = {STEPS: records_of(packed(random.Random(1), runs)), **findings_records(found)}
    sink_into(tmp_path / "store", log, every=20)
    return tmp_path / "store"


def steps_files(location: Path) -> List[Path]:
    store = Store(location)
    return [store.files.local(file.path) for file in store.files.listed("fresh/table=steps")]


def test_a_damaged_file_is_told_once_and_the_others_are_read(location: Path) -> None:
    whole = Store(location).frame("steps", "divergence")
    damaged = steps_files(location)[2]
    damaged.write_bytes(damaged.read_bytes()[:500])
    told: List[str] = []
    store = Store(location, told.append)
    left = store.frame("steps", "divergence")
    assert 0 < left.height < whole.height
    assert set(left["ordinal"]) < set(whole["ordinal"])
    list(store.events("divergence"))
    list(store.events("fleet"))
    (line,) = told
    assert damaged.name in line
    assert store.verdicts("divergence")


def test_rows_that_cannot_be_read_lose_nothing_of_the_files_beside(location: Path) -> None:
    """Its footer is whole and its pages are not, as after a bit flipped on the disk."""
    damaged = steps_files(location)[0]
    data = bytearray(damaged.read_bytes())
    for place in range(40, len(data) - 4000, 7):
        data[place] ^= 0x55
    damaged.write_bytes(bytes(data))
    told: List[str] = []
    events = list(Store(location, told.append).events("fleet"))
    assert events
    assert len(told) <= 1
    assert replay_run(History(str(location)), "divergence").error == ""


def test_foreign_files_and_other_tables_are_left_out_and_told(location: Path) -> None:
    wanted = contents(Store(location))
    folder = steps_files(location)[0].parent
    table = pyarrow.table({"run_id": ["divergence"], "anything": [1.0]})
    parquet.write_table(table, folder / "p00000-555555555555-000000900000-000000900001.parquet")
    (folder / "p00000-555555555555-000000900002-000000900003.parquet").write_bytes(b"")
    (folder / "notes.txt").write_text("not ours")
    (folder / ".hidden.parquet").write_bytes(b"?")
    told: List[str] = []
    assert contents(Store(location, told.append)) == wanted
    assert any("holds something else, not steps" in line for line in told)
    assert all("notes.txt" not in line and ".hidden" not in line for line in told)


def test_a_file_of_a_newer_version_says_that_an_upgrade_is_due(location: Path) -> None:
    path = steps_files(location)[1]
    table = parquet.read_table(path, partitioning=None)
    metadata = {**table.schema.metadata, b"argus.schema_version": b"99"}
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    told: List[str] = []
    list(Store(location, told.append).events("divergence"))
    assert "schema version 99 is newer" in told[0]
    assert "upgrade" in told[0]


def test_a_file_of_an_older_version_with_fewer_columns_is_read(location: Path) -> None:
    path = steps_files(location)[1]
    table = parquet.read_table(path, partitioning=None)
    wanted = Store(location).frame("steps", "divergence")
    parquet.write_table(table.drop_columns(["update_norm", "loss_scale", "sample_ids"]), path)
    told: List[str] = []
    store = Store(location, told.append)
    assert store.frame("steps", "divergence").height == wanted.height
    assert len(list(store.events("divergence"))) == len(list(store.events("divergence")))
    assert told == []


def test_a_run_without_a_start_or_an_end_is_there_as_far_as_it_goes(tmp_path: Path) -> None:
    steps: List[Event] = [
        StepEvent("run", "s" * 16, record, 0, record + 70, loss=2.0) for record in range(40)
    ]
    sink_into(tmp_path / "store", {STEPS: records_of(event_messages(steps))})
    store = Store(tmp_path / "store")
    assert_holds(store, {"run": steps})
    row = store.run_row("run")
    assert (row.status, row.started, row.last_step, row.first_time_ns) == (None, None, 109, None)


def test_ranks_whose_clocks_disagree_keep_the_logs_order(tmp_path: Path) -> None:
    events = [
        event._replace(time_ns=10**18 + (event.rank or 0) * 10**15 - event.record * 10**9)
        for event in named("fleet", "run", 40)
    ]
    records = records_of(packed(random.Random(2), {"run": events}))
    sink_into(tmp_path / "store", {STEPS: records}, every=5)
    assert_holds(Store(tmp_path / "store"), {"run": in_the_logs_order(records, "run")})


def test_nan_everywhere_comes_back_bit_for_bit(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    columns: Dict[str, Any] = {
        "loss": nan, "grad_norm": inf, "current_lr": -inf, "forward_ms": nan, "loss_scale": nan,
        "sample_losses": (nan, inf, 1.0), "local_scores": (nan,),
    }  # fmt: skip
    events: List[Event] = [
        StepEvent("run", "s" * 16, record, 0, record, **columns) for record in range(30)
    ]
    sink_into(tmp_path / "store", {STEPS: records_of(event_messages(events))})
    assert as_json(Store(tmp_path / "store").events("run")) == as_json(events)
    assert replay_run(History(str(tmp_path / "store")), "run").worst == 2


def test_what_a_run_says_of_itself_and_how_it_ended_is_in_the_list_of_runs(
    tmp_path: Path,
) -> None:
    data = {"project": "llm", "world_size": 1, "num_layers": 12}
    events: List[Event] = [
        ControlEvent("run", "s" * 16, 0, 0, "session_started", 5, None, data),
        StepEvent("run", "s" * 16, 1, 0, 7, time_ns=9, loss=1.5),
        ControlEvent("run", "s" * 16, 2, 0, "session_finished", 11, None, {"status": "crashed"}),
    ]
    sink_into(tmp_path / "store", {STEPS: records_of(event_messages(events))})
    row = Store(tmp_path / "store").run_row("run")
    assert (row.project, row.status, row.attempt, row.num_events, row.num_steps) == (
        "llm", "crashed", 1, 3, 1,
    )  # fmt: skip
    assert (row.first_time_ns, row.last_time_ns, row.last_step, row.last_loss) == (5, 11, 7, 1.5)
    assert '"num_layers":12' in (row.started or "")


def test_a_store_or_run_that_is_not_there_is_an_error_that_says_what_is(
    location: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="no such folder"):
        Store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no run nobody; the newest are"):
        Store(location).run_row("nobody")
    with pytest.raises(StoreError, match="it holds none"):
        Store(tmp_path / "empty", create=True).run_row("nobody")
    assert list(Store(tmp_path / "empty").events("nobody")) == []
    assert Store(tmp_path / "empty").scan("verdicts").collect().height == 0
