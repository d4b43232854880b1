"""What looks odd and is healthy: experts without tokens, checkpointing, accumulation, schedules."""

from __future__ import annotations

from typing import Any, Dict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plarv.local import LocalDetector


class Experts(nn.Module):
    """Each batch goes to one of four layers; the others see no data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, given: torch.Tensor) -> Any:
        chosen = int(torch.randint(0, 4, ()))
        return self.head(self.layers[chosen](given).relu())


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.first, self.head, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 2), reentrant

    def forward(self, given: torch.Tensor) -> Any:
        hidden = checkpoint(self.inner, self.first(given), use_reentrant=self.reentrant)
        return self.head(hidden)


class Sparse(nn.Module):
    """A ReLU network with six of ten neurons silent by birth."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(8, 100), nn.Linear(100, 2)
        with torch.no_grad():
            self.wide.bias[:60].fill_(-20.0)

    def forward(self, given: torch.Tensor) -> Any:
        return self.head(torch.relu(self.wide(given)))


MODELS: Dict[str, Any] = {
    "experts": Experts,
    "checkpointed": lambda: Checkpointed(reentrant=False),
    "checkpointed, reentrant": lambda: Checkpointed(reentrant=True),
    "sparse by birth": Sparse,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_healthy_run_is_silent(name: str, accumulate: int) -> None:
    everything: Any = torch
    everything.manual_seed(1)
    model = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=121)
    target = torch.randn(8, 2)
    alarms = []
    with LocalDetector(model, optimizer) as detector:
        for _ in range(120):
            for _ in range(accumulate):
                given = torch.randn(32, 8)
                loss: Any = (model(given) - given @ target).square().mean() / accumulate
                loss.backward()
                report = detector.step(loss=loss.item())
                alarms.extend([report.summary()] if report.any_warn else [])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert report.notes == ()
    assert alarms == []


def test_layers_frozen_in_the_middle_of_a_run_are_no_fault() -> None:
    everything: Any = torch
    everything.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with LocalDetector(model, optimizer) as detector:
        for step in range(60):
            if step == 30:
                model[0].requires_grad_(False)
            loss: Any = model(torch.randn(32, 8)).square().mean()
            loss.backward()
            assert not detector.step(loss=loss.item()).any_warn
            optimizer.step()
            optimizer.zero_grad()
