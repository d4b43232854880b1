"""``argus demo``."""

from __future__ import annotations

from typing import Any

from plarv.demo import add_options, run

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="train a small GPT, injure it, and watch Argus save it (under 90 s)",
        description="Trains a small GPT twice with the same fault: alone, then under Argus in AUTO "
        "mode. Draws both curves, and replays the journal to compare the verdicts.",
    )
    add_options(parser)
    parser.set_defaults(command=run)
