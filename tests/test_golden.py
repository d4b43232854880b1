from __future__ import annotations

import pytest
from tests.golden.record import FOLDER, lines_of
from tests.processors.logs import names
from tests.processors.streams import FAULTY, HEALTHY


@pytest.mark.parametrize("name", names)
def test_the_engine_says_what_it_said_before(name: str) -> None:
    """A difference is either a fault or to be recorded anew: `python tests/golden/record.py`."""
    recorded = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines_of(name) == recorded


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_critical_is_recorded_of_a_healthy_run(name: str) -> None:
    assert '"level": "critical"' not in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAULTY)
def test_the_detector_a_fault_is_for_has_found_it(name: str) -> None:
    detector = FAULTY[name][0]
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    assert f'"detector": "{detector}"' in text
