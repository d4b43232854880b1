"""The fleet's transport: a process beside this one ships the journal and subscribes.

This side holds no Kafka client: the training loop shares its interpreter's lock with one thread
that sleeps on a pipe.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set

from plarv.exceptions import ArgusAuthenticationError, ArgusConnectionError
from plarv.faults import Faults
from plarv.fleet.opening import FleetSettings
from plarv.fleet.positions import read_shipped
from plarv.transport import Mailbox
from plarv.transport.child_process import ChildProcess
from plarv.transport.follower import Follower, Record
from plarv.transport.journal_keeper import JournalKeeper
from plarv_schemas.events import Action, Verdict
from plarv_schemas.journal_reader import segments_of
from plarv_schemas.journal_writer import JournalWriter

__all__ = ["KafkaTransport"]

_PAUSE_S = 0.05  # at most between two looks at the journal's segments
_RESTART_S = 0.5  # before a child that died is followed by another; doubled each time ...
_MAX_RESTART_S = 30.0  # ... up to this
_MAX_REFUSALS = 100  # of one run that are written into its log
_MAX_BROUGHT = 16_384
_MARGIN_S = 0.4  # of the exit's time, for what comes after


class KafkaTransport:
    """Starts and watches the process that speaks to the brokers, and hands over what it finds."""

    def __init__(
        self,
        settings: FleetSettings,
        folder: Path,
        writer: JournalWriter,
        mailbox: Mailbox,
        faults: Faults,
        *,
        leads: bool,
        journal_max_bytes: int,
        say: Callable[[str], None],
        tell: Callable[[Record], None],
        tend: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._writer = writer
        self._mailbox = mailbox
        self._faults = faults
        self._leads = leads  # whether it also ships what earlier sessions left
        self._say = say
        self._tell = tell
        self._tend = tend
        self._keeper = JournalKeeper(folder, writer, journal_max_bytes, self._trim)
        self._follower = Follower()
        self._child: Optional[ChildProcess] = None
        self._state = ""  # of the handshake: ready, unreachable, refused
        self._why = ""
        self._finished: Optional[Dict[str, Any]] = None
        self._restart_s = _RESTART_S
        self._restart_at = 0.0
        self._refusals = 0
        self._brought: Dict[str, None] = {}  # ids of records, the newest last
        self._next: Dict[str, int] = {}  # offsets at which another child goes on
        self._binding: Set[str] = set()  # actions that may be carried out, until handed over
        self._troubled = False
        self._discarded = False
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="argus-fleet", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive()

    @property
    def child_pid(self) -> Optional[int]:
        """The process beside this one; None: there is none just now."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Starts the process and waits for its handshake with the brokers.

        ArgusAuthenticationError, ArgusConnectionError: it failed, and ``fail_open`` is not set.
        """
        try:
            self._child = ChildProcess(self._config())
        except OSError as error:
            raise ArgusConnectionError(f"no process for the brokers: {error}") from error
        self._shake_hands()
        try:
            self._thread.start()
        except RuntimeError as error:  # interpreter shutdown, or no more threads
            self._faults.count("no thread for the transport", error)

    def close(self, timeout_s: float) -> None:
        """Waits up to ``timeout_s`` until all is acknowledged; the process goes on for a while."""
        self._deadline = time.monotonic() + max(0.0, timeout_s - _MARGIN_S)
        self._stop.set()
        if self._thread.ident is None:
            self._finish()
        else:
            self._thread.join(timeout_s)

    def abandon(self) -> None:
        """In a forked child: the process stays the parent's."""
        if self._child is not None:
            self._child.abandon()

    def discard(self) -> None:
        """Ends the process at once: the run never began."""
        self._discarded = True
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._child is not None:
            self._child.kill()

    def describe(self) -> str:
        """What is not shipped yet, as a clause."""
        left = self._writer.record - self._shipped()
        if left <= 0:
            return ""
        return (
            f"{left} events not shipped yet: the run's next start or `argus sync {self._folder}` "
            "ships them"
        )

    def _shipped(self) -> int:
        """Up to which record the session is known to be shipped."""
        if self._finished is not None:
            return int(self._finished["record"])
        topic = self._settings.topics.steps
        shipped = read_shipped(self._folder, self._writer.session, topic)
        return 0 if shipped is None else shipped.record

    def _config(self) -> Dict[str, Any]:
        settings = self._settings
        return {
            "connection": settings.connection._asdict(),
            "prefix": settings.topics.prefix,
            "folder": str(self._folder),
            "run_id": self._writer.run_id,
            "session": self._writer.session,
            "rank": self._writer.rank,
            "leftovers": self._leads,
            "key": settings.key.hex() if settings.key is not None else "",
            "only_informs": settings.only_informs,
            "begin": self._next,
        }

    def _shake_hands(self) -> None:
        child, settings = self._child, self._settings
        assert child is not None
        deadline = time.monotonic() + settings.handshake_s
        while self._state != "ready" and time.monotonic() < deadline and child.alive:
            for line in child.hear(max(0.0, min(0.1, deadline - time.monotonic()))):
                self._take(line)
            if self._state == "refused" or (self._state and settings.fail_open):
                break
        if self._state == "ready":
            return
        where = ", ".join(settings.connection.brokers)
        why = self._why or f"no answer from the brokers at {where}"
        if settings.fail_open:
            self._troubled = True
            self._say(f"{why}: the run goes on, and is shipped once they answer")
        elif self._state == "refused":
            raise ArgusAuthenticationError(f"{why}: check api_key and the ARGUS_KAFKA_* settings")
        else:
            raise ArgusConnectionError(
                f"{why}. The fleet needs its topics (`argus topics create`) and a worker (`argus "
                f"worker`); with fail_open=True the run starts without them"
            )

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._keeper.keep(for_others=False)
                self._listen(_PAUSE_S)
                self._tend()
            except Exception as error:  # noqa: BLE001 - our own fault: counted, and the loop goes on
                self._faults.count("fleet's transport", error)
                self._stop.wait(_PAUSE_S)
        try:
            self._finish()
        except Exception as error:  # noqa: BLE001 - the same
            self._faults.count("fleet's transport at exit", error)

    def _listen(self, timeout_s: float) -> None:
        child = self._child
        if child is None:
            if time.monotonic() < self._restart_at:
                self._stop.wait(timeout_s)
                return
            self._child = child = ChildProcess(self._config())
        lines = child.hear(timeout_s)
        records = [record for line in lines for record in self._take(line)]
        if records:
            self._deliver(records)
        if not lines and not child.alive and self._finished is None:
            self._child_died(child)
        if self._mailbox.actions or self._mailbox.refused:
            self._writer.hold(True)  # again: the training thread may have let go in between

    def _child_died(self, child: ChildProcess) -> None:
        child.leave()
        self._child = None
        self._faults.count("the process that ships died, and was started again")
        self._restart_at = time.monotonic() + self._restart_s
        self._restart_s = min(2 * self._restart_s, _MAX_RESTART_S)

    def _take(self, line: Dict[str, Any]) -> List[Record]:
        """What a line from the child says; the record in it."""
        if "record" in line:
            return self._take_record(line)
        if "refused" in line:
            self._refuse(line["refused"])
        elif "refusals" in line:
            for why, count in line["refusals"].items():
                self._faults.count(f"action refused: {why}", times=count)
        elif "state" in line:
            self._state, self._why = line["state"], line.get("why", "")
            if self._state == "ready":
                self._restart_s = _RESTART_S
                self._recovered()
        elif "trouble" in line:
            if line["trouble"]:
                self._in_trouble(line["trouble"])
            else:
                self._recovered()
        elif "finished" in line:
            self._finished = line["finished"]
        elif "next" in line:
            self._next = line["next"]
        elif "fault" in line:
            self._why = self._why or str(line["fault"])
            self._faults.count(str(line["fault"]))
        return []

    def _take_record(self, line: Dict[str, Any]) -> List[Record]:
        """A verdict or action; none where an earlier child brought it."""
        record = _record(line["record"])
        if record.id in self._brought:
            return []
        self._brought[record.id] = None
        if len(self._brought) > _MAX_BROUGHT:
            del self._brought[next(iter(self._brought))]
        if line["binding"]:
            self._binding.add(record.id)
        return [record]

    def _in_trouble(self, why: str) -> None:
        if not self._troubled:
            self._troubled = True
            self._say(f"{why}: the journal keeps everything until they answer")

    def _recovered(self) -> None:
        if self._troubled:
            self._troubled = False
            self._say("the brokers answer again: what was kept is shipped")

    def _refuse(self, refused: Dict[str, str]) -> None:
        self._faults.count(f"action refused: {refused['why']}")
        self._refusals += 1
        if self._refusals <= _MAX_REFUSALS:
            self._mailbox.refused.append(refused)
            self._writer.hold(True)

    def _deliver(self, records: List[Record]) -> None:
        """Hands records to the training thread, the console and the newest decision."""
        mailbox = self._mailbox
        newest = mailbox.decision.newest_action
        for record in records:
            if isinstance(record, Action):
                newest = record
                if record.id in self._binding:
                    self._binding.discard(record.id)
                    mailbox.actions.append(record)
                    self._writer.hold(True)
            self._tell(record)
        decision = self._follower.take(records)
        if newest is not None and newest.attempt < decision.attempt:
            newest = None
        reason = newest.reason if newest else ""
        mailbox.publish(decision._replace(newest_action=newest, reason=reason))

    def _finish(self) -> None:
        """Ships what it can until the deadline; then the child goes on alone."""
        child = self._child
        if self._discarded:
            return
        if child is None:
            self._child = child = ChildProcess(self._config())
        child.tell({"finish": True})
        while self._finished is None and time.monotonic() < self._deadline and child.alive:
            records = [r for line in child.hear(0.02) for r in self._take(line)]
            if records:
                self._deliver(records)
        child.leave()

    def _trim(self) -> int:
        """Removes the segments that are shipped; the bytes freed."""
        freed = 0
        topic = self._settings.topics.steps
        for session, files in segments_of(self._folder).items():
            shipped = read_shipped(self._folder, session, topic)
            for file in files:
                if shipped is not None and file.segment < shipped.position[0]:
                    try:
                        size = file.path.stat().st_size
                        file.path.unlink()
                        freed += size
                    except FileNotFoundError:  # another rank was quicker
                        continue
        return freed


def _record(data: Dict[str, Any]) -> Record:
    return Verdict.from_dict(data) if data["type"] == "verdict" else Action.from_dict(data)
