"""Processes of their own, for faults that end one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional

__all__ = ["ROOT", "environment", "run", "start"]

ROOT = Path(__file__).parents[2]
_SOURCES = [str(ROOT / name) for name in ("producer", "schemas", "processors", "sinks", ".")]
_TIMEOUT_S = 120


def environment(**settings: str) -> Dict[str, str]:
    """The environment of such a process."""
    own = {
        "PYTHONPATH": os.pathsep.join(_SOURCES),
        "PYTHONWARNINGS": "ignore::DeprecationWarning",  # from 3.12 on of any fork beside a thread
    }
    return {**os.environ, **own, **settings}


def run(
    folder: Path,
    program: str,
    *arguments: str,
    prefix: Optional[List[str]] = None,
    **settings: str,
) -> subprocess.CompletedProcess[str]:
    """Runs ``program`` to its end."""
    return subprocess.run(
        [*(prefix or []), sys.executable, str(_script(folder, program)), *arguments],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def start(folder: Path, program: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Starts ``program``; its stdout and stderr are pipes."""
    options: Dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-u", str(_script(folder, program)), *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(**settings), **options)


def _script(folder: Path, program: str) -> Path:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program), encoding="utf-8")
    return path
