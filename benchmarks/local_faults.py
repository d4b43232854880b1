"""Faults put into the training of four models: which the local detector names, and how soon.

    python benchmarks/local_faults.py [--peer] [--json FILE] [--quick]

Each fault begins in the middle of a run that warms up and decays. Found means that the right check
warns within 100 steps and had been silent in the 20 before. Healthy runs of each model give the
false alarms; the time is that of a GPT step (d=256, 6 layers, batch 16 x 128) on one thread, two
equal models with and without the detector taking turns.
The seeds of the first rows are held out: no threshold was ever chosen by a look at them. They draw
weights, data, learning rate, layer, strength and onset of the fault.
--peer measures the published SDK's LocalDetector in the same run, in an environment of its own.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

import peer
from children import Child
from local_injections import FAULTS
from local_models import ARCHITECTURES
from measure import (
    Progress,
    Row,
    arguments,
    at_least,
    at_most,
    finish,
    information,
    median,
    middle_mean,
    standard_error,
)

_TUNED = (1, 2, 3, 4)  # the thresholds were chosen on these
_HELD_OUT = (101, 102, 103, 104)
_TIMED_STEPS = 12  # of a cycle
_AT_A_TIME = max(1, min(4, os.cpu_count() or 1))
_ONSET, _ONSETS, _APART = 80, 4, 37  # apart by an odd number: every place in a rolling schedule


class Size(NamedTuple):
    """How much is run."""

    held_out: Tuple[int, ...]
    tuned: Tuple[int, ...]
    healthy_steps: int  # of a run
    equal_steps: int
    cycles: int  # of twelve pairs of timed steps


_FULL = Size(_HELD_OUT, _TUNED, 600, 200, 10)
_QUICK = Size(_HELD_OUT[:1], (), 400, 50, 4)


class Found(NamedTuple):
    """What one package's detector did in the runs of one set of seeds."""

    outcomes: List[Mapping[str, Any]]  # of faults, with their architecture and seed
    alarms: Dict[str, Dict[str, int]]  # of healthy runs: by architecture, by check
    healthy_steps: int  # of each architecture


def rows(children: Sequence[Child], size: Size) -> Iterator[Row]:
    """The table: ours, then the peer's where it is there."""
    for what, seeds in (("held-out seeds", size.held_out), ("the seeds of tuning", size.tuned)):
        if not seeds:
            continue
        outcomes = _faults(children, seeds)
        alarms = _healthy(children, seeds, size.healthy_steps)
        steps = size.healthy_steps * len(seeds)
        for place, child in enumerate(children):
            found = Found(outcomes[place], alarms[place], steps)
            yield from _found_rows(child.package.name, what, found, is_ours=place == 0)
    yield _equal_row(children[0], size)
    for place, child in enumerate(children):
        yield _time_row(child, size.cycles, is_ours=place == 0)


def _faults(children: Sequence[Child], seeds: Sequence[int]) -> List[List[Mapping[str, Any]]]:
    """Each child's outcomes: all faults, architectures and seeds."""
    found: List[List[Mapping[str, Any]]] = [[] for _ in children]
    places = [(architecture, seed) for architecture in ARCHITECTURES for seed in seeds]
    progress = Progress("faults", len(places) * len(FAULTS) * len(children))
    for architecture, seed in places:
        names = [name for name, fault in FAULTS.items() if architecture.startswith(fault.only)]
        for child, outcomes in zip(children, found):
            onset = _ONSET + _APART * (seed % _ONSETS)
            child.ask("warm", architecture=architecture, seed=seed, steps=onset)
            for start in range(0, len(names), _AT_A_TIME):
                some = names[start : start + _AT_A_TIME]
                for outcome in child.ask("inject", names=some):
                    outcomes.append({"architecture": architecture, "seed": seed, **outcome})
                progress.add(len(some))
    progress.close()
    return found


def _healthy(
    children: Sequence[Child], seeds: Sequence[int], steps: int
) -> List[Dict[str, Dict[str, int]]]:
    """Each child's steps with an alarm, by architecture and check."""
    found: List[Dict[str, Dict[str, int]]] = [{} for _ in children]
    progress = Progress("healthy runs", len(ARCHITECTURES) * len(seeds))
    for architecture in ARCHITECTURES:
        for seed in seeds:
            for child in children:
                child.tell("healthy", architecture=architecture, seed=seed, steps=steps)
            for child, alarms in zip(children, found):
                of_model = alarms.setdefault(architecture, {})
                for check, count in child.answer().items():
                    of_model[check] = of_model.get(check, 0) + count
            progress.add()
    progress.close()
    return found


# -- the rows


def _found_rows(name: str, what: str, found: Found, *, is_ours: bool) -> Iterator[Row]:
    """The three figures, then a line an architecture and a line a check."""
    judged = [each for each in found.outcomes if each["known"]]
    named = [each for each in judged if each["latency"] is not None]
    share = 100.0 * len(named) / len(judged)
    text = f"{len(named)} of {len(judged)} ({share:.1f}%)"
    if len(judged) < len(found.outcomes):
        text += f"; {len(found.outcomes) - len(judged)} have no check"
    latency = median([float(each["latency"]) for each in named])
    alarms = sum(each["any"] for each in found.alarms.values())
    steps = found.healthy_steps * len(found.alarms)
    rate = 1000.0 * alarms / steps
    false = f"{alarms} of {steps:,}"
    heads: List[Tuple[str, str, float, float, str]] = [
        ("faults found by the right check", text, share, 95.0, "%"),
        ("median latency", f"{latency:g} steps", latency, 5.0, "steps"),
        ("false-alarm steps, healthy runs", false, rate, 1.0, "in 1,000"),
    ]
    for place, (label, measured, value, limit, unit) in enumerate(heads):
        more: Dict[str, Any] = {"package": name, "seeds": what}
        if place == 0:
            more["outcomes"] = found.outcomes
        if not is_ours:
            yield information(f"   {name}: {label}", measured, value=value, unit=unit, **more)
        elif place == 0:
            yield at_least(f"{label}, {what}", measured, value, limit, unit, **more)
        else:
            yield at_most(f"{label}, {what}", measured, value, limit, unit, **more)
    for architecture in ARCHITECTURES:
        of = [each for each in judged if each["architecture"] == architecture]
        yield _detail(name, architecture, of, found.alarms[architecture]["any"], steps // 4)
    for check in dict.fromkeys(fault.check for fault in FAULTS.values()):
        of = [each for each in found.outcomes if each["check"] == check]
        count = sum(each.get(check, 0) for each in found.alarms.values())
        yield _detail(name, check, of, count, steps)


def _detail(
    name: str, what: str, outcomes: Sequence[Mapping[str, Any]], alarms: int, steps: int
) -> Row:
    """Found, latency, false alarms, and what was missed."""
    named = [each for each in outcomes if each["latency"] is not None]
    latency = median([float(each["latency"]) for each in named])
    missed = [
        f"{each['fault']} ({each['architecture']}, {each['seed']})"
        for each in outcomes
        if each["latency"] is None
    ]
    rate = 1000.0 * alarms / steps
    text = f"{len(named)} of {len(outcomes)}, median {latency:g}, {rate:.2f} false in 1,000"
    return information(
        f"   {what}", text, package=name, found=len(named), of=len(outcomes), latency=latency,
        false_alarms_in_1000=rate, missed=missed,
    )  # fmt: skip


def _equal_row(child: Child, size: Size) -> Row:
    """Bits with and without the detector."""
    equal = [
        name
        for name in ARCHITECTURES
        if child.ask("equal", architecture=name, seed=size.held_out[0], steps=size.equal_steps)
    ]
    text = f"{size.equal_steps} steps: {', '.join(equal) or 'none'}"
    return at_least("weights bitwise equal", text, len(equal), len(ARCHITECTURES), "models")


def _time_row(child: Child, cycles: int, *, is_ours: bool) -> Row:
    """What it adds to a step, by the CPU's clock: on one thread that is the wall's, undisturbed."""
    found: Dict[str, List[float]] = {}
    progress = Progress("time a step", cycles)
    child.ask("begin_times")
    for _ in range(cycles):
        for key, value in child.ask("times").items():
            found.setdefault(key, []).append(value)
        progress.add()
    progress.close()
    plain = middle_mean(found["plain_cpu_s"])
    added = [a - b for a, b in zip(found["watched_cpu_s"], found["plain_cpu_s"])]
    walls = [a - b for a, b in zip(found["watched_s"], found["plain_s"])]
    share = 100.0 * middle_mean(added) / plain
    wall = 100.0 * middle_mean(walls) / middle_mean(found["plain_s"])
    error = 100.0 * standard_error(added) / plain
    steps_ms = 1000.0 * plain / _TIMED_STEPS
    text = f"{share:.2f} +- {error:.2f}% of {steps_ms:,.0f} ms (wall clock {wall:.2f}%)"
    if is_ours:
        what = "time added to a GPT step"
        return at_most(what, text, share, 3.0, "%", wall_share=wall, error=error, **found)
    what = f"   {child.package.name}: time added to a GPT step"
    return information(what, text, value=share, unit="%", wall_share=wall, error=error, **found)


def main() -> None:
    """Runs it."""
    parser = arguments(__doc__, "local_faults")
    parser.add_argument("--peer", action="store_true", help="measure the published SDK too")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        packages = peer.packages(stack, with_peer=options.peer)
        children = [stack.enter_context(Child(each, "local", "local_runs.py")) for each in packages]
        size = _QUICK if options.quick else _FULL
        finish(
            "local_faults", rows(children, size), options.json,
            quick=options.quick, load_before=load,
        )  # fmt: skip


if __name__ == "__main__":
    main()
