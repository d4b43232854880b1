"""A detector that raises or hangs, a broker that is killed or deaf: nothing else is lost."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, List

import pytest

pytest.importorskip("faust")
pytest.importorskip("kafka")

from tests.fleets import TopicsOnTest, going_wrong
from tests.integration.faulty_worker import DETECTORS, FAULT_STEP
from tests.integration.fleet import (
    WorkerProcess,
    assert_log_and_results_agree,
    controls,
    drain,
    folded_runs,
    interleaved,
    messages_of,
    named,
    until,
    workers,
)
from tests.integration.load import Load
from tests.proxies import Proxy

MODULE = ("tests.integration.faulty_worker",)


@pytest.fixture
def fleet(broker_address: str, topic_prefix: str) -> TopicsOnTest:
    """Topics of this test's own."""
    return TopicsOnTest(broker_address, topic_prefix)


def _steps_of(records: Any, detector: str, run_id: str) -> List[int]:
    return sorted(
        each["step"]
        for each in records.values()
        if each.get("detector") == detector and each["run_id"] == run_id
    )


def test_a_detector_that_raises_is_off_for_that_run_alone(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    rng = random.Random(1)
    queues = [messages_of(rng, named("spike", run)) for run in ("raise-1", "fine-1", "fine-2")]
    worker = WorkerProcess(fleet, tmp_path, "w1", module=MODULE)
    with workers(worker):
        fleet.put(fleet.topics.steps, interleaved(rng, queues))
        drain(fleet)
        assert worker.metric("argus_detector_faults_total", detector="raising") == 1
    records = assert_log_and_results_agree(fleet, DETECTORS)
    assert max(_steps_of(records, "raising", "raise-1")) < FAULT_STEP
    assert max(_steps_of(records, "raising", "fine-1")) > 2 * FAULT_STEP
    assert max(_steps_of(records, "hanging", "raise-1")) > 2 * FAULT_STEP


def test_a_detector_that_hangs_is_left_out_of_that_run_and_the_worker_goes_on(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    rng = random.Random(2)
    queues = [messages_of(rng, named("spike", run)) for run in ("hang-1", "fine-1", "fine-2")]
    worker = WorkerProcess(fleet, tmp_path, "w1", module=MODULE)
    with workers(worker):
        fleet.put(fleet.topics.steps, interleaved(rng, queues))
        drain(fleet)
        assert "hangs on run hang-1" in worker.said()
    (event,) = controls(fleet, "hang-1", "detector_left_out")
    assert event.data["detector"] == "hanging"
    # It names the last event that the policy had folded: before the one that the detector hung on.
    (fault,) = [
        ordinal
        for ordinal, each in enumerate(
            each for each in folded_runs(fleet)["hang-1"] if each.session == "session-0"
        )
        if getattr(each, "step", None) == FAULT_STEP and hasattr(each, "loss")
    ]
    assert event.data["ordinal"] < fault
    records = assert_log_and_results_agree(fleet, DETECTORS)
    assert max(_steps_of(records, "hanging", "hang-1")) < FAULT_STEP
    assert max(_steps_of(records, "raising", "hang-1")) > 2 * FAULT_STEP
    for run_id in ("fine-1", "fine-2"):
        assert max(_steps_of(records, "hanging", run_id)) > 2 * FAULT_STEP
        assert not controls(fleet, run_id, "detector_left_out")


@pytest.mark.slow
def test_a_broker_that_is_killed_for_10_s_under_load_costs_nothing(
    own_broker: Any, topic_prefix: str, tmp_path: Path
) -> None:
    fleet = TopicsOnTest(own_broker.address, topic_prefix)
    worker = WorkerProcess(fleet, tmp_path, "w1", "--snapshot-every", "1")
    with workers(worker), Load(fleet, random.Random(3)) as load:
        until("steps flow", lambda: load.acknowledged > 50)
        own_broker.kill()
        away = time.monotonic() + 10.0
        until("10 s pass", lambda: time.monotonic() > away)
        own_broker.restart()
        behind = load.sent
        until("what waited has come", lambda: load.acknowledged > behind)
        load.finish()
        assert worker.is_alive(), worker.said()[-2000:]
        drain(fleet)
    load.assert_complete(fleet)
    assert assert_log_and_results_agree(fleet)


def test_a_worker_waits_for_a_broker_that_accepts_and_never_answers(
    fleet: TopicsOnTest, tmp_path: Path
) -> None:
    host, _, port = fleet.address.rpartition(":")
    proxy = Proxy((host, int(port)))
    proxy.deaf = True
    worker = WorkerProcess(fleet, tmp_path, "w1", brokers=proxy.address)
    try:
        worker.start()
        until("it says that it waits", lambda: "waiting for them" in worker.said())
        assert worker.is_alive()
        proxy.deaf = False
        worker.ready()
        fleet.put_events(going_wrong("run"))
        drain(fleet)
        assert_log_and_results_agree(fleet)
    finally:
        worker.kill()
        proxy.close()
