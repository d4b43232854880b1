"""A fleet of each test's own: topics under one prefix on the tests' broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fleets import TopicsOnTest


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> TopicsOnTest:
    from tests.fleets import TopicsOnTest

    monkeypatch.setenv("ARGUS_TOPIC_PREFIX", topic_prefix)
    monkeypatch.setenv("ARGUS_BROKERS", broker_address)
    return TopicsOnTest(broker_address, topic_prefix)
