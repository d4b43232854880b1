"""``argus dlq``: messages that the workers could not read."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any, List

from plarv.cli.brokers import add_broker_option, fleet_of, told
from plarv.cli.complaint import Complaint, tell
from plarv.cli.table import aligned

if TYPE_CHECKING:
    from plarv_processors.dead_letters import DeadLetter

__all__ = ["add_to"]

_EPILOG = """examples:
  argus dlq                    what could not be read, and why
  argus dlq send 3:17 3:18     put these back into the log
  argus dlq send --all         all that were not sent again yet
"""


def add_to(commands: Any) -> None:
    """Adds the commands."""
    parser = commands.add_parser(
        "dlq",
        help="messages that a fleet's workers could not read: list, send",
        description="The dead letters: messages that no worker could read, each with the reason. "
        "After an update of the workers they may be sent again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    add_broker_option(parser)
    parser.set_defaults(command=_list)
    parts = parser.add_subparsers(title="commands", metavar="COMMAND")
    listed = parts.add_parser("list", help="list them (the default)", description="Lists them.")
    as_above = {"default": argparse.SUPPRESS}  # what was given before the part's name stands
    listed.add_argument("--json", action="store_true", help="one JSON object a line", **as_above)
    add_broker_option(listed, **as_above)
    listed.set_defaults(command=_list)
    send = parts.add_parser(
        "send",
        help="put them back into the topic they came from",
        description="Sends letters again, to where they came from.",
    )
    send.add_argument("letters", nargs="*", metavar="PARTITION:OFFSET", help="as listed")
    send.add_argument("--all", action="store_true", help="all that were not sent again yet")
    add_broker_option(send, **as_above)
    send.set_defaults(command=_send)


def _list(options: argparse.Namespace) -> int:
    letters = _letters(options)
    if options.json:
        for letter in letters:
            sys.stdout.write(json.dumps(letter._asdict()) + "\n")
        return 0
    if not letters:
        tell("no dead letters")
        return 0
    rows = [("letter", "when", "run", "size", "came from", "state", "reason")]
    for letter in letters:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.time_ms * 1e-3))
        source = f"{letter.source_topic} {letter.source_partition}:{letter.source_offset}"
        state = "sent again" if letter.sent else "waiting"
        name = f"{letter.partition}:{letter.offset}"
        size = f"{letter.size_bytes:,} B"
        rows.append((name, when, _shown(letter.key), size, source, state, _shown(letter.reason)))
    for line in aligned(rows):
        sys.stdout.write(line + "\n")
    return 0


def _send(options: argparse.Namespace) -> int:
    from plarv_processors.dead_letters import send_again

    if options.all == bool(options.letters):
        raise Complaint("name letters as PARTITION:OFFSET, or say --all")
    letters = _letters(options)
    if options.all:
        chosen = [letter for letter in letters if not letter.sent]
    else:
        chosen = _chosen(options.letters, letters)
    fleet = fleet_of(options)
    with told():
        count = send_again(fleet.connection, fleet.topics, chosen) if chosen else 0
    sys.stdout.write(f"{count} {'letter' if count == 1 else 'letters'} sent again\n")
    if count < len(chosen):
        raise Complaint(f"{len(chosen) - count} did not come from {fleet.topics.steps}", 1)
    return 0


def _letters(options: argparse.Namespace) -> List[DeadLetter]:
    from plarv_processors.dead_letters import read_dead_letters

    fleet = fleet_of(options)
    with told():
        return read_dead_letters(fleet.connection, fleet.topics)


def _chosen(names: List[str], letters: List[DeadLetter]) -> List[DeadLetter]:
    by_name = {f"{letter.partition}:{letter.offset}": letter for letter in letters}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise Complaint(f"no letter {', '.join(unknown)}; `argus dlq` lists those there are")
    return [by_name[name] for name in dict.fromkeys(names)]


def _shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
