"""One training as a framework's callback sees it: opened when it begins, ended once."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Callable, Dict, Mapping, Optional

from plarv.client import Argus
from plarv.console import Console
from plarv.exceptions import ArgusConfigurationError, ArgusIntervention
from plarv.faults import Guard
from plarv.identity import validate_run_id
from plarv.parameters import check_arguments, resolve_mode
from plarv.settings import flag

__all__ = ["CallbackRun"]

_FROM_THE_MODEL = ("model", "tokenizer")  # what only the rank that owns the loss needs


class CallbackRun:
    """The Argus of a callback, from one training to the next.

    ``settings`` are arguments of ``Argus``; what the framework knows fills in the others. Nothing
    is opened before ``begin()``, so that a callback can be pickled to the processes of a strategy.
    A wrong setting is an ArgusConfigurationError here, at the callback's construction. With
    ``ARGUS_DISABLED=1`` everything here does nothing.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.argus: Optional[Argus] = None
        self.intervention: Optional[ArgusIntervention] = None  # that stopped the training
        self._run_id: Optional[str] = None
        self._ended_well = True
        self._owner = True
        self._rate = _RateInForce()
        if self.enabled:
            _check(self.settings)

    @property
    def enabled(self) -> bool:
        """Whether Argus is to do anything at all."""
        return not flag("ARGUS_DISABLED")

    @property
    def active(self) -> bool:
        """Whether a training goes on that is reported."""
        return self.argus is not None

    def begin(self, found: Mapping[str, Any], *, owner: bool, resumed: bool) -> None:
        """A training begins. ``found`` is what the framework knows; the caller's settings win.

        ``owner``: whether this process reports the loss. A training that is ``resumed`` in this
        process, or that follows one which did not end well, is the next attempt of the same run.
        ArgusPause: the run was paused and not resumed; nothing has been trained yet.
        """
        if not self.enabled:
            return
        self.end("failed")  # one that never said that it was over
        known = {name: value for name, value in found.items() if value is not None}
        if not owner:
            known = {name: value for name, value in known.items() if name not in _FROM_THE_MODEL}
        given = {**known, **self.settings}
        if "run_id" not in given and self._run_id and (resumed or not self._ended_well):
            given["run_id"] = self._run_id
        self.intervention = None
        self._owner = owner
        argus = Argus(**given)
        self._run_id = argus.run_id or None
        self._ended_well = False
        self._rate.follow(given.get("optimizer"))
        self.argus = argus

    def step(self, number: int, loss: Any, columns: Mapping[str, Any]) -> bool:
        """One optimizer step; True where an intervention asks to stop the training.

        Ranks that do not own the loss report that they made the step, which gives its time.
        """
        if self.argus is None:
            return False
        if not self._owner:
            loss, columns = None, {}
        rate = self._rate.read()
        return self._report(number, loss, columns if rate is None else {**columns, **rate})

    def validated(self, number: int, val_loss: Any, epoch: Any = None) -> bool:
        """An evaluation after step ``number``; True where the training is to stop."""
        if self.argus is None or not self._owner or val_loss is None:
            return False
        return self._report(number, None, {"val_loss": val_loss, "epoch": epoch})

    def end(self, status: str = "completed") -> None:
        """The training is over; where an intervention stopped it, that is its status."""
        argus, self.argus = self.argus, None
        self._rate.follow(None)
        if argus is None:
            return
        stop = self.intervention
        if stop is not None:
            argus.__exit__(type(stop), stop, None)
        else:
            argus.complete(status)
            self._ended_well = status == "completed"

    def fail(self, error: BaseException) -> None:
        """The training ends with ``error``."""
        argus, self.argus = self.argus, None
        self._rate.follow(None)
        if argus is not None:
            argus.__exit__(type(error), error, None)

    def say(self, text: str, *, here: bool = True) -> None:
        """One line for a person, unless silent or not ``here``, on the process that speaks."""
        Console(not here or flag("ARGUS_SILENT", self.settings.get("silent"))).say(text)

    def __getstate__(self) -> Dict[str, Any]:
        """In another process nothing is open."""
        return {**self.__dict__, "argus": None, "_rate": _RateInForce()}

    def _report(self, number: int, loss: Any, columns: Mapping[str, Any]) -> bool:
        argus = self.argus
        if argus is None:
            return False
        try:
            argus.step(loss, step=number, **columns)
        except ArgusIntervention as stop:
            self.intervention = stop
            return True
        return False


class _RateInForce:
    """The learning rate that an optimizer's step used: its scheduler has moved on when the step is
    reported, and a cap of ours is not in the scheduler's own figure.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._rate: Any = None

    def follow(self, optimizer: Any) -> None:
        """Looks at this optimizer's steps from now on; None: at nobody's."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._rate = None
        register: Optional[Callable[..., Any]] = getattr(optimizer, "register_step_post_hook", None)
        watcher = weakref.ref(self)

        def stepped(stepping: Any, *_: object) -> None:
            alive = watcher()
            if alive is not None:
                with Guard("the learning rate could not be read"):
                    rate = stepping.param_groups[0].get("lr")
                    alive._rate = rate.detach().clone() if hasattr(rate, "detach") else rate

        if register is not None:
            # An optimizer of another make, or a wrapper whose torch part was never set up.
            try:
                self._handle = register(stepped)
            except (AttributeError, TypeError):
                self._handle = None

    def read(self) -> Optional[Dict[str, Any]]:
        """As an argument of ``step()``; None where it is not known."""
        return None if self._rate is None else {"current_lr": self._rate}


def _check(settings: Mapping[str, Any]) -> None:
    """ArgusConfigurationError for what ``Argus`` would not take."""
    parameters = inspect.signature(Argus).parameters
    for name, value in settings.items():
        if name not in parameters:
            raise ArgusConfigurationError(name, "must be an argument of Argus", value)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    check_arguments({**defaults, **settings})
    if "mode" in settings:
        resolve_mode(settings["mode"])
    if "run_id" in settings:
        validate_run_id(settings["run_id"])
