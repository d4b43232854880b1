"""The training run: the same from the same seed, until somebody changes its learning rate."""

from __future__ import annotations

import contextlib
import time
from typing import Callable, Generator, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from plarv import Argus
from plarv.demo.model import SmallGPT
from plarv.demo.plan import Curve, Plan
from plarv.demo.text import Text
from plarv.exceptions import ArgusIntervention

__all__ = ["train"]

Attach = Callable[[nn.Module, torch.optim.Optimizer], Argus]
Watch = Callable[[int, float, float], None]
"""(step, loss, learning rate) after each step."""


def train(plan: Plan, text: Text, watch: Watch, attach: Optional[Attach] = None) -> Curve:
    """Trains one network; with ``attach``, under the Argus that it makes. Deterministic.

    It runs on one thread: a network this small gains little from a second one, and the numbers then
    do not depend on how many there are.
    """
    with _one_thread():
        torch.default_generator.manual_seed(plan.seed)
        model = SmallGPT(len(text.alphabet), context=plan.context, width=plan.width)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        argus = attach(model, optimizer) if attach is not None else None
        losses: List[float] = []
        rates: List[float] = []
        stopped = ""
        began = time.monotonic()
        try:
            with argus or contextlib.nullcontext():
                for loss, rate in _steps(plan, text, model, optimizer):
                    losses.append(loss.item())
                    rates.append(rate)
                    watch(len(losses) - 1, losses[-1], rate)
                    if argus is not None:
                        argus.step(loss)
                    late = time.monotonic() - began > plan.time_limit_s
                    if late and len(losses) >= plan.least_steps:
                        break
        except ArgusIntervention as intervention:
            stopped = str(intervention)
        seconds = time.monotonic() - began
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Curve(losses, rates, parameters, seconds, _write(model, text, plan), stopped)


def _steps(
    plan: Plan, text: Text, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Tuple[Tensor, float]]:
    """Each step's loss and the learning rate that it was made with."""
    number_of = {character: number for number, character in enumerate(text.alphabet)}
    tokens = torch.tensor([number_of[character] for character in text.characters])
    window = torch.arange(plan.context + 1)
    chance = torch.Generator().manual_seed(plan.seed)
    used: List[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        used.append(float(optimizer.param_groups[0]["lr"]))

    # Called before the hook of Argus, which was attached later, lets go of the rate again.
    optimizer.register_step_post_hook(note)
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        starts = torch.randint(len(tokens) - plan.context, (plan.batch, 1), generator=chance)
        batch = tokens[starts + window]
        logits: Tensor = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)  # loss.backward(), which torch leaves untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss, used[-1]


def _write(model: SmallGPT, text: Text, plan: Plan, length: int = 64) -> str:
    """A line by the network, one character after the other; what a broken one puts out, too."""
    chance = torch.Generator().manual_seed(plan.seed)
    written = [text.alphabet.index(character) for character in "The "]
    with torch.no_grad():
        while len(written) < length:
            logits: Tensor = model(torch.tensor([written[-plan.context :]]))[0, -1]
            if not bool(torch.isfinite(logits).all()):
                return "(nothing: its weights are not numbers)"
            chances = torch.softmax(logits / 0.7, dim=0)
            written.append(int(torch.multinomial(chances, 1, generator=chance).item()))
    return " ".join("".join(text.alphabet[number] for number in written).split())


@contextlib.contextmanager
def _one_thread() -> Generator[None, None, None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
