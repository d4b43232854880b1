"""``argus key``: the fleet's master key, and the key of one run made from it."""

from __future__ import annotations

import argparse
import secrets
import sys
from typing import Any

from plarv.cli.complaint import Complaint
from plarv_schemas.signatures import run_key

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Adds the commands."""
    parser = commands.add_parser(
        "key",
        help="the keys that sign a fleet's actions and orders: for RUN, new",
        description="Workers and operators hold the master key (ARGUS_MASTER_KEY); a training "
        "process needs only its run's (ARGUS_RUN_KEY), with which it can forge nothing of others.",
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    made = parts.add_parser(
        "for", help="a run's key, made from ARGUS_MASTER_KEY", description="Prints a run's key."
    )
    made.add_argument("run", metavar="RUN", help="id of the run")
    made.set_defaults(command=_key_for)
    new = parts.add_parser(
        "new", help="a fresh master key", description="Prints a fresh master key."
    )
    new.set_defaults(command=_new_key)


def _key_for(options: argparse.Namespace) -> int:
    from plarv.fleet.connection import master_key

    master = master_key()
    if not master:
        raise Complaint("set ARGUS_MASTER_KEY; `argus key new` prints a fresh one")
    try:
        key = run_key(master, options.run)
    except ValueError as error:
        raise Complaint(f"ARGUS_MASTER_KEY: {error}") from error
    sys.stdout.write(key.hex() + "\n")
    return 0


def _new_key(_: argparse.Namespace) -> int:
    sys.stdout.write(secrets.token_urlsafe(32) + "\n")
    return 0
