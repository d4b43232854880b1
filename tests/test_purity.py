"""The fold is pure: what it is made of can reach no clock, file, thread, chance or third party.

The import contracts say what must not be imported; here stands what may be, which is shorter, and
what no import shows.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator, List

import pytest

PROCESSORS = Path(__file__).parents[1] / "processors" / "plarv_processors"
SHELLS = ("app.py", "dead_letters.py", "kafka_topics.py", "serve.py", "stored_fold.py")
PURE = [
    path
    for path in sorted(PROCESSORS.rglob("*.py"))
    if path.name not in SHELLS and path.parent.name != "worker"
]

ALLOWED_IMPORTS = frozenset(
    [
        "__future__", "abc", "array", "bisect", "collections", "dataclasses", "enum", "functools",
        "hashlib", "heapq", "itertools", "math", "operator", "struct", "typing", "zlib",
        "plarv_schemas.events", "plarv_schemas.versions",
    ]
)  # fmt: skip
FORBIDDEN_CALLS = frozenset(
    ["__import__", "breakpoint", "compile", "eval", "exec", "input", "open", "print"]
)
# Finding other packages' detectors reads their metadata: once, when a fold is set up.
REGISTRY = "detectors/__init__.py"
REGISTRY_IMPORTS = frozenset(["importlib", "warnings"])


def impurities(source: str, also_allowed: frozenset[str] = frozenset()) -> List[str]:
    """What is not pure in `source`, each as `line: what`; a sum may be marked `# integers`."""
    lines = ["", *source.splitlines()]
    found: List[str] = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        what = _impurity(node, ALLOWED_IMPORTS | also_allowed)
        if what and not (what.startswith("calls sum") and lines[line].endswith("# integers")):
            found.append(f"{line}: {what}")
    return found


def _impurity(node: ast.AST, allowed: frozenset[str]) -> str:
    for module in _imported(node):
        if module not in allowed and module.split(".")[0] not in allowed | {"plarv_processors"}:
            return f"imports {module}"
    if isinstance(node, ast.Global):
        return f"changes the global {', '.join(node.names)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in FORBIDDEN_CALLS:
            return f"calls {node.func.id}"
        if node.func.id == "sum":
            return "calls sum, whose floats add up differently from Python 3.12 on"
        if node.func.id == "hash":
            return "calls hash, which for text differs from process to process"
    if isinstance(node, (ast.For, ast.comprehension)) and _is_a_set(node.iter):
        return "takes an order from a set"
    return ""


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        yield node.module or "."


def _is_a_set(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("set", "frozenset")
    return isinstance(node, (ast.Set, ast.SetComp))


def test_the_modules_of_the_fold_are_found() -> None:
    names = {path.relative_to(PROCESSORS).as_posix() for path in PURE}
    assert {"windows.py", "snapshot.py", "detectors/loss_spike.py"} <= names


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.relative_to(PROCESSORS).as_posix())
def test_a_module_of_the_fold_is_pure(path: Path) -> None:
    name = path.relative_to(PROCESSORS).as_posix()
    source = path.read_text(encoding="utf-8")
    found = impurities(source, REGISTRY_IMPORTS) if name == REGISTRY else impurities(source)
    assert found == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time", "1: imports time"),
        ("from os import path", "1: imports os"),
        ("def f():\n    import numpy.linalg", "2: imports numpy.linalg"),
        ("from plarv_schemas import journal_reader", "1: imports plarv_schemas"),
        ("def f():\n    global x\n    x = 1", "2: changes the global x"),
        ("x = open('f')", "1: calls open"),
        (
            "x = sum([0.1, 0.2])",
            "1: calls sum, whose floats add up differently from Python 3.12 on",
        ),
        ("x = hash('a')", "1: calls hash, which for text differs from process to process"),
        ("for x in {1, 2}:\n    pass", "1: takes an order from a set"),
        ("x = [y for y in set(z)]", "0: takes an order from a set"),
    ],
)
def test_an_impurity_is_seen(source: str, expected: str) -> None:
    assert impurities(source) == [expected]


def test_pure_code_passes() -> None:
    source = "import math\nfrom plarv_schemas.events import Verdict\nx = sorted({1, 2})\n"
    source += "for y in sorted(set(x)):\n    math.fsum([y])\nz = sum([1, 2])  # integers\n"
    assert impurities(source) == []
