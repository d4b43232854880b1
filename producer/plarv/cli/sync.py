"""``argus sync``: ships what runs' folders still hold to their fleet."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple

from plarv.cli.brokers import Fleet, add_broker_option, fleet_of, told
from plarv.cli.complaint import Complaint, tell
from plarv_schemas.kafka_clients import BrokerError
from plarv_schemas.run_log import is_run_dir
from plarv_schemas.topic_reader import open_topic

if TYPE_CHECKING:
    from plarv.fleet.shipper import SessionShipper

__all__ = ["add_to"]

_STALLED_S = 30.0  # without an acknowledgement, and the brokers count as away
_PAUSE_S = 0.002
_SHOWN_EVERY_S = 0.1


class _Synced(NamedTuple):
    """What became of one run."""

    run: str
    folder: Path
    sessions: int
    events: int  # acknowledged now
    messages: int
    held: int  # sessions that a living process ships
    problems: List[str]

    def to_dict(self) -> Dict[str, Any]:
        return {**self._asdict(), "folder": str(self.folder)}


def add_to(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sync",
        help="ship what a run's folder still holds to its fleet",
        description="Ships what the journals in a run's folder, or in every run's folder below "
        "DIR, still hold. Harmless twice and while the run goes on: what is shipped is noted, and "
        "of two copies of an event the second counts for nothing.",
    )
    parser.add_argument("dir", metavar="DIR", help="a run's folder, or a folder of such: ARGUS_DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    add_broker_option(parser)
    parser.set_defaults(command=_sync)


def _sync(options: argparse.Namespace) -> int:
    folders = _folders(Path(options.dir))
    fleet = fleet_of(options)
    synced: List[_Synced] = []
    for folder in folders:
        with told():
            synced.append(_sync_run(folder, fleet))
        if options.json:
            sys.stdout.write(json.dumps(synced[-1].to_dict()) + "\n")
        else:
            sys.stdout.write(_line(synced[-1]) + "\n")
        for problem in synced[-1].problems:
            tell(f"{folder.name}: {problem}")
    return 1 if any(each.problems for each in synced) else 0


def _folders(path: Path) -> List[Path]:
    """The folders of runs at ``path`` or below. Complaint: there is none."""
    for place in (path, path / "runs"):
        if place.is_dir():
            found = [place] if is_run_dir(place) else sorted(filter(is_run_dir, place.iterdir()))
            if found:
                return found
    raise Complaint(f"{path}: no run's folder, and none below it")


def _sync_run(folder: Path, fleet: Fleet) -> _Synced:
    from plarv.fleet.link import Link
    from plarv.fleet.shipper import SessionShipper, sessions_to_ship

    link = Link(fleet.connection, lambda: None)
    bar = _Bar(folder.name)
    sessions = sessions_to_ship(folder)
    events = messages = held = 0
    problems: List[str] = []
    try:
        with open_topic(fleet.connection, fleet.topics.steps):
            link.open()
        for rank, session in sessions:
            shipper = SessionShipper(folder.absolute(), rank, session, fleet.topics.steps, link)
            if not shipper.acquire():
                held += 1
                continue
            begin = shipper.record
            try:
                _ship(shipper, bar, events)
            except (OSError, ValueError) as error:
                problems.append(f"session {session}: {error}")
            finally:
                events += shipper.record - begin
                messages += shipper.messages
                problems.extend(shipper.errors)
                shipper.close()
    finally:
        bar.end()
        link.close()
    return _Synced(folder.name, folder, len(sessions), events, messages, held, problems)


def _ship(shipper: SessionShipper, bar: _Bar, before: int) -> None:
    """Ships all that the session holds by now. BrokerError: the brokers take nothing."""
    begin, record, heard = shipper.record, shipper.record, time.monotonic()
    while True:
        busy = shipper.turn()
        now = time.monotonic()
        if shipper.record != record:
            record, heard = shipper.record, now
            bar.show(before + record - begin)
        if shipper.done:
            return
        if now - heard > _STALLED_S:
            raise BrokerError(shipper.trouble or f"no acknowledgement for {_STALLED_S:.0f} s")
        if not busy:
            time.sleep(_PAUSE_S)


def _line(synced: _Synced) -> str:
    parts = [f"{synced.run}: {synced.events:,} events shipped"]
    if not synced.events:
        parts = [f"{synced.run}: nothing left to ship"]
    if synced.held:
        verb = "session is" if synced.held == 1 else "sessions are"
        parts.append(f"{synced.held} {verb} being shipped by a living process")
    return "; ".join(parts)


class _Bar:
    """A line that is drawn again while events go out; only at a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown_at = -float("inf")
        self._drawn = False

    def show(self, events: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_at >= _SHOWN_EVERY_S:
            self._shown_at, self._drawn = now, True
            sys.stderr.write(f"\r{self._name}: {events:,} events shipped\x1b[K")
            sys.stderr.flush()

    def end(self) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
