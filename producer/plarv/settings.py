"""Every setting that is not an argument: argument > environment > ``[tool.argus]`` > default.

``[tool.argus]`` is read from the ``pyproject.toml`` of the working folder, under the variable's
name in lower case without its prefix (``ARGUS_JOURNAL_MAX_MB`` -> ``journal_max_mb``), on Python
3.11 and later.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

from plarv.exceptions import ArgusConfigurationError

__all__ = ["SETTINGS", "flag", "integer", "number", "text"]

SETTINGS: Mapping[str, Tuple[str, str]] = {
    "ARGUS_DISABLED": ("0", "1: Argus does nothing at all; the one kill switch"),
    "ARGUS_DIR": (".argus", "folder of the journals, verdicts and actions"),
    "ARGUS_STORE": ("", "path or URI of the Parquet store; `store` in ARGUS_DIR; `none`: no store"),
    "ARGUS_RUN_ID": ("", "run id; the same id again opens the run's next attempt"),
    "ARGUS_PROJECT": ("", "a name that groups runs"),
    "ARGUS_MODE": ("MANUAL", "MANUAL reports, AUTO applies"),
    "ARGUS_SILENT": ("0", "1: nothing is printed"),
    "ARGUS_CHECKPOINT_DIR": ("", "folder of the checkpoints; none are kept without it"),
    "ARGUS_CHECKPOINT_STEPS": (
        "0",
        "steps between two checkpoints at least; 0: as often as it costs under 1%",
    ),
    "ARGUS_JOURNAL_MAX_MB": ("1024", "bound of one run's journal on disk, in MiB"),
    "ARGUS_LOCAL_MAX_MB": (
        "16",
        "bound of one run's local reports on disk, in MiB; 0: none are kept",
    ),
    "ARGUS_SHUTDOWN_TIMEOUT": ("2.0", "seconds that the exit may take at most"),
    "ARGUS_API_KEY": (
        "",
        "`id:secret`, the SASL name and password of a fleet; unused when embedded",
    ),
    "ARGUS_URL": ("", "address of an `argus serve`; not in this version: embedded instead"),
    "ARGUS_BROKERS": ("", "Kafka brokers of a fleet, host:port, several separated by commas"),
    "ARGUS_TOPIC_PREFIX": ("argus", "what the fleet's topics begin with"),
    "ARGUS_RUN_KEY": ("", "key of the run, from `argus key for RUN`: checks a fleet's actions"),
    "ARGUS_MASTER_KEY": ("", "key of the fleet, for workers and operators: signs actions, orders"),
    "ARGUS_KAFKA_PROTOCOL": (
        "",
        "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL; SASL_SSL where there is an api_key",
    ),
    "ARGUS_KAFKA_MECHANISM": ("PLAIN", "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"),
    "ARGUS_KAFKA_CA": ("", "PEM file of the authority behind the brokers' certificates"),
    "ARGUS_KAFKA_CERTIFICATE": ("", "PEM file of this client's certificate, for mutual TLS"),
    "ARGUS_KAFKA_CERTIFICATE_KEY": ("", "PEM file of that certificate's key"),
}
"""Name -> (default, meaning). The README's table is this one; a test compares them."""


def text(name: str, argument: Optional[str] = None) -> str:
    """The value of a setting, as text."""
    if argument is not None:
        return argument
    value = os.environ.get(name)
    if value:  # an empty one is as good as none: that is how compose files and CI unset it
        return value
    project = _project_file().get(name[len("ARGUS_") :].lower())
    if project is not None:
        return str(int(project)) if isinstance(project, bool) else str(project)
    return SETTINGS[name][0]


def flag(name: str, argument: Optional[bool] = None) -> bool:
    """The value of an on/off setting: 1, true, yes, on."""
    if argument is not None:
        return argument
    return text(name).strip().lower() in ("1", "true", "yes", "on")


def number(name: str) -> float:
    """The value of a setting that is a number and not negative."""
    value = text(name)
    try:
        result = float(value)
    except ValueError:
        result = -1.0
    if not 0.0 <= result < float("inf"):
        raise ArgusConfigurationError(name, "must be a number of at least 0", value)
    return result


def integer(name: str) -> int:
    """The value of a setting that counts something."""
    return int(number(name))


_read: Dict[str, Mapping[str, Any]] = {}


def _project_file() -> Mapping[str, Any]:
    """``[tool.argus]`` of the working folder's pyproject.toml, read once per folder."""
    if sys.version_info < (3, 11):
        return {}
    try:
        path = Path.cwd() / "pyproject.toml"
        key = str(path)
    except OSError:  # the working folder is gone
        return {}
    if key not in _read:
        _read[key] = _load(path)
    return _read[key]


def _load(path: Path) -> Mapping[str, Any]:
    if sys.version_info < (3, 11):
        return {}
    import tomllib

    try:
        with open(path, "rb") as file:
            table: Mapping[str, Any] = tomllib.load(file).get("tool", {}).get("argus", {})
    except (OSError, tomllib.TOMLDecodeError):
        return {}
    return table if hasattr(table, "get") else {}
