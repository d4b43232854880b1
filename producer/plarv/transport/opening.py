"""The transport that a run needs: the embedded engine, or a fleet's brokers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Optional, Union

from plarv import settings
from plarv.faults import Faults
from plarv.identity import Identity
from plarv.journal_home import Home
from plarv.transport import Mailbox, Transport
from plarv.transport.embedded import EmbeddedTransport
from plarv_schemas.events import Action, Verdict

if TYPE_CHECKING:
    from plarv.fleet.opening import FleetSettings

__all__ = ["open_transport"]

_MEGABYTE = 1024 * 1024


def open_transport(
    fleet: Optional[FleetSettings],
    home: Home,
    identity: Identity,
    mailbox: Mailbox,
    faults: Faults,
    say: Callable[[str], None],
    tell: Callable[[Union[Verdict, Action]], None],
    tend: Callable[[], None],
) -> Transport:
    """Not started yet. ``tell`` hears of records, ``tend`` is called now and then, both on its
    thread.
    """
    max_bytes = settings.integer("ARGUS_JOURNAL_MAX_MB") * _MEGABYTE
    if fleet is None:
        return EmbeddedTransport(
            home.folder,
            home.writer,
            mailbox,
            faults,
            may_lead=identity.local_rank == 0,
            several=identity.local_world_size > 1,
            journal_max_bytes=max_bytes,
            tell=tell,
            tend=tend,
        )
    from plarv.transport.kafka import KafkaTransport

    return KafkaTransport(
        fleet,
        home.folder,
        home.writer,
        mailbox,
        faults,
        leads=identity.local_rank == 0,
        journal_max_bytes=max_bytes,
        say=say,
        tell=tell,
        tend=tend,
    )
