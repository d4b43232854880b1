"""Every optimizer of torch and some of nobody's: healthy runs are silent, spoilt state is named."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import pytest
import torch
from tests.producer.local.watched import Fault, Watch, faulty, healthy
from torch import nn

from plarv.local import LocalDetector

OPTIM: Any = torch.optim


class Lion(OPTIM.Optimizer):  # type: ignore[misc]
    """A class of nobody's, with state under a name of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["velocity"] = torch.zeros_like(parameter)
                kept = state["velocity"]
                parameter.sub_((0.9 * kept + 0.1 * parameter.grad).sign(), alpha=group["lr"])
                kept.lerp_(parameter.grad, 0.01)


class Rebuilt(OPTIM.Optimizer):  # type: ignore[misc]
    """Makes its state anew on each step, instead of writing to it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter].get("average", torch.zeros_like(parameter))
                kept = 0.9 * kept + 0.1 * parameter.grad
                self.state[parameter] = {"average": kept}
                parameter.sub_(kept, alpha=group["lr"])


def adam(name: str, **more: Any) -> Callable[[Any], Any]:
    return lambda parameters: getattr(OPTIM, name)(parameters, lr=1e-3, **more)


def muon(parameters: Any) -> Any:
    return OPTIM.Muon([each for each in parameters if each.dim() == 2], lr=1e-3)


OPTIMIZERS: Dict[str, Callable[[Any], Any]] = {
    "AdamW": adam("AdamW", foreach=False),
    "AdamW foreach": adam("AdamW", foreach=True),
    "AdamW fused": adam("AdamW", fused=True),
    "AdamW amsgrad": adam("AdamW", amsgrad=True),
    "AdamW with a tensor as lr": lambda p: OPTIM.AdamW(p, lr=torch.tensor(1e-3)),
    "Adam": adam("Adam"),
    "Adamax": adam("Adamax"),
    "NAdam": adam("NAdam"),
    "RAdam": adam("RAdam"),
    "Adadelta": lambda p: OPTIM.Adadelta(p, lr=0.5),
    "Adagrad": lambda p: OPTIM.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: OPTIM.Adafactor(p, lr=1e-3),
    "ASGD": lambda p: OPTIM.ASGD(p, lr=1e-2),
    "RMSprop": adam("RMSprop"),
    "RMSprop centered with momentum": adam("RMSprop", centered=True, momentum=0.9),
    "Rprop": lambda p: OPTIM.Rprop(p, lr=1e-4),
    "SGD": lambda p: OPTIM.SGD(p, lr=1e-2),
    "SGD momentum": lambda p: OPTIM.SGD(p, lr=1e-2, momentum=0.9),
    "SGD momentum fused": lambda p: OPTIM.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "Muon": muon,
    "Lion": lambda p: Lion(p, 1e-4),
    "Rebuilt": lambda p: Rebuilt(p, 1e-2),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def regression(make_optimizer: Callable[[Any], Any]) -> Callable[[Watch], None]:
    def training(watch: Watch) -> None:
        model = mlp()
        optimizer = make_optimizer(list(model.parameters()))
        target = torch.randn(8, 4)
        watch.attach(model, optimizer)
        for _ in watch.steps():
            data = torch.randn(32, 8)
            loss: Any = (model(data) - data @ target).square().mean()
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    return training


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_healthy_run_is_silent_and_unchanged(name: str) -> None:
    if name == "Muon" and not hasattr(OPTIM, "Muon"):
        pytest.skip("this torch has no Muon")
    healthy(regression(OPTIMIZERS[name]))


def tensors_of(optimizer: Any, parameter: Any) -> Dict[str, Any]:
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if torch.is_tensor(value) and value.dim() and value.numel() > 1
    }


def poison(model: Any, optimizer: Any) -> None:
    for value in tensors_of(optimizer, model[2].weight).values():
        value.mul_(1000.0)


def zero(model: Any, optimizer: Any) -> None:
    for value in tensors_of(optimizer, model[2].weight).values():
        value.zero_()


def not_finite(model: Any, optimizer: Any) -> None:
    next(iter(tensors_of(optimizer, model[2].weight).values())).view(-1)[3] = float("nan")


def negative(model: Any, optimizer: Any) -> None:
    for key, value in tensors_of(optimizer, model[2].weight).items():
        if "sq" in key or key == "sum":
            value.view(-1)[5] = -1e-3


def one_bit(model: Any, optimizer: Any) -> None:
    value = next(iter(tensors_of(optimizer, model[2].weight).values())).data
    value.view(torch.int32).view(-1)[7] ^= 1 << 12


SPOILT: Dict[str, Callable[[Any, Any], None]] = {
    "poisoned": poison,
    "zeroed": zero,
    "not finite": not_finite,
    "one bit": one_bit,
}


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in ("SGD", "Rebuilt", "Adafactor")]
)
def test_spoilt_state_is_named(name: str, fault: str) -> None:
    if name == "Muon" and not hasattr(OPTIM, "Muon"):
        pytest.skip("this torch has no Muon")
    faulty(regression(OPTIMIZERS[name]), Fault("optimizer_health", "2", SPOILT[fault]))


SECONDS = (
    "AdamW", "AdamW foreach", "AdamW fused", "AdamW amsgrad", "Adam", "NAdam", "RAdam", "Adadelta",
    "Adagrad", "RMSprop",
)  # fmt: skip


@pytest.mark.parametrize("name", SECONDS)
def test_a_negative_second_moment_is_named(name: str) -> None:
    faulty(regression(OPTIMIZERS[name]), Fault("optimizer_health", "2", negative))


@pytest.mark.parametrize("name", ["AdamW", "AdamW foreach", "AdamW fused", "NAdam", "RAdam"])
@pytest.mark.parametrize("to", [0.0, 1000.0])
def test_a_wrong_step_counter_is_named(name: str, to: float) -> None:
    def act(model: Any, optimizer: Any) -> None:
        optimizer.state[model[2].weight]["step"].fill_(to)

    faulty(regression(OPTIMIZERS[name]), Fault("optimizer_health", "2", act))


def test_a_poisoned_part_of_a_state_that_is_made_anew_is_named() -> None:
    faulty(regression(OPTIMIZERS["Rebuilt"]), Fault("optimizer_health", "2", poison))


def test_factored_second_moments_are_watched() -> None:
    faulty(regression(OPTIMIZERS["Adafactor"]), Fault("optimizer_health", "2", poison))


def test_a_closure_that_is_called_many_times_is_no_fault() -> None:
    def training(watch: Watch) -> None:
        model = mlp()
        optimizer = OPTIM.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        data, target = torch.randn(64, 8), torch.randn(64, 4)
        watch.attach(model, optimizer)
        for _ in watch.steps():

            def closure() -> Any:
                optimizer.zero_grad()
                loss: Any = (model(data) - target).square().mean()
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            watch.step(loss)

    healthy(training, steps=60)


def test_two_optimizers_over_one_model_are_no_fault() -> None:
    def training(watch: Watch) -> None:
        model = mlp()
        first = OPTIM.AdamW(model[:3].parameters(), 1e-3)
        second = OPTIM.SGD(model[3:].parameters(), 1e-2, momentum=0.9)
        target = torch.randn(8, 4)
        watch.attach(model, first)
        for step in watch.steps():
            data = torch.randn(32, 8)
            loss: Any = (model(data) - data @ target).square().mean()
            loss.backward()
            watch.step(loss)
            first.step()
            if step % 2:
                second.step()
            first.zero_grad()
            second.zero_grad()

    healthy(training)


def test_generator_and_critic_in_turns_are_no_fault() -> None:
    """Two models, two detectors, one step of each in turns, as a GAN is trained."""

    def run(*, on: bool) -> Any:
        torch.manual_seed(3)  # type: ignore[no-untyped-call, unused-ignore]
        made, judge = mlp(), nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 1))
        optimizers = [OPTIM.Adam(each.parameters(), 1e-3) for each in (made, judge)]
        detectors = [LocalDetector(*each) for each in zip((made, judge), optimizers)]
        alarms = []
        for detector in detectors if on else []:
            detector.attach()
        for _ in range(120):
            fake: Any = made(torch.randn(32, 8))
            real = torch.randn(32, 4) + 1.0
            loss: Any = (judge(fake.detach()).exp() - judge(real)).mean().tanh()
            optimizers[1].zero_grad()
            loss.backward()
            if on:
                alarms.append(detectors[1].step(loss=loss))
            optimizers[1].step()
            optimizers[0].zero_grad()
            loss = -judge(fake).mean().tanh()
            loss.backward()
            if on:
                alarms.append(detectors[0].step(loss=loss))
            optimizers[0].step()
        for detector in detectors:
            detector.detach()
        assert [each.summary() for each in alarms if each.any_warn] == []
        return [each.detach().clone() for model in (made, judge) for each in model.parameters()]

    for bare, watched in zip(run(on=False), run(on=True)):
        assert torch.equal(bare, watched)


class Plain:
    """No optimizer of torch's, but of its form."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.param_groups: List[Dict[str, Any]] = [{"params": list(parameters), "lr": lr}]
        self.state: Dict[Any, Any] = {}

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                kept = self.state.setdefault(parameter, {"momentum": torch.zeros_like(parameter)})
                kept["momentum"].mul_(0.9).add_(parameter.grad)
                parameter.sub_(kept["momentum"], alpha=self.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class Deaf(Rebuilt):
    """Somebody has put another step in the place of the one that calls the hooks."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                kept = state.setdefault("average", torch.zeros_like(parameter))
                parameter.sub_(kept.lerp_(parameter.grad, 0.1), alpha=group["lr"])

    step.hooked = True  # type: ignore[attr-defined]


def test_an_optimizer_whose_hooks_are_never_called_is_watched_by_its_norms() -> None:
    training = regression(lambda parameters: Deaf(parameters, lr=1e-2))
    healthy(training, notes=["steps were not heard of"])
    faulty(training, Fault("optimizer_health", "2", poison))


def test_an_optimizer_without_hooks_is_watched_by_its_norms() -> None:
    training = regression(lambda parameters: Plain(parameters, 1e-3))
    healthy(training, notes=["the optimizer has no hooks"])
    faulty(training, Fault("optimizer_health", "2", poison))
