"""One run as this process sees it: journal, engine, console, interventions, put together."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Union

from plarv import settings
from plarv.agreement import StoreAgreement
from plarv.announcement import address_note, describe, may_act, ranks_note
from plarv.columns import ColumnReader
from plarv.console import Console
from plarv.decision import Decision
from plarv.discovery import batch_size_of
from plarv.exceptions import ArgusError
from plarv.faults import Faults, Guard
from plarv.identity import Identity, discover, validate_run_id
from plarv.interventions import Interventions
from plarv.journal_home import Home, open_home, refuse_if_paused, remove_session, sample_key
from plarv.learning_rate import LearningRateCap
from plarv.parameters import resolve_mode
from plarv.recorder import Recorder
from plarv.signals import ModelSignals
from plarv.transport import Mailbox, Transport
from plarv.transport.embedded import EmbeddedTransport
from plarv_schemas.events import Action, Verdict

if TYPE_CHECKING:
    from plarv.fleet.opening import FleetSettings

__all__ = ["Session", "open_session"]

_MEGABYTE = 1024 * 1024
_FLUSH_S = 0.001


class Session:
    """What stands between ``step()`` and the run's folder.

    All but ``tend`` and ``tell`` belongs to the training thread; these two are called by the
    transport's.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        identity: Identity,
        home: Home,
        mode: str,
        fleet: Optional[FleetSettings],
        listener: Callable[[Decision], None],
        follow_rate: Callable[[Optional[Mapping[str, Any]]], None],
    ) -> None:
        self.run_id = identity.run_id
        self.folder: Path = home.folder
        self.writer = home.writer
        self.mailbox = Mailbox(listener)
        self.faults = Faults()
        self.identity = identity
        self.mode = mode
        silent = settings.flag("ARGUS_SILENT", given["silent"])
        self.console = Console(silent or identity.local_rank != 0)
        self._on_pause = given["on_pause"]
        self._cap = LearningRateCap(self.faults)
        self._signals = ModelSignals(given["model"], given["optimizer"], self._cap, self.faults)
        self._batch_size = batch_size_of(given["dataloader"])
        self._agreement = StoreAgreement(identity) if identity.world_size > 1 else None
        self._interventions = Interventions(
            auto=mode == "AUTO" and may_act(identity, fleet),
            accept_operator=given["accept_operator"] is True and may_act(identity, fleet),
            cap=self._cap,
            find_optimizer=self._signals.optimizer,
            on_pause=given["on_pause"],
            report=self._report,
            faults=self.faults,
            agreement=self._agreement,
            scheduler=given["scheduler"],
        )
        self._recorder = Recorder(
            self.writer, ColumnReader(sample_key(self.folder)), self._signals, self.faults
        )
        self._records: Dict[str, int] = {}
        self._last_step = -1
        self.late = 0  # steps after complete()
        self._closed = False
        self._timeout_s = settings.number("ARGUS_SHUTDOWN_TIMEOUT")
        self._follow_rate = follow_rate
        self._rate: Optional[Mapping[str, Any]] = None
        self._odd_rate = False
        self._fleet = fleet
        self.transport = self._embedded() if fleet is None else self._kafka(fleet)
        self._look_at_rate()
        self._hold()

    def start(self, data: Mapping[str, Any]) -> None:
        """Writes that the session began, and starts the transport.

        ArgusConnectionError and its kin: the handshake with a fleet failed. ArgusPause: the fleet
        has paused the run since. Nothing is left of the session then.
        """
        self.writer.control("session_started", step=None, rank=self.identity.rank, data=data)
        try:
            self.transport.start()
            if self._fleet is not None:
                refuse_if_paused(self.run_id)
        except BaseException:
            self._discard()
            raise

    def record(
        self,
        loss: Any,
        grad_norm: Any,
        step: int,
        given: Mapping[str, Any],
        local_report: Any,
        catch: bool,
    ) -> None:
        """One step, by the long way."""
        if self._closed:
            self.late += 1
            if self.late == 1:
                self.console.say(
                    "step() after complete(): this step and later ones are not recorded"
                )
            return
        if self._batch_size is not None and given.get("batch_size") is None:
            given = {**given, "batch_size": self._batch_size}
        for problem in self._recorder.record(loss, grad_norm, step, given, local_report):
            self.problem(problem, catch)
        if step < self._last_step:
            self.console.say(
                f"step went back from {self._last_step} to {step}: a new attempt begins. If your "
                f"counter starts again each epoch, leave step= out."
            )
        self._last_step = step

    def problem(self, what: str, catch: bool) -> None:
        """An argument of ``step()`` that was left out."""
        if not catch:
            raise ArgusError(what)
        self.faults.count(what)

    def intervene(self, step: int) -> None:
        """Applies what the engine asks for; raises the intervention that stands."""
        if self._closed:
            return
        refused = self.mailbox.refused
        while refused:
            self.writer.control(
                "action_refused", step=step, rank=self.identity.rank, data=refused.popleft()
            )
        actions = self.mailbox.actions
        while actions:
            self._interventions.take(actions.popleft(), step)
        try:
            self._interventions.apply(step)
        finally:
            self._hold()

    def close(self, status: str, exception: Optional[str], begun: Optional[float] = None) -> None:
        """Ends the session within ARGUS_SHUTDOWN_TIMEOUT, and prints the summary. Once.

        ``begun`` is the monotonic time from which several sessions that end together are timed.
        """
        if self._closed:
            if self.late > 1:
                self.console.say(f"{self.late} steps after complete() were not recorded")
            self.late = 0
            return
        self._closed = True
        until = (time.monotonic() if begun is None else begun) + self._timeout_s
        guard = Guard("the end of the run", self.faults)
        with guard:
            self._recorder.close(self._timeout_s / 4)
        with guard:
            data = {"status": status, "exception": exception}
            self.writer.control("session_finished", step=None, rank=self.identity.rank, data=data)
            self.writer.hold(True)
        with guard:
            self._signals.close()
            self._cap.lift()
        with guard:
            while not self.writer.flush() and self.transport.alive and time.monotonic() < until:
                time.sleep(_FLUSH_S)  # its thread makes room
            self.transport.close(max(0.0, until - time.monotonic()))
        with guard:
            self.writer.close()
        with guard:
            self._summarise(status)

    def abandon(self) -> None:
        """In a forked child: lets go of everything without a word."""
        self._closed = True
        self.console.silent = True
        self.transport.abandon()
        self._signals.close()

    def _embedded(self) -> Transport:
        return EmbeddedTransport(
            self.folder,
            self.writer,
            self.mailbox,
            self.faults,
            may_lead=self.identity.local_rank == 0,
            several=self.identity.local_world_size > 1,
            journal_max_bytes=settings.integer("ARGUS_JOURNAL_MAX_MB") * _MEGABYTE,
            tell=self._tell,
            tend=self._tend,
        )

    def _kafka(self, fleet: FleetSettings) -> Transport:
        from plarv.transport.kafka import KafkaTransport

        return KafkaTransport(
            fleet,
            self.folder,
            self.writer,
            self.mailbox,
            self.faults,
            leads=self.identity.local_rank == 0,
            journal_max_bytes=settings.integer("ARGUS_JOURNAL_MAX_MB") * _MEGABYTE,
            say=self.console.say,
            tell=self._tell,
            tend=self._tend,
        )

    def _discard(self) -> None:
        """The session never began: no process, no journal, and no folder if it made one."""
        guard = Guard("a start that failed", self.faults)
        self._closed = True
        with guard:
            self.transport.discard()
        with guard:
            self._signals.close()
            self.writer.close()
            remove_session(self.folder, self.writer.session)

    def _hold(self) -> None:
        """Closes the short way while every step has something to do on the long one."""
        self.writer.hold(
            self._closed
            or self._signals.active
            or self._batch_size is not None
            or self._recorder.waiting
            or self._odd_rate
            or self._interventions.busy
            or bool(self.mailbox.actions)
            or bool(self.mailbox.refused)
        )

    def _report(self, kind: str, step: int, data: Mapping[str, Any]) -> None:
        self.writer.control(kind, step=step, rank=self.identity.rank, data=data)
        done = kind.replace("action_", "")
        if done != "applied" or data["kind"] == "SET_LR":
            extra = f": {data['why']}" if "why" in data else ""
            if "lr" in data:
                before = "" if data["lr_before"] is None else f"{data['lr_before']:.4g} "
                extra = f": learning rate {before}-> {data['lr']:.4g}"
            self.console.say(f"step {step} {data['kind']} {done}{extra}")

    def _tell(self, record: Union[Verdict, Action]) -> None:
        name = "verdicts" if isinstance(record, Verdict) else "actions"
        self._records[name] = self._records.get(name, 0) + 1
        self.console.record(record)

    def _tend(self) -> None:
        if self._agreement is not None:
            self._agreement.tend()
        if not self._signals.active:
            self._look_at_rate()

    def _look_at_rate(self) -> None:
        """Finds the parameter group whose rate the short way reads: load_state_dict() makes new
        ones.

        A rate that is no plain number (a tensor) is left to the long way.
        """
        groups: Any = getattr(self._signals.optimizer(), "param_groups", None) or [{}]
        group: Mapping[str, Any] = groups[0]
        rate = group.get("lr")
        plain = isinstance(rate, (float, int))
        self._odd_rate = rate is not None and not plain
        if self._odd_rate:
            self.writer.hold(True)
        found = group if plain else None
        if found is not self._rate:
            self._rate = found
            self._follow_rate(found)

    def _summarise(self, status: str) -> None:
        notes: List[str] = [self.transport.describe(), self.faults.describe()]
        if self.writer.lost:
            notes.append(f"{self.writer.lost} events lost ({self.writer.ended or 'too long'})")
        text = "; ".join(note for note in notes if note)
        self.console.say(
            f"run {self.run_id} {status}: {self.writer.record} events, "
            f"{self._records.get('verdicts', 0)} verdicts, "
            f"{self._records.get('actions', 0)} actions"
            + (f" ({text})" if text else "")
            + f". argus replay {self.folder}"
        )


def open_session(
    given: Mapping[str, Any],
    listener: Callable[[Decision], None],
    follow_rate: Callable[[Optional[Mapping[str, Any]]], None],
) -> Optional[Session]:
    """A session that has begun; None where no disk takes a journal.

    ``listener`` hears decisions, ``follow_rate`` which parameter group holds the learning rate.
    """
    mode = resolve_mode(
        settings.text("ARGUS_MODE", given["mode"]),
        "ARGUS_MODE" if given["mode"] is None else "mode",
    )
    wanted = settings.text("ARGUS_RUN_ID", given["run_id"]) or None
    if wanted is not None:
        validate_run_id(wanted, "ARGUS_RUN_ID" if given["run_id"] is None else "run_id")
    for name in ("ARGUS_JOURNAL_MAX_MB", "ARGUS_SHUTDOWN_TIMEOUT"):
        settings.number(name)
    identity = discover(wanted)
    fleet = _fleet(given, identity.run_id, mode)
    if fleet is None:  # a fleet may have lifted the pause meanwhile: it is asked first
        refuse_if_paused(identity.run_id)
    world_size = identity.local_world_size if fleet is None else identity.world_size
    home = open_home(identity, secrets.token_hex(8), world_size)
    if home is None:
        silent = Console(settings.flag("ARGUS_SILENT", given["silent"]))
        silent.say("no folder can be written to: this run is not monitored (set ARGUS_DIR)")
        return None
    session = Session(given, identity, home, mode, fleet, listener, follow_rate)
    say = session.console.say
    rank = f", {identity.world_size} ranks" if identity.world_size > 1 else ""
    say(f"run {identity.run_id} ({mode}{rank}), journal in {home.folder}")
    for note in (home.note, address_note(given, fleet, mode), ranks_note(identity, mode, fleet)):
        if note:
            say(note)
    session.start(describe(given, identity, mode, acts=may_act(identity, fleet)))
    return session


def _fleet(given: Mapping[str, Any], run_id: str, mode: str) -> Optional[FleetSettings]:
    """The fleet that the run belongs to; None: the embedded engine judges it."""
    if not (given["brokers"] or settings.text("ARGUS_BROKERS")):
        return None
    from plarv.fleet.opening import fleet_settings  # it and TLS cost a run without brokers nothing

    return fleet_settings(given, run_id, mode)
