"""``argus compact``: few large files of a store's many small ones."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from plarv.cli.brokers import told
from plarv.cli.complaint import Complaint, tell
from plarv.cli.export import ProgressBar
from plarv.cli.sink import add_store_option, store_of

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "compact",
        help="put a store's small files together",
        description="Puts each run's steps of a day into table=steps/date=.../run_id=..., and a "
        "day's events, verdicts, actions and runs into one file each, while sinks write.",
        epilog="example, once an hour:\n  argus compact --every 3600",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_store_option(parser)
    parser.add_argument(
        "--every", type=float, metavar="S", help="again, so many seconds later, until Ctrl-C"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a compaction")
    parser.set_defaults(command=_compact)


def _compact(options: argparse.Namespace) -> int:
    if options.every is not None and not options.every > 0:
        raise Complaint("--every is a number of seconds above 0")
    while True:
        try:
            _once(store_of(options), as_json=options.json)
        except (Complaint, OSError) as error:
            if options.every is None:
                raise
            tell(f"{error}; again in {options.every:g} s")
        if options.every is None:
            return 0
        time.sleep(options.every)


def _once(store: str, *, as_json: bool) -> None:
    from plarv_sinks.compact import compact
    from plarv_sinks.store_files import shown

    bar = ProgressBar("compact", sys.stderr)
    try:
        with told():
            done = compact(store, tell=tell, progress=bar.show)
    finally:
        bar.close()
    if as_json:
        sys.stdout.write(json.dumps(done._asdict()) + "\n")
    elif done.taken:
        text = f"{done.taken:,} files put together into {done.made:,}, of {done.rows:,} rows"
        sys.stdout.write(f"{shown(store)}: {text}\n")
    else:
        sys.stdout.write(f"{shown(store)}: nothing to put together\n")
    sys.stdout.flush()
