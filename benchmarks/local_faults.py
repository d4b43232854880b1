"""Faults put into the training of four models: which the local detector names, and how soon.

Each fault begins at step 60 of a run that warms up and decays; found means that the right check
warns within 100 steps. Healthy runs of each model give the false alarms and the weights that must
be equal bit by bit; the time is that of a GPT step (d=256, 6 layers, batch 16 x 128) on one thread,
taken in turns with and without the detector.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, cast

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "producer"))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "schemas"))

from local_injections import FAULTS, Fault
from local_models import ARCHITECTURES, Gpt, Trainee, trainee
from measure import Progress, Row, arguments, at_least, at_most, finish, information, median
from plarv.local import LocalDetector

_ONSET = 60
_WITHIN = 100
_STEPS = 400  # of the schedule


class Outcome(NamedTuple):
    """One run with a fault."""

    architecture: str
    fault: str
    check: str
    latency: Optional[int]  # steps from the onset, 0: in its own step; None: not found
    before: int  # steps before the onset with an alarm


def run_with(architecture: str, name: str, seed: int) -> Outcome:
    """Trains up to the fault and on until it is named."""
    fault = FAULTS[name]
    learner = trainee(architecture, seed, _STEPS)
    before = 0
    with LocalDetector(learner.model, learner.optimizer) as detector:
        for step in range(_ONSET + _WITHIN):
            report = train(learner, detector, fault if step >= _ONSET else None, step == _ONSET)
            if step < _ONSET:
                before += report.any_warn
            elif report.checks[fault.check].level != "ok":
                return Outcome(architecture, name, fault.check, step - _ONSET, before)
    return Outcome(architecture, name, fault.check, None, before)


def train(
    learner: Trainee, detector: Optional[LocalDetector], fault: Optional[Fault], onset: bool
) -> Any:
    """One step; the report, where there is a detector."""
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


def false_alarms(architecture: str, seed: int, steps: int) -> Dict[str, int]:
    """Steps with an alarm in a healthy run, by check."""
    learner = trainee(architecture, seed, steps)
    alarms: Dict[str, int] = {}
    with LocalDetector(learner.model, learner.optimizer) as detector:
        for _ in range(steps):
            report = train(learner, detector, None, False)
            for key, check in report.checks.items():
                if check.level != "ok":
                    alarms[key] = alarms.get(key, 0) + 1
            alarms["any"] = alarms.get("any", 0) + report.any_warn
    return alarms


def are_equal(architecture: str, steps: int) -> bool:
    """Whether all weights after ``steps`` are the same bits with and without the detector."""
    bits: List[List[bytes]] = []
    for watched in (False, True):
        learner = trainee(architecture, 0, steps)
        detector = LocalDetector(learner.model, learner.optimizer) if watched else None
        if detector is not None:
            detector.attach()
        for _ in range(steps):
            train(learner, detector, None, False)
        bits.append([each.detach().numpy().tobytes() for each in learner.model.parameters()])
    return bits[0] == bits[1]


def step_times(pairs: int) -> List[float]:
    """The detector's share of a GPT step, one value a block of four steps with and without."""
    everything: Any = torch
    everything.manual_seed(0)
    model = Gpt(fused=True, width=256, layers=6, heads=4, length=128)
    optimizer: Any = torch.optim.AdamW(model.parameters(), 3e-4)
    tokens = torch.randint(0, 48, (16, 129))
    detector = LocalDetector(model, optimizer)

    def block(watched: bool) -> float:
        started = time.perf_counter()
        for _ in range(4):  # each layer is looked at once in four steps
            logits = model(tokens[:, :-1])
            wanted = tokens[:, 1:].flatten()
            loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
            loss.backward()
            if watched:
                detector.step(loss=loss.item())
            else:
                loss.item()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started

    shares: List[float] = []
    block(False)
    for _ in range(pairs):
        plain = block(False)
        detector.attach()
        watched = block(True)
        detector.detach()
        shares.append((watched - (plain + block(False)) / 2.0) / plain)
    return shares


def rows(*, quick: bool) -> Iterator[Row]:
    """The table."""
    outcomes: List[Outcome] = []
    seeds = (1,) if quick else (1, 2)
    names = [
        (architecture, name, seed)
        for architecture in ARCHITECTURES
        for name, fault in FAULTS.items()
        for seed in seeds
        if architecture.startswith(fault.only)
    ]
    progress = Progress("faults", len(names))
    for architecture, name, seed in names:
        outcomes.append(run_with(architecture, name, seed))
        progress.add()
    progress.close()
    yield from fault_rows(outcomes)
    yield from healthy_rows(400 if quick else 1500, seeds=(7,) if quick else (7, 8))
    equal = [name for name in ARCHITECTURES if are_equal(name, 50 if quick else 200)]
    text = ", ".join(equal) or "none"
    yield at_least("weights bitwise equal", text, len(equal), len(ARCHITECTURES), "models")
    shares = step_times(3 if quick else 10)
    share = 100.0 * median(shares)
    yield at_most("time added to a GPT step", f"{share:.2f}%", share, 3.0, "%", shares=shares)


def fault_rows(outcomes: List[Outcome]) -> Iterator[Row]:
    """Found, how soon, and a line for each fault that was not found everywhere."""
    found = [outcome for outcome in outcomes if outcome.latency is not None]
    share = 100.0 * len(found) / len(outcomes)
    text = f"{len(found)} of {len(outcomes)} ({share:.1f}%)"
    yield at_least("faults found by the right check", text, share, 95.0, "%")
    latency = median([float(each.latency) for each in found if each.latency is not None])
    yield at_most("median latency", f"{latency:g} steps", latency, 5.0, "steps")
    for name in FAULTS:
        of = [outcome for outcome in outcomes if outcome.fault == name]
        latencies = [outcome.latency for outcome in of]
        texts = ["-" if each is None else str(each) for each in latencies]
        where = dict.fromkeys(outcome.architecture for outcome in of)
        yield information(
            f"  {name} -> {of[0].check}",
            f"latency {' '.join(texts)}",
            latencies=latencies,
            architectures=list(where),
        )


def healthy_rows(steps: int, seeds: Any) -> Iterator[Row]:
    """False alarms of healthy runs."""
    total: Dict[str, int] = {}
    runs = [(architecture, seed) for architecture in ARCHITECTURES for seed in seeds]
    progress = Progress("healthy runs", len(runs))
    for architecture, seed in runs:
        for key, count in false_alarms(architecture, seed, steps).items():
            total[key] = total.get(key, 0) + count
        progress.add()
    progress.close()
    count = total.pop("any", 0)
    rate = 1000.0 * count / (steps * len(runs))
    by_check = ", ".join(f"{key} {value}" for key, value in total.items())
    text = f"{count} of {steps * len(runs):,}" + (f" ({by_check})" if by_check else "")
    yield at_most("false-alarm steps, healthy runs", text, rate, 1.0, "in 1,000", by_check=total)


def main() -> None:
    """Runs it."""
    options = arguments(__doc__, "local_faults").parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    finish(
        "local_faults", rows(quick=options.quick), options.json, quick=options.quick,
        load_before=load,
    )  # fmt: skip


if __name__ == "__main__":
    main()
