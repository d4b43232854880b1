"""What the SDK's tests share: our own faults are raised, and no run is left open.

What a thread raises fails its test too: pytest warns of it, and warnings are errors here.
"""

from __future__ import annotations

from typing import Iterator

import pytest

from plarv import faults, lifecycle


@pytest.fixture(autouse=True)
def _our_own_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Production swallows and counts them. A test that injects one sets RERAISE back to False."""
    monkeypatch.setattr(faults, "RERAISE", True)


@pytest.fixture(autouse=True)
def _no_run_is_left_open(_our_own_faults_are_raised: None) -> Iterator[None]:
    yield
    for argus in list(lifecycle._live):
        argus.complete("left open by a test")
