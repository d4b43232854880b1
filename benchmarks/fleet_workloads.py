"""The training processes of the fleet's benchmarks: `python fleet_workloads.py WORKLOAD`.

Commands and answers as in workloads.py. Whether Argus speaks to a fleet is the environment's
choice. Times are those of the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Mapping, Type

from plarv import Argus
from workloads import Curve, serve

_WARM_UP = 200  # steps
_LOST_EVERY = 20  # steps from one loss that is no number to the next: found, and gone after 16
_CALM = 32  # steps before the fault of Actions, enough for the detectors' history
_TRIES = 200  # steps that an action is waited for
_NAN = float("nan")


class PacedSteps:
    """A loop that reports at a steady pace, and loses its loss now and then."""

    def __init__(self) -> None:
        self._argus = Argus(silent=True)
        self._curve = Curve()
        self._step = 0

    def run(self, count: int, per_s: float) -> List[float]:
        """The time in seconds at which each of ``count`` calls of step() began."""
        called: List[float] = []
        due = time.monotonic()
        for _ in range(count):
            loss, norm = self._curve.next()
            if self._step % _LOST_EVERY == _LOST_EVERY - 1:
                loss = _NAN
            due += 1.0 / per_s
            time.sleep(max(0.0, due - time.monotonic()))
            called.append(time.monotonic())
            self._argus.step(loss, grad_norm=norm)
            self._step += 1
        return called

    def complete(self) -> Dict[str, Any]:
        """Ends the run: when that began, seconds that it took, and the run's folder."""
        folder = str(self._argus.run_dir)
        begin = time.monotonic()
        self._argus.complete()
        return {"begin": begin, "complete_s": time.monotonic() - begin, "folder": folder}


class Optimizer:
    """The least that is one."""

    def __init__(self) -> None:
        self.param_groups: List[Dict[str, Any]] = [{"lr": 1.0, "params": []}]


class Actions:
    """AUTO: again and again the loss and the gradient leap, until the learning rate is lowered.

    Each time is an attempt of its own, since the step goes back to 0.
    """

    def __init__(self) -> None:
        self._optimizer = Optimizer()
        self._argus = Argus(silent=True, mode="AUTO", optimizer=self._optimizer)
        self._curve = Curve()

    def run(self, count: int, per_s: float) -> List[float]:
        """Seconds from the call of the step that an action is about to the end of the call in which
        it was applied; for an action that did not come, none.
        """
        taken: List[float] = []
        due = time.monotonic()
        for _ in range(count):
            called: Dict[int, float] = {}
            group = self._optimizer.param_groups[0]
            before = group["lr"]
            for step in range(_CALM + _TRIES):
                loss, norm = self._curve.next()
                if step >= _CALM:
                    loss, norm = 4.0 * loss, 50.0 * norm
                due += 1.0 / per_s
                time.sleep(max(0.0, due - time.monotonic()))
                called[step] = time.monotonic()
                self._argus.step(loss, grad_norm=norm, step=step)
                if group["lr"] != before:
                    now, action = time.monotonic(), self._argus.decision.newest_action
                    if action is not None and action.step in called:
                        taken.append(now - called[action.step])
                    break
        return taken


class StepCost:
    """step(float, grad_norm=float) after pauses, with whichever transport the environment names."""

    def __init__(self) -> None:
        self._argus = Argus(silent=True)
        self._curve = Curve()
        self.run(_WARM_UP, 0.0)

    def run(self, count: int, pause_s: float) -> List[float]:
        """Microseconds of each of ``count`` steps."""
        step, curve, timer, sleep = self._argus.step, self._curve, time.perf_counter_ns, time.sleep
        taken: List[float] = []
        for _ in range(count):
            loss, norm = curve.next()
            sleep(pause_s)
            begin = timer()
            step(loss, grad_norm=norm)
            taken.append((timer() - begin) * 1e-3)
        return taken


WORKLOADS: Mapping[str, Type[Any]] = {
    "paced": PacedSteps,
    "actions": Actions,
    "cost": StepCost,
}


if __name__ == "__main__":
    serve(WORKLOADS)
