"""The house keeps its own rules: layers, sizes, names, and a README that says what is true."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("producer", "schemas", "processors", "sinks")
MODULES = sorted(path for root in SOURCE_ROOTS for path in (ROOT / root).rglob("*.py"))
SCRIPTS = sorted(path for name in ("benchmarks", "deploy") for path in (ROOT / name).rglob("*.py"))

LONGEST_MODULE = 400
LONGEST_FUNCTION = 40
HOT_PATH = {"client.py": {"step"}}  # in one piece: a call costs what the whole of it may cost


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_a_module_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_its_functions_are_short(path: Path) -> None:
    lengths = {name: length for name, length in _functions(path) if length > LONGEST_FUNCTION}
    for name in HOT_PATH.get(path.name, set()):
        del lengths[name]
    assert lengths == {}


def _functions(path: Path) -> Iterator[Tuple[str, int]]:
    """Name and number of lines of each function's body, its docstring aside."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_public_module_says_what_it_offers(path: Path) -> None:
    statements = tree_of(path).body[1:]  # after the docstring
    if path.stem.startswith("_") and (path.stem != "__init__" or not statements):
        pytest.skip("private, or an empty package")
    offered = _offered(statements)
    assert offered is not None, "no __all__"
    missing = set(offered) - set(_defined(statements))
    assert not missing or "__getattr__" in _defined(statements), missing


def _offered(statements: List[ast.stmt]) -> List[str] | None:
    for node in statements:
        if isinstance(node, ast.Assign) and "__all__" in _defined([node]):
            return list(ast.literal_eval(node.value))
    return None


def _defined(statements: List[ast.stmt]) -> Iterator[str]:
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, (ast.If, ast.Try)):
            inner = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt)]
            yield from _defined(inner)


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_each_package_is_typed_for_others(root: str) -> None:
    packages = [path.parent for path in (ROOT / root).glob("*/__init__.py")]
    assert len(packages) == 1
    assert (packages[0] / "py.typed").exists()


def test_imports_run_one_way() -> None:
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    program = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    done = _python(program)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_plarv_loads_the_standard_library_and_us_and_nothing_else() -> None:
    done = _python(
        "import sys, json; before = set(sys.modules); import plarv; plarv.Argus;"
        "print(json.dumps([[n, getattr(getattr(m, '__spec__', None), 'origin', None)]"
        " for n, m in sys.modules.items() if n not in before]))",
    )
    assert done.returncode == 0, done.stderr
    loaded = dict(json.loads(done.stdout))
    assert "plarv" in loaded
    tops = {name.split(".")[0] for name in loaded}
    ours = {"plarv", "plarv_schemas", "plarv_processors"}
    if sys.version_info >= (3, 10):
        assert tops - ours <= set(sys.stdlib_module_names)
    assert not any("site-packages" in (origin or "") for origin in loaded.values())


def _python(program: str) -> subprocess.CompletedProcess[str]:
    """Runs `program` in a fresh Python that sees our source roots, from the checkout's root."""
    start = f"import sys; sys.path[:0] = {[str(ROOT / root) for root in SOURCE_ROOTS]!r}; "
    return subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_readme_lists_every_setting_as_the_settings_module_has_it() -> None:
    settings = pytest.importorskip("plarv.settings", reason="plarv.settings is not there yet")
    expected = [
        f"| `{name}` | {f'`{default}`' if default else '-'} | {meaning} |"
        for name, (default, meaning) in settings.SETTINGS.items()
    ]
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("| `ARGUS_")] == expected
