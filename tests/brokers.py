"""Where tests find a real Kafka: ARGUS_TEST_BROKERS, else Docker, else deploy/local-broker."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn, Protocol

import pytest

__all__ = ["Broker", "OwnBroker", "find_broker", "own_broker"]

NAMED = os.environ.get("ARGUS_TEST_BROKERS", "")  # read before tests lose their ARGUS_*
ROOT = Path(__file__).resolve().parents[1]
IMAGE = "apache/kafka:4.1.1"


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
    address = NAMED

    def stop(self) -> None:
        """It is not ours."""


class _Docker:
    def __init__(self) -> None:
        from testcontainers.community.kafka import KafkaContainer

        self._container: Any = KafkaContainer(IMAGE).with_kraft()
        self._container.start()
        self.address = str(self._container.get_bootstrap_server())

    def stop(self) -> None:
        self._container.stop()


def find_broker() -> Broker:
    """A broker for the whole test run; a skip where none can be had, a failure with CI=true."""
    if NAMED:
        return _Named()
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
    module = local_broker()
    try:
        broker: OwnBroker = module.LocalBroker(folder, **options)
        broker.start()
    except module.BrokerProblem as problem:
        _give_up(str(problem))
    return broker


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
