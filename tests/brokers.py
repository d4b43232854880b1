"""Where tests find a real Kafka: ARGUS_TEST_BROKERS, else Docker, else deploy/local-broker."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Mapping, NoReturn, Protocol

import pytest

__all__ = [
    "Broker",
    "OwnBroker",
    "container_settings",
    "find_broker",
    "local_broker",
    "own_broker",
    "require_local_broker",
]

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "apache/kafka:4.1.1"
CONTAINER_START_S = 90.0


class Broker(Protocol):
    """A broker that somebody started."""

    @property
    def address(self) -> str: ...
    def stop(self) -> None: ...


class OwnBroker(Broker, Protocol):
    """One that a test may kill."""

    data: Path

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def restart(self) -> None: ...


class _Named:
    def __init__(self, address: str) -> None:
        self.address = address

    def stop(self) -> None:
        """It is not ours."""


class _Docker:
    """Apache's image; testcontainers' own KafkaContainer starts Confluent's alone."""

    def __init__(self) -> None:
        from testcontainers.core.container import DockerContainer

        port = local_broker().free_port()  # known beforehand: clients are told it
        self._container: Any = DockerContainer(IMAGE).with_bind_ports(9092, port)
        host = str(self._container.get_container_host_ip())
        for name, value in container_settings(host, port).items():
            self._container.with_env(name, value)
        self._container.start()
        try:
            self._wait(host, port)
        except BaseException:
            self.stop()
            raise
        self.address = f"{host}:{port}"

    def _wait(self, host: str, port: int) -> None:
        until = time.monotonic() + CONTAINER_START_S
        while not local_broker().answers(host, port):
            if time.monotonic() > until:
                said = b"\n".join(self._container.get_logs()).decode(errors="replace")
                pytest.fail(f"{IMAGE} does not answer at {host}:{port}:\n{said[-2000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        self._container.stop()


def container_settings(host: str, port: int) -> Mapping[str, str]:
    """What the image is told: the local broker's settings, reached as host:port from outside."""
    settings = {
        **local_broker().LocalBroker(Path("unused"), port=port).settings(),
        "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "advertised.listeners": f"PLAINTEXT://{host}:{port}",
        "controller.quorum.voters": "1@localhost:9093",
        "log.dirs": "/var/lib/kafka/data",
    }
    return {f"KAFKA_{name.upper().replace('.', '_')}": value for name, value in settings.items()}


def find_broker(named: str = "") -> Broker:
    """A broker for the whole test run; a skip where none can be had, a failure with CI=true.

    ``named``, where it is not empty, is the address of one that runs.
    """
    if named:
        return _Named(named)
    if docker_answers():
        return _Docker()
    folder = Path(tempfile.mkdtemp(prefix="argus-broker-"))
    broker = _local(folder)
    return _Removed(broker, folder)


def own_broker(folder: Path, **options: Any) -> OwnBroker:
    """A started broker of a test's own, with its data in ``folder``; the same rule."""
    return _local(folder, **options)


def docker_answers() -> bool:
    """Whether a Docker engine is at work."""
    docker = shutil.which("docker")
    if docker is None or importlib.util.find_spec("testcontainers") is None:
        return False
    try:
        found = subprocess.run([docker, "info"], check=False, capture_output=True, timeout=20)
    except subprocess.TimeoutExpired:
        return False
    return found.returncode == 0


class _Removed:
    """A local broker whose data goes with it."""

    def __init__(self, broker: OwnBroker, folder: Path) -> None:
        self._broker, self._folder = broker, folder
        self.address = broker.address

    def stop(self) -> None:
        self._broker.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _local(folder: Path, **options: Any) -> OwnBroker:
    broker: OwnBroker = require_local_broker().LocalBroker(folder, **options)
    broker.start()  # one that breaks is a failure, no skip
    return broker


def require_local_broker() -> Any:
    """The module of deploy/local-broker, once Java and the jars are here; else the same rule."""
    module = local_broker()
    try:
        module.find_java()
        module.fetch_jars()
    except module.BrokerProblem as problem:
        _give_up(str(problem))
    return module


def local_broker() -> Any:
    """The module of deploy/local-broker."""
    path = ROOT / "deploy" / "local-broker" / "local_broker.py"
    known = sys.modules.get("local_broker")
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location("local_broker", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["local_broker"] = module
    spec.loader.exec_module(module)
    return module


def _give_up(why: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)
