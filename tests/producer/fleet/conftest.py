"""A fleet of each test's own: topics under one prefix on the tests' broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Iterator, Tuple

import pytest

if TYPE_CHECKING:
    from tests.fleets import TopicsOnTest
    from tests.proxies import Proxy


@pytest.fixture
def proxied(
    tmp_path: Path, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tuple[TopicsOnTest, Proxy]]:
    """Topics on a broker that is reached through a proxy alone, and the proxy."""
    from tests.brokers import own_broker as start_broker
    from tests.fleets import TopicsOnTest
    from tests.proxies import Proxy

    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    proxy = Proxy()
    broker = start_broker(tmp_path / "broker", advertised_port=proxy.port)
    proxy.target = ("127.0.0.1", int(broker.address.rpartition(":")[2]))
    try:
        yield TopicsOnTest(proxy.address, topic_prefix), proxy
    finally:
        broker.stop()
        proxy.close()


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> TopicsOnTest:
    from tests.fleets import TopicsOnTest

    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("ARGUS_BROKERS", broker_address)
    return TopicsOnTest(broker_address, topic_prefix)
