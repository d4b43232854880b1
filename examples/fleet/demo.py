"""A fleet on one machine: Kafka, a worker, a training job of two ranks that goes wrong.

    python examples/fleet/demo.py [--brokers HOST:PORT] [--keep]

Shows verdicts and actions as they come over the topics, what the ranks did about them, and at the
end that a replay of the log in a fresh process finds the same. `make demo-kafka` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "deploy" / "local-broker"))

from local_broker import BrokerProblem, LocalBroker  # noqa: E402

from plarv_schemas.events import Action, ControlEvent, Verdict  # noqa: E402
from plarv_schemas.kafka_connection import Connection, connect_to  # noqa: E402
from plarv_schemas.messages import decode_action, decode_events, decode_verdict  # noqa: E402
from plarv_schemas.signatures import run_key  # noqa: E402
from plarv_schemas.topic_reader import open_topic  # noqa: E402
from plarv_schemas.topics import TABLE_HEADER, Topics, header  # noqa: E402

RANKS = 2
INJURED_AT = 150  # as train.py has it
_READY_S = 60.0
_JOB_S = 300.0
_SETTLE_S = 20.0

Record = Union[Verdict, Action, ControlEvent]


class Fleet:
    """The processes, and the environment that they share."""

    def __init__(self, folder: Path, brokers: Optional[str]) -> None:
        self.folder = folder
        self.run_id = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
        self.topics = Topics(f"demo-{secrets.token_hex(3)}" if brokers else "argus")
        self.master_key = secrets.token_urlsafe(32)
        self._broker = None if brokers else LocalBroker(folder / "broker")
        self.brokers = brokers or ""
        self._worker: Optional[subprocess.Popen[bytes]] = None

    @property
    def connection(self) -> Connection:
        """To the brokers."""
        return connect_to(self.brokers)

    def environment(self, **more: str) -> Dict[str, str]:
        """Of a process of the fleet."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("ARGUS_")},
            "ARGUS_BROKERS": self.brokers,
            "ARGUS_TOPIC_PREFIX": self.topics.prefix,
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    def start_broker(self) -> str:
        """Starts Kafka where none was named; its address."""
        if self._broker is not None:
            self._broker.start()
            self.brokers = self._broker.address
        return self.brokers

    def start_worker(self) -> str:
        """Starts a worker and waits until it is well; what it says of itself."""
        command = [sys.executable, "-m", "plarv", "worker", "--metrics-port", "0"]
        command += ["--partitions", "4", "--state-dir", str(self.folder / "workers")]
        log = self.folder / "worker.log"
        with log.open("wb") as stream:
            self._worker = subprocess.Popen(
                command, env=self.environment(ARGUS_MASTER_KEY=self.master_key), stderr=stream
            )
        _wait_for(lambda: _is_well(_health_of(log)), _READY_S, "the worker")
        found = re.search(r"worker \S+: (.*)", log.read_text())
        return found[1] if found else ""

    def train(self) -> subprocess.Popen[bytes]:
        """Starts the job. Each rank is given the key of its run, and no other."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(RANKS), str(HERE / "train.py")]
        return subprocess.Popen(
            command,
            env=self.environment(
                ARGUS_RUN_ID=self.run_id,
                ARGUS_RUN_KEY=run_key(self.master_key, self.run_id).hex(),
                ARGUS_DIR=str(self.folder / "argus"),
                ARGUS_SILENT="1",
                OMP_NUM_THREADS="1",
                OUT=str(self.folder),
            ),
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "job.log").open("wb"),
        )

    def replay(self) -> Tuple[int, str]:
        """``argus replay --compare`` in a process of its own: exit code and what it prints."""
        command = [sys.executable, "-m", "plarv", "replay", "--from", f"kafka://{self.brokers}"]
        command += ["--runs", self.run_id, "--compare"]
        done = subprocess.run(
            command, env=self.environment(), check=False, capture_output=True, text=True
        )
        return done.returncode, (done.stdout + done.stderr).strip()

    def stop(self) -> None:
        """Ends what was started."""
        if self._worker is not None:
            self._worker.terminate()
            try:
                self._worker.wait(20)
            except subprocess.TimeoutExpired:
                self._worker.kill()
        if self._broker is not None:
            self._broker.stop()


class Timeline:
    """Prints what comes over the topics, each record once, with the time since the start."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._began = time.monotonic()
        self._seen: Dict[str, None] = {}
        self._lock = threading.Lock()
        self.applied: Dict[int, int] = {}  # rank -> step
        self.decided: Optional[Action] = None
        self.finished = 0  # ranks
        for topic in (fleet.topics.verdicts, fleet.topics.actions, fleet.topics.steps):
            threading.Thread(target=self._follow, args=(topic,), daemon=True).start()

    def _follow(self, topic: str) -> None:
        with open_topic(self._fleet.connection, topic) as reader:
            partition = reader.partition_of(self._fleet.run_id)
            for record in reader.follow({partition: 0}):
                if record is None or record.key != self._fleet.run_id.encode():
                    continue
                table = header(record.headers, TABLE_HEADER)
                found: List[Any] = []
                if table == "verdicts":
                    found = [decode_verdict(record.value or b"")]
                elif table == "actions":
                    found = [decode_action(record.value or b"")]
                elif table == "events":
                    found = list(decode_events(record.headers, record.value or b""))
                for each in found:
                    self._show(each)

    def _show(self, record: Record) -> None:
        with self._lock:
            key = (
                f"{record.session}/{record.record}"
                if isinstance(record, ControlEvent)
                else record.id
            )
            if key in self._seen:
                return
            self._seen[key] = None
            line = self._line(record)
        if line:
            seconds = time.monotonic() - self._began
            sys.stdout.write(f"  {seconds:5.1f} s  {line}\n")
            sys.stdout.flush()

    def _line(self, record: Record) -> str:
        if isinstance(record, Verdict):
            word = record.state if record.state == "resolved" else record.level
            return f"step {record.step:4d}  verdict  {word:8}  {record.detector}: {record.message}"
        if isinstance(record, Action):
            if record.kind == "WARN":
                return ""
            if record.kind == "SET_LR" and self.decided is None:
                self.decided = record
            return f"step {record.step:4d}  action   {record.kind:8}  {record.reason}"
        if record.kind == "session_finished":
            self.finished += 1
        if record.kind.startswith("action_"):
            done, data = record.kind.replace("action_", ""), record.data
            if done == "applied" and data.get("kind") == "SET_LR":
                self.applied.setdefault(record.rank or 0, record.step or 0)
            rate = (
                f": learning rate {data['lr_before']:.3g} -> {data['lr']:.3g}"
                if "lr" in data
                else ""
            )
            return f"step {record.step:4d}  rank {record.rank}   {done:8}  {data.get('kind')}{rate}"
        return ""


def main() -> int:
    """Runs the demo; 0: the run was saved, and the replay is identical."""
    parser = argparse.ArgumentParser(description="A fleet on one machine.")
    parser.add_argument("--brokers", metavar="HOST:PORT", help="use these and start none")
    parser.add_argument("--keep", action="store_true", help="keep the folder of journals and logs")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="argus-fleet-"))
    fleet = Fleet(folder, options.brokers)
    try:
        return _run(fleet)
    except BrokerProblem as problem:
        sys.stderr.write(f"argus: {problem}\n")
        return 1
    finally:
        fleet.stop()
        if options.keep:
            sys.stdout.write(f"journals and logs: {folder}\n")
        else:
            subprocess.run(["rm", "-rf", str(folder)], check=False)


def _run(fleet: Fleet) -> int:
    _say("A fleet on this machine: Kafka, a worker, a training job of two ranks.")
    _say(f"At step {INJURED_AT} the job's learning rate becomes 60 times too high, and stays so.\n")
    _timed("Kafka", fleet.start_broker)
    _timed("worker", fleet.start_worker)
    job = fleet.train()
    _say(f"  job      torchrun, {RANKS} ranks, run {fleet.run_id}\n")
    timeline = Timeline(fleet)
    try:
        code = job.wait(_JOB_S)
    finally:
        job.kill()
    if code:
        _say((fleet.folder / "job.log").read_text(errors="replace")[-3000:])
        _say(f"the job failed with exit code {code}")
        return 1
    _wait_for(lambda: timeline.finished >= RANKS, _SETTLE_S, "the end of the log")
    return _conclude(fleet, timeline)


def _conclude(fleet: Fleet, timeline: Timeline) -> int:
    ranks = [json.loads((fleet.folder / f"rank-{r}.json").read_text()) for r in range(RANKS)]
    losses = ranks[0]["losses"]
    before = statistics.median(losses[INJURED_AT - 20 : INJURED_AT])
    after = statistics.median(losses[-20:])
    same = len({rank["weights"] for rank in ranks}) == 1
    at = sorted(set(timeline.applied.values()))
    together = len(timeline.applied) == RANKS and len(at) == 1
    code, said = _settled_replay(fleet)
    _say("\nwhat came of it")
    if timeline.decided is not None:
        _say(f"  injured at step {INJURED_AT}; SET_LR decided at step {timeline.decided.step}")
    steps, by = ", ".join(map(str, at)) or "-", len(timeline.applied)
    _say(f"  applied at step {steps} by {by} of {RANKS} ranks")
    _say(f"  loss {before:.2f} before the injury, {after:.2f} at the end")
    _say(f"  the ranks hold {'the same weights, bit for bit' if same else 'DIFFERENT weights'}")
    _say(f"  replay of the log in a fresh process: {said}")
    return 0 if together and same and code == 0 else 1


def _settled_replay(fleet: Fleet) -> Tuple[int, str]:
    """The comparison, once the worker has judged the last event."""
    until = time.monotonic() + _SETTLE_S
    code, said = fleet.replay()
    while code and time.monotonic() < until:
        time.sleep(1.0)
        code, said = fleet.replay()
    return code, said


def _timed(what: str, start: Callable[[], str]) -> None:
    began = time.monotonic()
    said = start()
    _say(f"  {what:7}  {said} ({time.monotonic() - began:.1f} s)")


def _health_of(log: Path) -> str:
    found = re.search(r"(http://\S+)/metrics", log.read_text())
    return f"{found[1]}/healthz" if found else ""


def _is_well(url: str) -> bool:
    import urllib.request

    if not url:
        return False
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait_for(is_there: Callable[[], bool], limit_s: float, what: str) -> None:
    until = time.monotonic() + limit_s
    while not is_there():
        if time.monotonic() > until:
            raise SystemExit(f"argus: {what} did not come within {limit_s:.0f} s")
        time.sleep(0.1)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
