"""What the training process does about an action, in AUTO or for an order that it accepts."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Protocol, Type

from plarv.exceptions import ArgusCheckpoint, ArgusHalt, ArgusIntervention, ArgusPause
from plarv.faults import Faults
from plarv.learning_rate import LearningRateCap
from plarv.tensors import loaded_torch
from plarv_schemas.events import Action

__all__ = ["Agreement", "Interventions", "call_on_pause"]

_APPLIED_HERE = frozenset({"SET_LR", "RESET_OPTIMIZER", "ROLLBACK", "PAUSE", "HALT", "RESUME"})

_RAISED: Mapping[str, Type[ArgusIntervention]] = {
    "HALT": ArgusHalt, "CHECKPOINT": ArgusCheckpoint,
}  # fmt: skip

Report = Callable[[str, int, Mapping[str, Any]], None]
"""(control kind, step, data): writes a control event."""


class Rollback(Protocol):
    """How a run goes back to one of its checkpoints."""

    def can_restore(self, step: int) -> Optional[str]:
        """Why the checkpoint of ``step`` cannot be gone back to; None: it can."""
        ...

    def restore(self, step: int) -> object:
        """Goes back. OSError, ValueError, RuntimeError: it could not, and nothing has changed."""
        ...


class Agreement(Protocol):
    """How several ranks agree to act at one step, or not at all."""

    def available(self) -> bool:
        """Whether there is a way to agree."""
        ...

    def announce(self, action: Action) -> None:
        """Says that this rank has ``action`` and will carry it out with the others."""
        ...

    def settle(self, action: Action) -> bool:
        """At its step: whether all ranks carry it out. The only wait that a step may make."""
        ...


class Interventions:
    """Carries out the engine's actions on the training thread, each one once.

    With several ranks an action names the step at which all of them act; until then it waits here.
    """

    def __init__(
        self,
        *,
        auto: bool,
        accept_operator: bool,
        cap: LearningRateCap,
        find_optimizer: Callable[[], Any],
        on_pause: Optional[Callable[..., object]],
        raise_checkpoint: bool = False,
        report: Report,
        faults: Faults,
        agreement: Optional[Agreement] = None,
        scheduler: Any = None,
        rollback: Optional[Rollback] = None,
        on_rollback: Callable[[Action, object], None] = lambda action, slot: None,
    ) -> None:
        self._rollback = rollback
        self._on_rollback = on_rollback
        self._scheduler = scheduler
        self._auto = auto
        self._accept_operator = accept_operator
        self._cap = cap
        self._find_optimizer = find_optimizer
        self._on_pause = on_pause
        self._raises_checkpoint = raise_checkpoint
        self._report = report
        self._faults = faults
        self._agreement = agreement
        self._waiting: List[Action] = []
        self._seen: Dict[str, None] = {}
        self._checkpoint: Optional[Action] = None  # that the loop is to save, raised once
        self.held: Optional[Action] = None  # the pause that stands

    @property
    def busy(self) -> bool:
        """Whether every step must pass by here."""
        return bool(self._waiting) or self.held is not None or self._cap.is_active

    def take(self, action: Action, step: int) -> None:
        """Takes in an action that the engine sent."""
        if action.id in self._seen:
            return
        self._seen[action.id] = None
        if len(self._seen) > 1024:
            del self._seen[next(iter(self._seen))]
        if action.kind == "PAUSE" and self._on_pause is not None:
            call_on_pause(self._on_pause, action, self._faults)
        if not self._is_ours(action) or not self._binding(action):
            return
        if "apply_step" not in action.parameters or self._promised(action, step):
            self._waiting.append(action)

    def apply(self, step: int) -> None:
        """Carries out what is due at ``step``; raises the intervention that stands."""
        self._cap.enforce()
        due = [action for action in self._waiting if step >= action.parameters.get("apply_step", 0)]
        for action in due:
            self._waiting.remove(action)
            if "apply_step" in action.parameters:  # what all agreed on has not expired for one
                if self._agreed(action, step):
                    self._carry_out(action, step)
            elif step > action.expiry_step:
                self._tell("action_expired", action, step, {})
            else:
                self._carry_out(action, step)
        asked, self._checkpoint = self._checkpoint, None
        if self.held is not None or asked is not None:
            raise self._intervention(self.held or asked, step)

    def _is_ours(self, action: Action) -> bool:
        """Whether it is for the training process to carry out."""
        if action.kind == "CHECKPOINT":
            return self._raises_checkpoint
        return action.kind in _APPLIED_HERE

    def _binding(self, action: Action) -> bool:
        """Whether this process was told to obey it. An order is also reported where it is not."""
        if "operator" in action.parameters:
            return self._auto or self._accept_operator
        return self._auto

    def _promised(self, action: Action, step: int) -> bool:
        """Tells the other ranks that this one will act with them, where it can; whether it does.

        Once told it is bound. Without a word from this rank no other one acts.
        """
        agreement = self._agreement
        if agreement is None or not agreement.available():
            self._tell("action_dropped", action, step, {"why": "no store to agree by"})
        elif step > action.parameters["apply_step"]:
            self._tell("action_dropped", action, step, {"why": "it came too late"})
        elif not self._refused(action, step):
            agreement.announce(action)
            return True
        return False

    def _refused(self, action: Action, step: int) -> bool:
        """Whether it cannot be carried out here; that is told then."""
        why = self._why_not(action)
        if why is not None:
            self._tell("action_refused", action, step, {"why": why})
        return why is not None

    def _why_not(self, action: Action) -> Optional[str]:
        """What is missing here for ``action``; None: it can be carried out."""
        optimizer = self._find_optimizer()
        if action.kind == "SET_LR" and optimizer is None:
            return "no optimizer is known"
        if action.kind == "RESET_OPTIMIZER" and not (
            loaded_torch() and hasattr(optimizer, "state")
        ):
            return "no optimizer with state is known"
        if action.kind == "ROLLBACK":
            if self._rollback is None:
                return "no checkpoints are kept: give checkpoint_dir"
            return self._rollback.can_restore(int(action.parameters["checkpoint_step"]))
        return None

    def _agreed(self, action: Action, step: int) -> bool:
        """At its step, or the first one reported after it: what all ranks decided."""
        if self._agreement is not None and self._agreement.settle(action):
            return True
        self._tell("action_dropped", action, step, {"why": "not all ranks had it in time"})
        return False

    def _carry_out(self, action: Action, step: int) -> None:
        if self._refused(action, step):
            return
        if action.kind == "SET_LR":
            self._set_lr(action, step)
        elif action.kind == "RESET_OPTIMIZER":
            self._reset_optimizer(action, step)
        elif action.kind == "ROLLBACK":
            self._roll_back(action, step)
        elif action.kind == "RESUME":
            self.held = None
            self._tell("action_applied", action, step, {})
        elif action.kind == "CHECKPOINT":
            self._checkpoint = action
            self._tell("action_applied", action, step, {})
        else:
            self.held = action
            self._tell("action_applied", action, step, {})

    def _set_lr(self, action: Action, step: int) -> None:
        optimizer = self._find_optimizer()
        before = self._cap.current(optimizer)
        lr = action.parameters.get("lr")
        if lr is None and before is not None:
            lr = before * float(action.parameters.get("factor", 0.5))
        if lr is None or not self._cap.apply(optimizer, float(lr), self._scheduler):
            self._tell("action_refused", action, step, {"why": "the learning rate cannot be set"})
            return
        self._tell("action_applied", action, step, {"lr": lr, "lr_before": before})

    def _reset_optimizer(self, action: Action, step: int) -> None:
        from plarv.checkpoints.training_state import reset_optimizer  # asked for once in a run

        number = reset_optimizer(self._find_optimizer())
        self._tell("action_applied", action, step, {"parameters": number})

    def _roll_back(self, action: Action, step: int) -> None:
        assert self._rollback is not None
        try:
            slot = self._rollback.restore(int(action.parameters["checkpoint_step"]))
        except (OSError, ValueError, RuntimeError) as error:
            self._tell("action_refused", action, step, {"why": str(error)})
            return
        self._waiting.clear()  # of the attempt that is left
        self._tell("action_applied", action, step, {})
        self._on_rollback(action, slot)

    def _tell(self, what: str, action: Action, step: int, data: Mapping[str, Any]) -> None:
        self._report(what, step, {"action": action.id, "kind": action.kind, **data})

    def _intervention(self, action: Any, step: int) -> ArgusIntervention:
        kind = _RAISED.get(action.kind, ArgusPause)
        return kind(f"{action.kind} at step {step}: {action.reason}", step, action.to_dict())


def call_on_pause(handler: Callable[..., object], action: Action, faults: Faults) -> None:
    """Calls the user's handler with the action as a mapping; what it raises is only counted."""
    try:
        handler(action.to_dict())
    except Exception as error:  # noqa: BLE001 - anybody's handler
        faults.count(f"on_pause raised {type(error).__name__}")
