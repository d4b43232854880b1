"""The pure fold of one detector over one run: what an agent of a fleet keeps of the run."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple, Type

from plarv_processors.attempts import ENDINGS, Attempts
from plarv_processors.complete_steps import CompleteSteps
from plarv_processors.detectors.detector import Detector
from plarv_processors.event_batch import EventBatch
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import ControlEvent, Event, StepEvent, Verdict

__all__ = ["DetectorFold"]


class DetectorFold:
    """Gives the verdicts that :class:`~plarv_processors.engine.Engine` gives of this detector.

    A run that has ended keeps only what placing its later events takes: some 500 bytes. A detector
    that raises is off for this run from that ordinal on, and ``fault`` says why.
    """

    __slots__ = (
        "detector_class", "attempts", "detector", "ordinal", "attempt", "ended", "is_off", "fault",
        "_steps",
    )  # fmt: skip

    def __init__(self, detector_class: Type[Detector]) -> None:
        self.detector_class = detector_class
        self.attempts = Attempts()
        self.detector: Optional[Detector] = None  # made at the attempt's first step
        self.ordinal = -1  # of the last accepted event
        self.attempt = 0
        self.ended = False
        self.is_off = False
        self.fault = ""
        self._steps: Optional[CompleteSteps] = None  # of a run of several ranks

    def fold(self, batch: EventBatch) -> List[Verdict]:
        """The verdicts of a batch's events."""
        found: List[Verdict] = []
        if self.is_off:
            return found
        attempt = self.attempts.place_all(batch)
        if attempt is not None:
            self._fold_plain(batch, attempt, found)
        else:
            for event in batch.events:
                self._fold_one(event, found)
        return found

    def leave_out(self) -> None:
        """The detector is not called again for this run."""
        self.is_off = True
        self.detector = self._steps = None

    def snapshot(self) -> bytes:
        """The whole state, for a fold of a detector of the same version."""
        detector, steps = self.detector, self._steps
        state = (
            None if detector is None else dump(detector),
            None if steps is None else dump(steps),
        )
        return pack(
            (
                dump(self.attempts), self.ordinal, self.attempt, self.ended, self.is_off,
                self.fault, *state,
            )
        )  # fmt: skip

    def restore(self, snapshot: bytes) -> None:
        """Goes on where ``snapshot`` was taken. ValueError: it is none of such a fold."""
        state: Tuple[Any, ...] = unpack(snapshot)
        if len(state) != 8:
            raise ValueError("the snapshot is not one of a detector's fold")
        restore(self.attempts, state[0])
        self.ordinal, self.attempt, self.ended, self.is_off, self.fault = state[1:6]
        if state[6] is not None:
            self.detector = self.detector_class()
            restore(self.detector, state[6])
        if state[7] is not None:
            self._steps = CompleteSteps()
            restore(self._steps, state[7])

    def _fold_plain(self, batch: EventBatch, attempt: int, found: List[Verdict]) -> None:
        """Steps of a run of one rank, already placed."""
        ordinal = self.ordinal
        self.ordinal += len(batch.events)
        if attempt != self.attempt:
            return  # of an earlier attempt: accepted, and no say
        update = self._ready().update
        try:
            for event in batch.steps:
                ordinal += 1
                verdicts = update(event)
                if verdicts:
                    self._add(verdicts, ordinal, found)
        except Exception as error:  # noqa: BLE001 - a detector's fault ends here
            self._fail(error)

    def _fold_one(self, event: Event, found: List[Verdict]) -> None:
        attempts = self.attempts
        attempt = attempts.place(event)
        if attempt is None or self.is_off:
            return
        self.ordinal += 1
        if attempts.current != self.attempt:
            self.attempt = attempts.current
            self._forget()
        if isinstance(event, ControlEvent):
            if event.kind in ENDINGS and attempts.ended:
                self._forget()
                self.ended = True
            return
        if attempt == self.attempt:
            self._judge(event, found)

    def _judge(self, event: StepEvent, found: List[Verdict]) -> None:
        detector = self._ready()
        world_size = event.world_size
        try:
            if world_size is None or world_size <= 1 or detector.scope == "rank":
                self._add(detector.update(event), self.ordinal, found)
                return
            if self._steps is None:
                self._steps = CompleteSteps()
            for complete in self._steps.add(event):
                self._add(detector.update(complete), self.ordinal, found)
        except Exception as error:  # noqa: BLE001 - the same
            self._fail(error)

    def _ready(self) -> Detector:
        detector = self.detector
        if detector is None:
            detector = self.detector = self.detector_class()
            self.ended = False
        return detector

    def _forget(self) -> None:
        self.detector = self._steps = None
        self.ended = False

    def _fail(self, error: Exception) -> None:
        self.fault = f"{type(error).__name__}: {error}"
        self.leave_out()

    def _add(self, verdicts: Tuple[Verdict, ...], ordinal: int, found: List[Verdict]) -> None:
        for verdict in verdicts:
            found.append(verdict._replace(attempt=self.attempt, ordinal=ordinal))
