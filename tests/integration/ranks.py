"""One rank of the jobs in test_ranks.py: trains a tiny model, and writes down what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

STEPS = 1_000  # at most: a job ends once it has seen what it is there for
FAULT_AT = 80
STEP_S = 0.004  # a step takes at least this long, as a real one would


def main(scenario: str, folder: str) -> None:
    """A rank that torchrun started. The first time it fails, before the slow import of torch."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        _fail()
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    _run(scenario, torch.distributed.get_rank(), Path(folder))
    torch.distributed.destroy_process_group()


def _fail() -> None:
    from plarv import Argus

    argus = Argus(mode="AUTO")
    for step in range(30):
        argus.step(2.0 + 0.01 * (step % 5), 1.0)
        time.sleep(STEP_S)
    if os.environ["RANK"] == "1":
        raise RuntimeError("this rank fails once")
    time.sleep(60.0)  # until torchrun ends it


def spawned(rank: int, scenario: str, folder: str, port: int) -> None:
    """A rank that knows of its job what torch.distributed knows, and nothing from its
    environment.
    """
    import torch.distributed

    os.environ["ARGUS_DIR"] = folder
    distributed: Any = torch.distributed
    store = distributed.TCPStore("127.0.0.1", port, 2, False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    _run(scenario, rank, Path(folder))
    distributed.destroy_process_group()


def _run(scenario: str, rank: int, folder: Path) -> None:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from plarv import Argus

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
    )
    if scenario not in ("follower_killed", "leader_killed"):  # these do without collectives
        model = DistributedDataParallel(model)
    # torch's own optimizers take five seconds to import, which torchrun's ranks cannot share.
    descent: Any = _Descent if scenario == "restart" else torch.optim.Adam
    optimizer = descent(model.parameters(), lr=1e-3)
    argus = Argus(mode="AUTO", model=model, optimizer=optimizer)
    job = _Job(scenario, rank, argus, model, optimizer)
    job.train()
    begun = time.monotonic()
    argus.complete()
    found = {**job.found, "run_id": argus.run_id, "exit_s": time.monotonic() - begun}
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    (folder / f"rank-{rank}-{restart}.json").write_text(json.dumps(found))


class _Descent:
    """Gradient descent, without anything that torch's optimizers do besides."""

    def __init__(self, weights: Any, lr: float) -> None:
        self.param_groups: List[Dict[str, Any]] = [{"params": list(weights), "lr": lr}]

    def zero_grad(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.grad = None

    def step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data.add_(weight.grad, alpha=-self.param_groups[0]["lr"])


class _Job:
    def __init__(self, scenario: str, rank: int, argus: Any, model: Any, optimizer: Any) -> None:
        self.scenario, self.rank = scenario, rank
        self.argus, self.model, self.optimizer = argus, model, optimizer
        self.found: Dict[str, Any] = {"rank": rank, "paused_at": None}
        self.lrs: List[float] = []
        self.ends_after = STEPS

    def train(self) -> None:
        import torch

        from plarv import ArgusPause

        chance = torch.Generator().manual_seed(self.rank)
        truth = torch.randn(16, 1, generator=torch.Generator().manual_seed(9))
        try:
            for step in range(STEPS):
                begun = time.monotonic()
                x = torch.randn(32, 16, generator=chance)
                y = x @ truth + 0.3 * torch.randn(32, 1, generator=chance)
                loss = ((self.model(x) - y) ** 2).mean()
                self._step(step, loss)
                if step >= self.ends_after:
                    break
                time.sleep(max(0.0, begun + STEP_S - time.monotonic()))
        except ArgusPause as pause:
            self.found["paused_at"] = pause.step
        weights = torch.cat([weight.detach().flatten() for weight in self.model.parameters()])
        self.found["weights"] = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        self.found["lrs"] = self.lrs

    def _step(self, step: int, loss: Any) -> None:
        dies = self.scenario in ("pause", "restart")
        if dies and step >= FAULT_AT:
            loss = loss * float("nan")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if step == FAULT_AT and not dies:
            for group in self.optimizer.param_groups:
                group["lr"] = 3.0
        self.argus.step(loss)
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        getattr(self, f"_{self.scenario}")(step)

    def _lower(self, step: int) -> None:
        if step > FAULT_AT and self.lrs[-1] < 3.0:
            self.ends_after = min(self.ends_after, step + 20)

    def _pause(self, step: int) -> None:
        pass

    def _late(self, step: int) -> None:
        """Rank 1 hears nothing from a while before the fault until long after it."""
        transport: Any = self.argus._session.transport
        if self.rank == 1 and step == FAULT_AT - 1:
            transport._stop.set()
            transport._thread.join()
        if self.rank == 1 and step == FAULT_AT + 400:
            transport._deliver(*transport._follow.look())
        self.ends_after = FAULT_AT + 410

    def _follower_killed(self, step: int) -> None:
        self._kill(1, step)

    def _leader_killed(self, step: int) -> None:
        self._kill(0, step)

    def _kill(self, rank: int, step: int) -> None:
        import torch.distributed

        if step == FAULT_AT - 1:  # side by side once: it is dead before there is a fault
            torch.distributed.barrier()
            if self.rank == rank:
                os.kill(os.getpid(), signal.SIGKILL)
        self.ends_after = FAULT_AT + 300

    def _restart(self, step: int) -> None:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
