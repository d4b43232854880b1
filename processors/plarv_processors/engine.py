"""The pure fold: events of one run in, verdicts and actions out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type, Union

from plarv_processors.attempts import ENDINGS, Attempts
from plarv_processors.complete_steps import CompleteSteps
from plarv_processors.detectors import registered
from plarv_processors.detectors.detector import Detector
from plarv_processors.policy import Policy
from plarv_processors.snapshot import dump, pack, restore, unpack
from plarv_schemas.events import Action, ControlEvent, Event, StepEvent, Verdict
from plarv_schemas.versions import SNAPSHOT_VERSION

__all__ = ["Engine", "EngineConfig", "is_compiled", "left_out_by"]

_Update = Callable[[StepEvent], Tuple[Verdict, ...]]
_NEVER = 1 << 62


@dataclass(frozen=True)
class EngineConfig:
    """What a fold is made of."""

    mode: str = "MANUAL"  # until a session_started event says otherwise
    detectors: Optional[Tuple[Type[Detector], ...]] = None  # None: all that are registered
    extra: Tuple[Type[Detector], ...] = ()
    without: Tuple[str, ...] = ()  # names to leave out
    policy: Policy.Config = field(default_factory=Policy.Config)

    def classes(self) -> Tuple[Type[Detector], ...]:
        """The detectors' classes, in the order in which the policy hears them."""
        base = registered() if self.detectors is None else self.detectors
        every = (*base, *(extra for extra in self.extra if extra not in base))
        return tuple(cls for cls in every if cls.name not in self.without)


class Engine:
    """Folds the log of one run: the same events in the same order give the same records, bit for
    bit.

    It reads no clock and does no I/O. A detector that raises is off for this run from that ordinal
    on (``faults`` says which and why); every other one goes on. Where all sessions of an attempt
    have ended, a step that still comes begins with fresh detectors and a fresh policy.

    >>> from plarv_processors.detectors.loss_spike import LossSpike
    >>> engine = Engine(EngineConfig(detectors=(LossSpike,)))
    >>> for step in range(61):
    ...     loss = 9.0 if step == 60 else 2.0 + 0.01 * (step % 5)
    ...     for record in engine.fold(StepEvent("run", "session", step, 0, step, loss=loss)):
    ...         print(type(record).__name__, record.step, record.kind)
    Verdict 60 transient
    Action 60 WARN
    """

    def __init__(self, config: Optional[EngineConfig] = None) -> None:
        self.config = config or EngineConfig()
        self._classes = self.config.classes()
        self.ordinal = -1  # of the last accepted event
        self.attempt = 0  # being folded
        self.step = -1  # of the last step event folded
        self.accepted = False  # whether the last event was accepted
        self.duplicates = 0
        self.stale = 0  # events of earlier attempts
        self.faults: Dict[str, str] = {}  # detector -> what it raised
        self.attempts = Attempts()
        self.policy = Policy(self.config.policy, self.config.mode)
        self._steps = CompleteSteps()
        self.detectors: Tuple[Detector, ...] = ()
        self._off: Dict[str, int] = {}  # detector -> ordinal from which it is off
        self._ended = False  # the attempt: its state is not used again
        self._left_out: Dict[str, int] = {}  # detector -> last ordinal that it is called for
        self._leave_after = _NEVER  # the first of these
        self._single: List[_Update] = []  # all of them, for a run of one rank
        self._by_rank: List[Tuple[int, _Update]] = []
        self._by_step: List[Tuple[int, _Update]] = []
        self._make_detectors()

    @property
    def fingerprint(self) -> str:
        """Of the snapshot's version and every detector's configuration: only equal ones share
        state.
        """
        versions = [detector.version for detector in self.detectors]
        return "|".join([str(SNAPSHOT_VERSION), repr(self.config.policy), *versions])

    def fold(self, event: Event) -> Tuple[Union[Verdict, Action], ...]:
        """The verdicts and actions of ``event``; none for a duplicate."""
        attempt = self.attempts.place(event)
        if attempt is None:
            self.accepted = False
            self.duplicates += 1
            return ()
        self.accepted = True
        self.ordinal += 1
        if self.ordinal > self._leave_after:
            self._apply_left_out()
        if self.attempts.current != self.attempt:
            self._begin_attempt()
        if isinstance(event, ControlEvent):
            return self._control(event)
        if attempt != self.attempt:
            self.stale += 1
            return ()
        if self._ended:
            self._begin_attempt()
        self.step = event.step
        world_size = event.world_size
        if world_size is None or world_size <= 1:
            verdicts = self._run(self._single, event)
        else:
            verdicts = self._fold_rank(event)
        if verdicts:
            verdicts = [self._stamp(found) for found in verdicts]
        actions = self.policy.step(event, verdicts, self)
        return (*verdicts, *actions) if verdicts or actions else ()

    def sessions(self) -> Tuple[Tuple[str, int], ...]:
        """(session, first record) of each rank in the attempt."""
        return self.attempts.sessions()

    def leave_out(self, detector: str, ordinal: int) -> None:
        """``detector`` is not called after ``ordinal``: it hung there when the run was live.

        A replay collects this from the log's ``detector_left_out`` events before it folds.
        """
        self._left_out[detector] = min(ordinal, self._left_out.get(detector, ordinal))
        self._leave_after = min(self._left_out.values())

    def snapshot(self) -> bytes:
        """The whole state, for an engine of the same ``fingerprint``."""
        return pack((self.fingerprint, _dump(self)))

    def restore(self, snapshot: bytes) -> None:
        """Goes on where ``snapshot`` was taken. ValueError: it is of another configuration."""
        fingerprint, state = unpack(snapshot)
        if fingerprint != self.fingerprint:
            raise ValueError("the snapshot is of another engine configuration")
        places, parts, detectors = state
        for name, value in zip(_OWN, places):
            setattr(self, name, value)
        for name, value in zip(_PARTS, parts):
            restore(getattr(self, name), value)
        for detector, value in zip(self.detectors, detectors):
            restore(detector, value)
        self._wire()

    def _begin_attempt(self) -> None:
        """Every attempt is judged by fresh detectors: its own past is all it has."""
        self.attempt = self.attempts.current
        self._ended = False
        self.step = -1
        self._steps = CompleteSteps()
        self.policy.begin_attempt()
        self._make_detectors()

    def _make_detectors(self) -> None:
        self.detectors = tuple([cls() for cls in self._classes])
        self._wire()

    def _wire(self) -> None:
        """The calls of the hot loop, without the detectors that are off."""
        self._single, self._by_rank, self._by_step = [], [], []
        for number, detector in enumerate(self.detectors):
            if detector.name in self._off:
                continue
            self._single.append(detector.update)
            into = self._by_rank if detector.scope == "rank" else self._by_step
            into.append((number, detector.update))

    def _control(self, event: ControlEvent) -> Tuple[Action, ...]:
        if event.kind == "detector_left_out":
            name = str(event.data.get("detector", ""))
            self._off.setdefault(name, self.ordinal)
            self._wire()
        self._ended = self._ended or (event.kind in ENDINGS and self.attempts.ended)
        return self.policy.control(event, self)

    def _apply_left_out(self) -> None:
        for name, last in self._left_out.items():
            if self.ordinal > last:
                self._off.setdefault(name, self.ordinal)
        waiting = [last for last in self._left_out.values() if last >= self.ordinal]
        self._leave_after = min(waiting, default=_NEVER)
        self._wire()

    def _fold_rank(self, event: StepEvent) -> List[Verdict]:
        """One rank's event of a job of several: by rank at once, by step once the step is
        complete.
        """
        found: List[Tuple[int, Verdict]] = []
        for number, update in self._by_rank:
            found.extend((number, verdict) for verdict in self._run([update], event))
        for complete in self._steps.add(event):
            for number, update in self._by_step:
                found.extend((number, verdict) for verdict in self._run([update], complete))
        found.sort(key=lambda pair: pair[0])
        return [verdict for _, verdict in found]

    def _run(self, updates: Sequence[_Update], event: StepEvent) -> List[Verdict]:
        found: List[Verdict] = []
        calls: Iterator[_Update] = iter(updates)
        update: Optional[_Update] = None
        while True:
            try:
                for update in calls:
                    verdicts = update(event)
                    if verdicts:
                        found.extend(verdicts)
                return found
            except Exception as error:  # noqa: BLE001 - the one place where a detector's fault ends
                self._leave_out(update, error)

    def _leave_out(self, update: Optional[_Update], error: Exception) -> None:
        """The detector that raised is off from here on: part of the fold, so a replay does the
        same.
        """
        detector = next((d for d in self.detectors if d.update == update), None)
        name = detector.name if detector is not None else repr(update)
        self._off[name] = self.ordinal
        self.faults[name] = f"{type(error).__name__}: {error}"
        self._wire()

    def _stamp(self, found: Verdict) -> Verdict:
        return found._replace(attempt=self.attempt, ordinal=self.ordinal)


def left_out_by(event: Event) -> Optional[Tuple[str, int]]:
    """(detector, last ordinal that it was called for), where the event leaves a detector out.

    What :meth:`Engine.leave_out` takes; None: it is no such event, or names none.
    """
    if not isinstance(event, ControlEvent) or event.kind != "detector_left_out":
        return None
    detector, ordinal = event.data.get("detector"), event.data.get("ordinal")
    if isinstance(detector, str) and isinstance(ordinal, int):
        return detector, ordinal
    return None


def is_compiled() -> bool:
    """Whether this is the fold as compiled to machine code; either build says the same."""
    return not __file__.endswith((".py", ".pyc"))


_OWN = (
    "ordinal", "attempt", "step", "duplicates", "stale", "_off", "faults", "_ended", "_left_out",
    "_leave_after",
)  # fmt: skip
_PARTS = ("attempts", "policy", "_steps")


def _dump(engine: Engine) -> Tuple[object, ...]:
    return (
        tuple([dump(getattr(engine, name)) for name in _OWN]),
        tuple([dump(getattr(engine, name)) for name in _PARTS]),
        tuple([dump(detector) for detector in engine.detectors]),
    )
