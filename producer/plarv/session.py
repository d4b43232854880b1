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
from plarv.transport import Mailbox
from plarv.transport.opening import open_transport
from plarv_schemas.events import Action, Verdict

if TYPE_CHECKING:
    from plarv.checkpoints.ring import CheckpointRing, Recovery
    from plarv.fleet.opening import FleetSettings

__all__ = ["Session", "open_session"]

_FLUSH_S = 0.001
_UNHEARD_STEPS = 1000  # where no step of the engine is known, it is taken to be so far behind


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
        watched = given["model"], given["optimizer"], given["scaler"]
        self._signals = ModelSignals(*watched, self._cap, self.faults)
        self._batch_size = batch_size_of(given["dataloader"])
        self._agreement = StoreAgreement(identity) if identity.world_size > 1 else None
        self._ring = self._open_ring({**given, "scaler": self._signals.scaler})
        self._attempt_from = 0  # first record of this attempt
        self.resume_at: Optional[int] = None  # the step that the next one is, after a rollback
        self._interventions = self._make_interventions(given, may_act(identity, fleet))
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
        self.transport = open_transport(
            fleet, home, identity, self.mailbox, self.faults, self.console.say, self._tell,
            self._tend,
        )  # fmt: skip
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
            action = actions.popleft()
            if any(s == self.writer.session and r < self._attempt_from for s, r in action.sessions):
                continue  # of an attempt that a rollback has left
            if self._ring is not None:
                self._ring.take(action, step)
            self._interventions.take(action, step)
        try:
            self._interventions.apply(step)
            if self._ring is not None and self.resume_at is None:
                known = self.mailbox.decision
                judged = step - _UNHEARD_STEPS if known.step is None else known.step
                self._ring.offer(step, judged, calm=known.action in ("CONTINUE", "WARN"))
        finally:
            self._hold()

    def recover(self, step: Optional[int]) -> Optional[Recovery]:
        """Puts the training back to a checkpoint, and opens the run's next attempt."""
        if self._ring is None:
            raise ArgusError("recover() needs a model and checkpoint_dir")
        try:
            found = self._ring.recover(step)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArgusError(f"the training could not be put back: {error}") from error
        if found is not None:
            self._begin_attempt(found.step)
        return found

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
            if self._ring is not None:
                self._ring.finish(self._timeout_s / 4)
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
            self._close_ring(max(0.0, until - time.monotonic()))
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
        if self._ring is not None:
            self._ring.abandon()

    def _discard(self) -> None:
        """The session never began: no process, no journal, and no folder if it made one."""
        guard = Guard("a start that failed", self.faults)
        self._closed = True
        with guard:
            self.transport.discard()
        with guard:
            self._signals.close()
            self._close_ring(0.0)
            self.writer.close()
            remove_session(self.folder, self.writer.session)

    def _hold(self) -> None:
        """Closes the short way while every step has something to do on the long one."""
        self.writer.hold(
            self._closed
            or self._signals.active
            or self._batch_size is not None
            or self._ring is not None
            or self._recorder.waiting
            or self._odd_rate
            or self._interventions.busy
            or bool(self.mailbox.actions)
            or bool(self.mailbox.refused)
        )

    def _make_interventions(self, given: Mapping[str, Any], acts: bool) -> Interventions:
        return Interventions(
            auto=self.mode == "AUTO" and acts,
            accept_operator=given["accept_operator"] is True and acts,
            cap=self._cap,
            find_optimizer=self._signals.optimizer,
            **{name: given[name] for name in ("on_pause", "raise_checkpoint", "scheduler")},
            report=self._report,
            faults=self.faults,
            agreement=self._agreement,
            rollback=self._ring,
            on_rollback=self._rolled_back,
        )

    def _open_ring(self, given: Mapping[str, Any]) -> Optional[CheckpointRing]:
        if given["checkpoint_dir"] is None and not settings.text("ARGUS_CHECKPOINT_DIR"):
            return None
        from plarv.checkpoints.opening import open_ring  # nothing where there is no ring

        return open_ring(given, self.identity, self.writer, self.console.say, self.faults)

    def _close_ring(self, timeout_s: float) -> None:
        """What the engine said last still counts: a run that has just died is frozen."""
        if self._ring is not None:
            while self.mailbox.actions:
                self._ring.take(self.mailbox.actions.popleft(), self._last_step)
            self._ring.close(timeout_s)

    def _rolled_back(self, action: Action, slot: Any) -> None:
        self._begin_attempt(slot.step)
        bad = "{} to {}".format(*action.parameters["bad_steps"])
        self.console.say(f"rolled back to step {slot.step}: the batches of steps {bad} are skipped")

    def _begin_attempt(self, step: int) -> None:
        """The state is that after ``step`` now: the log hears of it, and of what can be gone back
        to from there.
        """
        self._recorder.settle(self._timeout_s)  # what a device owes belongs to the attempt before
        self.writer.control(
            "recovered", step=step, rank=self.identity.rank, data={"checkpoint_step": step}
        )
        self._attempt_from = self.writer.record - 1
        self._last_step = step
        self.resume_at = step + 1
        if self._ring is not None:
            self._ring.announce(step)

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
        self._recorder.tend()
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
