from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, List

import pytest
from tests.brokers import ROOT, container_settings, local_broker, require_local_broker

kafka: Any = pytest.importorskip("kafka")


def _record(address: str, value: bytes) -> int:
    producer = kafka.KafkaProducer(bootstrap_servers=address)
    offset: int = producer.send("first", value, partition=0).get(timeout=30).offset
    producer.close()
    return offset


def _records(address: str) -> List[bytes]:
    consumer = kafka.KafkaConsumer(
        "first", bootstrap_servers=address, auto_offset_reset="earliest", consumer_timeout_ms=30000
    )
    found = [next(consumer).value, next(consumer).value]
    consumer.close()
    return found


def test_what_was_written_survives_a_kill_at_the_same_address(own_broker: Any) -> None:
    address = own_broker.address
    admin = kafka.KafkaAdminClient(bootstrap_servers=address)
    admin.create_topics({"first": {"num_partitions": 1, "replication_factor": 1}})
    admin.close()
    assert _record(address, b"before") == 0
    pid = own_broker.pid
    own_broker.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    own_broker.restart()
    assert own_broker.address == address
    assert _record(address, b"after") == 1
    assert _records(address) == [b"before", b"after"]
    pid = own_broker.pid
    own_broker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


_STARTS_A_BROKER = """
import sys, time
from pathlib import Path
from local_broker import LocalBroker
broker = LocalBroker(Path(sys.argv[1]))
broker.start()
print(broker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell a child")
def test_a_test_run_that_is_killed_leaves_no_broker_behind(tmp_path: Path) -> None:
    require_local_broker()
    parent = subprocess.Popen(
        [sys.executable, "-c", _STARTS_A_BROKER, str(tmp_path / "its")],
        cwd=ROOT / "deploy" / "local-broker",
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    with parent.stdout as said:
        pid = int(said.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 30.0
    while _is_java(pid):
        assert time.monotonic() < until, "the broker outlived its parent"
        time.sleep(0.05)


def _is_java(pid: int) -> bool:
    """Whether it runs: one that is dead may wait for whoever inherits it."""
    try:
        return "java" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_container_is_told_in_its_own_words_where_it_is_reached() -> None:
    told = container_settings("docker.example", 32000)
    assert told["KAFKA_ADVERTISED_LISTENERS"] == "PLAINTEXT://docker.example:32000"
    assert told["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert not any("127.0.0.1" in value for value in told.values())  # it would reach itself alone


def test_a_port_that_is_taken_is_told_with_the_brokers_own_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        module = require_local_broker()
        broker = module.LocalBroker(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(module.BrokerProblem, match=r"did not start:\n(.|\n)*in use"):
            broker.start()


@pytest.mark.parametrize(
    ("missing", "advice"), [("java", "openjdk-17"), ("mvn", "apt install maven")]
)
def test_what_is_missing_is_named_with_how_to_get_it(
    missing: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {"java", "mvn"} - {missing}:
        tool = tools / name
        tool.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write('version \"17.0\"')\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = local_broker()
    with pytest.raises(module.BrokerProblem, match=advice):
        module.LocalBroker(tmp_path / "data").start()


def test_what_maven_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, said in (("java", 'version \\"17.0\\"'), ("mvn", "no such repository")):
        tool = tools / name
        tool.write_text(
            f"#!{sys.executable}\nimport sys\nsys.stderr.write('{said}')\n"
            f"sys.exit({int(name == 'mvn')})\n"
        )
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = local_broker()
    with pytest.raises(module.BrokerProblem, match="no such repository"):
        module.LocalBroker(tmp_path / "data").start()
    assert not list((tmp_path / "cache" / "argus").glob("kafka-*"))
