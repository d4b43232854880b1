"""Faults that can be put into a training, each with the check that should name it."""

from __future__ import annotations

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


def _input_of_next(change: Change) -> Act:
    """Changes what the layer behind an activation gets."""

    def act(trainee: Trainee) -> None:
        def changed(_: Any, given: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
            return (change(given[0]), *given[1:])

        trainee.after_activation.register_forward_pre_hook(changed)

    return act


def _edit(change: Callable[[Trainee], None]) -> Act:
    def act(trainee: Trainee) -> None:
        with torch.no_grad():
            change(trainee)

    return act


def _masked(values: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(values.shape[1 if values.dim() == 4 else -1])
    keep[: int(0.9 * len(keep))] = 0.0
    return values * (keep.view(-1, 1, 1) if values.dim() == 4 else keep)


def _size(values: torch.Tensor) -> torch.Tensor:
    return values.detach().square().mean().sqrt()


def _kill(trainee: Trainee) -> None:
    trainee.before_activation.bias.fill_(-50.0)


def _scale_hidden(factor: float) -> Callable[[Trainee], None]:
    def change(trainee: Trainee) -> None:
        trainee.hidden.weight.mul_(factor)

    return change


def _starve(trainee: Trainee) -> None:
    for parameter in trainee.starved.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(1e-5)


def _state(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Trainee], None]:
    def act(trainee: Trainee) -> None:
        change(trainee.optimizer.state[trainee.hidden.weight][key])

    return act


def _sharpen(trainee: Trainee) -> None:
    layer: Any = trainee.query[1]
    layer.weight[: layer.weight.shape[0] // 3].mul_(200.0)


def _look_at_first(trainee: Trainee) -> None:
    """All heads of all layers get queries and keys of one large direction at the first token."""
    for each in trainee.query:
        layer: Any = each
        width = layer.weight.shape[1]
        layer.bias[:width].fill_(60.0)
        layer.weight[width : 2 * width].mul_(20.0)


def _round(trainee: Trainee) -> None:
    for parameter in trainee.model.parameters():
        parameter.copy_(parameter.bfloat16().float())


def _flip(bit: int) -> Callable[[Trainee], None]:
    def change(trainee: Trainee) -> None:
        weight: Any = trainee.hidden.weight
        bits = weight.data.view(torch.int32).view(-1)
        bits[bits.numel() // 3] ^= 1 << bit

    return change


def _collapsed(values: torch.Tensor) -> torch.Tensor:
    return values.mean(0, keepdim=True).expand_as(values)


def _next_class(labels: torch.Tensor) -> torch.Tensor:
    return (labels + 1) % int(labels.max() + 1)


def _not_finite(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


FAULTS: Dict[str, Fault] = {
    "dead units": Fault("activation_sparsity", once=_edit(_kill)),
    "masked units": Fault("activation_sparsity", once=_input_of_next(_masked)),
    "clamped activations": Fault(
        "activation_saturation",
        once=_input_of_next(lambda x: torch.clamp(x, -0.1 * _size(x), 0.1 * _size(x))),
    ),
    "saturated activations": Fault(
        "activation_saturation", once=_input_of_next(lambda x: torch.tanh(50.0 * x / _size(x)))
    ),
    "detached layer": Fault("gradient_flow", once=_input_of_next(lambda x: x.detach())),
    "vanishing gradient": Fault("gradient_flow", after_backward=_edit(_starve)),
    "weights of a layer x 8": Fault("weight_imbalance", once=_edit(_scale_hidden(8.0))),
    "weights grow 5% a step": Fault("weight_imbalance", after_step=_edit(_scale_hidden(1.05))),
    "momentum x 1,000": Fault(
        "optimizer_health", once=_edit(_state("exp_avg", lambda x: x.mul_(1e3)))
    ),
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
    "queries x 200": Fault("attention_collapse", once=_edit(_sharpen), only="gpt"),
    "one token attended": Fault("attention_collapse", once=_edit(_look_at_first), only="gpt"),
    "labels permuted": Fault("loss_spike", wanted=_next_class),
    "loss not finite": Fault("loss_spike", loss=_not_finite),
    "collapsed outputs": Fault("representation_collapse", once=_input_of_next(_collapsed)),
    "weights rounded to bfloat16": Fault("precision_erosion", after_step=_edit(_round)),
    "exponent bit flipped": Fault("hardware_integrity", once=_edit(_flip(29))),
    "mantissa bit flipped": Fault("hardware_integrity", once=_edit(_flip(3))),
}
