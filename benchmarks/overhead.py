"""What Argus costs the training that it watches.

    python benchmarks/overhead.py [--peer] [--json FILE] [--quick]

Every figure is a comparison inside one run: with and without Argus, or Argus and the floor, in
turns.
--peer installs the published SDK into an environment of its own (under the user's cache folder),
answers it from a stub on the loopback interface, and measures it in the same turns.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain
from typing import Any, Dict, Iterator, List, Mapping, Sequence

import peer
from children import Child, Package, our_package
from measure import (
    Progress,
    Row,
    arguments,
    at_most,
    finish,
    information,
    median,
    middle_mean,
    percentile,
    standard_error,
)

_TURNS = 20  # of each package in a measurement
_IMPORTS = 10
_NO_TORCH = "torch is not installed: not measured"

_IMPORT_CODE = """
import json, sys, time
before = set(sys.modules)
begin = time.perf_counter()
import plarv
taken = time.perf_counter() - begin
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
known = set(sys.stdlib_module_names) | {"plarv", "plarv_schemas", "plarv_processors", "plarv_sinks"}
print(json.dumps({"ms": taken * 1e3, "foreign": sorted(roots - known)}))
"""


def main() -> None:
    """Measures every row, prints the table, writes the JSON."""
    parser = arguments(__doc__, "overhead")
    parser.add_argument("--peer", action="store_true", help="measure the published SDK too")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    scale = 0.1 if options.quick else 1.0
    with ExitStack() as stack:
        packages = peer.packages(stack, with_peer=options.peer)
        rows = chain(
            paused_steps(packages, int(10_000 * scale)),
            tight_steps(packages, int(40_000 * scale)),
            training_steps(packages, 16, max(10, int(50 * scale))),
            cpu_time(int(20 * scale)),
            resident_memory(packages, int(1_000_000 * scale)),
            import_time(),
            exit_time(int(200_000 * scale)),
        )
        finish("overhead", rows, options.json, quick=options.quick, load_before=load_before)


def paused_steps(packages: Sequence[Package], steps: int) -> Iterator[Row]:
    """step(float, grad_norm=float) with 2 ms between steps, against the floor."""
    blocks = _in_turns(f"{steps:,} steps with pauses", packages, "paused", steps // _TURNS)
    for package in packages:
        floor = [value for block in blocks[package.name] for value in block["floor_us"]]
        step = [value for block in blocks[package.name] for value in block["step_us"]]
        for fraction, limit in ((0.5, 2.0), (0.99, 2.5)):
            step_us, floor_us = percentile(step, fraction), percentile(floor, fraction)
            ratio = step_us / floor_us
            yield _ours(
                package,
                f"step(float), 2 ms pauses, {steps:,} steps, p{fraction * 100:g}",
                f"{ratio:.2f} x the floor ({step_us:.1f} of {floor_us:.1f} us)",
                ratio,
                limit,
                "x",
                step_us=step_us,
                floor_us=floor_us,
            )


def tight_steps(packages: Sequence[Package], steps: int) -> Iterator[Row]:
    """The same in a tight loop."""
    blocks = _in_turns(f"{steps:,} steps, tight", packages, "tight", steps // _TURNS)
    for package in packages:
        step = [value for block in blocks[package.name] for value in block["step_us"]]
        middle, high = percentile(step, 0.5), percentile(step, 0.99)
        what = f"step(float), tight loop, {steps:,} steps, p50"
        measured = f"{middle:.2f} us (p99 {high:.2f})"
        yield _ours(package, what, measured, middle, 5.0, "us", p99_us=high)


def training_steps(packages: Sequence[Package], steps: int, turns: int) -> Iterator[Row]:
    """step(tensor) with a model: what it adds to the whole training step, beyond a bare norm.

    The norm is timed alone, of gradients as a backward leaves them.
    """
    what = "step(tensor), 12 x 512 MLP, beyond a bare norm"
    if importlib.util.find_spec("torch") is None:
        yield information(what, _NO_TORCH)
        return
    blocks = _in_turns("training steps", packages, "training", steps, turns)
    for package in packages:
        means = [_means(block) for block in blocks[package.name]]
        norm, bare = (median([mean[name] for mean in means]) for name in ("norm_ms", "bare_ms"))
        added = median([mean["argus_ms"] - mean["bare_ms"] for mean in means])
        beyond = (added - norm) / norm * 100
        yield _ours(
            package,
            what,
            f"{beyond:.0f} % of the norm (adds {added:.3f} ms to {bare:.1f}; norm {norm:.3f})",
            beyond,
            30.0,
            "%",
            added_ms=added,
            norm_ms=norm,
            norm_in_training_ms=median([mean["normed_ms"] - mean["bare_ms"] for mean in means]),
            warm_norm_ms=median([mean["warm_norm_ms"] for mean in means]),
            training_step_ms=bare,
        )


def _means(block: Mapping[str, Sequence[float]]) -> Dict[str, float]:
    """Means, since every 16th step does more; the blocks' medians then leave out what disturbed."""
    return {name: math.fsum(values) / len(values) for name, values in block.items()}


def cpu_time(turns: int) -> Iterator[Row]:
    """Process CPU time that Argus adds to steps of 10 ms, engine running."""
    for workload, name in (("cpu", "that holds the GIL"), ("cpu_torch", "in torch, two threads")):
        what = f"CPU time added to a 10 ms step {name}"
        if workload == "cpu_torch" and importlib.util.find_spec("torch") is None:
            yield information(what, _NO_TORCH)
            continue
        yield _cpu_row(workload, what, turns)


def _cpu_row(workload: str, what: str, turns: int) -> Row:
    """The engine's time is read from its thread's clock. What reporting does to the loop, and the
    engine's presence with it, is the difference of short turns with and without.
    """
    engines: List[Any] = []
    added: List[float] = []
    bare: List[float] = []
    bar = Progress(what, turns)
    with Child(our_package(), workload) as child:
        for _ in range(turns):
            engines.append(child.ask("engine", count=40))
            found = child.ask("loop", count=6, pairs=20)
            bare += found["without_us"]
            added += [a - b for a, b in zip(found["with_us"], found["without_us"])]
            bar.add()
    bar.close()
    engine = median([found["engine_us"] for found in engines])
    loop, error, step = middle_mean(added), standard_error(added), median(bare)
    share = (engine + loop) / step * 100
    return at_most(
        what,
        f"{share:.2f} % (engine {engine:.0f}, loop {loop:+.0f} +- {error:.0f} of {step:,.0f} us)",
        share,
        1.0,
        "%",
        engine_us=engine,
        loop_us=loop,
        loop_error_us=error,
        open_verdicts=max(found["open_verdicts"] for found in engines),
        step_cpu_us=step,
    )


def resident_memory(packages: Sequence[Package], steps: int) -> Iterator[Row]:
    """MB held after many steps, against those after 1,000."""
    with ExitStack() as stack:
        children = [stack.enter_context(Child(package, "memory")) for package in packages]
        totals = [steps if _is_ours(package) else steps // 10 for package in packages]
        held = [[child.ask(count=1000)["resident_mb"]] for child in children]
        bar = Progress(f"{steps:,} steps, memory", _TURNS * len(children))
        for _ in range(_TURNS):
            for child, total, found in zip(children, totals, held):
                found.append(child.ask(count=(total - 1000) // _TURNS)["resident_mb"])
                bar.add()
        bar.close()
        for child, total, found in zip(children, totals, held):
            if _is_ours(child.package):  # and once more when the engine has folded them all
                done = child.ask("complete")
                if done["folded_step"] != total - 1:
                    raise RuntimeError(f"of {total} steps the engine folded {done['folded_step']}")
                found.append(done["resident_mb"])
            yield _memory_row(child.package, total, found)


def _memory_row(package: Package, steps: int, held: Sequence[float]) -> Row:
    """Of the most that was held, so that nothing hides in what was given back."""
    grown = max(held) - held[0]
    return _ours(
        package,
        f"resident memory after {steps:,} steps, against 1,000",
        f"{grown:+.1f} MB in {steps:,} steps ({held[0]:.0f} at first)",
        grown,
        20.0,
        "MB",
        first_mb=held[0],
        last_mb=held[-1],
        steps=steps,
    )


def import_time() -> Iterator[Row]:
    """`import plarv` in a fresh process, and whether it loads the standard library alone."""
    package = our_package()
    taken: List[float] = []
    foreign: List[str] = []
    for _ in range(_IMPORTS + 1):
        command = [package.python, "-c", _IMPORT_CODE]
        done = subprocess.run(
            command, env=dict(package.environment), capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)
        taken.append(found["ms"])
        foreign = found["foreign"]
    middle, best = median(taken[1:]), min(taken[1:])  # the first may have had to compile
    only = "standard library only" if not foreign else f"loads {', '.join(foreign)}"
    row = at_most(
        "import plarv, standard library only",
        f"{middle:.1f} ms (best {best:.1f}), {only}",
        middle,
        30.0,
        "ms",
        best_ms=best,
        foreign=foreign,
    )
    yield row._replace(ok=bool(row.ok) and not foreign)


def exit_time(behind: int) -> Iterator[Row]:
    """complete() and the end of the process, with the embedded engine behind."""
    with Child(our_package(), "exit") as child:
        found = child.ask(count=behind)
        total = child.end() - found["begin"]
    yield at_most(
        f"exit with the engine {behind:,} steps behind",
        f"{total:.2f} s (complete() {found['complete_s']:.2f}; {found['lag']:,.0f} behind)",
        total,
        2.0,
        "s",
        complete_s=found["complete_s"],
        lag_steps=found["lag"],
    )


def _in_turns(
    what: str, packages: Sequence[Package], workload: str, count: int, turns: int = _TURNS
) -> Dict[str, List[Any]]:
    """Each package's answers to ``turns`` blocks of ``count``, the packages taking turns."""
    found: Dict[str, List[Any]] = {package.name: [] for package in packages}
    with ExitStack() as stack:
        children = [stack.enter_context(Child(package, workload)) for package in packages]
        bar = Progress(what, turns * len(children))
        for _ in range(turns):
            for child in children:
                found[child.package.name].append(child.ask(count=max(1, count)))
                bar.add()
        bar.close()
    return found


def _is_ours(package: Package) -> bool:
    return package.python == sys.executable


def _ours(
    package: Package, what: str, measured: str, value: float, limit: float, unit: str, **more: Any
) -> Row:
    """A row with its reach for this Argus, and without one for the peer."""
    if _is_ours(package):
        return at_most(what, measured, value, limit, unit, **more)
    return information(f"   {package.name}", measured, value=value, unit=unit, **more)


if __name__ == "__main__":
    main()
