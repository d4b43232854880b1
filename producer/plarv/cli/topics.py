"""``argus topics create`` and ``argus topics list``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from plarv.cli.brokers import add_broker_option, fleet_of, told
from plarv.cli.complaint import Complaint
from plarv.cli.table import aligned
from plarv_schemas.topics import DEFAULT_PARTITIONS

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Adds the commands."""
    parser = commands.add_parser(
        "topics",
        help="the fleet's Kafka topics: create, list",
        description="The topics of a fleet, which begin with ARGUS_TOPIC_PREFIX.",
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = parts.add_parser(
        "create",
        help="create those that are missing",
        description="Creates the topics that are missing. A worker that finds none does the same.",
    )
    create.add_argument(
        "--partitions",
        type=_count,
        default=DEFAULT_PARTITIONS,
        metavar="N",
        help=f"of each topic: how many workers can share the load (default: {DEFAULT_PARTITIONS})",
    )
    create.add_argument(
        "--replication",
        type=_count,
        metavar="N",
        help="copies of each partition (default: 3, or as many as there are brokers)",
    )
    add_broker_option(create)
    create.set_defaults(command=_create)
    listed = parts.add_parser("list", help="how each topic stands", description="Lists the topics.")
    listed.add_argument("--json", action="store_true", help="one JSON object a line")
    add_broker_option(listed)
    listed.set_defaults(command=_list)


def _create(options: argparse.Namespace) -> int:
    from plarv_processors.kafka_topics import TopicsError, check_topics, create_topics

    fleet = fleet_of(options)
    try:
        with told():
            created = create_topics(
                fleet.connection, fleet.topics, options.partitions, options.replication
            )
            partitions = check_topics(fleet.connection, fleet.topics)
    except TopicsError as error:
        raise Complaint(str(error), 1) from error
    for name in fleet.topics.all():
        what = "created" if name in created else "was there"
        sys.stdout.write(f"{name}: {what}\n")
    sys.stdout.write(f"{partitions} partitions each\n")
    return 0


def _list(options: argparse.Namespace) -> int:
    from plarv_processors.kafka_topics import describe_topics

    fleet = fleet_of(options)
    with told():
        states = describe_topics(fleet.connection, fleet.topics)
    if options.json:
        for state in states:
            sys.stdout.write(json.dumps(state._asdict()) + "\n")
        return 0
    rows = [("topic", "partitions", "records", "kept")]
    rows += [
        (state.name, str(state.partitions or ""), f"{state.records:,}", state.retention)
        for state in states
    ]
    for line in aligned(rows):
        sys.stdout.write(line + "\n")
    return 0


def _count(text: str) -> int:
    number = int(text)
    if not 0 < number < 10_000:
        raise argparse.ArgumentTypeError(f"a number from 1 to 9999, not {text}")
    return number
