"""``argus sink`` on a real Kafka: killed, stopped, joined by others, and on a disk that is full."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Generator, List, Optional

import pytest
from tests.fleets import TopicsOnTest
from tests.producer.processes import ROOT, environment
from tests.sinks.stores import assert_holds, folded, in_the_logs_order, named, packed

from plarv_schemas.events import Event
from plarv_sinks.compact import compact
from plarv_sinks.sink.service import Sink, SinkConfig
from plarv_sinks.store import Store, StoreError

pytest.importorskip("pyarrow")
pytest.importorskip("polars")
pytest.importorskip("kafka")

_DEADLINE_S = 90.0
_RUNS = {"divergence": 700, "fleet": 60, "repeated_batch": 300, "with_samples": 100}


class SinkProcess:
    """``argus sink`` in a process of its own."""

    def __init__(self, fleet: TopicsOnTest, location: Path, name: str = "sink") -> None:
        self.log = location.parent / f"{name}.log"
        self._environment = environment()
        self._environment["ARGUS_TOPIC_PREFIX"] = fleet.topics.prefix
        self._command = [
            sys.executable, "-m", "plarv", "sink", "--brokers", fleet.address,
            "--store", str(location), "--flush-every", "0.3",
        ]  # fmt: skip
        self.process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> SinkProcess:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends it: its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def said(self) -> str:
        return self.log.read_text()

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


def until(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _DEADLINE_S
    while not holds():
        assert time.monotonic() < end, f"not within {_DEADLINE_S:.0f} s: {what}"
        time.sleep(0.05)


def num_events(location: Path) -> int:
    """The events that the store has by now."""
    try:
        return sum(row.num_events for row in Store(location).run_rows().values())
    except StoreError:
        return 0


def runs() -> Dict[str, List[Event]]:
    return {f"run-{name}": named(name, f"run-{name}", steps) for name, steps in _RUNS.items()}


def assert_all_there(fleet: TopicsOnTest, location: Path) -> None:
    """Every event once in the log's order, and every verdict and action."""
    store, records = Store(location), list(fleet.records(fleet.topics.steps))
    logs = {run_id: in_the_logs_order(records, run_id) for run_id in runs()}
    assert_holds(store, logs)
    for run_id, events in logs.items():
        found = {each.id for each in folded(events)}
        stored = [each.id for each in store.verdicts(run_id)]
        stored += [each.id for each in store.actions(run_id)]
        assert sorted(stored) == sorted(found)
        rows = store.frame("verdicts", run_id).height + store.frame("actions", run_id).height
        assert rows == len(found)


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str) -> TopicsOnTest:
    return TopicsOnTest(broker_address, topic_prefix)


def put(fleet: TopicsOnTest, rng: random.Random) -> int:
    """All runs into the topics, some messages twice: how many events there are."""
    logs = runs()
    messages = packed(rng, logs)
    doubled = [each for message in messages for each in [message] * rng.choice((1, 1, 1, 2))]
    fleet.put(fleet.topics.steps, doubled)
    records = list(fleet.records(fleet.topics.steps))
    for run_id in logs:
        found = folded(in_the_logs_order(records, run_id))
        fleet.put_findings([each for finding in found for each in [finding] * rng.choice((1, 2))])
    return sum(map(len, logs.values()))


def all_there(fleet: TopicsOnTest, location: Path, wanted: int) -> Callable[[], bool]:
    found = sum(
        len(folded(in_the_logs_order(list(fleet.records(fleet.topics.steps)), run)))
        for run in runs()
    )

    def holds() -> bool:
        if num_events(location) < wanted:
            return False
        store = Store(location)
        return len(store.ids("verdicts")) + len(store.ids("actions")) >= found

    return holds


def test_all_that_the_topics_hold_is_in_the_store_once(fleet: TopicsOnTest, tmp_path: Path) -> None:
    location = tmp_path / "store"
    wanted = put(fleet, random.Random(1))
    with SinkProcess(fleet, location) as sink:
        until("all is there", all_there(fleet, location, wanted))
        assert sink.end() == 0
    assert_all_there(fleet, location)
    assert "that were there already" in sink.said()


def test_what_is_sent_once_more_after_a_restart_makes_no_file(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    wanted = put(fleet, random.Random(1))
    store = Store(tmp_path / "store", create=True)
    with sink_here(fleet, store):
        until("all is there", all_there(fleet, tmp_path / "store", wanted))
    before = store.files.listed("")
    put(fleet, random.Random(1))
    with sink_here(fleet, store) as sink:
        until("it was read", lambda: sink.counts.copies >= wanted and not sink.counts.behind)
    assert store.files.listed("") == before
    assert sink.counts.rows == 0


@contextmanager
def sink_here(fleet: TopicsOnTest, store: Store) -> Generator[Sink, None, None]:
    """A sink on a thread of this process, for those who ask what it counts."""
    told: List[str] = []
    sink = Sink(
        SinkConfig(fleet.connection, fleet.topics, "sinks", flush_s=0.3), store, told.append
    )
    stop = threading.Event()
    thread = threading.Thread(target=sink.run, args=(stop,))
    thread.start()
    try:
        yield sink
    finally:
        stop.set()
        thread.join()
    assert told == []


def test_killed_again_and_again_while_the_store_is_compacted_nothing_is_missing_or_twice(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    location, rng = tmp_path / "store", random.Random(2)
    wanted = put(fleet, rng)
    (tmp_path / "store").mkdir()
    for share in (0.0, 0.2, 0.4, 0.6, 0.8):
        with SinkProcess(fleet, location) as sink:
            until("it writes", lambda least=share * wanted: num_events(location) > least)  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 0.3))  # nobody knows where this is
            sink.end(signal.SIGKILL)
        compact(location, tell=print)
    with SinkProcess(fleet, location, "last") as sink:
        until("it has begun", lambda: "sink: " in sink.said())
        until("all is there", all_there(fleet, location, wanted))
        assert sink.end() == 0
    assert_all_there(fleet, location)


def test_sinks_that_come_and_go_share_the_partitions(fleet: TopicsOnTest, tmp_path: Path) -> None:
    location = tmp_path / "store"
    with SinkProcess(fleet, location, "first") as first:
        until("the first has joined", lambda: "sink: " in first.said())
        wanted = put(fleet, random.Random(3))
        with SinkProcess(fleet, location, "second") as second:
            until("all is there", all_there(fleet, location, wanted))
            assert first.end() == 0
            assert second.is_alive()
            assert second.end() == 0
    assert_all_there(fleet, location)


def test_on_a_full_disk_nothing_is_lost_and_it_goes_on_when_there_is_room(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    location = tmp_path / "store"
    with SinkProcess(fleet, location) as sink:
        assert sink.process is not None
        until("it has joined", lambda: "sink: " in sink.said())
        # No file may grow: what a full disk does, and SIGXFSZ is ignored by Python.
        resource.prlimit(sink.process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        wanted = put(fleet, random.Random(4))
        until("it says so", lambda: "nothing is lost: trying again" in sink.said())
        assert num_events(location) == 0
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(sink.process.pid, resource.RLIMIT_FSIZE, unlimited)
        until("all is there", all_there(fleet, location, wanted))
        assert "writing again" in sink.said()
        assert sink.end() == 0
    assert_all_there(fleet, location)


def test_without_its_topics_it_says_what_to_do(broker_address: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plarv", "sink", "--brokers", broker_address,
         "--store", str(tmp_path / "store")],
        cwd=ROOT, env={**environment(), "ARGUS_TOPIC_PREFIX": "nobody"}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "argus topics create" in done.stderr


def test_a_new_store_gets_everything_also_from_a_group_that_has_committed_further(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    wanted = put(fleet, random.Random(5))
    for name in ("first", "second"):
        location = tmp_path / name
        with sink_here(fleet, Store(location, create=True)):
            until("all is there", all_there(fleet, location, wanted))
        assert_all_there(fleet, location)
