"""Runs' folders as training processes leave them, of one rank or several."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from plarv_schemas.journal import pack_control, pack_full
from plarv_schemas.journal_writer import JournalWriter

__all__ = ["Columns", "diverging", "healthy", "lost", "straggling", "write_run"]

Columns = Callable[[int, int, random.Random], Dict[str, Any]]  # step, rank


def write_run(
    folder: Path,
    columns: Columns,
    steps: int,
    *,
    ranks: int = 1,
    first_step: int = 0,
    name: str = "a",
    after_s: float = 0.0,
    status: str = "completed",
    started: Optional[Dict[str, Any]] = None,
) -> Path:
    """A run's folder with a session of each rank; ``columns`` says what a step
    reports, ``after_s`` how much later than now its first one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(name)
    writers = [
        JournalWriter(
            folder, run_id=folder.name, session=f"{name}{rank:x}" * 8, rank=rank, world_size=ranks
        )
        for rank in range(ranks)
    ]
    clocks = [time.monotonic_ns() + int(after_s * 1e9)] * ranks

    def control(rank: int, kind: str, data: Dict[str, Any]) -> None:
        writer = writers[rank]
        assert writer.append(pack_control(writer.record, clocks[rank], None, rank, kind, data))

    for rank in range(ranks):
        data = {"mode": "MANUAL", "world_size": ranks, **(started or {})}
        control(rank, "session_started", data)
    for step in range(first_step, first_step + steps):
        for rank, writer in enumerate(writers):
            writer.prepare()
            found = columns(step, rank, chance)
            clocks[rank] += int(found.pop("step_time_ms", 10.0) * 1e6)
            packed, _ = pack_full(writer.record, clocks[rank], step, found)
            assert writer.append(packed)
    for rank, writer in enumerate(writers):
        control(rank, "session_finished", {"status": status, "exception": None})
        writer.close()
    return folder


def healthy(step: int, rank: int, chance: random.Random) -> Dict[str, Any]:
    """A power law with warm-up."""
    lr = 6e-4 * min(1.0, (step + 1) / 100)
    return {
        "loss": 2.6 + 8.2 * (1 + step / 12) ** -0.75 + chance.gauss(0, 0.03),
        "grad_norm": (0.35 + 3 / (1 + step / 15)) * math.exp(chance.gauss(0, 0.12)),
        "current_lr": lr,
        "update_norm": lr * 900 * math.exp(chance.gauss(0, 0.03)),
        "step_time_ms": 250 * math.exp(chance.gauss(0, 0.02)),
        "batch_size": 32,
    }


def diverging(step: int, rank: int, chance: random.Random) -> Dict[str, Any]:
    """The learning rate is 40 times what it was from step 700 on."""
    found = healthy(step, rank, chance)
    if step >= 700:
        found["current_lr"] *= 40
        found["update_norm"] *= 40
        found["grad_norm"] *= min(300.0, 1.3 ** (step - 700))
        found["loss"] *= min(30.0, 1.1 ** (step - 700))
    return found


def straggling(step: int, rank: int, chance: random.Random) -> Dict[str, Any]:
    """Rank 2's forward pass takes 100 ms longer from step 300 on, and all wait for it."""
    found = healthy(step, rank, chance)
    found["grad_norm"] = healthy(step, 0, random.Random(step))["grad_norm"]
    found["loss"] += chance.gauss(0, 0.05)
    found["step_time_ms"] = 350.0 if step >= 300 else 250.0
    slow = 100.0 if rank == 2 and step >= 300 else 0.0
    found["forward_ms"] = 80.0 * math.exp(chance.gauss(0, 0.02)) + slow
    return found


def lost(step: int, rank: int, chance: random.Random) -> Dict[str, Any]:
    """NaN from the first step on."""
    return {"loss": math.nan, "grad_norm": math.nan, "current_lr": 1e-3}
