"""A learning rate that is lowered is lowered in torch's own step, whatever a scheduler says."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict

import pytest
import torch
from tests.producer.runs import caught_up, controls_of, folder_of, recorded, replayed, steps_of
from torch.optim import lr_scheduler

from plarv import Argus, ArgusPause

JUMP = 150
LOW, HIGH = 1e-3, 6e-2


def _jump(step: int) -> float:
    return HIGH / LOW if step >= JUMP else 1.0


class ByHand:
    """A schedule of one's own, which knows nothing of torch's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._step = 0

    def step(self) -> None:
        self._step += 1
        for group in self._optimizer.param_groups:
            group["lr"] = LOW * _jump(self._step)


SCHEDULES: Dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, _jump),
    "by hand": ByHand,
}


class Loop:
    """A loop whose loss goes up with its learning rate, and whose weight shows the rate in
    force.
    """

    def __init__(self, schedule: str, lr: Any = LOW, **options: Any) -> None:
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.weight], lr=lr)
        self.scheduler = SCHEDULES[schedule](self.optimizer)
        self.argus = Argus(optimizer=self.optimizer, mode="AUTO", silent=True, **options)
        self.step = -1

    def train(self) -> float:
        """One step; the rate that it was made with."""
        before = float(self.weight.detach())
        self.weight.grad = torch.ones_like(self.weight)
        self.optimizer.step()
        rate = before - float(self.weight.detach())
        self.scheduler.step()
        self.step += 1
        healthy = rate < 2 * LOW
        loss = 2.5 + 0.01 * (self.step % 5) if healthy else 9.0 + 0.1 * (self.step % 3)
        self.argus.step(loss, 1.0 + 0.01 * (self.step % 7) if healthy else 30.0)
        return rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weights_move_by_the_lowered_rate_while_the_scheduler_sets_the_high_one(
    schedule: str,
) -> None:
    loop = Loop(schedule)
    for _ in range(JUMP):
        assert loop.train() == pytest.approx(LOW)
    for _ in range(20):
        assert loop.train() == pytest.approx(HIGH)
    caught_up(loop.argus, loop.step)
    loop.train()  # applied at its end
    for _ in range(20):
        assert loop.train() == pytest.approx(LOW)
    loop.argus.complete()
    assert loop.train() == pytest.approx(HIGH)  # without us the schedule is what it was
    (applied,) = controls_of(loop.argus, "action_applied")
    assert applied.data["kind"] == "SET_LR"
    assert [step.current_lr for step in steps_of(loop.argus)][-5:] == pytest.approx([LOW] * 5)
    assert recorded(folder_of(loop.argus)) == replayed(folder_of(loop.argus))


def test_a_rate_that_is_a_tensor_is_lowered_in_place() -> None:
    rate = torch.tensor(LOW, dtype=torch.float64)
    loop = Loop("lambda", rate)
    for _ in range(JUMP + 20):
        loop.train()
    caught_up(loop.argus, loop.step)
    loop.train()
    assert loop.train() == pytest.approx(LOW)
    assert loop.optimizer.param_groups[0]["lr"] is rate
    loop.argus.complete()


def test_an_optimizer_that_is_found_by_the_losss_graph_is_acted_on_too() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LOW)
    argus = Argus(mode="AUTO", silent=True)
    inputs = torch.randn(8, 4)

    def train(step: int, is_healthy: bool) -> None:
        loss = (model(inputs) * 0.0).mean() + (2.5 if is_healthy else 9.0) + 0.01 * (step % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        argus.step(loss, 1.0 + 0.01 * (step % 7) if is_healthy else 30.0)

    for step in range(JUMP):
        train(step, is_healthy=True)
    optimizer.param_groups[0]["lr"] = HIGH
    for step in range(JUMP, JUMP + 20):
        train(step, is_healthy=False)
    caught_up(argus, JUMP + 19)
    train(JUMP + 20, is_healthy=False)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LOW)
    argus.complete()


def test_a_pause_reaches_a_loop_of_tensors_and_the_gradients_are_left_as_they_are() -> None:
    model = torch.nn.Linear(4, 1)
    argus = Argus(model=model, mode="AUTO", silent=True)
    inputs = torch.randn(8, 4)
    for step in range(60):
        loss = model(inputs).pow(2).mean() * (1.0 if step < 40 else math.nan)
        model.zero_grad()
        loss.backward()
        try:
            argus.step(loss)
        except ArgusPause:
            break
    else:
        caught_up(argus, 59)
        with pytest.raises(ArgusPause) as raised:
            argus.step(loss)
        assert raised.value.step == 60
    argus.complete("paused")
    assert model.weight.grad is not None
    assert not model.weight._backward_hooks  # and our hooks are gone
