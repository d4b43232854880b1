"""Workers and the broker are killed at random points; every record is there, and as folded."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Dict

import pytest

pytest.importorskip("faust")
pytest.importorskip("kafka")

from tests.fleets import TopicsOnTest
from tests.integration.fleet import (
    WorkerProcess,
    assert_log_and_results_agree,
    drain,
    until,
    workers,
)
from tests.integration.load import Load

SEED = os.environ.get("ARGUS_CHAOS_SEED", "")  # read before tests lose their ARGUS_*
_BROKER_SHARE = 0.2  # of the kills
_STOP_SHARE = 0.2  # of the workers' ends are no kills: a group is left in good order, too


def _chaos(own_broker: Any, prefix: str, folder: Path, kills: int, seed: int) -> None:
    sys.stdout.write(f"ARGUS_CHAOS_SEED={seed}\n")  # pytest shows it where the test fails
    rng = random.Random(seed)
    fleet = TopicsOnTest(own_broker.address, prefix)
    pair = [WorkerProcess(fleet, folder, f"w{n}", "--snapshot-every", "1") for n in (1, 2)]
    with workers(*pair), Load(fleet, random.Random(seed + 1)) as load:
        done: Dict[str, int] = {"broker": 0, "worker": 0}
        while sum(done.values()) < kills:
            _let_pass(rng.uniform(0.2, 5.0))
            if rng.random() < _BROKER_SHARE:
                own_broker.kill()
                _let_pass(rng.uniform(0.0, 2.0))
                own_broker.restart()
                done["broker"] += 1
                continue
            worker = rng.choice(pair)
            if rng.random() < _STOP_SHARE:
                worker.stop()
            else:
                worker.kill()
                done["worker"] += 1
            _let_pass(rng.uniform(0.0, 1.5))
            worker.start()  # the next kill may come while it rebuilds
        sys.stdout.write(f"kills: {done}, messages: {load.acknowledged} of {load.sent}\n")
        load.finish()
        for worker in pair:
            worker.ready()
        drain(fleet, seconds=180)
    load.assert_complete(fleet)
    records = assert_log_and_results_agree(fleet)
    sys.stdout.write(f"records: {len(records)}\n")
    assert len(records) > 5


def _let_pass(seconds: float) -> None:
    """The chosen moment comes."""
    end = time.monotonic() + seconds
    until("time passes", lambda: time.monotonic() >= end)


def _seed() -> int:
    return int(SEED) if SEED else random.SystemRandom().randrange(1_000_000)


def test_eight_kills_lose_nothing_and_change_nothing(
    own_broker: Any, topic_prefix: str, tmp_path: Path
) -> None:
    _chaos(own_broker, topic_prefix, tmp_path, 8, _seed())


@pytest.mark.slow
def test_twenty_five_kills_lose_nothing_and_change_nothing(
    own_broker: Any, topic_prefix: str, tmp_path: Path
) -> None:
    _chaos(own_broker, topic_prefix, tmp_path, 25, _seed())
