"""Faults that can be put into a training, each with the check that should name it.

How strong a fault is, is drawn by the run's seed within the limits that stand beside it.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch

from local_models import Trainee

__all__ = ["FAULTS", "Fault"]

Act = Callable[[Trainee], None]
Change = Callable[[torch.Tensor], torch.Tensor]


class Fault(NamedTuple):
    """What happens from the onset on. All but ``once`` happen on every step."""

    check: str
    once: Optional[Act] = None  # before the forward of the onset's step
    loss: Optional[Change] = None
    after_backward: Optional[Act] = None
    after_step: Optional[Act] = None
    wanted: Optional[Change] = None
    only: str = ""  # architectures whose name begins so


def _between(trainee: Trainee, low: float, high: float) -> float:
    """How strong the fault is in this run, even in the logarithm."""
    return math.exp(trainee.chance.uniform(math.log(low), math.log(high)))


def _input_of_next(change: Callable[[torch.Tensor, float], torch.Tensor], *limits: float) -> Act:
    """Changes what the layer behind an activation gets."""

    def act(trainee: Trainee) -> None:
        strength = _between(trainee, *limits) if limits else 0.0

        def changed(_: Any, given: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
            return (change(given[0], strength), *given[1:])

        trainee.after_activation.register_forward_pre_hook(changed)

    return act


def _edit(change: Callable[[Trainee], None]) -> Act:
    def act(trainee: Trainee) -> None:
        with torch.no_grad():
            change(trainee)

    return act


def _masked(values: torch.Tensor, part: float) -> torch.Tensor:
    keep = torch.ones(values.shape[1 if values.dim() == 4 else -1])
    keep[: int(part * len(keep))] = 0.0
    return values * (keep.view(-1, 1, 1) if values.dim() == 4 else keep)


def _clamped(values: torch.Tensor, part: float) -> torch.Tensor:
    limit = part * _size(values)
    return torch.clamp(values, -limit, limit)


def _saturated(values: torch.Tensor, gain: float) -> torch.Tensor:
    return torch.tanh(gain * values / _size(values))


def _size(values: torch.Tensor) -> torch.Tensor:
    return values.detach().square().mean().sqrt()


def _kill(trainee: Trainee) -> None:
    bias = trainee.before_activation.bias
    bias[: int(_between(trainee, 0.75, 1.0) * len(bias))] = -50.0


def _scale_hidden(low: float, high: float) -> Callable[[Trainee], None]:
    def change(trainee: Trainee) -> None:
        trainee.hidden.weight.mul_(_between(trainee, low, high))

    return change


def _scale_gradient(low: float, high: float) -> Callable[[Trainee], None]:
    def change(trainee: Trainee) -> None:
        factor = _between(trainee, low, high)
        for parameter in trainee.starved.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    return change


def _state(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Trainee], None]:
    def act(trainee: Trainee) -> None:
        change(trainee.optimizer.state[trainee.hidden.weight][key])

    return act


def _scale_momentum(trainee: Trainee) -> None:
    state = trainee.optimizer.state[trainee.hidden.weight]
    state["exp_avg"].mul_(_between(trainee, 1e2, 1e4))


def _sharpen(trainee: Trainee) -> None:
    layer: Any = trainee.query[0]
    layer.weight[: layer.weight.shape[0] // 3].mul_(_between(trainee, 60.0, 600.0))


def _look_at_first(trainee: Trainee) -> None:
    """All heads of all layers get queries and keys of one large direction at the first token."""
    for each in trainee.query:
        layer: Any = each
        width = layer.weight.shape[1]
        layer.bias[:width].fill_(60.0)
        layer.weight[width : 2 * width].mul_(20.0)


def _round(kind: torch.dtype) -> Callable[[Trainee], None]:
    def change(trainee: Trainee) -> None:
        for parameter in trainee.model.parameters():
            parameter.copy_(parameter.to(kind).float())

    return change


def _flip(first: int, last: int) -> Callable[[Trainee], None]:
    def change(trainee: Trainee) -> None:
        weight: Any = trainee.hidden.weight
        bits = weight.data.view(torch.int32).view(-1)
        bits[trainee.chance.randrange(bits.numel())] ^= 1 << trainee.chance.randint(first, last)

    return change


def _collapsed(values: torch.Tensor, noise: float) -> torch.Tensor:
    return values.mean(0, keepdim=True) + noise * (values - values.mean(0, keepdim=True))


def _next_class(labels: torch.Tensor) -> torch.Tensor:
    return (labels + 1) % int(labels.max() + 1)


def _not_finite(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


FAULTS: Dict[str, Fault] = {
    "units dead": Fault("activation_sparsity", once=_edit(_kill)),
    "units masked": Fault("activation_sparsity", once=_input_of_next(_masked, 0.75, 0.95)),
    "activations clamped": Fault("activation_saturation", once=_input_of_next(_clamped, 0.03, 0.2)),
    "activations saturated": Fault(
        "activation_saturation", once=_input_of_next(_saturated, 20.0, 200.0)
    ),
    "layer detached": Fault("gradient_flow", once=_input_of_next(lambda x, _: x.detach())),
    "gradient vanishes": Fault("gradient_flow", after_backward=_edit(_scale_gradient(1e-6, 1e-3))),
    "gradient explodes": Fault("gradient_flow", after_backward=_edit(_scale_gradient(1e3, 1e6))),
    "weights of a layer leap": Fault("weight_imbalance", once=_edit(_scale_hidden(4.0, 16.0))),
    "weights of a layer grow": Fault(
        "weight_imbalance", after_step=_edit(_scale_hidden(1.03, 1.08))
    ),
    "momentum multiplied": Fault("optimizer_health", once=_edit(_scale_momentum)),
    "momentum not finite": Fault(
        "optimizer_health", once=_edit(_state("exp_avg", lambda x: x.fill_(float("nan"))))
    ),
    "second moments zeroed": Fault(
        "optimizer_health", once=_edit(_state("exp_avg_sq", lambda x: x.zero_()))
    ),
    "second moments negative": Fault(
        "optimizer_health", once=_edit(_state("exp_avg_sq", lambda x: x.neg_()))
    ),
    "step counter reset": Fault(
        "optimizer_health", once=_edit(_state("step", lambda x: x.zero_()))
    ),
    "queries multiplied": Fault("attention_collapse", once=_edit(_sharpen), only="gpt"),
    "one token attended": Fault("attention_collapse", once=_edit(_look_at_first), only="gpt"),
    "labels permuted": Fault("loss_spike", wanted=_next_class),
    "loss not finite": Fault("loss_spike", loss=_not_finite),
    "outputs collapsed": Fault(
        "representation_collapse", once=_input_of_next(_collapsed, 1e-4, 0.03)
    ),
    "weights rounded to bfloat16": Fault(
        "precision_erosion", after_step=_edit(_round(torch.bfloat16))
    ),
    "weights rounded to float16": Fault(
        "precision_erosion", after_step=_edit(_round(torch.float16))
    ),
    "exponent bit flipped": Fault("hardware_integrity", once=_edit(_flip(23, 29))),
    "mantissa bit flipped": Fault("hardware_integrity", once=_edit(_flip(0, 22))),
}
