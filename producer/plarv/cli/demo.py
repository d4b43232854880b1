"""``argus demo``."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from plarv.cli.complaint import Complaint

__all__ = ["add_to", "run"]


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="train a small GPT, injure it, and watch Argus save it (90 s)",
        description="Trains a small GPT twice with the same fault: alone and under Argus.",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """The demo's exit code."""
    try:
        demo = importlib.import_module("plarv.demo")
    except ImportError as error:
        hint = "pip install 'plarv-argus-sdk[demo]'"
        raise Complaint(f"the demo needs {error.name}: {hint}", 1) from error
    code: object = demo.main()
    return code if isinstance(code, int) else 0
