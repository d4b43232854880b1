"""The SDK on every Python that it promises, with nothing but pytest beside it.

The set-up makes a bare environment for each interpreter that it finds; a run inside one of them
leaves out what needs torch, pyarrow or hypothesis.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHONS = ROOT / ".venv" / "pythons"
INSIDE = "TESTS_ON_ANOTHER_PYTHON"

pytestmark = pytest.mark.skipif(INSIDE in os.environ, reason="this is such a run")


def run_the_tests_on(version: str) -> None:
    python = PYTHONS / version / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment with Python {version} here")
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, INSIDE: version},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (
        f"on Python {version}:\n{done.stdout[-20000:]}{done.stderr[-5000:]}"
    )


def test_the_sdk_runs_on_the_oldest_python_with_nothing_installed() -> None:
    run_the_tests_on("3.8")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13"])
def test_the_sdk_runs_on_the_other_pythons_with_nothing_installed(version: str) -> None:
    run_the_tests_on(version)
