"""What can go wrong between sinks, archives, compactions and clocks, and must not cost a row."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.sinks.stores import (
    STEPS,
    assert_holds,
    contents,
    flush,
    in_the_logs_order,
    journal,
    losses,
    named,
    packed,
    records_of,
    sink_into,
)

from plarv_processors.detectors.loss_plateau import LossPlateau
from plarv_processors.engine import EngineConfig
from plarv_processors.stored_fold import fold_rest
from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.messages import event_messages
from plarv_sinks import compact as compact_module
from plarv_sinks.archive import archive
from plarv_sinks.compact import compact
from plarv_sinks.history import History, replay_run
from plarv_sinks.sink.partitions import load_partitions
from plarv_sinks.store import Store, StoreError

pytest.importorskip("pyarrow")
pytest.importorskip("polars")
pytest.importorskip("kafka")

_DAY_MS = 86_400_000


def log(seed: int = 1) -> List[Any]:
    runs = {name: named(name, name, 80) for name in ("fleet", "spike")}
    return records_of(packed(random.Random(seed), runs, longest=8))


def in_order(records: List[Any]) -> Dict[str, List[Event]]:
    return {name: in_the_logs_order(records, name) for name in ("fleet", "spike")}


def test_a_compaction_that_was_decided_and_killed_keeps_its_files_however_late_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink_into(tmp_path / "store", {STEPS: log()}, every=9)
    store = Store(tmp_path / "store")
    wanted = contents(store)
    _decided(tmp_path / "store", monkeypatch)
    for path in store.files.local("_aside").iterdir():
        os.utime(path, (0, 0))  # many days ago
    load_partitions(store, [STEPS], {STEPS.name: {0}})  # a sink starts, and sweeps
    assert contents(Store(tmp_path / "store")) == wanted
    compact(tmp_path / "store", tell=print)
    assert contents(Store(tmp_path / "store")) == wanted
    assert store.files.listed("fresh") == []


def test_a_compaction_whose_files_are_gone_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink_into(tmp_path / "store", {STEPS: log()}, every=9)
    store = Store(tmp_path / "store")
    before = {file.path for file in store.files.listed("fresh")}
    _decided(tmp_path / "store", monkeypatch)
    for path in store.files.local("_aside").iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="is gone"):
        compact(tmp_path / "store", tell=print)
    assert {file.path for file in store.files.listed("fresh")} == before


def _decided(location: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the store as a compaction does that is killed right after its first manifest."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "_finish", kill)
        with pytest.raises(Killed):
            compact(location, tell=print)


def test_hosts_that_disagree_about_the_day_lose_no_row_of_a_compacted_run(tmp_path: Path) -> None:
    records = [
        record._replace(time_ms=record.time_ms + (number // 10) % 2 * _DAY_MS)
        for number, record in enumerate(log())
    ]
    sink_into(tmp_path / "store", {STEPS: records}, every=10)
    compact(tmp_path / "store", tell=print)
    store = Store(tmp_path / "store")
    assert len({file.date for file in store.listed("steps")}) == 2
    assert_holds(store, in_order(records))


def test_a_sink_does_not_take_a_store_that_it_cannot_read_for_an_empty_one(tmp_path: Path) -> None:
    records = log()
    sink_into(tmp_path / "store", {STEPS: records}, every=20)
    store = Store(tmp_path / "store")
    marks = store.files.local(store.files.listed("fresh/table=runs")[0].path)
    whole = marks.read_bytes()
    marks.write_bytes(whole[:-30])
    with pytest.raises(StoreError, match="put it back"):
        load_partitions(store, [STEPS], {STEPS.name: {0}})
    marks.write_bytes(whole)
    sink_into(tmp_path / "store", {STEPS: records})
    assert_holds(Store(tmp_path / "store"), in_order(records))


@pytest.mark.parametrize("world_size", [True, 10**30, -1, "four", None, [1]])
def test_a_session_that_says_odd_things_of_itself_stops_no_sink(
    world_size: Any, tmp_path: Path
) -> None:
    events: List[Event] = [
        ControlEvent("run", "s" * 16, 0, 0, "session_started", 5, None, {"world_size": world_size}),
        StepEvent("run", "s" * 16, 1, 0, 7, loss=1.5),
    ]
    sink_into(tmp_path / "store", {STEPS: records_of(event_messages(events))})
    assert_holds(Store(tmp_path / "store"), {"run": events})


def test_a_run_whose_id_is_too_long_for_a_folder_is_compacted_and_read(tmp_path: Path) -> None:
    run_id = "прогон/" * 40
    events: List[Event] = [
        StepEvent(run_id, "s" * 16, record, 0, record, loss=1.0) for record in range(50)
    ]
    sink_into(tmp_path / "store", {STEPS: records_of(event_messages(events))})
    compact(tmp_path / "store", tell=print)
    store = Store(tmp_path / "store")
    assert store.files.listed("fresh") == []
    assert_holds(store, {run_id: events})


def test_two_nodes_of_one_run_are_both_in_the_store(tmp_path: Path) -> None:
    for node in ("0", "1"):
        journal(tmp_path / node / "run", node, losses(120, spike_at=90))
    for node in ("0", "1", "0"):
        archive(tmp_path / node / "run", tmp_path / "store", tell=print)
    sessions = Store(tmp_path / "store").frame("steps", "run")["session"].value_counts()
    assert sorted(sessions.rows()) == [("0" * 16, 120), ("1" * 16, 120)]


def test_what_other_detectors_would_say_today_is_not_recorded_as_said_then(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    journal(run_dir, "0", losses(400, spike_at=300))
    assert fold_rest(run_dir, EngineConfig(detectors=(LossPlateau,)))
    said = (
        (run_dir / "verdicts.jsonl").read_bytes() if (run_dir / "verdicts.jsonl").exists() else b""
    )
    told: List[str] = []
    archive(run_dir, tmp_path / "store", tell=told.append)
    store = Store(tmp_path / "store")
    assert {verdict.detector for verdict in store.verdicts("run")} <= {"loss_plateau"}
    assert len(store.verdicts("run")) == len(said.splitlines())
    assert "judged by other detectors" in told[0]
    assert store.frame("steps", "run").height == 400


def test_a_run_whose_beginning_is_missing_is_replayed_and_not_compared(tmp_path: Path) -> None:
    records = log()
    store = Store(tmp_path / "store", create=True)
    (partition,) = load_partitions(store, [STEPS], {STEPS.name: {0}})
    for record in records:
        partition.take(record, 0.0)
        if record.offset in (5, len(records) - 1):
            flush(store, partition)
    first = store.files.listed("fresh/table=steps")[0]
    store.files.remove(first.path)
    replayed = replay_run(History(str(tmp_path / "store")), "spike")
    assert replayed.num_steps > 0
    assert replayed.changes == ()
    assert (replayed.only_replayed, replayed.only_recorded) == (0, 0)
    assert "not compared" in replayed.told[0]
