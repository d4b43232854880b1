"""One rank of the jobs in test_rank_checkpoints.py: trains, is poisoned, goes back, goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Dict

STEP_S = 0.004
LIMIT_S = 60.0


def spawned(rank: int, scenario: str, folder: str, port: int) -> None:
    """``scenario``: "ddp" or "fsdp2", then "poisoned" or "recover"."""
    import torch.distributed

    os.environ["ARGUS_DIR"] = folder
    os.environ["ARGUS_CHECKPOINT_STEPS"] = "20"
    distributed: Any = torch.distributed
    store = distributed.TCPStore("127.0.0.1", port, 2, False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    wrapper, what = scenario.split()
    job = _Job(rank, wrapper, Path(folder))
    found = getattr(job, f"_{what}")()
    job.argus.complete()
    (Path(folder) / f"{what}-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


class _Job:
    def __init__(self, rank: int, wrapper: str, folder: Path) -> None:
        import torch

        from plarv import Argus

        torch.manual_seed(0)
        self.rank = rank
        model: Any = torch.nn.Sequential(
            torch.nn.Linear(16, 63), torch.nn.ReLU(), torch.nn.Linear(63, 1)
        )
        if wrapper == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
            self.slots = folder / "ring"
        else:
            from torch.distributed.fsdp import fully_shard

            fully_shard(model[0])
            model = fully_shard(model)
            self.slots = folder / "ring" / f"rank-{rank:05d}"
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, 0.99)
        self.argus: Any = Argus(
            mode="AUTO", model=model, optimizer=self.optimizer, scheduler=self.scheduler,
            checkpoint_dir=folder / "ring",
        )  # fmt: skip
        self.chance = torch.Generator().manual_seed(rank)
        self.truth = torch.randn(16, 1, generator=torch.Generator().manual_seed(9))
        self.states: Dict[int, str] = {}

    def state(self) -> str:
        """A digest of this rank's weights, moments and rates."""
        found = hashlib.sha256()
        parts = [*self.model.parameters()]
        for state in self.optimizer.state.values():
            parts.extend(state[key] for key in sorted(state))
        for part in parts:
            local = getattr(part, "_local_tensor", part).detach().contiguous()
            found.update(local.view(-1).numpy().tobytes())
        found.update(repr(self.optimizer.param_groups[0]["lr"]).encode())
        return found.hexdigest()

    def step(self, *, poison: bool = False) -> None:
        import torch

        begun = time.monotonic()
        x = torch.randn(32, 16, generator=self.chance)
        y = x @ self.truth + 0.3 * torch.randn(32, 1, generator=self.chance)
        loss: Any = ((self.model(x) - y) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if poison:
            with torch.no_grad():
                for part in self.model.parameters():
                    getattr(part, "_local_tensor", part).fill_(math.nan)
        before = self.state()
        self.argus.step(loss)
        self.states[self.argus._session._last_step] = before
        time.sleep(max(0.0, begun + STEP_S - time.monotonic()))

    def certified(self) -> int:
        """The newest certified step of all ranks' rings, or -1: the same answer on each rank."""
        import torch
        import torch.distributed

        from plarv.checkpoints.slots import Slots

        steps = [slot.step for slot in Slots(self.slots).all() if slot.certified]
        distributed: Any = torch.distributed
        newest = torch.tensor(max(steps, default=-1))
        distributed.all_reduce(newest, op=distributed.ReduceOp.MIN)
        return int(newest)

    def is_finite(self) -> bool:
        import torch

        part: Any = next(iter(self.model.parameters()))
        return bool(torch.isfinite(getattr(part, "_local_tensor", part)).all())

    def _poisoned(self) -> Any:
        end = time.monotonic() + LIMIT_S
        while self.certified() < 0:
            assert time.monotonic() < end, "no checkpoint was certified"
            self.step()
        for _ in range(30):
            self.step()
        known = dict(self.states)
        self.step(poison=True)
        while not self.is_finite():
            assert time.monotonic() < end, "it was not gone back"
            self.step()
        back = self.state()
        (step,) = [step for step, state in known.items() if state == back] or [-1]
        self.states = {}
        while self.certified() <= step:
            assert time.monotonic() < end + LIMIT_S, "nothing was certified after it"
            self.step()
        return {"back": step, "states": self.states, "certified": self.certified()}

    def _recover(self) -> Any:
        found = self.argus.recover()
        state = self.state()
        for _ in range(5):
            self.step()
        return {"step": found.step, "state": state, "finite": self.is_finite()}
