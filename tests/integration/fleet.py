"""Worker processes on a real Kafka, logs put into it, and what the fold says must come out."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Generator, List, Mapping, Optional, Sequence, Type

from tests.fleets import MASTER_KEY, TopicsOnTest
from tests.processors.logs import log_of
from tests.producer.processes import ROOT, environment

from plarv_processors.detectors.detector import Detector
from plarv_processors.engine import Engine, EngineConfig
from plarv_schemas.events import Action, ControlEvent, Event, Verdict
from plarv_schemas.kafka_clients import partition_of
from plarv_schemas.messages import (
    Message,
    decode_action,
    decode_events,
    decode_verdict,
    event_messages,
)
from plarv_schemas.topic_reader import open_topic
from plarv_schemas.topics import ID_HEADER, TABLE_HEADER, header

__all__ = [
    "WorkerProcess", "assert_log_and_results_agree", "controls", "drain", "expected", "folded_runs",
    "found", "interleaved", "messages_of", "named", "sessions_of",
    "side_by_side", "until", "workers",
]  # fmt: skip

_DEADLINE_S = 90.0
_PORT = re.compile(rb"http://127\.0\.0\.1:(\d+)/metrics")


def until(what: str, holds: Callable[[], bool], seconds: float = _DEADLINE_S) -> None:
    """Waits until it holds; fails with ``what`` after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


class WorkerProcess:
    """A worker in a process of its own, that can be killed and started again under its name."""

    def __init__(
        self, fleet: TopicsOnTest, folder: Path, name: str = "w1", *options: str,
        module: Sequence[str] = ("plarv", "worker"), brokers: str = "",
    ) -> None:  # fmt: skip
        self.log = folder / f"{name}.log"
        self.kills = 0
        self._folder = folder
        self._command = [
            sys.executable, "-m", *module, "--brokers", brokers or fleet.address, "--name", name,
            "--metrics-port", "0", "--state-dir", str(folder / "state"), *options,
        ]  # fmt: skip
        self._environment = {
            name: value for name, value in environment().items() if not name.startswith("ARGUS_")
        }
        self._environment["ARGUS_TOPIC_PREFIX"] = fleet.topics.prefix
        self._environment["ARGUS_MASTER_KEY"] = MASTER_KEY
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._from = 0  # where the log of this process begins

    def start(self) -> WorkerProcess:
        """Begins; it is not ready yet."""
        self._from = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log
            )
        return self

    def ready(self, seconds: float = _DEADLINE_S) -> WorkerProcess:
        """Waits until /healthz says 200: its states are whole."""
        until(f"{self.log.stem} is well:\n{self.said()[-2000:]}", self.is_well, seconds)
        return self

    def is_well(self) -> bool:
        """Whether /healthz says 200 now."""
        process = self._process
        assert process is not None
        assert process.poll() is None, f"the worker ended: {self.said()[-3000:]}"
        return self._get("/healthz") is not None

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)
        self.kills += 1

    def stop(self) -> int:
        """Asks it to end; its exit code."""
        return self._end(signal.SIGTERM)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def said(self) -> str:
        """What this process, and no earlier one of the name, wrote on stderr."""
        if not self.log.exists():
            return ""
        return self.log.read_bytes()[self._from :].decode(errors="replace")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels; 0 where there is none."""
        total = 0.0
        for line in (self._get("/metrics") or "").splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] != name:
                continue
            if all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
                total += float(value)
        return total

    def _get(self, path: str) -> Optional[str]:
        ports = _PORT.findall(self.said().encode())
        if not ports:
            return None
        try:
            url = f"http://127.0.0.1:{int(ports[-1])}{path}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                body: bytes = answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            return None
        except OSError:
            return None
        return body.decode()

    def _end(self, number: signal.Signals) -> int:
        process = self._process
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            self._process = None


@contextmanager
def workers(*each: WorkerProcess) -> Generator[None, None, None]:
    """Started and ready; ended at the end, also where the test fails."""
    try:
        for worker in each:
            worker.start()
        for worker in each:
            worker.ready()
        yield
    finally:
        for worker in each:
            if worker.is_alive():
                worker.kill()


def named(stream: str, run_id: str, steps: Optional[int] = None) -> List[Event]:
    """The log of a stream as the run ``run_id``."""
    return [event._replace(run_id=run_id) for event in log_of(stream, steps)]


def sessions_of(events: Sequence[Event]) -> List[List[Event]]:
    """A run's events by session, each in its own order."""
    by_session: Dict[str, List[Event]] = {}
    for event in events:
        by_session.setdefault(event.session, []).append(event)
    return list(by_session.values())


def messages_of(rng: random.Random, events: Sequence[Event], longest: int = 64) -> List[Message]:
    """A session's events packed by chance."""
    messages: List[Message] = []
    begin = 0
    while begin < len(events):
        end = begin + rng.randint(1, longest)
        messages += event_messages(events[begin:end])
        begin = end
    return messages


def side_by_side(rng: random.Random, sessions: Sequence[Sequence[Event]]) -> List[Message]:
    """Ranks that keep about the same pace, each with messages of its own."""
    messages: List[Message] = []
    begin = 0
    while begin < max(map(len, sessions)):
        end = begin + rng.randint(1, 12)
        parts = [session[begin:end] for session in sessions if session[begin:end]]
        rng.shuffle(parts)
        for part in parts:
            messages += event_messages(part)
        begin = end
    return messages


def interleaved(rng: random.Random, sequences: Sequence[Sequence[Any]]) -> List[Any]:
    """All of them in one order by chance that keeps the order of each."""
    order = [number for number, each in enumerate(sequences) for _ in each]
    rng.shuffle(order)
    rest = [iter(each) for each in sequences]
    return [next(rest[number]) for number in order]


def folded_runs(fleet: TopicsOnTest) -> Dict[str, List[Event]]:
    """What the steps topic holds, by run in the log's order; unreadable messages left out."""
    runs: Dict[str, List[Event]] = {}
    for record in fleet.records(fleet.topics.steps):
        try:
            events = decode_events(record.headers, record.value or b"")
        except ValueError:
            continue
        if record.key == events[0].run_id.encode():
            runs.setdefault(events[0].run_id, []).extend(events)
    return runs


def expected(
    runs: Mapping[str, Sequence[Event]], detectors: Optional[Sequence[Type[Detector]]] = None
) -> Dict[str, Mapping[str, Any]]:
    """By id, the records that a straight fold gives of these runs."""
    config = EngineConfig(detectors=None if detectors is None else tuple(detectors))
    records: Dict[str, Mapping[str, Any]] = {}
    for events in runs.values():
        engine = Engine(config)
        for event in events:
            if isinstance(event, ControlEvent) and event.kind == "detector_left_out":
                engine.leave_out(str(event.data["detector"]), int(event.data["ordinal"]))
        for event in events:
            records.update({made.id: made.to_dict() for made in engine.fold(event)})
    return records


def found(fleet: TopicsOnTest) -> Dict[str, Mapping[str, Any]]:
    """By id, the verdicts and actions on the topics; every copy of an id is the same."""
    records: Dict[str, Mapping[str, Any]] = {}
    copies: Dict[str, bytes] = {}
    for topic in (fleet.topics.verdicts, fleet.topics.actions):
        for record in fleet.records(topic):
            table, value = header(record.headers, TABLE_HEADER), record.value or b""
            if table == "watermark":
                continue
            made: Verdict | Action
            made = decode_verdict(value) if table == "verdicts" else decode_action(value)
            assert header(record.headers, ID_HEADER) == made.id
            assert copies.setdefault(made.id, value) == value, f"two different records {made.id}"
            records[made.id] = made.to_dict()
    return records


def controls(fleet: TopicsOnTest, run_id: str, kind: str) -> List[ControlEvent]:
    """A run's control events of one kind, each once."""
    events = {
        event.session: event
        for event in folded_runs(fleet).get(run_id, [])
        if isinstance(event, ControlEvent) and event.kind == kind
    }
    return list(events.values())


def drain(fleet: TopicsOnTest, tag: str = "last", seconds: float = _DEADLINE_S) -> None:
    """Waits until all that the log holds is judged and answered, in every partition.

    The last run of each partition asks for an action; the policy gives it after all before it.
    """
    with open_topic(fleet.connection, fleet.topics.actions) as reader:
        count = reader.num_partitions
        waiting: Dict[int, str] = {}
        number = 0
        while len(waiting) < count:
            run_id = f"{tag}-{number}"
            waiting.setdefault(partition_of(run_id, count), run_id)
            number += 1
        for run_id in waiting.values():
            fleet.put_events(_asking(run_id))
        wanted = {run_id.encode() for run_id in waiting.values()}
        begins = {partition: span.begin for partition, span in reader.ranges().items()}
        end = time.monotonic() + seconds
        for record in reader.follow(begins):
            wanted.discard((record.key or b"") if record else b"")
            if not wanted:
                return
            assert time.monotonic() < end, f"no action within {seconds:.0f} s for {wanted}"


def assert_log_and_results_agree(
    fleet: TopicsOnTest,
    detectors: Optional[Sequence[Type[Detector]]] = None,
    *,
    removed: Optional[Mapping[str, Sequence[Event]]] = None,
) -> Dict[str, Mapping[str, Any]]:
    """Every verdict and action of the fold is on the topics, and no other; they are returned.

    ``removed``: what the log held before its begin was removed.
    """
    runs: Dict[str, List[Event]] = {name: list(events) for name, events in (removed or {}).items()}
    for name, events in folded_runs(fleet).items():
        runs.setdefault(name, []).extend(events)
    wanted, there = expected(runs, detectors), found(fleet)
    missing = [wanted[name] for name in wanted.keys() - there.keys()]
    beside = [there[name] for name in there.keys() - wanted.keys()]
    assert not missing, f"{len(missing)} of {len(wanted)} are missing, such as {missing[:3]}"
    assert not beside, f"{len(beside)} are in no fold, such as {beside[:3]}"
    different = [name for name in wanted if repr(wanted[name]) != repr(there[name])]
    assert not different, [(wanted[name], there[name]) for name in different[:2]]
    return there


def _asking(run_id: str) -> List[Event]:
    return [
        ControlEvent(run_id, "s", 0, 0, "session_started", data={"mode": "AUTO", "world_size": 1}),
        ControlEvent(run_id, "order", 0, None, "order", data={"order": "stop"}),
        ControlEvent(run_id, "s", 1, 0, "session_finished", data={"status": "completed"}),
    ]
