"""Child processes that run a workload and answer, one at a time, so that none disturbs another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Type

from measure import ROOT

__all__ = ["Child", "Package", "clean_environment", "our_package"]

_SOURCES = tuple(str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks"))
_HERE = Path(__file__).resolve().parent
_END_S = 20.0
_WITH_TORCH = ("training", "local")

# For glibc: gradients that come and go must not go back to the system, or a step takes a third
# longer or not, as the heap happens to lie.
_STEADY_HEAP = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}


class Package(NamedTuple):
    """An SDK to measure: the interpreter that imports it, and what that one needs."""

    name: str
    python: str
    environment: Mapping[str, str]
    torch_paths: List[str]  # where torch lies, if it lies elsewhere; searched after all others


class Child:
    """One process with one workload of ``script``, in a folder of its own."""

    def __init__(self, package: Package, workload: str, script: str = "workloads.py") -> None:
        self.package = package
        self._folder = tempfile.mkdtemp(prefix="argus-benchmark-")
        self._errors = Path(self._folder) / "stderr.txt"
        with open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                [package.python, str(_HERE / script), workload, *_torch_paths(package, workload)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._folder,
                env={**package.environment, **(_STEADY_HEAP if workload in _WITH_TORCH else {})},
                text=True,
            )

    def ask(self, method: str = "run", **given: Any) -> Any:
        """What the workload's ``method(**given)`` gives. RuntimeError: the child died, and why."""
        self.tell(method, **given)
        return self.answer()

    def tell(self, method: str, **given: Any) -> None:
        """Begins ``method(**given)``."""
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([method, given]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # its errors tell more, in answer()

    def answer(self) -> Any:
        """What the method begun last gives. RuntimeError: the child died, and why."""
        process = self._process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            tail = self._errors.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            who = f"a benchmark of {self.package.name} ended with status {status}"
            raise RuntimeError(f"{who}:\n{tail}")
        return json.loads(line)

    def end(self) -> float:
        """Lets the child come to its end; the time (monotonic) at which it had."""
        process = self._process
        try:
            if process.stdin is not None:
                process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended before
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:  # the other SDK at its exit
            process.kill()
            process.wait()
        return time.monotonic()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.end()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def our_package() -> Package:
    """This checkout, on this interpreter."""
    environment = clean_environment()
    environment["PYTHONPATH"] = os.pathsep.join(_SOURCES)
    return Package("this Argus", sys.executable, environment, [])


def _torch_paths(package: Package, workload: str) -> List[str]:
    return package.torch_paths if workload in _WITH_TORCH else []


def clean_environment() -> Dict[str, str]:
    """The environment without what sets up either SDK, or makes this process a rank of a job.

    No run is kept as Parquet: the process that does it would run beside the next measurement.
    """
    ours = ("ARGUS_", "PLARV_", "SLURM_", "OMPI_", "PMI_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONPATH"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in names}
    return {**kept, "ARGUS_STORE": "none"}
