"""Whether a run belongs to a fleet, and what it needs to know of it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Mapping, NamedTuple, Optional

from plarv.exceptions import ArgusConfigurationError
from plarv.fleet.connection import fleet_connection, fleet_topics, key_of_run
from plarv_schemas.kafka_connection import Connection
from plarv_schemas.topics import Topics

__all__ = ["FleetSettings", "fleet_settings", "key_note"]


class FleetSettings(NamedTuple):
    """How a run reaches its fleet."""

    connection: Connection
    topics: Topics
    key: Optional[bytes]  # of the run; None: no action can be checked
    only_informs: bool  # MANUAL, and no operator is obeyed
    handshake_s: float
    fail_open: bool


def fleet_settings(given: Mapping[str, Any], run_id: str, mode: str) -> FleetSettings:
    """The fleet that the constructor's arguments or the settings name.

    ArgusConfigurationError: one of them cannot be, or something that is needed is not installed.
    """
    connection = fleet_connection(given["brokers"], given["api_key"])
    ca, certificate, key = (
        os.path.abspath(path) if path else ""  # who reads them has another working folder
        for path in (connection.ca_file, connection.certificate_file, connection.key_file)
    )
    _check_installed()
    return FleetSettings(
        connection._replace(ca_file=ca, certificate_file=certificate, key_file=key),
        fleet_topics(),
        key_of_run(run_id, given["run_key"]),
        only_informs=mode != "AUTO" and given["accept_operator"] is not True,
        handshake_s=float(given["step0_timeout"]),
        fail_open=given["fail_open"] is True,
    )


def key_note(fleet: FleetSettings, mode: str) -> str:
    """What to say where actions are wanted and none can be checked; "" elsewhere."""
    if fleet.key is not None or fleet.only_informs:
        return ""
    return (
        f"{mode} without a key: every action of the fleet will be refused. Set ARGUS_RUN_KEY, from "
        "`argus key for RUN`, or ARGUS_MASTER_KEY"
    )


def _check_installed() -> None:
    for module, name in (("kafka", "kafka-python"), ("pyarrow", "pyarrow")):
        if importlib.util.find_spec(module) is None:
            raise ArgusConfigurationError(
                f"brokers need {name}: pip install 'plarv-argus-sdk[kafka]'"
            )
