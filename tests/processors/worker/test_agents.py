from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faust")

from plarv_processors.app import build_app, build_fleet
from plarv_processors.detectors import BUILTIN
from plarv_processors.worker.config import WorkerConfig
from plarv_schemas.kafka_connection import connect_to


def _config(tmp_path: Path, **changes: Any) -> WorkerConfig:
    return WorkerConfig(
        connection=connect_to("127.0.0.1:1"),
        **{"detectors": BUILTIN, "all_detectors": BUILTIN, "state_dir": tmp_path, **changes},
    )


def test_there_are_twelve_agents_one_a_detector(tmp_path: Path) -> None:
    app = build_app(_config(tmp_path))
    assert len(app.agents) == 12
    assert {name.rpartition(".")[2] for name in app.agents} == {
        f"detector-{cls.name}" for cls in BUILTIN
    }


def test_every_agent_has_a_state_and_a_position_of_its_own(tmp_path: Path) -> None:
    shell = build_fleet(_config(tmp_path)).detectors
    lanes = shell.new_lanes(3)
    assert len({lane.name for lane in lanes}) == 12
    lanes[0].next = 7
    lanes[0].entry("run", 6)
    assert [lane.next for lane in lanes[1:]] == [0] * 11
    assert all(not lane.runs for lane in lanes[1:])


def test_the_policy_is_an_app_of_its_own(tmp_path: Path) -> None:
    fleet = build_fleet(_config(tmp_path))
    assert fleet.policy is not None
    assert fleet.policy.app.conf.id != fleet.detectors.app.conf.id
    assert len(fleet.policy.app.agents) == 1
    assert build_fleet(_config(tmp_path, run_policy=False)).policy is None


def test_a_choice_of_detectors_is_a_group_of_its_own(tmp_path: Path) -> None:
    everyone = _config(tmp_path)
    some = _config(tmp_path, detectors=BUILTIN[:2])
    assert everyone.detector_group == "argus-detectors"
    assert some.detector_group not in ("argus-detectors", "")
    assert some.detector_group == _config(tmp_path, detectors=BUILTIN[:2]).detector_group
    assert some.detector_group != _config(tmp_path, detectors=BUILTIN[1:3]).detector_group
    assert len(build_app(some).agents) == 2
    assert some.policy_group == everyone.policy_group


def test_a_detector_of_another_configuration_takes_up_no_old_state(tmp_path: Path) -> None:
    lanes = build_fleet(_config(tmp_path)).detectors.new_lanes(0)
    assert [cls().version in lane.name for cls, lane in zip(BUILTIN, lanes)] == [True] * 12
