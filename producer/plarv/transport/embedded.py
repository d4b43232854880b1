"""The embedded engine: detectors and policy on a thread of the training process."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Callable, List, Optional

from plarv.decision import Decision
from plarv.faults import Faults
from plarv.transport import Mailbox
from plarv.transport.follower import FileFollower
from plarv.transport.journal_keeper import JournalKeeper
from plarv_processors.engine import EngineConfig
from plarv_processors.stored_fold import Record, StoredFold, fold_rest
from plarv_schemas.events import Action
from plarv_schemas.journal_writer import JournalWriter
from plarv_schemas.locks import FileLock
from plarv_schemas.records import FOLD_LOCK

__all__ = ["EmbeddedTransport", "fold_rest"]

_PAUSE_S = 0.1  # between two looks at the journal while all is well
_PAUSE_BEHIND_S = 0.02  # while there is more to fold than fits into a slice
_PAUSE_OPEN_S = 0.01  # while a verdict asks for more than a warning: now a late answer costs
_SLICE_S = 0.002  # of folding at a time; with the pauses it leaves the loop nine tenths of the GIL
_CHUNK = 32  # events between two looks at the clock
_SAVE_EVERY = 50_000  # events between two snapshots
_LOCK_EVERY_S = 1.0


class EmbeddedTransport:
    """Folds the run's journal on a daemon thread, a slice at a time.

    The process that holds the run's fold lock folds all ranks' journals in the folder (local rank
    0); the others follow what it writes. The same thread keeps the journal's next segments ready
    and removes folded ones where the journal would pass its bound.
    """

    def __init__(
        self,
        folder: Path,
        writer: JournalWriter,
        mailbox: Mailbox,
        faults: Faults,
        *,
        may_lead: bool,
        several: bool,
        journal_max_bytes: int,
        tell: Callable[[Record], None],
        tend: Callable[[], None],
        config: Optional[EngineConfig] = None,
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._mailbox = mailbox
        self._faults = faults
        self._may_lead = may_lead
        self._several = several  # whether other ranks of this node write to the folder
        self._keeper = JournalKeeper(folder, writer, journal_max_bytes, self._trim)
        self._tell = tell
        self._tend = tend
        self._config = self._resolved(config)
        self._lock = FileLock(folder / FOLD_LOCK)
        self._fold: Optional[StoredFold] = None
        self._follow = FileFollower(folder)
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="argus-engine", daemon=True)
        self._tried_lock = -float("inf")
        self._saved_at = 0
        self.caught_up = False

    @property
    def alive(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread; where none can be started, the journal alone is kept."""
        try:
            self._thread.start()
        except RuntimeError as error:  # interpreter shutdown, or no more threads
            self._faults.count("no thread for the engine", error)

    def close(self, timeout_s: float) -> None:
        """Folds what it can within ``timeout_s``; the next start or `argus export` folds the
        rest.
        """
        self._deadline = time.monotonic() + max(0.0, timeout_s - 0.25)
        self._stop.set()
        if self._thread.ident is None:  # none could be started
            self._finish()
        else:
            self._thread.join(timeout_s)
        # A rank that ends after the one that leads has more to keep; the run's lock orders them.
        folded = self.folded_step
        if folded >= 0 if folded is not None else self._writer.record > 1:
            from plarv.archiving import start_archive  # it and subprocess: at the end alone

            try:
                start_archive(self._folder)
            except OSError as error:
                self._faults.count("no process to keep the run as Parquet", error)

    def discard(self) -> None:
        """Ends the thread; it had nothing to fold."""
        self.close(0.0)

    def abandon(self) -> None:
        """In a forked child: closes its copy of the lock, or the run would stay locked with it."""
        self._lock.release()

    def describe(self) -> str:
        """What stands against the fold being complete, as a clause."""
        notes: List[str] = []
        if not self.caught_up:
            notes.append(
                "the engine is behind; `argus export` or the run's next start folds the rest"
            )
        fold = self._fold
        if fold is not None:
            notes.extend(
                f"detector {name} failed ({why})" for name, why in fold.engine.faults.items()
            )
            notes.extend(f"{count} x {why}" for why, count in fold.errors.items())
            if fold.skipped:
                notes.append(f"{fold.skipped} journal records unreadable")
        return "; ".join(notes)

    @property
    def folded_step(self) -> Optional[int]:
        """The last step that the engine folded; None before the first, or where another one
        leads.
        """
        return self._fold.engine.step if self._fold is not None else None

    def _run(self) -> None:
        while not self._stop.is_set():
            behind = False
            try:
                self._keeper.keep(for_others=self._several and self._fold is not None)
                behind = self._turn(time.monotonic() + _SLICE_S)
                self._tend()
            except Exception as error:  # noqa: BLE001 - our own fault: counted, and the loop goes on
                self._faults.count("embedded engine", error)
            if behind:
                pause = _PAUSE_BEHIND_S
            else:
                is_calm = self._mailbox.decision.action in ("CONTINUE", "WARN")
                pause = _PAUSE_S if is_calm else _PAUSE_OPEN_S
            self._stop.wait(pause)
        self._finish()

    def _turn(self, until: float) -> bool:
        """Folds until there is nothing more, or until ``until``; whether there is more."""
        if self._fold is None and not self._lead():
            self._deliver(*self._follow.look())
            self.caught_up = True
            return False
        fold = self._fold
        assert fold is not None
        before = fold.engine.ordinal
        more = True
        while more:
            count, records = fold.advance(_CHUNK)
            more = count > 0 and not fold.at_end
            self._deliver(records, None)
            if more and time.monotonic() >= until:
                break
        if fold.engine.ordinal != before:
            self._publish(fold)
        if fold.engine.ordinal - self._saved_at >= _SAVE_EVERY:
            fold.save()
            self._saved_at = fold.engine.ordinal
        self.caught_up = not more
        return more

    def _lead(self) -> bool:
        """Takes the fold lock, now and then, where this process may lead."""
        now = time.monotonic()
        if not self._may_lead or now - self._tried_lock < _LOCK_EVERY_S:
            return False
        self._tried_lock = now
        if not self._lock.acquire():
            return False
        self._deliver(*self._follow.look())  # what whoever led before wrote last
        self._fold = StoredFold(self._folder, self._config)
        return True

    def _publish(self, fold: StoredFold) -> None:
        engine, before = fold.engine, self._mailbox.decision
        policy = engine.policy
        newest = before.newest_action if before.attempt == engine.attempt else None
        self._mailbox.publish(
            Decision(
                engine.step if engine.step >= 0 else None,
                policy.recommendation(),
                policy.harm_pressure,
                policy.open_verdicts(),
                newest.reason if newest else "",
                engine.attempt,
                newest,
            )
        )

    def _deliver(self, records: List[Record], decision: Optional[Decision]) -> None:
        """Hands records to the training thread (actions of its attempt) and to the console."""
        mailbox = self._mailbox
        for record in records:
            if isinstance(record, Action):
                mailbox.publish(
                    mailbox.decision._replace(
                        newest_action=record, reason=record.reason, attempt=record.attempt
                    )
                )
                if any(session == self._writer.session for session, _ in record.sessions):
                    mailbox.actions.append(record)
                    self._writer.hold(True)
            self._tell(record)
        if decision is not None:
            newest = mailbox.decision.newest_action
            mailbox.publish(
                decision._replace(newest_action=newest, reason=newest.reason if newest else "")
            )
        if mailbox.actions:  # again and again: the training thread may have let go in between
            self._writer.hold(True)

    def _trim(self) -> int:
        """Removes the segments that are folded; the bytes freed."""
        return 0 if self._fold is None else self._fold.trim()

    def _finish(self) -> None:
        try:
            self._fold_what_is_left()
        except Exception as error:  # noqa: BLE001 - the same
            self._faults.count("embedded engine at exit", error)

    def _fold_what_is_left(self) -> None:
        if self._fold is not None or self._may_lead:
            self._tried_lock = -float("inf")
            if self._fold is not None:
                self._fold.discover()  # an order that was given just before the end
            while self._turn(min(self._deadline, time.monotonic() + 0.1)) or self._others_run():
                if time.monotonic() >= self._deadline:
                    break
        fold = self._fold
        if fold is not None:
            fold.save()
            fold.close()
            self._lock.release()
        else:
            self._deliver(*self._follow.look())

    def _resolved(self, config: Optional[EngineConfig]) -> EngineConfig:
        """The configuration with its detectors imported. One that cannot be had is counted.

        Not on the thread: beside it a DataLoader may fork at any time, also while it holds a lock.
        """
        config = config or EngineConfig()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            classes = config.classes()
        for warning in caught:
            self._faults.count(str(warning.message))
        return replace(config, detectors=classes, extra=(), without=())

    def _others_run(self) -> bool:
        """Whether another rank of this node is still at work; waits a moment where one is."""
        if not self._several or self._fold is None or not self._fold.running:
            return False
        time.sleep(_PAUSE_OPEN_S)
        return True
