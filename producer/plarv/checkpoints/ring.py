"""When a checkpoint is saved, and what becomes of it: the ring of three slots beside a training."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Callable, Deque, Dict, Mapping, NamedTuple, Optional, Tuple

from plarv import settings
from plarv.checkpoints.anchor import write_anchor
from plarv.checkpoints.contents import Training
from plarv.checkpoints.parts import anchor_of_all, had_by_all
from plarv.checkpoints.pretrained import save_beside
from plarv.checkpoints.slots import Slot, Slots, choose
from plarv.checkpoints.snapshot import Snapshot
from plarv.checkpoints.training_state import restore
from plarv.faults import Faults
from plarv_schemas.events import CONFIRM_STEPS, Action
from plarv_schemas.journal_writer import JournalWriter

__all__ = ["CheckpointRing", "Recovery", "give_way"]

_SNAPSHOT_SHARE = 0.01  # of the training's time
_WRITE_SHARE = 0.05  # of the time that a disk is busy with it
_SHARDED_STEPS = 500  # all ranks must save at one step, so none may go by its own clock
_WAIT_S = 60.0  # that a rollback waits for a write under way
_NICE = 19  # the thread that writes gives way to the training's
_Job = Callable[[], None]


class Recovery(NamedTuple):
    """What a training was put back to."""

    step: int  # whose state it has now
    path: Path
    certified: bool
    run_id: str  # that saved it
    onset_step: Optional[int]  # of the fault for which it is the anchor
    bad_steps: Tuple[int, ...]  # first and last step of that fault's batches; () without one


class CheckpointRing:
    """Keeps a training's state in three slots on disk.

    ``offer()`` is called at every step and copies the state into memory where a checkpoint is due;
    a thread of its own writes it, and the log hears of it at the next step. ``take()`` hears of the
    engine's CERTIFY, FREEZE and CHECKPOINT.
    """

    def __init__(
        self,
        slots: Slots,
        training: Training,
        about: Mapping[str, Any],  # run_id, session, part, parts
        writer: JournalWriter,
        rank: int,
        say: Callable[[str], None],
        faults: Faults,
        *,
        writes: bool,
    ) -> None:
        self._writer = writer
        self._rank = rank
        self._saved: Deque[Dict[str, Any]] = deque(maxlen=64)
        self._slots = slots
        self._training = training
        self._about = about
        self._say = say
        self._faults = faults
        self._writes = writes
        self._every = settings.integer("ARGUS_CHECKPOINT_STEPS")
        self._is_sharded = about["parts"] > 1
        self._snapshot = Snapshot(training)
        self._state = "new"  # then "preparing", "ready"; "off": no checkpoint is saved any more
        self._known: Tuple[Slot, ...] = ()
        self._blocked: Mapping[int, str] = {}
        self._look()
        self._frozen_step = -1  # of the checkpoint that must stay; -1: none
        self._heard: Deque[int] = deque(maxlen=8)  # steps certified in this attempt, by its word
        self._last: Optional[int] = None  # step of the newest
        self._judged = -1
        self._since = slots.sequence  # slots up to it are of another attempt: no word on them comes
        self._step_s = self._take_s = self._write_s = 0.0  # durations, in seconds
        self._at: Optional[float] = None  # when the last step was
        self._jobs: SimpleQueue[Optional[_Job]] = SimpleQueue()
        self._thread: Optional[threading.Thread] = None

    def offer(self, step: int, judged: int, *, calm: bool) -> None:
        """Training thread, after ``step``: saves it where that is due and nothing is under way.

        ``judged``: the step up to which the engine has come. ``calm``: nothing grave is open.
        """
        self._judged = judged
        self._tell_saved()
        if not self._writes or self._state in ("off", "preparing"):
            return
        now = time.monotonic()
        if self._at is not None:
            took = now - self._at
            self._step_s = took if self._step_s == 0.0 else 0.9 * self._step_s + 0.1 * took
        self._at = now
        if self._state == "new":
            self._snapshot.survey()
            self._do("preparing", self._prepare)
        elif self._state == "ready" and self._is_due(step, calm):
            self._save(step)

    def take(self, action: Action, step: int) -> None:
        """Hears of an action of the engine, after ``step``."""
        if action.kind == "CERTIFY":
            self._heard.append(int(action.parameters["checkpoint_step"]))
        if not self._writes:
            return
        if action.kind == "CERTIFY":
            self._do(None, lambda: self._certify(action))
        elif action.kind == "FREEZE":
            clean = action.parameters.get("checkpoint_step")
            if isinstance(clean, int):
                self._frozen_step = clean
                self._do(None, lambda: self._freeze(action, clean))
        elif action.kind == "CHECKPOINT" and not self._is_sharded and self._state == "ready":
            self._save(step)

    def can_restore(self, step: int) -> Optional[str]:
        """Why the checkpoint of ``step`` cannot be gone back to; None: it can."""
        try:
            self._find(step)
        except ValueError as error:
            return str(error)
        return None

    def restore(self, step: int) -> Slot:
        """Goes back to the certified checkpoint of ``step``.

        OSError, ValueError, RuntimeError: it could not be, and nothing has changed.
        """
        self._settle()
        slot = self._find(step)
        self._load(slot)
        return slot

    def recover(self, step: Optional[int]) -> Optional[Recovery]:
        """Goes back to the anchor, or to ``step``; None: there is no checkpoint."""
        self._settle()
        place = self._slots.folder, self._about["parts"]
        anchor = anchor_of_all(*place)
        slots = self._slots.all()
        if step is None:
            certified = had_by_all([slot for slot in slots if slot.certified], *place)
            wanted = [slot for slot in certified if slot.step == anchor.get("step")]
            chosen = (wanted or certified or had_by_all(slots, *place))[-1:]
        else:
            chosen = [slot for slot in slots if slot.step == step][-1:]
            if not chosen:
                steps = ", ".join(str(slot.step) for slot in slots) or "none"
                raise ValueError(f"there is no checkpoint of step {step}; there are: {steps}")
        if not chosen:
            return None
        slot = chosen[0]
        self._load(slot)
        word = "certified" if slot.certified else "NOT certified (no certified one is there)"
        self._say(f"back at step {slot.step}, from {slot.path}, {word}")
        onset = anchor.get("onset_step") if slot.step == anchor.get("step") else None
        last = anchor.get("frozen_at_step")
        bad = (onset, last) if isinstance(onset, int) and isinstance(last, int) else ()
        return Recovery(slot.step, slot.path, slot.certified, slot.run_id, onset, bad)

    def announce(self, step: int) -> None:
        """The training is at ``step`` again: what is newer is certified no more, and the log hears
        of what is older.
        """
        self._last = step
        self._since = self._slots.sequence
        self._frozen_step = -1
        self._heard.clear()
        if not self._writes:
            return
        for slot in [slot for slot in self._known if slot.certified]:
            if slot.step > step:
                self._slots.uncertify(slot)
            else:
                self._saved.append(self._event(slot))
        self._look()
        self._tell_saved()

    def finish(self, timeout_s: float) -> None:
        """Saves no more; lets a write under way end within ``timeout_s``, and tells the log."""
        self._state = "off"
        self._is_idle(timeout_s)
        self._tell_saved()

    def close(self, timeout_s: float) -> None:
        """Ends within ``timeout_s``; a checkpoint that is not whole by then is dropped."""
        thread = self._thread
        if thread is not None:
            self._jobs.put(None)
            thread.join(timeout_s)
            if thread.is_alive():
                self._faults.count("a checkpoint was not written before the exit")
                return  # it holds the folder for as long as it lives
        self._slots.close()

    def abandon(self) -> None:
        """In a forked child: the folder is the parent's."""
        self._state = "off"
        self._thread = None
        self._slots.close()

    def _is_due(self, step: int, calm: bool) -> bool:
        if self._is_sharded:
            return step > 0 and step % (self._every or _SHARDED_STEPS) == 0
        if not calm:
            return False
        if self._last is None:
            return True
        least = self._every
        if not least and self._step_s > 0.0:
            cost = max(self._take_s / _SNAPSHOT_SHARE, self._write_s / _WRITE_SHARE)
            least = max(CONFIRM_STEPS, math.ceil(cost / self._step_s))
        return step - self._last >= least

    def _save(self, step: int) -> None:
        if self._next_slot() is None:
            return
        begun = time.perf_counter()
        if not self._snapshot.take(step):  # the optimizer has state now, or a layer was added
            self._state = "new"
            return
        self._take_s = time.perf_counter() - begun
        self._last = step
        self._do("writing", lambda: self._write(step))

    def _next_slot(self) -> Optional[int]:
        """None where every slot is needed, or not ours."""
        needed = [slot.number for slot in self._known if self._is_needed(slot)]
        return choose(self._known, [*needed, *self._blocked])

    def _is_needed(self, slot: Slot) -> bool:
        """Whether it is frozen, or waits for the engine's word."""
        if slot.step == self._frozen_step:
            return True
        is_of_now = not slot.certified and slot.sequence > self._since
        return is_of_now and slot.step + CONFIRM_STEPS >= self._judged

    def _find(self, step: int) -> Slot:
        """The certified one of ``step``, also where its certificate has been heard of and is not
        written yet. ValueError: there is none.
        """
        for slot in reversed(self._slots.all()):
            is_heard = step in self._heard and slot.sequence > self._since
            if slot.step == step and (slot.certified or is_heard):
                return slot
        raise ValueError(f"{self._slots.folder} holds no certified checkpoint of step {step}")

    def _load(self, slot: Slot) -> None:
        wrong = self._slots.verify(slot)
        if wrong is not None:
            raise ValueError(wrong)
        passed_over = restore(slot.path, self._training).passed_over
        if passed_over:
            self._say(f"not put back: {' and '.join(passed_over)} of {slot.path}, none was given")
        self._look()

    def _look(self) -> None:
        """What lies in the slots; what is not ours there, or cannot be read, is told once."""
        self._known, self._blocked = self._slots.all(), self._slots.blocked()
        for why in self._blocked.values():
            cause = f"a checkpoint's place is left alone: {why}"
            if cause not in self._faults.counts:
                self._say(cause)
                self._faults.count(cause)

    def _tell_saved(self) -> None:
        while self._saved:
            data = self._saved.popleft()
            self._writer.control("checkpoint_saved", step=data["step"], rank=self._rank, data=data)

    def _do(self, state: Optional[str], job: _Job) -> None:
        if state is not None:
            self._state = state
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="argus-checkpoints", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _settle(self) -> None:
        """Waits until nothing is under way. RuntimeError: it takes too long."""
        if not self._is_idle(_WAIT_S):
            raise RuntimeError(f"a checkpoint is still being written after {_WAIT_S:.0f} s")

    def _is_idle(self, timeout_s: float) -> bool:
        """Waits; whether nothing is under way any more."""
        if self._thread is None:
            return True
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(timeout_s)

    # From here on: the ring's own thread.

    def _run(self) -> None:
        give_way()
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except OSError as error:
                cause = f"a checkpoint could not be kept: {error.strerror}"
                if cause not in self._faults.counts:
                    self._say(f"a checkpoint could not be kept in {self._slots.folder}: {error}")
                self._faults.count(cause)
            except Exception as error:  # noqa: BLE001 - our own fault: counted, and training goes on
                self._faults.count("a checkpoint could not be kept", error)

    def _prepare(self) -> None:
        state = "off"
        try:
            problem = self._snapshot.prepare()
            if problem is None:
                state = "ready"
            else:
                self._say(f"no checkpoints are kept: {problem}")
            if self._snapshot.left_out and self._last is None:
                names = ", ".join(self._snapshot.left_out[:3])
                self._say(f"not kept in checkpoints: {names} ({len(self._snapshot.left_out)})")
        finally:
            if self._state == "preparing":
                self._state = state

    def _write(self, step: int) -> None:
        number = self._next_slot()  # now: one may have been certified since
        begun = time.monotonic()
        try:
            if number is None:
                return
            draft = self._slots.draft()
            try:
                digests = self._snapshot.write(draft)
                save_beside(draft, self._training, self._faults)
                about = {**self._about, "step": step, "time_ns": time.time_ns()}
                slot = self._slots.publish(draft, number, digests, about)
            except BaseException:
                self._slots.discard(draft)
                raise
        finally:
            self._look()
            self._snapshot.release()
            if self._state == "writing":
                self._state = "ready"
        first = self._write_s == 0.0
        self._write_s = time.monotonic() - begun
        self._saved.append(self._event(slot))
        if first:
            self._say(
                f"checkpoints in {self._slots.folder}: three slots of {slot.size_bytes / 1e6:.4g} "
                f"MB, the first of step {step}"
            )

    def _certify(self, action: Action) -> None:
        step = int(action.parameters["checkpoint_step"])
        about = {"step": step, "certified_at_step": action.step}
        slot = self._slots.certify(step, about, after=self._since)
        self._look()
        if slot is None or step <= self._frozen_step:
            return
        self._frozen_step = -1
        write_anchor(self._slots.folder, slot)

    def _freeze(self, action: Action, step: int) -> None:
        try:
            found = self._find(step)
        except ValueError:  # it has been overwritten since: the anchor stays what it was
            return
        write_anchor(self._slots.folder, found, action)

    def _event(self, slot: Slot) -> Dict[str, Any]:
        return {
            "step": slot.step,
            "slot": slot.number,
            "part": self._about["part"],
            "parts": self._about["parts"],
            "certified": slot.certified,
            "size_bytes": slot.size_bytes,
        }


def give_way() -> None:
    """This thread comes after the training's from here on, where a thread has its own priority."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
