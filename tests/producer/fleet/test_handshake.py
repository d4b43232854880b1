"""What the constructor says of a fleet that cannot be reached, and what it leaves behind."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any, Iterator, Tuple

import pytest
from tests.fleets import TopicsOnTest
from tests.producer.fleet.fleet_runs import arrived, shipped, transport_of, until
from tests.producer.processes import run
from tests.producer.runs import folder_of, healthy
from tests.proxies import Proxy

from plarv.client import Argus
from plarv.exceptions import (
    ArgusAuthenticationError,
    ArgusConfigurationError,
    ArgusConnectionError,
)
from plarv_processors.kafka_topics import describe_topics
from plarv_schemas.kafka_connection import connect_to
from plarv_schemas.topics import Topics

pytest.importorskip("kafka")
pytest.importorskip("pyarrow")

USER, SECRET = "argus", "a-secret"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture
def deaf() -> Iterator[Proxy]:
    """An address that accepts connections and never answers."""
    proxy = Proxy()
    yield proxy
    proxy.close()


def nothing_is_left() -> bool:
    place = Path(os.environ["ARGUS_DIR"])
    return not place.exists() or not list(place.glob("runs/*/*"))


@pytest.mark.parametrize("brokers", ["nowhere", "a:b", [], "a:9092,,b:0"])
def test_an_address_that_cannot_be_is_a_wrong_setting(brokers: Any) -> None:
    if not brokers:  # none at all is the embedded engine
        Argus(brokers=brokers).complete()
        return
    with pytest.raises(ArgusConfigurationError, match="broker"):
        Argus(brokers=brokers)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"run_key": "00"}, "64 hex digits"),
        ({"api_key": "no-secret"}, "id:secret"),
    ],
)
def test_a_key_that_cannot_be_is_a_wrong_setting(arguments: Any, match: str) -> None:
    with pytest.raises(ArgusConfigurationError, match=match):
        Argus(brokers="127.0.0.1:9", **arguments)
    assert nothing_is_left()


def test_where_nobody_listens_the_constructor_says_so_in_time() -> None:
    address = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(ArgusConnectionError, match=f"{address}.*argus topics create.*argus worker"):
        Argus(brokers=address, step0_timeout=3.0)
    assert time.monotonic() - begin < 10.0  # of its 3 s
    assert nothing_is_left()


def test_where_nobody_answers_the_constructor_says_so_in_time(deaf: Proxy) -> None:
    with pytest.raises(ArgusConnectionError, match=deaf.address):
        Argus(brokers=deaf.address, step0_timeout=2.0)
    assert deaf.connections
    assert nothing_is_left()


def test_missing_topics_are_named(
    broker_address: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    with pytest.raises(ArgusConnectionError, match=f"no topic {topic_prefix}.steps"):
        Argus(brokers=broker_address, step0_timeout=4.0)
    assert nothing_is_left()
    states = describe_topics(connect_to(broker_address), Topics(topic_prefix))
    assert all(state.partitions == 0 for state in states)  # it has not made them either


@pytest.mark.slow
def test_with_fail_open_the_run_goes_on_and_is_shipped_once_the_broker_comes(
    fleet: TopicsOnTest, own_broker: Any, topic_prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own_broker.kill()
    argus = Argus(run_id="a-run", brokers=own_broker.address, fail_open=True)
    said = capsys.readouterr().err
    assert "the run goes on, and is shipped once they answer" in said
    healthy(argus, 500)
    own_broker.restart()
    late = TopicsOnTest(own_broker.address, topic_prefix)
    until(lambda: shipped(late, folder_of(argus)))
    assert "the brokers answer again" in capsys.readouterr().err
    argus.complete()
    assert shipped(late, folder_of(argus))


def test_with_fail_open_and_a_broker_that_never_answers_the_exit_is_in_time(
    deaf: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = Argus(run_id="a-run", brokers=deaf.address, fail_open=True, step0_timeout=2.0)
    healthy(argus, 10)
    begin = time.monotonic()
    argus.complete()
    took_s = time.monotonic() - begin
    assert took_s < 2.5, took_s
    said = capsys.readouterr().err
    assert (
        f"12 events not shipped yet: the run's next start or `argus sync {argus.run_dir}`" in said
    )


def test_a_broker_that_stops_to_answer_costs_the_exit_two_seconds(
    proxied: Tuple[TopicsOnTest, Proxy], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, proxy = proxied
    argus = Argus(run_id="a-run", brokers=proxy.address)
    healthy(argus, 10)
    until(lambda: len(arrived(fleet, "a-run")) > 1)
    until(lambda: transport_of(argus).describe() == "")
    proxy.deaf = True
    argus.step(2.0)
    begin = time.monotonic()
    argus.complete()
    assert time.monotonic() - begin < 2.5
    assert "2 events not shipped yet" in capsys.readouterr().err
    proxy.deaf = False


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a broker that wants SASL/PLAIN credentials."""
    from tests.brokers import own_broker as start_broker

    plain, sasl, controller = free_port(), free_port(), free_port()
    login = "org.apache.kafka.common.security.plain.PlainLoginModule"
    jaas = f'{login} required user_{USER}="{SECRET}";'
    broker = start_broker(
        tmp_path_factory.mktemp("guarded"),
        port=plain,
        properties={
            "listeners": f"PLAINTEXT://127.0.0.1:{plain},GUARDED://127.0.0.1:{sasl},"
            f"CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{plain},GUARDED://127.0.0.1:{sasl}",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,GUARDED:SASL_PLAINTEXT,"
            "CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.name.guarded.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.guarded.plain.sasl.jaas.config": jaas,
        },
    )
    TopicsOnTest(broker.address, "guarded")
    yield f"127.0.0.1:{sasl}"
    broker.stop()


@pytest.fixture
def _over_sasl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARGUS_KAFKA_PROTOCOL", "SASL_PLAINTEXT")
    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", "guarded")


@pytest.mark.usefixtures("_over_sasl")
def test_the_api_key_is_the_sasl_name_and_secret(
    guarded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = Argus(brokers=guarded, api_key=f"{USER}:{SECRET}")
    healthy(argus, 10)
    argus.complete()
    assert transport_of(argus).describe() == ""
    assert SECRET not in capsys.readouterr().err


@pytest.mark.usefixtures("_over_sasl")
@pytest.mark.parametrize("api_key", [f"{USER}:wrong", f"somebody:{SECRET}"])
def test_wrong_credentials_are_said_at_once(guarded: str, api_key: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ArgusAuthenticationError, match="check api_key") as raised:
        Argus(brokers=guarded, api_key=api_key, step0_timeout=60.0)
    assert time.monotonic() - begin < 30.0  # it does not try again and again
    assert api_key.partition(":")[2] not in str(raised.value)
    assert nothing_is_left()


@pytest.mark.usefixtures("_over_sasl")
def test_with_fail_open_wrong_credentials_are_one_line(
    guarded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argus = Argus(brokers=guarded, api_key=f"{USER}:wrong", fail_open=True)
    healthy(argus, 3)
    argus.complete()
    said = capsys.readouterr().err
    assert said.count("refuse the credentials") == 1
    assert "5 events not shipped yet" in said


def test_the_secret_is_in_no_list_of_processes(fleet: TopicsOnTest) -> None:
    argus = Argus(run_id="a-run", run_key="ab" * 32)
    pid = transport_of(argus).child_pid
    assert b"plarv.fleet.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"abab" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    argus.complete()


def test_without_what_kafka_needs_the_error_says_what_to_install(tmp_path: Path) -> None:
    program = """
    import sys
    missing = sys.argv[1]
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name: None if name == missing else found(name)
    from plarv import Argus, ArgusConfigurationError
    try:
        Argus(brokers="127.0.0.1:9092", fail_open=True)
    except ArgusConfigurationError as error:
        print(error)
    """
    for module, name in (("kafka", "kafka-python"), ("pyarrow", "pyarrow")):
        done = run(tmp_path, program, module)
        assert done.stdout == f"brokers need {name}: pip install 'plarv-argus-sdk[kafka]'\n"
