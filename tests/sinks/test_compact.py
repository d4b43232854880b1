"""A compaction changes where rows lie and nothing else, also when it is killed or read beside."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from tests.producer.processes import environment
from tests.sinks.stores import (
    STEPS,
    assert_holds,
    contents,
    findings_records,
    flush,
    folded,
    in_the_logs_order,
    named,
    packed,
    records_of,
    sink_into,
)

from plarv_schemas.locks import FileLock
from plarv_schemas.topic_reader import Record
from plarv_sinks.compact import compact
from plarv_sinks.sink.partitions import load_partitions
from plarv_sinks.store import Store, StoreError

pytest.importorskip("pyarrow")
pytest.importorskip("polars")
pytest.importorskip("kafka")

RUNS = {"divergence": 900, "fleet": 100, "repeated_batch": 300, "with_samples": 100}


@pytest.fixture(scope="module")
def log() -> Dict[Any, List[Record]]:
    runs = {f"a run/{name}": named(name, f"a run/{name}", steps) for name, steps in RUNS.items()}
    found = [each for events in runs.values() for each in folded(events)]
    messages = packed(random.Random(1), runs)
    return {STEPS: records_of(messages), **findings_records(found)}


@pytest.fixture
def location(log: Dict[Any, List[Record]], tmp_path: Path) -> Path:
    sink_into(tmp_path / "store", log, every=17)
    return tmp_path / "store"


def test_every_row_is_where_it_belongs_and_as_it_was(
    location: Path, log: Dict[Any, List[Record]]
) -> None:
    before, covered = contents(Store(location)), Store(location).covered("runs")
    done = compact(location, tell=print)
    store = Store(location)
    assert contents(store) == before
    assert_holds(store, {run: in_the_logs_order(log[STEPS], run) for run in before})
    assert store.files.listed("fresh") == []
    steps = store.files.listed("table=steps")
    assert {file.run_id for file in steps} == set(before)
    assert len(steps) == len(before)
    for table in ("events", "verdicts", "actions", "runs"):
        assert len(store.files.listed(f"table={table}")) == 1
    assert store.covered("runs") == covered
    assert done.made == len(steps) + 4
    assert store.files.names("_aside") == []


def test_a_second_time_there_is_nothing_to_do_and_what_comes_later_is_added(
    log: Dict[Any, List[Record]], tmp_path: Path
) -> None:
    half = {topic: records[: len(records) // 2] for topic, records in log.items()}
    sink_into(tmp_path / "store", half, every=17)
    compact(tmp_path / "store", tell=print)
    assert compact(tmp_path / "store", tell=print).taken == 0
    sink_into(tmp_path / "store", log, every=17)  # it goes on where the files end
    compact(tmp_path / "store", tell=print)
    sink_into(tmp_path / "whole", log)
    assert contents(Store(tmp_path / "store")) == contents(Store(tmp_path / "whole"))
    assert len(Store(tmp_path / "store").files.listed("table=verdicts")) == 1


def test_what_two_sinks_wrote_of_one_range_is_there_once_afterwards(
    log: Dict[Any, List[Record]], tmp_path: Path
) -> None:
    """As one does that was stopped for minutes between asking the group and naming its files."""
    store = Store(tmp_path / "store", create=True)
    (stopped,) = load_partitions(store, [STEPS], {STEPS.name: {0}})
    for record in log[STEPS][:20]:
        stopped.take(record, 0.0)
    prepared = stopped.prepare(store)
    (other,) = load_partitions(store, [STEPS], {STEPS.name: {0}})
    for record in log[STEPS]:
        other.take(record, 0.0)
    flush(store, other)
    store.files.publish(prepared)
    runs = {run: in_the_logs_order(log[STEPS], run) for run in (f"a run/{name}" for name in RUNS)}
    assert_holds(store, runs)
    compact(tmp_path / "store", tell=print)
    assert_holds(Store(tmp_path / "store"), runs)
    rows = Store(tmp_path / "store").scan("steps").collect().height
    assert rows + Store(tmp_path / "store").scan("events").collect().height == sum(
        map(len, runs.values())
    )


def test_a_flush_that_its_sink_has_not_finished_is_left_alone(
    log: Dict[Any, List[Record]], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store", create=True)
    (partition,) = load_partitions(store, [STEPS], {STEPS.name: {0}})
    for record in log[STEPS]:
        partition.take(record, 0.0)
    store.files.publish(partition.prepare(store)[:2])  # all but the list of runs
    assert compact(tmp_path / "store", tell=print).taken == 0
    sink_into(tmp_path / "store", {STEPS: log[STEPS]})
    compact(tmp_path / "store", tell=print)
    assert_holds(
        Store(tmp_path / "store"),
        {f"a run/{name}": in_the_logs_order(log[STEPS], f"a run/{name}") for name in RUNS},
    )


def test_killed_anywhere_and_called_again_it_has_changed_no_row(
    log: Dict[Any, List[Record]], tmp_path: Path
) -> None:
    sink_into(tmp_path / "whole", log)
    wanted, rng, kills = contents(Store(tmp_path / "whole")), random.Random(5), 0
    for number in range(5):
        location = tmp_path / f"store-{number}"
        sink_into(location, log, every=17)
        kills += killed_while_compacting(location, rng.uniform(0.0, 0.12))
        assert contents(Store(location)) == wanted  # for readers, too
        compact(location, tell=print)
        assert contents(Store(location)) == wanted
        assert Store(location).files.listed("fresh") == []
    assert kills > 0


_CHILD = """
import sys
from plarv_sinks.compact import compact
import pyarrow.fs, pyarrow.parquet, pyarrow.compute
print("ready", flush=True)
compact(sys.argv[1], tell=print)
"""


def killed_while_compacting(location: Path, after_s: float) -> bool:
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(location)], env=environment(), stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(after_s)  # it is the point of the test that nobody knows where this is
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.read()
    return process.returncode == -signal.SIGKILL


def test_readers_find_every_row_once_at_any_time(
    log: Dict[Any, List[Record]], tmp_path: Path
) -> None:
    location = tmp_path / "store"
    sink_into(location, log, every=6)
    wanted, found, stop = contents(Store(location)), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            found.append(contents(Store(location)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while not found:
            time.sleep(0.001)
        compact(location, tell=print)
    finally:
        number = len(found)
        while len(found) < number + 2 and reader.is_alive():
            time.sleep(0.001)
        stop.set()
        reader.join()
    assert len(found) > 2
    for each in found:
        assert each == wanted


def test_a_file_that_cannot_be_read_stays_and_the_others_are_put_together(location: Path) -> None:
    store = Store(location)
    damaged = [store.files.listed(f"fresh/table={table}")[-1] for table in ("steps", "verdicts")]
    for file in damaged:
        path = store.files.local(file.path)
        path.write_bytes(path.read_bytes()[:-20])
    (location / "fresh/table=steps" / f"date={damaged[0].date}" / "foreign.parquet").write_bytes(
        b"?"
    )
    told: List[str] = []
    before = contents(Store(location, told.append))
    told.clear()
    compact(location, tell=told.append)
    assert {file.path for file in store.files.listed("fresh")} == {file.path for file in damaged}
    assert all(any(file.path in line for line in told) for file in damaged)
    assert contents(Store(location, told.append)) == before


def test_two_at_once_are_refused(location: Path) -> None:
    lock = FileLock(location / "_compact.lock")
    assert lock.acquire()
    try:
        with pytest.raises(StoreError, match="another process compacts it"):
            compact(location, tell=print)
    finally:
        lock.release()
