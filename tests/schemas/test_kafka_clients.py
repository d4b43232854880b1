"""Clients reach their brokers with the right credentials, and are told what is wrong else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.brokers import own_broker

from plarv_processors.kafka_topics import check_topics, create_topics
from plarv_schemas.kafka_clients import RefusedError, admin_client
from plarv_schemas.kafka_connection import Connection, connect_to
from plarv_schemas.topics import Topics

pytest.importorskip("kafka")

ROOT = Path(__file__).parents[2]
WITH_PASSWORDS = {
    "listener.security.protocol.map": "PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256",
    "sasl.mechanism.inter.broker.protocol": "PLAIN",
    "listener.name.plaintext.plain.sasl.jaas.config": (
        "org.apache.kafka.common.security.plain.PlainLoginModule required "
        'username="argus" password="secret" user_argus="secret";'
    ),
    "listener.name.plaintext.scram-sha-256.sasl.jaas.config": (
        "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    ),
}


def test_the_api_key_is_the_name_and_password_and_a_wrong_one_is_refused_at_once(
    tmp_path: Path,
) -> None:
    broker = own_broker(tmp_path / "broker", properties=WITH_PASSWORDS)
    try:
        right, wrong = (
            connect_to(broker.address, api_key=f"argus:{secret}", protocol="SASL_PLAINTEXT")
            for secret in ("secret", "guessed")
        )
        create_topics(right, Topics(), 2)
        assert check_topics(right, Topics()) == 2
        with pytest.raises(RefusedError, match=r"refuse the credentials \(Authentication failed"):
            check_topics(wrong, Topics())
        scram = right._replace(mechanism="SCRAM-SHA-256")  # which does not know the name yet
        with pytest.raises(RefusedError, match="refuse the credentials"):
            check_topics(scram, Topics())
        add_user(right, "argus", "other")
        assert check_topics(scram._replace(password="other"), Topics()) == 2
        with pytest.raises(RefusedError, match="refuse the credentials"):
            check_topics(scram, Topics())
        with pytest.raises(RefusedError, match="it has no such SASL mechanism"):
            check_topics(right._replace(mechanism="SCRAM-SHA-512"), Topics())
    finally:
        broker.stop()


def add_user(connection: Connection, name: str, password: str) -> None:
    """Lets somebody in with SCRAM, too."""
    from kafka.admin import UserScramCredentialUpsertion

    with admin_client(connection) as admin:
        client: Any = admin
        added = UserScramCredentialUpsertion(name, "SCRAM-SHA-256", password)
        assert client.alter_user_scram_credentials([added]) == {name: None}


def test_brokers_that_do_not_answer_are_told_in_one_line() -> None:
    with socket.socket() as busy:  # bound, and nobody listens
        busy.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        paths = [str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks")]
        done = subprocess.run(
            [sys.executable, "-m", "plarv", "topics", "list", "--brokers", address],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no answer from the brokers at {address}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
