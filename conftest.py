"""What tests and doctests share: no settings from outside, and a house that needs little.

The SDK's tests also run where nothing but pytest is installed: a test file whose top imports
something that is not there is left out, and the header says so.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import os
import re
import secrets
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest

OPTIONAL = (
    "aiokafka", "faust", "hypothesis", "kafka", "matplotlib", "numpy", "polars",
    "prometheus_client", "pyarrow", "testcontainers", "torch",
)  # fmt: skip
MISSING = frozenset(name for name in OPTIONAL if importlib.util.find_spec(name) is None)

BROKERS = os.environ.get("ARGUS_TEST_BROKERS", "")  # read before tests lose their ARGUS_*

# Fixtures of a whole module run before those of a test: no run of theirs is kept as Parquet, by a
# process that would fold beside them.
os.environ["ARGUS_STORE"] = "none"

_LONGEST = ("test_pythons.py",)
_WORKER = ("plarv_processors.app.", "plarv_processors.worker.")
_DOCTEST_IMPORT = re.compile(r"^ *>>> (?:import|from) (\w+)", re.MULTILINE)
_left_out: Dict[str, List[str]] = {}

if "hypothesis" not in MISSING:
    from hypothesis import settings

    settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    settings.register_profile("local", deadline=None)
    settings.load_profile("ci" if os.environ.get("CI") else "local")


_folders = itertools.count()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each test begins without the developer's `ARGUS_*`, with a place of its own for journals.

    No run is kept as Parquet by a process that a test would leave behind, unless it asks for that.
    """
    for name in [name for name in os.environ if name.startswith("ARGUS_")]:
        monkeypatch.delenv(name)
    place = tmp_path_factory.getbasetemp() / f"argus-{next(_folders)}"  # made only if it is used
    monkeypatch.setenv("ARGUS_DIR", str(place))
    monkeypatch.setenv("ARGUS_STORE", "none")


@pytest.fixture(scope="session")
def broker_address() -> Iterator[str]:
    """A real Kafka, host:port, started when the first test asks for it. Use a ``topic_prefix``."""
    from tests.brokers import find_broker

    broker = find_broker(BROKERS)
    yield broker.address
    broker.stop()


@pytest.fixture
def topic_prefix() -> str:
    """What the topics of this test begin with: no two tests share one."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Any]:
    """A real Kafka that the test may kill: a ``tests.brokers.OwnBroker``, started."""
    from tests.brokers import own_broker as start

    broker = start(tmp_path / "broker")
    yield broker
    broker.stop()


def pytest_ignore_collect(collection_path: Path) -> Optional[bool]:
    """Leaves out a test file that cannot be imported here; None: nothing to say about it."""
    if not MISSING or collection_path.suffix != ".py":
        return None
    missing = {name.split(".")[0] for name in _top_imports(collection_path)} & MISSING
    if "faust" in MISSING and _is_of_a_worker(collection_path):
        missing.add("faust")
    for name in missing:
        _left_out.setdefault(name, []).append(collection_path.name)
    return True if missing else None


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """The longest file first: with several workers it would else run on alone at the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which files were left out and why."""
    for name, files in sorted(_left_out.items()):
        terminalreporter.write_line(
            f"left out, {name} is not installed: {', '.join(sorted(files))}"
        )


def _top_imports(path: Path) -> frozenset[str]:
    """What the file's top imports, and its doctests."""
    text = path.read_text(encoding="utf-8")
    names: List[str] = _DOCTEST_IMPORT.findall(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return frozenset(names)


def _is_of_a_worker(path: Path) -> bool:
    """Whether the file is a part of a fleet's worker, or takes one in: they import Faust."""
    module = ".".join(path.with_suffix("").parts)
    names = {f"{module[module.rfind('plarv_processors') :]}", *_top_imports(path)}
    return any(f"{name}.".startswith(_WORKER) for name in names)
