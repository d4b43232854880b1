"""A real Kafka without Docker: one node in KRaft mode, from its published jars. Java 17 and Maven.

    python deploy/local-broker/local_broker.py run [--port N] [--data DIR]

runs until Ctrl-C. The jars (about 45 MB) are fetched once, by Maven as it is set up on this
machine, into ~/.cache/argus. Tests and benchmarks use :class:`LocalBroker`.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Mapping, Optional

__all__ = ["BrokerProblem", "LocalBroker", "answers", "fetch_jars", "find_java", "free_port"]

HERE = Path(__file__).resolve().parent
KAFKA = "4.1.1"
CLUSTER = "MkU3OEVBNTcwNTJENDM2Qg"
JAVA = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx512m"]
START_S = 90.0
STOP_S = 20.0

# Runs as a program of its own, and becomes Java: code between fork and exec may deadlock where
# the caller has threads. 1 is PR_SET_PDEATHSIG; a parent that is gone already signals nothing.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
os.setpgid(0, 0)  # Ctrl-C is for the one who started it
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (AttributeError, OSError):
    pass  # not Linux
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class BrokerProblem(Exception):
    """The broker cannot be had, or does not start; the message says what to do."""


class LocalBroker:
    """A single-node broker on the loopback interface; its data and port outlive a kill.

    On Linux the broker dies with the thread that started it: start it in one that lasts.
    """

    def __init__(
        self,
        data: Path,
        *,
        port: int = 0,
        advertised_port: Optional[int] = None,
        properties: Optional[Mapping[str, str]] = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            data: folder of the broker's data, properties and log.
            port: to listen on; 0: a free one.
            advertised_port: that clients are told, where a proxy stands in between.
            properties: more lines of server.properties, or others in the place of ours.
        """
        self.data = data
        self.port = port or free_port()
        self._controller_port = free_port()
        self._advertised_port = advertised_port or self.port
        self._properties = dict(properties or {})
        self._process: Optional[subprocess.Popen[bytes]] = None

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the Java process; 0: it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Starts it and waits until it answers. BrokerProblem: it does not, and why."""
        jars = fetch_jars()
        self.data.mkdir(parents=True, exist_ok=True)
        config = self.data / "server.properties"
        config.write_text(
            "".join(f"{name}={value}\n" for name, value in self.settings().items()),
            encoding="utf-8",
        )
        base = [find_java(), *JAVA, f"-Dlog4j2.configurationFile={HERE / 'log4j2.properties'}"]
        base += ["-cp", f"{jars}/*"]
        if not (self.data / "log" / "meta.properties").exists():
            command = [*base, "kafka.tools.StorageTool", "format", "-t", CLUSTER, "-c", str(config)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                raise BrokerProblem(f"Kafka's storage could not be made:\n{_last(done.stderr)}")
        with open(self.data / "broker.log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _DIE_WITH_PARENT,
                    str(os.getpid()),
                    *base,
                    "kafka.Kafka",
                    config,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait()

    def kill(self) -> None:
        """SIGKILL, as a machine that loses its power."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Starts it again: same data, same port."""
        self._end(signal.SIGKILL)
        self.start()

    def stop(self) -> None:
        """Stops it."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def settings(self) -> Dict[str, str]:
        """Its server.properties."""
        here, controller = f"127.0.0.1:{self.port}", f"127.0.0.1:{self._controller_port}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "listeners": f"PLAINTEXT://{here},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._advertised_port}",
            "controller.listener.names": "CONTROLLER",
            "controller.quorum.voters": f"1@{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self.data / "log"),
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "broker.session.timeout.ms": "3000",  # a restart waits for the killed one's
            "broker.heartbeat.interval.ms": "500",
            "group.initial.rebalance.delay.ms": "0",
            "auto.create.topics.enable": "false",
            "log.cleaner.backoff.ms": "1000",  # what is due is compacted or deleted at once
            "log.initial.task.delay.ms": "1000",
            "log.retention.check.interval.ms": "1000",
            **self._properties,
        }

    def _wait(self) -> None:
        """Until the port accepts and the broker has registered (its log is then quiet)."""
        process = self._process
        assert process is not None
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if process.poll() is not None:
                break
            if answers("127.0.0.1", self.port):
                return
            time.sleep(0.05)
        self.kill()
        log = (self.data / "broker.log").read_text(encoding="utf-8", errors="replace")
        raise BrokerProblem(f"Kafka did not start:\n{_last(log)}")


def fetch_jars() -> Path:
    """The folder of Kafka's jars, fetched by Maven where it is not there. BrokerProblem."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argus"
    jars = home / f"kafka-{KAFKA}"
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise BrokerProblem(
            "a local Kafka needs Maven to fetch it (on Debian and Ubuntu: apt install maven); "
            "or name a broker: ARGUS_TEST_BROKERS=host:9092"
        )
    find_java()
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two starts at once
        if not jars.is_dir():
            _say(f"fetching Kafka {KAFKA}, once: about 45 MB")
            _copy_dependencies(maven, home, jars)
    return jars


def _copy_dependencies(maven: str, home: Path, jars: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home) as folder:
        shutil.copy(HERE / "pom.xml", folder)
        command = [maven, "-q", "-B", "-f", f"{folder}/pom.xml", "dependency:copy-dependencies"]
        command += ["-DincludeScope=runtime", f"-DoutputDirectory={folder}/jars"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = _last(done.stdout + done.stderr)
            raise BrokerProblem(f"Maven could not fetch Kafka:\n{said}")
        os.rename(f"{folder}/jars", jars)


def find_java() -> str:
    """Java 17 or later. BrokerProblem: there is none."""
    java = shutil.which("java")
    if java is not None:
        said = subprocess.run([java, "-version"], check=False, capture_output=True, text=True)
        match = re.search(r'version "(\d+)', said.stderr)
        if match and int(match[1]) >= 17:
            return java
    raise BrokerProblem(
        "a local Kafka needs Java 17 or later (on Debian and Ubuntu: apt install "
        "openjdk-17-jre-headless); or name a broker: ARGUS_TEST_BROKERS=host:9092"
    )


def answers(host: str, port: int) -> bool:
    """Whether a broker answers an ApiVersions request there: it does once it is registered."""
    request = b"\x00\x12\x00\x00\x00\x00\x00\x01\x00\x01x"  # key 18, version 0, id 1, client "x"
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            connection.sendall(len(request).to_bytes(4, "big") + request)
            return len(connection.recv(8)) > 0
    except OSError:
        return False


def free_port() -> int:
    """A port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _last(text: str, lines: int = 12) -> str:
    said = [line for line in text.strip().splitlines() if not line.startswith(("\tat ", "\t..."))]
    return "\n".join(said[-lines:])


def _say(text: str) -> None:
    sys.stderr.write(f"argus: {text}\n")
    sys.stderr.flush()


def main(arguments: List[str]) -> int:
    """Runs a broker until it is interrupted; exit status."""
    parser = argparse.ArgumentParser(description="A single-node Kafka on this machine.")
    parser.add_argument("command", nargs="?", choices=["run"], default="run", help="the only one")
    parser.add_argument("--port", type=int, default=9092, help="default: 9092; 0: a free one")
    parser.add_argument("--data", type=Path, help="kept there (default: a folder that is removed)")
    options = parser.parse_args(arguments)
    temporary = None if options.data else tempfile.TemporaryDirectory(prefix="argus-broker-")
    broker = LocalBroker(options.data or Path(str(temporary and temporary.name)), port=options.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        broker.start()
        print(f"brokers: {broker.address}", flush=True)
        signal.pause()
    except BrokerProblem as problem:
        _say(str(problem))
        return 1
    except KeyboardInterrupt:
        pass
    finally:
        broker.stop()
        if temporary is not None:
            temporary.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
