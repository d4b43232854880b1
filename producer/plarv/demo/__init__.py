"""``argus demo``: one training run with one fault, twice: alone, and under Argus."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, List, Optional, Sequence

from plarv import settings
from plarv.cli.complaint import Complaint, tell

if TYPE_CHECKING:
    import torch

    from plarv import Argus
    from plarv.demo.plan import Curve, Plan
    from plarv.demo.story import Outcome

__all__ = ["add_options", "main", "run"]

_PICTURE = Path("demo", "argus-demo.png")
_LEAST_STEPS = 300  # the injury comes well after the warm-up, and a recovery takes its time


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The demo by itself: its exit code. 1: a replay that differs, or a run that was not saved."""
    parser = argparse.ArgumentParser(prog="argus demo", description=__doc__)
    add_options(parser)
    try:
        return run(parser.parse_args(argv))
    except Complaint as complaint:
        tell(str(complaint))
        return complaint.exit_code


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what the demo can be told."""
    parser.add_argument("--steps", type=int, metavar="N", help="steps of each run (default: 700)")
    parser.add_argument(
        "--output", type=Path, default=_PICTURE, metavar="PNG", help=f"default: {_PICTURE}"
    )
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")
    parser.add_argument("--quick", action="store_true", help="a smaller network and a shorter run")


def run(options: argparse.Namespace) -> int:
    """Runs the demo; its exit code. Complaint: what it needs is not there."""
    began = time.monotonic()
    plan = _plan(options)
    if settings.flag("ARGUS_DISABLED"):
        raise Complaint("ARGUS_DISABLED is set: there would be nothing to show")
    _require("torch", "matplotlib")
    _make_room(options.output)
    outcome = _play(plan, options.output, began, quiet=options.json)
    from plarv.demo import story

    if options.json:
        sys.stdout.write(json.dumps(story.as_json(outcome), allow_nan=False) + "\n")
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for line in story.tell(outcome, colour=colour):
            sys.stdout.write(line + "\n")
    return 0 if outcome.check.identical and outcome.rescued else 1


def _require(*modules: str) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            hint = "pip install 'plarv-argus-sdk[demo]'"
            raise Complaint(f"the demo needs {name}, which is not here: {hint}", 1) from error


def _make_room(picture: Path) -> None:
    """Finds out now, and not after a minute of training, that the picture cannot be written."""
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.open("ab").close()
    except OSError as error:
        raise Complaint(f"--output {picture}: {error.strerror}") from error


def _plan(options: argparse.Namespace) -> Plan:
    from plarv.demo.plan import Plan

    plan = Plan()
    if options.quick:
        plan = plan._replace(
            steps=300, injury_step=120, width=64, batch=12, context=24, learning_rate=1.2e-3
        )
    if options.steps is not None:
        if options.steps < _LEAST_STEPS:
            raise Complaint(f"--steps must be at least {_LEAST_STEPS}, not {options.steps}")
        plan = plan._replace(steps=options.steps, injury_step=options.steps * 2 // 5)
    return plan


def _play(plan: Plan, picture: Path, began: float, *, quiet: bool) -> Outcome:
    """Both runs, the picture, the replay."""
    from plarv import Argus
    from plarv.demo.picture import draw
    from plarv.demo.progress import ProgressBar
    from plarv.demo.replay_check import check_replay
    from plarv.demo.story import Outcome
    from plarv.demo.text import read_text
    from plarv.demo.training import train

    text = read_text()
    if not quiet:
        _introduce(plan, len(text.characters))
    watching: List[Argus] = []

    def attach(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Argus:
        run_id = f"demo-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        argus = Argus(
            run_id=run_id,
            model=model,
            optimizer=optimizer,
            mode="AUTO",
            total_steps=plan.steps,
            silent=quiet or None,
        )
        watching.append(argus)
        return argus

    curves: List[Curve] = []
    for label, attaching in (("alone", None), ("under Argus", attach)):
        bar = ProgressBar(sys.stderr, label, plan.steps, plan.learning_rate)
        curve = train(plan, text, bar.step, attaching)
        bar.finish(len(curve.losses), curve.losses[-1], curve.rates[-1])
        curves.append(curve)
    alone, watched = curves
    run_dir = watching[0].run_dir
    if run_dir is None:
        raise Complaint("Argus could keep no journal: there is nothing to compare", 1)
    check = check_replay(run_dir)
    draw(picture, plan, alone, watched, check.verdicts, check.actions)
    return Outcome(plan, alone, watched, check, picture, run_dir, time.monotonic() - began)


def _introduce(plan: Plan, characters: int) -> None:
    sys.stdout.write(
        f"A small GPT learns to write from Python's own manual ({characters:,} characters).\n"
        f"At step {plan.injury_step} of {plan.steps} its learning rate becomes "
        f"{plan.injury_factor:g} times too high, and stays so.\n"
        f"The same run twice, from the same seed: alone, then under Argus.\n"
    )
    sys.stdout.flush()
