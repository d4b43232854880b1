"""Trainings with a local detector, in a process of their own: ours or the published one.

Commands come as lines of JSON, as in workloads.py. Both packages are asked through the interface
that they share: LocalDetector(model, optimizer), attach(), step(loss=…), to_dict().
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, Dict, List, Mapping, Optional, Tuple, cast

sys.path.extend(sys.argv[2:])  # where torch lies, behind this environment's own packages

import torch

from local_injections import FAULTS, Fault
from local_models import Gpt, Trainee, trainee
from workloads import serve

__all__ = ["LocalRuns"]

WITHIN = 100  # steps in which a fault is to be named
_QUIET = 20  # steps before the onset in which the right check must have been silent
_SCHEDULE = 400  # steps
_ILL = ("warn", "critical")
_SAME = {"dead_neurons": "activation_sparsity", "saturation": "activation_saturation"}
_CYCLE = 12  # steps in which every layer has had its turns: of six, of four
_WARM_UP = 1  # cycle


class LocalRuns:
    """A warmed-up training, from which every fault starts in a fork of the process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._learner: Optional[Trainee] = None
        self._detector: Any = None
        self._alarms: List[Dict[str, str]] = []
        self._pair: Optional[Tuple[_Timed, _Timed]] = None
        self._turn = 0

    def warm(self, architecture: str, seed: int, steps: int) -> Dict[str, int]:
        """Trains without a fault; steps with an alarm, by check."""
        self._learner = learner = trainee(architecture, seed, _SCHEDULE)
        self._detector = detector = _detector(learner.model, learner.optimizer)
        self._alarms = [_levels(_train(learner, detector)) for _ in range(steps)]
        return _count(self._alarms)

    def inject(self, names: List[str]) -> List[Dict[str, Any]]:
        """Goes on with each fault, all at a time: when the right check warned, and who else did."""
        assert self._learner is not None
        return [_read(reader, child) for reader, child in [self._fork(name) for name in names]]

    def healthy(self, architecture: str, seed: int, steps: int) -> Dict[str, int]:
        """Steps with an alarm in a run that warms up and decays, by check; ``any``: by any."""
        learner = trainee(architecture, seed, steps)
        detector = _detector(learner.model, learner.optimizer)
        return _count([_levels(_train(learner, detector)) for _ in range(steps)])

    def equal(self, architecture: str, seed: int, steps: int) -> bool:
        """Whether all weights after ``steps`` are the same bits with and without the detector."""
        bits: List[List[bytes]] = []
        for watched in (False, True):
            learner = trainee(architecture, seed, steps)
            detector = _detector(learner.model, learner.optimizer) if watched else None
            for _ in range(steps):
                _train(learner, detector)
            values = learner.model.state_dict().values()
            bits.append([each.detach().numpy().tobytes() for each in values])
        return bits[0] == bits[1]

    def begin_times(self) -> bool:
        """Makes the two timed models, and takes their first steps."""
        self._pair = (_Timed(watched=False), _Timed(watched=True))
        for _ in range(_WARM_UP):
            self.times()
        return True

    def times(self) -> Dict[str, float]:
        """Seconds of twelve steps of a GPT (d=256, 6 layers, 16 x 128), of clock and of CPU.

        Two equal models, one of them watched, take their steps in turns, either first in turns.
        """
        assert self._pair is not None
        self._turn += 1
        names = ("plain", "watched")
        found: Dict[str, float] = {}
        for place in range(_CYCLE):
            for which in (0, 1) if (self._turn + place) % 2 else (1, 0):
                for unit, taken in zip(("s", "cpu_s"), self._pair[which].step()):
                    key = f"{names[which]}_{unit}"
                    found[key] = found.get(key, 0.0) + taken
        return found

    # -- small parts

    def _fork(self, name: str) -> Tuple[int, int]:
        reader, writer = os.pipe()
        child = os.fork()
        if child:
            os.close(writer)
            return reader, child
        status = 1
        try:
            with os.fdopen(writer, "w") as answer:
                answer.write(json.dumps(self._with_fault(name)))
            status = 0
        finally:
            os._exit(status)

    def _with_fault(self, name: str) -> Dict[str, Any]:
        fault = FAULTS[name]
        learner = cast(Trainee, self._learner)
        early = sorted({check for each in self._alarms[-_QUIET:] for check in each})
        found: Dict[str, int] = {}
        known = True
        for step in range(WITHIN):
            report = _train(learner, self._detector, fault, onset=step == 0)
            known = known and fault.check in _checks(report)
            for check in _levels(report):
                found.setdefault(check, step)
            if fault.check in found and fault.check not in early:
                break
        latency = None if fault.check in early else found.get(fault.check)
        return {
            "fault": name, "check": fault.check, "latency": latency, "known": known,
            "early": fault.check in early, "first": found,
        }  # fmt: skip


class _Timed:
    """A GPT that takes steps, and what they take."""

    def __init__(self, *, watched: bool) -> None:
        everything: Any = torch
        everything.manual_seed(0)
        self._model = Gpt(fused=True, width=256, layers=6, heads=4, length=128)
        self._optimizer: Any = torch.optim.AdamW(self._model.parameters(), 3e-4)
        self._tokens = torch.randint(0, 48, (16, 129))
        self._detector = _detector(self._model, self._optimizer) if watched else None

    def step(self) -> Tuple[float, float]:
        """One training step: seconds of the clock, and of this process's CPU time."""
        began, cpu = time.perf_counter(), time.process_time()
        logits = self._model(self._tokens[:, :-1])
        wanted = self._tokens[:, 1:].flatten()
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
        loss.backward()
        value = loss.item()
        if self._detector is not None:
            self._detector.step(loss=value)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - began, time.process_time() - cpu


def _detector(model: Any, optimizer: Any) -> Any:
    detector = importlib.import_module("plarv.local").LocalDetector(model, optimizer)
    detector.attach()
    return detector


def _train(
    learner: Trainee, detector: Any, fault: Optional[Fault] = None, *, onset: bool = False
) -> Any:
    """One step, and the report where there is a detector."""
    if fault is not None and onset and fault.once is not None:
        fault.once(learner)
    given, wanted = learner.batch()
    if fault is not None and fault.wanted is not None:
        wanted = fault.wanted(wanted)
    loss: Any = learner.loss(given, wanted)
    if fault is not None and fault.loss is not None:
        loss = cast(Any, fault.loss(loss))
    loss.backward()
    if fault is not None and fault.after_backward is not None:
        fault.after_backward(learner)
    report = detector.step(loss=loss.item()) if detector is not None else None
    learner.optimizer.step()
    if fault is not None and fault.after_step is not None:
        fault.after_step(learner)
    learner.scheduler.step()
    learner.optimizer.zero_grad()
    return report


def _checks(report: Any) -> Dict[str, Any]:
    """The checks of a report by our names: ours stand under ``checks``, the peer's do not."""
    data: Mapping[str, Any] = report.to_dict()
    checks: Mapping[str, Any] = data.get("checks", data)
    return {
        _SAME.get(key, key): check
        for key, check in checks.items()
        if isinstance(check, dict) and "level" in check
    }


def _levels(report: Any) -> Dict[str, str]:
    """The checks that are not ok."""
    levels = {key: str(check["level"]).lower() for key, check in _checks(report).items()}
    return {key: level for key, level in levels.items() if level in _ILL}


def _count(alarms: List[Dict[str, str]]) -> Dict[str, int]:
    counts: Dict[str, int] = {"any": sum(bool(each) for each in alarms)}
    for each in alarms:
        for check in each:
            counts[check] = counts.get(check, 0) + 1
    return counts


def _read(reader: int, child: int) -> Dict[str, Any]:
    with os.fdopen(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not text:
        raise RuntimeError(f"a run with a fault ended with status {status}")
    return cast(Dict[str, Any], json.loads(text))


if __name__ == "__main__":
    serve({"local": LocalRuns})
