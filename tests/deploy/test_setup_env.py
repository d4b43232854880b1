"""The set-up tells uv what pip knows, and nothing that uv was told otherwise."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", DEPLOY / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("pip", "environment", "expected"),
    [
        ({}, {}, {}),
        ({"index-url": "https://a/simple"}, {}, {"UV_DEFAULT_INDEX": "https://a/simple"}),
        ({"index-url": "https://a/simple"}, {"UV_INDEX_URL": "https://b/simple"}, {}),
        ({"index-url": "https://a/simple"}, {"UV_DEFAULT_INDEX": "https://b/simple"}, {}),
        ({"trusted-host": "a\nb"}, {}, {"UV_INSECURE_HOST": "a b"}),
        ({"find-links": "/w /x"}, {}, {"UV_FIND_LINKS": "/w,/x"}),
        (
            {"extra-index-url": "https://a https://b"},
            {},
            {"UV_INDEX": "https://a https://b", "UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        ({"quiet": "1"}, {}, {}),
    ],
)
def test_uv_is_told_what_pip_was_told(
    setup_env: ModuleType,
    pip: Dict[str, str],
    environment: Dict[str, str],
    expected: Dict[str, str],
) -> None:
    assert setup_env.uv_settings(pip, environment) == expected


def test_a_python_is_found_or_none_is_named(setup_env: ModuleType) -> None:
    assert setup_env.find_python("2.0") is None


def test_an_old_python_is_refused_in_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(DEPLOY / "find-python.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs Python 3.11" in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Python is too old to be taken")
def test_the_python_named_by_the_user_is_taken(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", str(DEPLOY / "find-python.sh")],
        env={"PATH": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == sys.executable
