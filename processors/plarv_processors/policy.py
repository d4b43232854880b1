"""Verdicts in, actions out: pure, with hysteresis and a budget."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence, Tuple

from plarv_schemas.events import Action, ActionKind, ControlEvent, StepEvent, Verdict

__all__ = ["LADDER", "RESPONSES", "Policy"]

LADDER: Tuple[ActionKind, ...] = (
    "WARN",
    "CHECKPOINT",
    "SET_LR",
    "RESET_OPTIMIZER",
    "PAUSE",
    "HALT",
)
"""From mild to grave. Below it all is CONTINUE, which is no action."""

# What a verdict (detector, kind) asks for, with the harm it stands for (0 to 3). Only confirmed or
# exact evidence is listed above CHECKPOINT; what is not listed asks for WARN (warn) or CHECKPOINT
# (critical), so a detector of the user's own can never stop a run.
RESPONSES: Mapping[Tuple[str, str], Tuple[ActionKind, float]] = {
    ("non_finite", "loss_non_finite"): ("WARN", 1.5),
    ("non_finite", "dead"): ("PAUSE", 3.0),
    ("non_finite", "masked_non_finite"): ("PAUSE", 3.0),
    ("non_finite", "scaler_collapse"): ("PAUSE", 2.5),
    ("loss_spike", "confirmed"): ("SET_LR", 1.5),
    ("loss_divergence", "diverged"): ("SET_LR", 2.0),
    ("loss_oscillation", "growing"): ("SET_LR", 1.5),
    ("gradient_explosion", "confirmed"): ("SET_LR", 1.5),
    ("gradient_collapse", "vanished"): ("PAUSE", 2.5),
    ("optimizer_corruption", "confirmed"): ("RESET_OPTIMIZER", 2.0),
    ("optimizer_corruption", "poisoned_moments"): ("RESET_OPTIMIZER", 1.5),
    ("fleet_skew", "replica_disagreement"): ("PAUSE", 2.5),
    ("fleet_skew", "hardware"): ("PAUSE", 2.5),
}
_HARM = {"warn": 0.5, "critical": 1.0}
_SECOND_CAUSE = 0.25  # of its harm, that a further open verdict adds to the worst one's

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

    A verdict that opens or escalates asks for what :data:`RESPONSES` says; each cause (detector, rank,
    onset) is answered once at each rung of the ladder, and rungs above CHECKPOINT keep
    ``cooldown_steps`` between each other. SET_LR goes back to the learning rate before the onset where
    it had risen since, else to ``lr_factor`` of what it is. A critical cause that is still open ``patience_steps`` after the
    learning rate was lowered asks for PAUSE. A loss spike alone lowers nothing: it takes a second
    critical verdict, or a learning rate that had risen.

    ``harm_pressure`` is 0 to 3: the worst open verdict's harm and a quarter of each other one's. It
    rises at once and falls by ``release`` a step, so that what comes and goes stays visible.

    Cost: O(1) a step; it keeps the open verdicts and 64 learning rates.
    """

    @dataclass(frozen=True)
    class Config:
        """Defaults lean to too little: an action in vain costs more trust than one late by a rung."""

        cooldown_steps: int = 50  # steps between two actions above CHECKPOINT
        patience_steps: int = 200  # steps that a lowered learning rate is given to work
        max_lowerings: int = 3  # of the learning rate, in one attempt
        lr_factor: float = 0.5  # where no earlier learning rate explains the fault
        lr_jump: float = 2.0  # times the earlier one: then the learning rate is the cause
        lr_lookback: int = 8  # events before the onset whose learning rate counts as good
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
        "config", "mode", "harm_pressure", "accept_operator", "_open", "_answered", "_lrs", "_lr_at",
        "_last_grave", "_lowered_at", "_lowerings", "_warned", "_paused", "_step_time", "_world_size",
    )  # fmt: skip

    def __init__(self, config: Optional[Config] = None, mode: str = "MANUAL") -> None:
        self.config = config or self.Config()
        self.mode = mode
        self.accept_operator = False
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """A new attempt owes nothing to the last one."""
        self.harm_pressure = 0.0
        self._open: Dict[str, Tuple[Any, ...]] = {}  # "detector/rank" -> verdict
        self._answered: Dict[str, str] = {}  # cause -> gravest action issued for it
        self._lrs = array("d")  # ring of learning rates, the newest at _lr_at - 1
        self._lr_at = 0
        self._last_grave: Optional[int] = None  # step of the last action above CHECKPOINT
        self._lowered_at: Optional[int] = None
        self._lowerings = 0
        self._warned: Dict[str, int] = {}
        self._paused = False
        self._step_time = 0.0
        self._world_size = 1

    def open_verdicts(self) -> Tuple[Verdict, ...]:
        """The verdicts that stand now, the newest state of each."""
        return tuple([Verdict(*fields) for fields in self._open.values()])

    def recommendation(self) -> str:
        """The gravest thing that an open verdict asks for, or CONTINUE."""
        if self._paused:
            return "PAUSE"
        kinds = [_response(Verdict(*fields))[0] for fields in self._open.values()]
        return max(kinds, key=LADDER.index) if kinds else "CONTINUE"

    def step(
        self, event: StepEvent, verdicts: Sequence[Verdict], place: Place
    ) -> Tuple[Action, ...]:
        """The actions that follow from a step and its verdicts."""
        self._observe(event)
        if not verdicts and not self._open:
            if self.harm_pressure:
                self._release()
            return ()
        asked: List[Tuple[ActionKind, Verdict]] = []
        for found in verdicts:
            key = f"{found.detector}/{found.rank}"
            if found.state == "resolved":
                self._open.pop(key, None)
                continue
            self._open[key] = tuple(found)
            asked.append((_response(found)[0], found))
        self._weigh()
        overdue = self._overdue(event.step)
        if overdue is not None:
            asked.append(("PAUSE", overdue))
        made: List[Action] = []
        for kind, found in sorted(asked, key=lambda item: LADDER.index(item[0]), reverse=True):
            action = self._answer(kind, found, event, place)
            if action is not None:
                made.append(action)
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
        elif kind == "action_applied" and event.data.get("kind") == "SET_LR":
            self._lowered_at = step  # from here on it is given its time
        elif kind == "order" and event.data.get("order") in _ORDERS:
            order = str(event.data["order"])
            self._paused = order == "pause" or (self._paused and order != "resume")
            who = str(event.data.get("operator", "an operator"))
            parameters: Dict[str, Any] = {"operator": who, "order": order}
            if self.mode != "AUTO" and not self.accept_operator:
                parameters["dry_run"] = True
            self._add_apply_step(parameters, step)
            return (
                Action(
                    run_id=event.run_id,
                    attempt=place.attempt,
                    sessions=place.sessions(),
                    step=step,
                    ordinal=place.ordinal,
                    kind=_ORDERS[order],
                    parameters=parameters,
                    reason=f"{who} ordered {order} after step {step}",
                    verdict_ids=(),
                    harm_pressure=self.harm_pressure,
                    expiry_step=step + self.config.expiry_steps,
                ),
            )
        return ()

    def _observe(self, event: StepEvent) -> None:
        lr = event.current_lr
        if lr is not None and lr - lr == 0.0:
            lrs = self._lrs
            at = self._lr_at
            if len(lrs) < _LRS:
                lrs.append(lr)
            else:
                lrs[at] = lr
            self._lr_at = at + 1 if at + 1 < _LRS else 0
        duration = event.step_time_ms
        if duration is not None and 0.0 < duration < 1e9:
            before = self._step_time
            self._step_time = duration if before == 0.0 else 0.9 * before + 0.1 * duration
        if event.world_size is not None:
            self._world_size = event.world_size

    def _weigh(self) -> None:
        """Brings the harm pressure up to what is open; it never falls here."""
        harms = sorted((_response(Verdict(*f))[1] for f in self._open.values()), reverse=True)
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
        """A critical verdict that a lowered learning rate has not cured in time."""
        lowered = self._lowered_at
        if lowered is None or step - lowered < self.config.patience_steps:
            return None
        uncured = [
            found
            for found in self.open_verdicts()
            if _response(found)[0] == "SET_LR" and found.level == "critical"
        ]
        return max(uncured, key=_harm_of) if uncured else None

    def _answer(
        self, kind: ActionKind, found: Verdict, event: StepEvent, place: Place
    ) -> Optional[Action]:
        config = self.config
        if kind == "SET_LR" and found.detector == "loss_spike" and not self._supported():
            kind = "CHECKPOINT"
        cause = f"{found.detector}/{found.rank}/{found.onset_step}"
        before = self._answered.get(cause)
        if before is not None and LADDER.index(before) >= LADDER.index(kind):
            return None
        parameters: Dict[str, Any] = {}
        why = found.message
        step = event.step
        if kind == "WARN":
            if self._warned.get(found.detector, 0) >= config.warn_budget:
                return None
            self._warned[found.detector] = self._warned.get(found.detector, 0) + 1
        elif kind != "CHECKPOINT":
            if self._last_grave is not None and step - self._last_grave < config.cooldown_steps:
                if kind == "SET_LR" or self._paused:
                    return None  # one lowering at a time; a pause need not wait for it
            if kind == "SET_LR":
                if self._lowerings >= config.max_lowerings:
                    return None
                why = self._lower(parameters, why)
                self._lowered_at = step if self.mode != "AUTO" else None  # until it is applied
                self._lowerings += 1
            elif kind == "PAUSE":
                if self._paused:
                    return None
                self._paused = True
                if before == "SET_LR" or _response(found)[0] == "SET_LR":
                    since = step - (self._lowered_at or step)
                    why = f"{since} steps after the learning rate was lowered, still: {why}"
            self._last_grave = step
        self._answered[cause] = kind
        if len(self._answered) > _MAX_CAUSES:
            del self._answered[next(iter(self._answered))]
        if kind in ("SET_LR", "RESET_OPTIMIZER", "PAUSE"):
            self._add_apply_step(parameters, step)
        if self.mode != "AUTO" and kind not in ("WARN", "CHECKPOINT"):
            parameters["dry_run"] = True
        where = "" if found.rank is None else f" on rank {found.rank}"
        return Action(
            run_id=event.run_id,
            attempt=place.attempt,
            sessions=place.sessions(),
            step=step,
            ordinal=place.ordinal,
            kind=kind,
            parameters=parameters,
            reason=f"{found.detector} ({found.kind}){where}: {why}",
            verdict_ids=(found.id,),
            harm_pressure=self.harm_pressure,
            expiry_step=step + config.expiry_steps,
        )

    def _supported(self) -> bool:
        """Whether a jump of the loss has a second signal: another critical verdict, or the lr's own."""
        now, earlier = self._lr_now(), self._lr_before()
        if now is not None and earlier is not None and now >= self.config.lr_jump * earlier > 0.0:
            return True
        criticals = [fields for fields in self._open.values() if Verdict(*fields).level == "critical"]
        return len(criticals) > 1

    def _lower(self, parameters: Dict[str, Any], why: str) -> str:
        """Fills in the learning rate to set, and says why it is that one."""
        now, earlier = self._lr_now(), self._lr_before()
        if now is None or not now > 0.0:
            parameters["factor"] = self.config.lr_factor
            return f"{why}; lower the learning rate to {self.config.lr_factor:g} of what it is"
        if earlier is not None and 0.0 < earlier and now >= self.config.lr_jump * earlier:
            parameters["lr"] = earlier
            return (
                f"{why}; the learning rate had risen {now / earlier:.3g}-fold, from {earlier:.4g} "
                f"to {now:.4g}: set it back to {earlier:.4g}"
            )
        parameters["lr"] = now * self.config.lr_factor
        return f"{why}; lower the learning rate from {now:.4g} to {parameters['lr']:.4g}"

    def _lr_now(self) -> Optional[float]:
        return self._lrs[self._lr_at - 1] if self._lrs else None

    def _lr_before(self) -> Optional[float]:
        """The smallest learning rate among the older ones kept: what it was before any jump."""
        lrs = self._lrs
        ordered = lrs[self._lr_at :] + lrs[: self._lr_at] if len(lrs) >= _LRS else lrs
        older = ordered[: max(0, len(ordered) - self.config.lr_lookback)]
        good = [lr for lr in older if lr > 0.0]
        return good[0] if good else None

    def _add_apply_step(self, parameters: Dict[str, Any], step: int) -> None:
        """With several ranks, the step ahead at which all of them act at once."""
        if self._world_size <= 1:
            return
        config = self.config
        steps = config.lead_ms / self._step_time if self._step_time > 0.0 else math.inf
        lead = config.max_lead_steps if steps > config.max_lead_steps else math.ceil(steps)
        parameters["apply_step"] = step + max(config.min_lead_steps, lead)

    def _forget(self, kind: str) -> None:
        """An action was not carried out: its causes may ask again."""
        for cause in [cause for cause, answer in self._answered.items() if answer == kind]:
            del self._answered[cause]
        if kind == "PAUSE":
            self._paused = False
        if kind == "SET_LR":
            self._lowered_at = None


def _harm_of(found: Verdict) -> float:
    return _response(found)[1]


_LRS = 64
_MAX_CAUSES = 64


def _response(found: Verdict) -> Tuple[ActionKind, float]:
    """What ``found`` asks for, and the harm it stands for."""
    known = RESPONSES.get((found.detector, found.kind))
    if known is not None and found.level == "critical":
        return known
    return ("CHECKPOINT" if found.level == "critical" else "WARN"), _HARM.get(found.level, 0.0)
