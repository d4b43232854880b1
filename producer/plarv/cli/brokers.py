"""What the fleet's commands share: where the brokers are, and how trouble with them is told."""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from typing import Any, Generator, NamedTuple

from plarv.cli.complaint import Complaint
from plarv.exceptions import ArgusConfigurationError
from plarv_schemas.kafka_clients import BrokerError, quiet_kafka_log
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.topics import Topics

__all__ = ["Fleet", "add_broker_option", "fleet_of", "told"]


class Fleet(NamedTuple):
    """The fleet that a command speaks to."""

    connection: Connection
    topics: Topics

    @property
    def where(self) -> str:
        """Its addresses, in words."""
        return ", ".join(self.connection.brokers)


def add_broker_option(parser: Any, **more: Any) -> None:
    """``--brokers``; ``more`` goes to argparse."""
    parser.add_argument(
        "--brokers",
        **more,
        metavar="HOST:PORT,...",
        help="the fleet's Kafka brokers (default: ARGUS_BROKERS)",
    )


def fleet_of(options: argparse.Namespace) -> Fleet:
    """The fleet that ``--brokers`` or the settings name. Complaint: none, or they cannot be."""
    from plarv.fleet.connection import fleet_connection, fleet_topics

    try:
        fleet = Fleet(fleet_connection(options.brokers), fleet_topics())
    except ArgusConfigurationError as error:
        raise Complaint(str(error)) from error
    quiet_kafka_log()
    return fleet


@contextmanager
def told() -> Generator[None, None, None]:
    """What can be wrong with brokers, stores, settings and what is installed, as Complaints."""
    from plarv_sinks.store import StoreError

    try:
        yield
    except (BrokerError, StoreError) as error:
        raise Complaint(str(error), 1) from error
    except ImportError as error:
        raise Complaint(str(error), 1) from error
    except ArgusConfigurationError as error:
        raise Complaint(str(error)) from error
