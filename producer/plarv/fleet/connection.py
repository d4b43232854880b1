"""The fleet that the settings name: its brokers, topics and keys."""

from __future__ import annotations

from typing import Optional, Sequence, Union

from plarv import settings
from plarv.exceptions import ArgusConfigurationError
from plarv_schemas.kafka_connection import Connection, connect_to
from plarv_schemas.signatures import parse_run_key, run_key
from plarv_schemas.topics import Topics, validate_prefix

__all__ = ["fleet_connection", "fleet_topics", "key_of_run", "master_key"]


def fleet_connection(
    brokers: Union[str, Sequence[str], None] = None, api_key: Optional[str] = None
) -> Connection:
    """How to reach the fleet's brokers; the arguments win over the settings.

    ArgusConfigurationError: no brokers are named, or a setting cannot be.
    """
    if not brokers:
        brokers = settings.text("ARGUS_BROKERS")
    if not brokers:
        raise ArgusConfigurationError("brokers: none are named; set ARGUS_BROKERS=host:9092")
    try:
        return connect_to(
            brokers,
            api_key=settings.text("ARGUS_API_KEY", api_key),
            protocol=settings.text("ARGUS_KAFKA_PROTOCOL"),
            mechanism=settings.text("ARGUS_KAFKA_MECHANISM"),
            ca_file=settings.text("ARGUS_KAFKA_CA"),
            certificate_file=settings.text("ARGUS_KAFKA_CERTIFICATE"),
            key_file=settings.text("ARGUS_KAFKA_CERTIFICATE_KEY"),
        )
    except ValueError as error:
        raise ArgusConfigurationError(str(error)) from error


def fleet_topics() -> Topics:
    """The fleet's topics. ArgusConfigurationError: their prefix cannot be."""
    try:
        return Topics(validate_prefix(settings.text("ARGUS_TOPIC_PREFIX")))
    except ValueError as error:
        raise ArgusConfigurationError(f"ARGUS_TOPIC_PREFIX: {error}") from error


def master_key() -> str:
    """The fleet's master key, "" where none is set."""
    return settings.text("ARGUS_MASTER_KEY")


def key_of_run(run_id: str, given: Optional[str] = None) -> Optional[bytes]:
    """The key that checks this run's actions; None: neither its own nor the master key is set.

    ArgusConfigurationError: the key is none.
    """
    own, master = settings.text("ARGUS_RUN_KEY", given), master_key()
    try:
        if own:
            return parse_run_key(own)
        return run_key(master, run_id) if master else None
    except ValueError as error:
        raise ArgusConfigurationError(str(error)) from error
