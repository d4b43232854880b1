"""The measured loops, in a process of their own: `python workloads.py WORKLOAD [FOLDER…]`.

Commands come as JSON lines on stdin (a method and its arguments), answers go to what was stdout.
The same loops drive our package and the published one: whichever this interpreter imports as
``plarv``. FOLDERs are searched for further packages, after all others.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import threading
import time
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Tuple, Type

from measure import Floor

_PAUSE_S = 0.002
_WARM_UP = 200  # steps: past the imports and caches that a first step fills
_STEP_MS = 10.0
_WIDTH, _DEPTH, _BATCH = 512, 12, 32


def open_argus(**given: Any) -> Any:
    """An Argus of whichever package is here; both take these arguments."""
    return importlib.import_module("plarv").Argus(api_key="benchmark", silent=True, **given)


class Curve:
    """The losses and gradient norms of a healthy run: falling, with noise."""

    def __init__(self, seed: int = 1) -> None:
        chance = random.Random(seed)
        self._noise = [chance.gauss(0.0, 0.02) for _ in range(4099)]
        self._at = 0

    def next(self) -> Tuple[float, float]:
        """The next step's loss and gradient norm."""
        at = self._at
        self._at = at + 1
        noise = self._noise
        level = 2.0 + 3.0 / (1.0 + at / 1000.0)
        return level * (1.0 + noise[at % 4099]), 1.0 + 5.0 * noise[at * 7 % 4099]


class PausedSteps:
    """step(float, grad_norm=float) and the floor, each after a pause: caches are equally cold."""

    def __init__(self) -> None:
        self._argus = open_argus()
        self._curve = Curve()
        self._floor = Floor()
        self._at = 0
        for _ in range(_WARM_UP):
            loss, norm = self._curve.next()
            self._argus.step(loss, grad_norm=norm)

    def run(self, count: int) -> Dict[str, List[float]]:
        """Microseconds of ``count`` steps and as many floors, in turns, either first in turns."""
        step, curve, timer, sleep = self._argus.step, self._curve, time.perf_counter_ns, time.sleep
        floor = self._floor
        clock, pack, buffer, append = floor.clock, floor.pack, floor.buffer, floor.queue.append
        floor_us: List[float] = []
        step_us: List[float] = []
        for number in range(count):
            loss, norm = curve.next()
            for first in (True, False):
                at = self._at
                sleep(_PAUSE_S)
                if first == (number % 2 == 0):
                    begin = timer()
                    step(loss, grad_norm=norm)
                    end = timer()
                    step_us.append((end - begin) * 1e-3)
                else:
                    begin = timer()
                    now = clock()
                    pack(buffer, at, 1, now, number, loss, norm, 3e-4, number)
                    append(now)
                    end = timer()
                    floor_us.append((end - begin) * 1e-3)
                    self._at = floor.next(at)
        return {"floor_us": floor_us, "step_us": step_us}


class TightSteps:
    """step(float, grad_norm=float) with nothing in between."""

    def __init__(self) -> None:
        self._argus = open_argus()
        self._curve = Curve()
        self.run(_WARM_UP)

    def run(self, count: int) -> Dict[str, List[float]]:
        """Microseconds of each of ``count`` steps."""
        step, timer = self._argus.step, time.perf_counter_ns
        values = [self._curve.next() for _ in range(count)]
        taken = [0] * count
        for number, (loss, norm) in enumerate(values):
            begin = timer()
            step(loss, grad_norm=norm)
            taken[number] = timer() - begin
        return {"step_us": [value * 1e-3 for value in taken]}


class TrainingSteps:
    """Whole training steps of an MLP, alone and with step(tensor); and a bare gradient norm.

    On one thread: on two, what the threads wait for each other is more than what is measured.
    """

    def __init__(self) -> None:
        torch = self._torch = importlib.import_module("torch")
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self._inputs = torch.randn(_BATCH, _WIDTH)
        self._targets = torch.randn(_BATCH, _WIDTH)
        self._bare, self._bare_optimizer = self._make()
        self._watched, self._watched_optimizer = self._make()
        self._argus = open_argus(model=self._watched)
        self._turn = 0
        self.run(5)

    def run(self, count: int) -> Dict[str, List[float]]:
        """Milliseconds of ``count`` steps without Argus, with it, and with a bare norm instead;
        and of as many norms: right after a backward, and once more with warm caches.
        """
        blocks = [self._bare_steps, self._watched_steps, self._normed_steps, self._norms]
        self._turn += 1
        shift = self._turn % 4
        found: Dict[str, List[float]] = {}
        for block in blocks[shift:] + blocks[:shift]:
            found.update(block(count))
        return found

    def _bare_steps(self, count: int) -> Dict[str, List[float]]:
        def step() -> None:
            self._forward_backward(self._bare, self._bare_optimizer)
            self._bare_optimizer.step()

        return {"bare_ms": _each_ms(step, count)}

    def _watched_steps(self, count: int) -> Dict[str, List[float]]:
        def step() -> None:
            loss = self._forward_backward(self._watched, self._watched_optimizer)
            self._watched_optimizer.step()
            self._argus.step(loss)

        return {"argus_ms": _each_ms(step, count)}

    def _norms(self, count: int) -> Dict[str, List[float]]:
        found: Dict[str, List[float]] = {"norm_ms": [], "warm_norm_ms": []}
        for _ in range(count):
            self._forward_backward(self._bare, self._bare_optimizer)
            found["norm_ms"].append(_elapsed_ms(self._norm))
            found["warm_norm_ms"].append(_elapsed_ms(self._norm))
            self._bare_optimizer.step()
        return found

    def _normed_steps(self, count: int) -> Dict[str, List[float]]:
        def step() -> None:
            self._forward_backward(self._bare, self._bare_optimizer)
            self._norm()
            self._bare_optimizer.step()

        return {"normed_ms": _each_ms(step, count)}

    def _make(self) -> Tuple[Any, Any]:
        torch = self._torch
        layers: List[Any] = []
        for _ in range(_DEPTH):
            linear = torch.nn.Linear(_WIDTH, _WIDTH)
            torch.nn.init.kaiming_normal_(linear.weight)  # so that it learns, and no verdict opens
            layers += [linear, torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers)
        return model, torch.optim.SGD(model.parameters(), lr=3e-3)

    def _forward_backward(self, model: Any, optimizer: Any) -> Any:
        optimizer.zero_grad()
        loss = self._torch.nn.functional.mse_loss(model(self._inputs), self._targets)
        loss.backward()
        return loss

    def _norm(self) -> None:
        torch = self._torch
        gradients = [parameter.grad for parameter in self._bare.parameters()]
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()


class CpuTime:
    """Process CPU time of 10 ms steps, in microseconds: the engine's, and the loop's own."""

    def __init__(self) -> None:
        self._curve = Curve()
        self._work = self._make_work()
        self._units = 1  # of work in a step
        self._calibrate()
        self._argus = open_argus()
        self._turn = 0
        self.engine(_WARM_UP // 2)

    def engine(self, count: int) -> Dict[str, float]:
        """What the engine's thread takes a step, while ``count`` are reported."""
        self._calibrate()
        begin = _threads_ns()
        for _ in range(count):
            self._step(reported=True)
        taken = _threads_ns() - begin
        verdicts = self._argus.decision.verdicts
        return {"engine_us": taken * 1e-3 / count, "open_verdicts": len(verdicts)}

    def loop(self, count: int, pairs: int) -> Dict[str, List[float]]:
        """What all else in the process takes a step: ``count`` reported ones, then as many that are
        not or the other way round, ``pairs`` times.
        """
        self._calibrate()
        found: Dict[str, List[float]] = {"with_us": [], "without_us": []}
        for _ in range(pairs):
            self._turn += 1
            for reported in (True, False) if self._turn % 2 else (False, True):
                begin = time.process_time_ns() - _threads_ns()
                for _ in range(count):
                    self._step(reported)
                taken = time.process_time_ns() - _threads_ns() - begin
                found["with_us" if reported else "without_us"].append(taken * 1e-3 / count)
        return found

    def _step(self, reported: bool) -> None:
        loss, norm = self._curve.next()
        self._work(self._units)
        if reported:
            self._argus.step(loss, grad_norm=norm)

    def _calibrate(self) -> None:
        """Finds how much work takes 10 ms now, in the best of some tries."""
        best = 0.0
        while not 0.5 * _STEP_MS < best < 2.0 * _STEP_MS:
            best = min(_elapsed_ms(partial(self._work, self._units)) for _ in range(5))
            self._units = max(1, int(self._units * min(8.0, _STEP_MS / best)))

    def _make_work(self) -> Callable[[int], object]:
        """Pure Python: it holds the GIL but for the switch interval."""
        return _python_loop


class TorchCpuTime(CpuTime):
    """The same with matrix products on two threads."""

    def _make_work(self) -> Callable[[int], object]:
        torch = importlib.import_module("torch")
        torch.set_num_threads(2)
        left, right = torch.randn(256, 256), torch.randn(256, 256)

        def products(count: int) -> None:
            for _ in range(count):
                torch.mm(left, right)

        return products


class Memory:
    """Steps without a pause, and what the process then holds."""

    def __init__(self) -> None:
        os.environ["ARGUS_SHUTDOWN_TIMEOUT"] = "300"  # the engine is to fold them all in the end
        self._argus = open_argus()
        self._curve = Curve()

    def run(self, count: int) -> Dict[str, float]:
        """MB resident after ``count`` more steps."""
        step, curve = self._argus.step, self._curve
        for _ in range(count):
            loss, norm = curve.next()
            step(loss, grad_norm=norm)
        return _resident_mb()

    def complete(self) -> Dict[str, float]:
        """MB resident once the engine has folded all steps, and the last one it folded."""
        self._argus.complete()
        return {"folded_step": self._argus.decision.step, **_resident_mb()}


class Exit:
    """A run that ends while the engine is far behind."""

    def __init__(self) -> None:
        self._argus = open_argus()
        self._curve = Curve()

    def run(self, count: int) -> Dict[str, float]:
        """Steps until the engine is ``count`` behind, then complete(); then the process ends."""
        step, curve, argus = self._argus.step, self._curve, self._argus
        number = 0
        while number - (argus.decision.step or 0) < count:
            for _ in range(1000):
                loss, norm = curve.next()
                step(loss, grad_norm=norm)
            number += 1000
        lag = number - (argus.decision.step or 0)
        begin = time.monotonic()
        argus.complete()
        return {"lag": lag, "begin": begin, "complete_s": time.monotonic() - begin}


WORKLOADS: Mapping[str, Type[Any]] = {
    "paused": PausedSteps,
    "tight": TightSteps,
    "training": TrainingSteps,
    "cpu": CpuTime,
    "cpu_torch": TorchCpuTime,
    "memory": Memory,
    "exit": Exit,
}


def _python_loop(count: int) -> int:
    value = 1
    for _ in range(count):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


def _elapsed_ms(action: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - begin) * 1e-6


def _each_ms(step: Callable[[], None], count: int) -> List[float]:
    """The time of each of ``count`` steps, after two untimed: another model was in the caches."""
    step()
    step()
    return [_elapsed_ms(step) for _ in range(count)]


def _threads_ns() -> int:
    """CPU time so far of all living Python threads but this one; 0 where the system cannot tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0
    total = 0
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident is not None:
            total += time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))
    return total


def _resident_mb() -> Dict[str, float]:
    """Resident memory now, all and anonymous; from /proc, so on Linux."""
    found: Dict[str, float] = {}
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "RssAnon"):
                found["resident_mb" if name == "VmRSS" else "anonymous_mb"] = (
                    int(rest.split()[0]) / 1024
                )
    return found


def main() -> None:
    """Serves one workload until stdin ends."""
    sys.path.extend(sys.argv[2:])
    serve(WORKLOADS)


def serve(workloads: Mapping[str, Type[Any]]) -> None:
    """Serves the workload that the command line names: a line of JSON in, a line out."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a package prints stays out of the answers
    workload = workloads[sys.argv[1]]()
    for line in sys.stdin:
        method, given = json.loads(line)
        answers.write(json.dumps(getattr(workload, method)(**given)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
