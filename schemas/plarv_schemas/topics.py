"""The Kafka topics: their names, what they hold, how long, and the headers of their messages.

Every topic but the dead letters has the same number of partitions and is keyed by run id, so that
all of a run lies in partitions of one number.
"""

from __future__ import annotations

import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

__all__ = [
    "DEFAULT_PARTITIONS",
    "DEFAULT_PREFIX",
    "Headers",
    "Topics",
    "header",
    "topic_settings",
    "validate_prefix",
]

DEFAULT_PREFIX = "argus"
DEFAULT_PARTITIONS = 16

MAX_MESSAGE_BYTES = 512 * 1024
"""Of a message's value, as its writer packs it; the topics take twice that."""

TABLE_HEADER = "argus-table"  # steps, events, verdicts, actions, watermark, order, ...
SCHEMA_HEADER = "argus-schema"  # SCHEMA_VERSION of the writer
OFFSET_HEADER = "argus-offset"  # of a verdict or action: the place of its event in the steps topic
SIGNATURE_HEADER = "argus-signature"  # of an action or order; see plarv_schemas.signatures
ID_HEADER = "argus-id"  # of a verdict or action: known before the value is decoded

Headers = Sequence[Tuple[str, bytes]]

_DAY_MS = 86_400_000
_PREFIX = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


class Topics(NamedTuple):
    """The names of a fleet's topics; two fleets share brokers under two prefixes.

    >>> Topics().steps, Topics("team-a").verdicts
    ('argus.steps', 'team-a.verdicts')
    """

    prefix: str = DEFAULT_PREFIX

    @property
    def steps(self) -> str:
        """Step and control events: the log."""
        return f"{self.prefix}.steps"

    @property
    def verdicts(self) -> str:
        """Verdicts, and how far each detector has read."""
        return f"{self.prefix}.verdicts"

    @property
    def actions(self) -> str:
        """The policy's actions, signed."""
        return f"{self.prefix}.actions"

    @property
    def orders(self) -> str:
        """Operators' signed orders."""
        return f"{self.prefix}.orders"

    @property
    def snapshots(self) -> str:
        """States of agents and policy (compacted)."""
        return f"{self.prefix}.snapshots"

    @property
    def left_out(self) -> str:
        """Detectors that hung on a run, and from which offset on (compacted)."""
        return f"{self.prefix}.left-out"

    @property
    def dead_letters(self) -> str:
        """Messages that could not be read, each with the reason."""
        return f"{self.prefix}.dlq"

    def all(self) -> Tuple[str, ...]:
        """Every topic, the log first."""
        return (
            self.steps,
            self.verdicts,
            self.actions,
            self.orders,
            self.snapshots,
            self.left_out,
            self.dead_letters,
        )


def topic_settings(topics: Topics) -> Dict[str, Mapping[str, str]]:
    """The configuration with which each topic is created."""
    sizes = {"max.message.bytes": str(2 * MAX_MESSAGE_BYTES)}
    compacted = {
        **sizes,
        "cleanup.policy": "compact",
        "segment.bytes": str(16 * 1024 * 1024),  # only closed segments are compacted
        "segment.ms": "600000",
        "min.cleanable.dirty.ratio": "0.2",
        "delete.retention.ms": str(_DAY_MS),
    }

    def kept(days: int) -> Dict[str, str]:
        return {**sizes, "cleanup.policy": "delete", "retention.ms": str(days * _DAY_MS)}

    return {
        topics.steps: kept(7),
        topics.verdicts: kept(30),
        topics.actions: kept(30),
        topics.orders: kept(7),
        topics.snapshots: compacted,
        topics.left_out: compacted,
        topics.dead_letters: kept(30),
    }


def header(headers: Optional[Union[Headers, Mapping[str, bytes]]], name: str) -> Optional[str]:
    """The text of one header; None where it is missing or no text.

    >>> header([("argus-table", b"steps")], "argus-table")
    'steps'
    """
    pairs = headers.items() if isinstance(headers, Mapping) else headers or ()
    for key, value in pairs:
        if key == name:
            try:
                return bytes(value).decode("utf-8")
            except UnicodeDecodeError:
                return None
    return None


def validate_prefix(prefix: str) -> str:
    """``prefix`` itself where it can begin a topic's name; else ValueError."""
    if not _PREFIX.match(prefix):
        raise ValueError(
            f"a topic prefix is 1 to 100 letters, digits, '.', '_', '-'; not {prefix!r}"
        )
    return prefix


def make_headers(**values: Union[str, int, None]) -> List[Tuple[str, bytes]]:
    """``table="steps"`` as ``[("argus-table", b"steps")]``; None is left out."""
    return [
        (f"argus-{name}", str(value).encode("utf-8"))
        for name, value in values.items()
        if value is not None
    ]
