"""A fleet for the benchmarks: a broker, topics of their own, worker processes, synthetic runs."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Generator, Iterator, List, Optional, Sequence, Tuple

from children import our_package
from measure import ROOT
from plarv_processors.kafka_topics import create_topics
from plarv_schemas.events import ControlEvent, Event, StepEvent
from plarv_schemas.kafka_clients import partition_of, producer_client
from plarv_schemas.kafka_connection import Connection, connect_to
from plarv_schemas.messages import Message, event_messages
from plarv_schemas.topics import MAX_MESSAGE_BYTES, Topics

sys.path.insert(0, str(ROOT / "deploy" / "local-broker"))

from local_broker import LocalBroker

__all__ = [
    "MASTER_KEY",
    "PACKED",
    "Fleet",
    "LocalBroker",
    "Worker",
    "add_brokers",
    "log_of",
    "names_in",
    "open_fleet",
    "packed",
    "wait_for",
]

MASTER_KEY = "the master key of these benchmarks"
PACKED = 64  # steps a message
_READY_S = 90.0
_END_S = 30.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Worker:
    """One ``argus worker`` process."""

    def __init__(self, fleet: Fleet, topics: Topics, name: str, options: Sequence[str]) -> None:
        self._log = fleet.folder / f"{topics.prefix}-{name}.log"
        command = [sys.executable, "-m", "plarv", "worker", "--brokers", fleet.brokers]
        command += ["--metrics-port", "0", "--name", name, *options]
        command += ["--state-dir", str(fleet.folder / f"workers-{topics.prefix}")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=fleet.environment(topics, ARGUS_MASTER_KEY=MASTER_KEY),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._url = ""

    def wait_until_well(self) -> None:
        """Waits until its states are whole and it judges."""
        wait_for(lambda: self._get("healthz") is not None, _READY_S, f"a worker: {self._log}")

    def metrics(self) -> str:
        """What it serves; "" before it does. RuntimeError: the worker has ended."""
        return self._get("metrics") or ""

    def judged(self, detectors: int) -> float:
        """Events that every one of so many detectors has judged."""
        found = _numbers(self.metrics(), "argus_steps_total")
        return min(found) if len(found) == detectors else 0.0

    def detector_seconds(self) -> float:
        """Spent in all folds."""
        return math.fsum(_numbers(self.metrics(), "argus_detector_seconds_total"))

    def cpu_s(self) -> float:
        """CPU seconds of all its threads so far."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def resident_mb(self) -> Tuple[float, float]:
        """MB resident now, and the most there was."""
        text = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", text))
        return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal and waits for the end."""
        self._process.send_signal(how)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _get(self, path: str) -> Optional[str]:
        if self._process.poll() is not None:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"a worker ended with status {self._process.returncode}:\n{tail}")
        if not self._url:
            found = re.search(r"(http://\S+)/metrics", self._log.read_text(encoding="utf-8"))
            if found is None:
                return None
            self._url = found[1]
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=10.0) as answer:
                return str(answer.read().decode("utf-8"))
        except OSError:  # not well yet
            return None


class Fleet:
    """Brokers, and what is started on them; :func:`open_fleet` makes it."""

    def __init__(self, folder: Path, brokers: str, own: Optional[LocalBroker]) -> None:
        self.folder = folder
        self.brokers = brokers
        self.own = own  # the broker, where it is ours to kill

    @property
    def connection(self) -> Connection:
        """To the brokers."""
        return connect_to(self.brokers)

    def topics(self, partitions: int) -> Topics:
        """A fleet's topics, under a fresh prefix."""
        topics = Topics(f"bench-{secrets.token_hex(4)}")
        create_topics(self.connection, topics, partitions)
        return topics

    def environment(self, topics: Topics, **more: str) -> Dict[str, str]:
        """Of a process of the fleet."""
        return {
            **our_package().environment,
            "ARGUS_BROKERS": self.brokers,
            "ARGUS_TOPIC_PREFIX": topics.prefix,
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    @contextlib.contextmanager
    def worker(
        self, topics: Topics, *options: str, name: str = "w1"
    ) -> Generator[Worker, None, None]:
        """A worker while the context lasts."""
        worker = Worker(self, topics, name, options)
        try:
            yield worker
        finally:
            worker.end()

    def produce(self, topics: Topics, messages: Iterator[Message]) -> int:
        """Sends messages as the shipper does, but many at once; their number."""
        count = 0
        options: Dict[str, Any] = {
            "linger_ms": 20,
            "batch_size": MAX_MESSAGE_BYTES,
            "compression_type": "lz4",
        }
        with producer_client(self.connection, **options) as producer:
            for message in messages:
                count += 1
                producer.send(
                    topics.steps, key=message.key, value=message.value, headers=message.headers
                )
            producer.flush()
        return count


@contextlib.contextmanager
def open_fleet(brokers: str) -> Generator[Fleet, None, None]:
    """A fleet on ``brokers``, or where none are named on a broker of its own."""
    folder = Path(tempfile.mkdtemp(prefix="argus-benchmark-"))
    own = None if brokers else LocalBroker(folder / "broker")
    try:
        if own is not None:
            own.start()
        yield Fleet(folder, brokers or (own.address if own is not None else ""), own)
    finally:
        if own is not None:
            own.stop()
        shutil.rmtree(folder, ignore_errors=True)


def add_brokers(parser: argparse.ArgumentParser) -> None:
    """Adds ``--brokers``."""
    parser.add_argument(
        "--brokers",
        default=os.environ.get("ARGUS_TEST_BROKERS", ""),
        metavar="HOST:PORT",
        help="default: ARGUS_TEST_BROKERS, else a broker of its own (Java 17, Maven)",
    )


def names_in(wanted: Sequence[int], partitions: int, count: int) -> List[str]:
    """So many run ids whose partitions, of so many there are, are among the wanted ones."""
    found: List[str] = []
    number = 0
    while len(found) < count:
        name = f"run-{number:06d}"
        if partition_of(name, partitions) in wanted:
            found.append(name)
        number += 1
    return found


def log_of(run_id: str, steps: int, seed: int = 1) -> List[Event]:
    """A run of one rank that goes well and reports what the wire's figure is about: loss and
    gradient norm (float32 in a trainer, so here), learning rate of a schedule, step time.
    """
    chance = random.Random(f"{seed}{run_id}")
    gauss = chance.gauss
    data = {"mode": "MANUAL", "world_size": 1}
    events: List[Event] = [ControlEvent(run_id, "a" * 16, 0, 0, "session_started", 0, None, data)]
    now = 1_763_000_000_000_000_000
    for step in range(steps):
        step_time = 10.0 + gauss(0.0, 0.1)
        now += int(step_time * 1e6)
        events.append(
            StepEvent(
                run_id, "a" * 16, step + 1, 0, step,
                time_ns=now,
                world_size=1,
                loss=_single(2.0 + 5.0 / (step + 10) + gauss(0.0, 0.02)),
                grad_norm=_single(1.0 + gauss(0.0, 0.05)),
                current_lr=1.5e-4 * (1.0 + math.cos(math.pi * step / 100_000)),
                step_time_ms=_single(step_time),
            )
        )  # fmt: skip
    return events


def packed(events: Sequence[Event], steps: int = PACKED) -> List[Message]:
    """A run's messages: its first event, then so many steps in each."""
    found = event_messages(events[:1])
    for begin in range(1, len(events), steps):
        found += event_messages(events[begin : begin + steps])
    return found


def wait_for(is_there: Callable[[], Any], limit_s: float, what: str, pause_s: float = 0.1) -> None:
    """Waits until a condition holds. RuntimeError: it does not within ``limit_s``."""
    until = time.monotonic() + limit_s
    while not is_there():
        if time.monotonic() > until:
            raise RuntimeError(f"within {limit_s:.0f} s there was no {what}")
        time.sleep(pause_s)


def _numbers(text: str, name: str) -> List[float]:
    return [float(found) for found in re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE)]


def _single(value: float) -> float:
    (found,) = struct.unpack("f", struct.pack("f", value))
    return float(found)
