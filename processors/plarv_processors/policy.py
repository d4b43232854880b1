"""Verdicts in, actions out: pure, with hysteresis and a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

from plarv_processors.checkpoints import CONFIRM_STEPS, Checkpoint, Checkpoints
from plarv_processors.learning_rates import LearningRates
from plarv_processors.responses import LADDER, harm_of, is_undone_by_rollback, response_to
from plarv_schemas.events import Action, ActionKind, ControlEvent, Event, StepEvent, Verdict

__all__ = ["Policy"]

_SECOND_CAUSE = 0.25  # of its harm, that a further open verdict adds to the worst one's
_MAX_CAUSES = 64
_ORDERS: Mapping[str, ActionKind] = {"pause": "PAUSE", "resume": "RESUME", "stop": "HALT"}


class Place(Protocol):
    """Where the fold stands: what an action says of its own place."""

    ordinal: int
    attempt: int
    step: int

    def sessions(self) -> Tuple[Tuple[str, int], ...]:
        """(session, first record) of each rank in the attempt."""
        ...


class Policy:
    """Decides what to do about a run's verdicts.

    A verdict that opens or escalates asks for what :data:`~plarv_processors.responses.RESPONSES`
    says; each cause (detector, rank, onset) is answered once at each rung of the ladder, and rungs
    above CHECKPOINT keep ``cooldown_steps`` between each other. SET_LR goes back to the learning
    rate before the onset where it had risen since, else to ``lr_factor`` of what it is. A critical
    cause that is still open ``patience_steps`` after the learning rate was lowered asks for PAUSE.
    A loss spike alone lowers nothing: it takes a second critical verdict, or a learning rate that
    had risen.

    Where the run keeps checkpoints, each is certified once ``confirm_steps`` have passed after it
    without a critical verdict (CERTIFY), and what goes above CHECKPOINT first says which one is the
    last before the onset (FREEZE). A fault that going back undoes then asks for ROLLBACK in place
    of PAUSE: once an attempt, ``max_rollbacks`` times until a newer checkpoint is certified, and
    PAUSE where it could not be done.

    ``harm_pressure`` is 0 to 3: the worst open verdict's harm and a quarter of each other one's. It
    rises at once and falls by ``release`` a step, so that what comes and goes stays visible.

    Cost: O(1) a step; it keeps the open verdicts and 64 learning rates.
    """

    @dataclass(frozen=True)
    class Config:
        """Defaults lean to too little: an action in vain costs more trust than one late by a
        rung.
        """

        cooldown_steps: int = 50  # steps between two actions above CHECKPOINT
        patience_steps: int = 200  # steps that a lowered learning rate is given to work
        max_lowerings: int = 3  # of the learning rate, in one attempt
        lr_factor: float = 0.5  # where no earlier learning rate explains the fault
        lr_jump: float = 2.0  # times the earlier one: then the learning rate is the cause
        lr_held: int = 8  # steps that the earlier one was held; the start of a warm-up is no jump
        confirm_steps: int = CONFIRM_STEPS  # of a checkpoint
        max_rollbacks: int = 2  # in a row, without a newer certified checkpoint
        expiry_steps: int = 200  # an action not applied by then is void
        warn_budget: int = 20  # warnings in an attempt before they are only counted, per detector
        release: float = 0.99  # of the harm pressure that is left after a step without harm
        lead_ms: float = 600.0  # that all ranks are given to hear of an action: 4 looks and a store
        min_lead_steps: int = 8
        max_lead_steps: int = 512

        def __post_init__(self) -> None:
            if not (0.0 < self.lr_factor < 1.0 and 0.0 < self.release < 1.0):
                raise ValueError("lr_factor and release must lie between 0 and 1")
            if self.lr_jump <= 1.0:
                raise ValueError("lr_jump must be above 1")

    __slots__ = (
        "config", "mode", "harm_pressure", "accept_operator", "_open", "_answered", "_rates",
        "_last_grave", "_lowered_at", "_lowerings", "_warned", "_paused", "_step_time",
        "_world_size", "_checkpoints", "_rollbacks", "_rollback",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None, mode: str = "MANUAL") -> None:
        self.config = config or self.Config()
        self.mode = mode
        self.accept_operator = False
        self._rollbacks = 0  # since a checkpoint was last certified
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """A new attempt owes nothing to the last one."""
        self.harm_pressure = 0.0
        self._open: Dict[str, Tuple[Any, ...]] = {}  # "detector/rank" -> verdict
        self._answered: Dict[str, ActionKind] = {}  # cause -> gravest action issued for it
        self._rates = LearningRates()
        self._last_grave: Optional[int] = None  # step of the last action above CHECKPOINT
        self._lowered_at: Optional[int] = None
        self._lowerings = 0
        self._warned: Dict[str, int] = {}
        self._paused = False
        self._step_time = 0.0
        self._world_size = 1
        self._checkpoints = Checkpoints()
        self._rollback = ""  # of this attempt: "asked", or "failed": then PAUSE is asked for

    def open_verdicts(self) -> Tuple[Verdict, ...]:
        """The verdicts that stand now, the newest state of each."""
        return tuple([Verdict(*fields) for fields in self._open.values()])

    def recommendation(self) -> str:
        """The gravest thing that an open verdict asks for, or CONTINUE."""
        if self._paused:
            return "PAUSE"
        kinds = [response_to(found)[0] for found in self.open_verdicts()]
        return max(kinds, key=LADDER.index) if kinds else "CONTINUE"

    def step(
        self, event: StepEvent, verdicts: Sequence[Verdict], place: Place
    ) -> Tuple[Action, ...]:
        """The actions that follow from a step and its verdicts."""
        self._observe(event)
        made: List[Action] = []
        if event.step >= self._checkpoints.due:
            self._certify(event, place, made)
        if not verdicts and not self._open:
            if self.harm_pressure:
                self._release()
            return tuple(made)
        asked: List[Tuple[ActionKind, Verdict]] = []
        for found in verdicts:
            key = f"{found.detector}/{found.rank}"
            if found.state == "resolved":
                self._open.pop(key, None)
                continue
            self._open[key] = tuple(found)
            asked.append((response_to(found)[0], found))
            if found.level == "critical":
                self._checkpoints.spoil()
        self._weigh()
        overdue = self._overdue(event.step)
        if overdue is not None:
            asked.append(("PAUSE", overdue))
        for kind, found in sorted(asked, key=lambda item: LADDER.index(item[0]), reverse=True):
            self._answer(kind, found, event, place, made)
        return tuple(made)

    def control(self, event: ControlEvent, place: Place) -> Tuple[Action, ...]:
        """What a control event changes, and the action that answers an operator's order."""
        kind, step = event.kind, place.step
        if kind == "session_started":
            mode = event.data.get("mode")
            if mode in ("MANUAL", "AUTO"):
                self.mode = mode
            self.accept_operator = event.data.get("accept_operator") is True
        elif kind in ("action_refused", "action_dropped", "action_expired"):
            self._forget(str(event.data.get("kind", "")))
        elif kind == "checkpoint_saved":
            self._checkpoints.save(event.data, self.config.confirm_steps, self._is_calm())
        elif kind == "action_applied" and event.data.get("kind") == "SET_LR":
            self._lowered_at = step  # from here on it is given its time
        elif kind == "order" and event.data.get("order") in _ORDERS:
            order = str(event.data["order"])
            self._paused = order == "pause" or (self._paused and order != "resume")
            who = str(event.data.get("operator", "an operator"))
            parameters: Dict[str, Any] = {"operator": who, "order": order}
            if "id" in event.data:  # of a fleet's order, by which its operator knows the answer
                parameters["id"] = event.data["id"]
            if self.mode != "AUTO" and not self.accept_operator:
                parameters["dry_run"] = True
            self._add_apply_step(parameters, step)
            reason = f"{who} ordered {order} after step {step}"
            return (self._action(_ORDERS[order], parameters, reason, (), event, step, place),)
        return ()

    def _observe(self, event: StepEvent) -> None:
        self._rates.observe(event.current_lr)
        duration = event.step_time_ms
        if duration is not None and 0.0 < duration < 1e9:
            before = self._step_time
            self._step_time = duration if before == 0.0 else 0.9 * before + 0.1 * duration
        if event.world_size is not None:
            self._world_size = event.world_size

    def _weigh(self) -> None:
        """Brings the harm pressure up to what is open; it never falls here."""
        harms = sorted((harm_of(found) for found in self.open_verdicts()), reverse=True)
        if not harms:
            self._release()
            return
        total = harms[0]
        for harm in harms[1:]:
            total += _SECOND_CAUSE * harm
        target = min(3.0, total)
        if target >= self.harm_pressure:
            self.harm_pressure = target
        else:
            self.harm_pressure = max(target, self.harm_pressure * self.config.release)

    def _release(self) -> None:
        pressure = self.harm_pressure * self.config.release
        self.harm_pressure = pressure if pressure >= 0.01 else 0.0

    def _overdue(self, step: int) -> Optional[Verdict]:
        """A critical verdict that a lowered learning rate has not cured in time, or that should
        have been rolled back and could not.
        """
        if self._rollback == "failed":
            uncured = [found for found in self.open_verdicts() if found.level == "critical"]
            return max(uncured, key=harm_of) if uncured else None
        lowered = self._lowered_at
        if lowered is None or step - lowered < self.config.patience_steps:
            return None
        uncured = [
            found
            for found in self.open_verdicts()
            if response_to(found)[0] == "SET_LR" and found.level == "critical"
        ]
        return max(uncured, key=harm_of) if uncured else None

    def _answer(
        self,
        kind: ActionKind,
        found: Verdict,
        event: StepEvent,
        place: Place,
        made: List[Action],
    ) -> None:
        """Adds the actions for one finding; none where its cause was answered, or the budget is
        spent.
        """
        if kind == "SET_LR" and found.detector == "loss_spike" and not self._supported():
            kind = "CHECKPOINT"
        clean = self._checkpoints.before(found.onset_step)
        if kind == "PAUSE" and clean is not None and self._may_roll_back(found):
            kind = "ROLLBACK"
        cause = f"{found.detector}/{found.rank}/{found.onset_step}"
        before = self._answered.get(cause)
        if before is not None and LADDER.index(before) >= LADDER.index(kind):
            return
        if not self._affordable(kind, found, event.step):
            return
        if LADDER.index(kind) > LADDER.index("CHECKPOINT"):
            self._freeze(found, event, place, made)
        parameters, why = self._plan(kind, found, event.step, before, clean)
        self._answered[cause] = kind
        if len(self._answered) > _MAX_CAUSES:
            del self._answered[next(iter(self._answered))]
        where = "" if found.rank is None else f" on rank {found.rank}"
        reason = f"{found.detector} ({found.kind}){where}: {why}"
        ids = (found.id,)
        made.append(self._action(kind, parameters, reason, ids, event, event.step, place))

    def _certify(self, event: StepEvent, place: Place, made: List[Action]) -> None:
        """Certifies the checkpoint that is due, one a step: an action's id tells its step and
        kind.
        """
        steps = self.config.confirm_steps
        done = self._checkpoints.certify(event.step, steps)
        if done is not None:
            self._rollbacks = 0
            why = (
                f"{steps} steps without a critical verdict after the checkpoint of step {done.step}"
            )
            made.append(self._action("CERTIFY", done.place(), why, (), event, event.step, place))

    def _freeze(self, found: Verdict, event: StepEvent, place: Place, made: List[Action]) -> None:
        """Says once which checkpoint is the last before the fault: it must not be overwritten."""
        frozen = self._checkpoints.freeze(found.onset_step)
        if frozen is not None:
            why = f"{found.detector} ({found.kind}): {frozen[1]}"
            step = event.step
            made.append(self._action("FREEZE", frozen[0], why, (found.id,), event, step, place))

    def _action(
        self,
        kind: ActionKind,
        parameters: Dict[str, Any],
        reason: str,
        verdict_ids: Tuple[str, ...],
        event: Event,
        step: int,
        place: Place,
    ) -> Action:
        return Action(
            run_id=event.run_id,
            attempt=place.attempt,
            sessions=place.sessions(),
            step=step,
            ordinal=place.ordinal,
            kind=kind,
            parameters=parameters,
            reason=reason,
            verdict_ids=verdict_ids,
            harm_pressure=self.harm_pressure,
            expiry_step=self._expiry(parameters, step),
        )

    def _may_roll_back(self, found: Verdict) -> bool:
        return (
            is_undone_by_rollback(found)
            and self._rollback != "failed"
            and (self._rollback == "asked" or self._rollbacks < self.config.max_rollbacks)
        )

    def _is_calm(self) -> bool:
        return all(found.level != "critical" for found in self.open_verdicts())

    def _affordable(self, kind: ActionKind, found: Verdict, step: int) -> bool:
        """Whether the budget and the cooldown allow it."""
        config = self.config
        if kind == "WARN":
            warned = self._warned.get(found.detector, 0)
            self._warned[found.detector] = warned + 1
            return warned < config.warn_budget
        if kind == "SET_LR":  # one lowering at a time; a pause need not wait for it
            last = self._last_grave
            cool = last is None or step - last >= config.cooldown_steps
            return cool and self._lowerings < config.max_lowerings
        if kind == "ROLLBACK":  # one an attempt, which ends with it
            return not self._rollback
        return not (kind == "PAUSE" and self._paused)

    def _plan(
        self,
        kind: ActionKind,
        found: Verdict,
        step: int,
        before: Optional[ActionKind],
        clean: Optional[Checkpoint],
    ) -> Tuple[Dict[str, Any], str]:
        """The action's parameters and why, and what the policy keeps in mind of it."""
        config = self.config
        parameters: Dict[str, Any] = {}
        why = found.message
        if kind in ("WARN", "CHECKPOINT"):
            if kind == "CHECKPOINT":
                self._add_apply_step(parameters, step)
            return parameters, why
        if kind == "SET_LR":
            parameters, how = self._rates.lowered(config.lr_factor, config.lr_jump, config.lr_held)
            why = f"{why}; {how}"
            self._lowered_at = step if self.mode != "AUTO" else None  # until it is applied
            self._lowerings += 1
        elif kind == "ROLLBACK" and clean is not None:
            self._rollback = "asked"
            self._rollbacks += 1
            onset = found.onset_step
            parameters.update(clean.place(), onset_step=onset, bad_steps=[onset, step])
            why = f"{why}; back to the certified checkpoint of step {clean.step}"
        elif kind == "PAUSE":
            self._paused = True
            if before == "SET_LR" or response_to(found)[0] == "SET_LR":
                since = step - (self._lowered_at or step)
                why = f"{since} steps after the learning rate was lowered, still: {why}"
        self._last_grave = step
        self._add_apply_step(parameters, step)
        if self.mode != "AUTO":
            parameters["dry_run"] = True
        return parameters, why

    def _supported(self) -> bool:
        """Whether a jump of the loss has a second signal: another critical verdict, or the lr's
        own.
        """
        if self._rates.jumped(self.config.lr_jump, self.config.lr_held):
            return True
        return len([found for found in self.open_verdicts() if found.level == "critical"]) > 1

    def _add_apply_step(self, parameters: Dict[str, Any], step: int) -> None:
        """With several ranks, the step ahead at which all of them act at once."""
        if self._world_size <= 1:
            return
        config = self.config
        steps = config.lead_ms / self._step_time if self._step_time > 0.0 else math.inf
        lead = config.max_lead_steps if steps > config.max_lead_steps else math.ceil(steps)
        parameters["apply_step"] = step + max(config.min_lead_steps, lead)

    def _expiry(self, parameters: Mapping[str, Any], step: int) -> int:
        """Not before the step at which all ranks act, however quick the steps are."""
        apply_step: int = parameters.get("apply_step", step)
        return max(step + self.config.expiry_steps, apply_step)

    def _forget(self, kind: str) -> None:
        """An action was not carried out: its causes may ask again."""
        for cause in [cause for cause, answer in self._answered.items() if answer == kind]:
            del self._answered[cause]
        if kind == "PAUSE":
            self._paused = False
        if kind == "SET_LR":
            self._lowered_at = None
        if kind == "ROLLBACK":
            self._rollback = "failed"
