"""Compiles the pure fold with mypyc: the same sources, the same records bit for bit, four times as
fast.

    python deploy/compile_fold.py [FOLDER]

FOLDER (default: build/compiled) then holds the package plarv_processors with compiled modules
beside its Python ones; nothing is written among the sources. First on PYTHONPATH it is what Python
imports; where a compiled module does not fit the interpreter, Python takes the source beside it.
It takes a minute, and nothing where nothing has changed. Needs mypy[mypyc], setuptools and a C
compiler. `ARGUS_COMPILE=1 pip wheel .` puts the same modules into a wheel (see hatch_build.py).

mypyc knows neither classes in classes nor `__slots__`, and drops docstrings. So what it compiles is
the source with a nested class moved out and put back, and these attributes set after the class.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import List, Sequence

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "compiled"
PACKAGES = (ROOT / "processors" / "plarv_processors", ROOT / "schemas" / "plarv_schemas")
COMPILED = PACKAGES[0].name
MODULES = (
    "attempts", "checkpoints", "complete_steps", "detector_fold", "detectors/*", "engine",
    "event_batch", "fleet_statistics", "learning_rates", "policy", "responses", "sample_statistics",
    "windows",
)  # fmt: skip
REQUIREMENTS = ("mypy[mypyc]>=2.4,<3", "setuptools>=70")
FLAGS = "-ffp-contract=off"  # a*b+c rounds twice, as in Python
STAMP = "sources.txt"

_MOVED = ("__slots__", "_derived")
_HEAD = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from typing import TypeAlias
    from mypy_extensions import mypyc_attr
"""
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

options = ["--config-file", "mypy.ini"]
files = {files!r}
modules = mypycify(
    options + files, opt_level={level!r}, debug_level="0", group_name="plarv_fold"
)
setup(name="plarv-fold", packages=[], ext_modules=modules)
"""


def main(arguments: List[str]) -> int:
    """Exit status: 0 done; otherwise that of the compiler."""
    target = Path(arguments[0]).resolve() if arguments else TARGET
    try:
        done = compile_fold(target)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{error.stdout}\nargus: the fold was not compiled (see above)\n")
        return error.returncode or 1
    sys.stderr.write(f"argus: {target} {'is ready' if done else 'was up to date'}\n")
    return 0


def compile_fold(target: Path, level: str = "2") -> bool:
    """Fills ``target``, a folder of its own; False: it was up to date. ``level`` 0 takes 20 s.

    subprocess.CalledProcessError: mypyc or the C compiler failed; its ``stdout`` says why.
    """
    stamp = f"-O{level} {fingerprint()}"
    if (target / STAMP).is_file() and (target / STAMP).read_text(encoding="utf-8") == stamp:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=target.parent) as place:
        work, made = Path(place) / "work", Path(place) / "made"
        _compile(work, made, level)
        shutil.copytree(PACKAGES[0], made / COMPILED, ignore=_caches, dirs_exist_ok=True)
        (made / STAMP).write_text(stamp, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return True


def fingerprint() -> str:
    """Changes with whatever the compiled modules depend on."""
    seen = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            seen.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    seen.update(Path(__file__).read_bytes())
    return f"{seen.hexdigest()} Python {sys.version} {platform.machine()} {_mypy_version()}\n"


def sources() -> List[str]:
    """What is compiled, as paths below the folder of the package."""
    package = PACKAGES[0]
    paths = [path for name in MODULES for path in sorted(package.glob(f"{name}.py"))]
    return [str(path.relative_to(package.parent)) for path in paths if path.name != "__init__.py"]


def native_source(source: str) -> str:
    """The same module in the words that mypyc knows."""
    tree = ast.parse(source)
    body: List[ast.stmt] = []
    for node in tree.body:
        body += _native_class(node) if isinstance(node, ast.ClassDef) else [node]
    future = next(
        number
        for number, node in enumerate(body)
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    )
    tree.body = [*body[: future + 1], *_parsed(_HEAD), *body[future + 1 :]]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _compile(work: Path, made: Path, level: str) -> None:
    for package in PACKAGES:
        shutil.copytree(package, work / package.name, ignore=_caches)
    files = sources()
    for name in files:
        path = work / name
        path.write_text(native_source(path.read_text(encoding="utf-8")), encoding="utf-8")
    (work / "mypy.ini").write_text("[mypy]\nexplicit_package_bases = true\n", encoding="utf-8")
    (work / "setup.py").write_text(_SETUP.format(files=files, level=level), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["CFLAGS"] = f"{environment.get('CFLAGS', '')} {FLAGS}".strip()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(made)],
        cwd=work,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _native_class(cls: ast.ClassDef) -> List[ast.stmt]:
    """The class, before it those that it held, behind it what is set on it."""
    before: List[ast.stmt] = []
    after: List[ast.stmt] = []
    for number, node in enumerate(cls.body):
        if isinstance(node, ast.ClassDef):
            inner, outer = node.name, f"{cls.name}{node.name}"
            for method in cls.body:
                if isinstance(method, ast.FunctionDef):
                    _Renamed(inner, outer).visit(method)
            node.name = outer
            before.append(node)
            cls.body[number] = _parsed(f"{inner}: TypeAlias = {outer}")[0]
            after += _set_on(cls.name, inner, outer)
            after += _set_on(outer, "__name__", repr(inner))
            after += _set_on(outer, "__qualname__", repr(f"{cls.name}.{inner}"))
            after += _set_on(outer, "__doc__", repr(ast.get_docstring(node, clean=False)))
        elif _is_moved(node):
            assert isinstance(node, ast.Assign)
            after += _set_on(cls.name, ast.unparse(node.targets[0]), ast.unparse(node.value))
            cls.body[number] = ast.Pass()
    after += _set_on(cls.name, "__doc__", repr(ast.get_docstring(cls, clean=False)))
    if not _is_dynamic(cls):
        cls.decorator_list.append(_expression("mypyc_attr(allow_interpreted_subclasses=True)"))
    return [*before, cls, *after]


class _Renamed(ast.NodeTransformer):
    """``name`` and ``self.name`` as ``new``."""

    def __init__(self, name: str, new: str) -> None:
        self._name = name
        self._new = new

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A name."""
        return ast.Name(self._new, node.ctx) if node.id == self._name else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """An attribute."""
        if ast.unparse(node) == f"self.{self._name}":
            return ast.Name(self._new, node.ctx)
        return self.generic_visit(node)


def _is_moved(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in _MOVED


def _is_dynamic(cls: ast.ClassDef) -> bool:
    """Whether the class is an ordinary one in the compiled module as well."""
    return any(ast.unparse(base) in ("NamedTuple", "Protocol") for base in cls.bases)


def _set_on(name: str, attribute: str, value: str) -> List[ast.stmt]:
    return _parsed(f"setattr({name}, {attribute!r}, {value})")


def _parsed(source: str) -> List[ast.stmt]:
    return ast.parse(source).body


def _expression(source: str) -> ast.expr:
    return ast.parse(source, mode="eval").body


def _mypy_version() -> str:
    try:
        return metadata.version("mypy")
    except metadata.PackageNotFoundError:
        return "none"


def _caches(_: str, names: Sequence[str]) -> List[str]:
    return [name for name in names if name == "__pycache__"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
