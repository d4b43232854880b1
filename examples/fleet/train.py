"""A data-parallel training job as a user would write it; one process a rank, started by torchrun.

    ARGUS_BROKERS=host:9092 ARGUS_RUN_KEY=... torchrun --nproc_per_node 2 train.py

The three lines about Argus are marked. At step 150 the schedule goes wrong: the learning rate
becomes 60 times too high. With ``mode="AUTO"`` and a key, what the fleet's policy decides is
applied by all ranks at one step, or by none.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from plarv import Argus, ArgusPause
from plarv.demo.model import SmallGPT
from plarv.demo.text import read_text

STEPS = int(os.environ.get("STEPS", "420"))
INJURED_AT = 150
INJURY = 60.0
RATE, WARMUP = 8e-4, 50
BATCH, CONTEXT = 8, 32  # a rank


def learning_rate(step: int) -> float:
    """A warm-up, then level, then the fault."""
    return RATE * min(1.0, (step + 1) / WARMUP) * (INJURY if step >= INJURED_AT else 1.0)


def main() -> None:
    """Trains, and leaves what came of it as JSON where ``OUT`` says."""
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(7)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    text = read_text()
    number_of = {character: number for number, character in enumerate(text.alphabet)}
    tokens = torch.tensor([number_of[character] for character in text.characters])
    window = torch.arange(CONTEXT + 1)
    chance = torch.Generator().manual_seed(rank)  # each rank reads other texts

    model: Any = DistributedDataParallel(SmallGPT(len(text.alphabet), CONTEXT, width=64))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    argus = Argus(model=model, optimizer=optimizer, mode="AUTO", total_steps=STEPS)  # Argus, 1

    losses: List[float] = []
    rates: List[float] = []

    def note_rate(adam: Any, *_: object) -> None:
        rates.append(float(adam.param_groups[0]["lr"]))

    optimizer.register_step_pre_hook(note_rate)
    found: Dict[str, Any] = {"rank": rank, "paused": None}
    try:
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=chance)
            batch = tokens[starts + window]
            logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            torch.autograd.backward(loss)  # loss.backward(), which torch leaves untyped
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            argus.step(loss)  # Argus, 2
    except ArgusPause as pause:
        found["paused"] = str(pause)
    argus.complete()  # Argus, 3

    weights = math.fsum(float(p.detach().double().sum()) for p in model.parameters())
    found.update(losses=losses, rates=rates, weights=weights.hex())
    if "OUT" in os.environ:
        Path(os.environ["OUT"], f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
