"""The faults of the first-cause suite, and what a right answer to each is.

The labels were written before the ranking was tuned, and name what a person who knows of the fault
would accept as its first cause.
"""

from __future__ import annotations

import math
import random
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Tuple

from injected_runs import Hooks, Setting, Training, onset_of
from plarv_schemas.events import Event

__all__ = ["FAULTS", "Label", "Labelled", "make"]

_UNSTABLE = frozenset(
    {
        "gradient_explosion", "loss_spike", "loss_divergence", "loss_oscillation",
        "optimizer_corruption", "non_finite",
    }
)  # fmt: skip


class Label(NamedTuple):
    """What is right: any of these detectors, an onset in this window, and these where given."""

    detectors: FrozenSet[str]
    early: int = 2  # steps before the injection
    late: int = 5  # steps after it
    clue: Optional[str] = None  # kind of a clue that must be among the reasons
    rank: Optional[int] = None
    layer: Optional[str] = None
    attempt: int = 1


class Labelled(NamedTuple):
    """A run with a fault in it; ``label`` None: nothing is wrong with it."""

    events: List[Event]
    onset: int
    label: Optional[Label]


def _of(*names: str) -> FrozenSet[str]:
    return frozenset(names)


def healthy(seed: int) -> Labelled:
    """Nothing is wrong."""
    training = Training(Setting.drawn(seed))
    training.run()
    return _ended(training, 0, None)


def lr_jump(seed: int) -> Labelled:
    """The learning rate is 30 to 100 times what it was, for good."""
    onset, factor = onset_of(seed, "lr_jump"), random.Random(seed).choice([30.0, 60.0, 100.0])
    hooks = Hooks(lr=lambda step, lr: lr * factor if step >= onset else lr)
    return _trained(seed, hooks, onset, Label(_UNSTABLE, 2, 12, clue="learning_rate"))


def poisoned_batch(seed: int) -> Labelled:
    """One batch has inputs a few hundred times too large."""
    onset, factor = onset_of(seed, "poisoned_batch"), random.Random(seed).choice([100.0, 300.0])
    hooks = Hooks(batch=lambda step, rank, x, y: (x * factor if step == onset else x, y))
    label = Label(_of("gradient_explosion", "loss_spike", "sample_anomaly"), 1, 1)
    return _trained(seed, hooks, onset, label)


def label_noise(seed: int) -> Labelled:
    """From one step on 60% of the labels are random."""
    onset, chance = onset_of(seed, "label_noise"), random.Random(seed)

    def batch(step: int, rank: int, x: Any, y: Any) -> Tuple[Any, Any]:
        if step < onset:
            return x, y
        y = y.clone()
        for place in range(len(y)):
            if chance.random() < 0.6:
                y[place] = chance.randrange(8)
        return x, y

    names = _of("loss_spike", "loss_divergence", "sample_anomaly", "gradient_explosion")
    return _trained(seed, Hooks(batch=batch), onset, Label(names, 2, 20))


def poisoned_moments(seed: int) -> Labelled:
    """Adam's second moments are a hundred-millionth of what they were."""
    onset = onset_of(seed, "poisoned_moments")

    def gradient(step: int, training: Training) -> None:
        if step == onset:
            for state in training.optimizers[0].state.values():
                state["exp_avg_sq"].mul_(1e-8)

    names = _of("optimizer_corruption")
    return _trained(seed, Hooks(gradient=gradient), onset, Label(names, 1, 3), optimizer="adam")


def layer_cut(seed: int) -> Labelled:
    """The first layers get no gradient from one step on, and the last one's is a tenth."""
    onset = onset_of(seed, "layer_cut")

    def gradient(step: int, training: Training) -> None:
        if step >= onset:
            layers = training.layers(training.models[0])
            for _, part in layers[:-1]:
                part.weight.grad.zero_()
                part.bias.grad.zero_()
            layers[-1][1].weight.grad.mul_(1e-3)
            layers[-1][1].bias.grad.mul_(1e-3)

    names = _of("gradient_collapse", "canalization")
    return _trained(seed, Hooks(gradient=gradient), onset, Label(names, 1, 25, layer="0"))


def dying_relu(seed: int) -> Labelled:
    """The biases of the second layer are so low that none of its units is on any more."""
    onset = onset_of(seed, "dying_relu")

    def before(step: int, training: Training) -> None:
        if step == onset:
            with training.torch.no_grad():
                training.layers(training.models[0])[1][1].bias.fill_(-100.0)

    label = Label(_of("gradient_collapse", "canalization"), 1, 12, layer="2")
    return _trained(seed, Hooks(before=before), onset, label, activation="ReLU", depth=3)


def nan_batch(seed: int) -> Labelled:
    """One value of one batch is NaN."""
    onset = onset_of(seed, "nan_batch")

    def batch(step: int, rank: int, x: Any, y: Any) -> Tuple[Any, Any]:
        if step == onset:
            x = x.clone()
            x[3, 5] = math.nan
        return x, y

    return _trained(seed, Hooks(batch=batch), onset, Label(_of("non_finite"), 0, 1))


def nan_on_one_rank(seed: int) -> Labelled:
    """One value of one rank's batch is NaN; all weights are a step later."""
    onset, odd = onset_of(seed, "nan_on_one_rank"), seed % 4

    def batch(step: int, rank: int, x: Any, y: Any) -> Tuple[Any, Any]:
        if step == onset and rank == odd:
            x = x.clone()
            x[3, 5] = math.nan
        return x, y

    label = Label(_of("non_finite"), 0, 1, rank=odd)
    return _trained(seed, Hooks(batch=batch), onset, label, ranks=4)


def rank_weights(seed: int) -> Labelled:
    """A layer of one rank's replica is wrong: its loss is not the others'."""
    onset, odd = onset_of(seed, "rank_weights"), seed % 4

    def before(step: int, training: Training) -> None:
        if step == onset:
            with training.torch.no_grad():
                training.layers(training.models[odd])[1][1].weight.mul_(-4.0)

    names = _of("fleet_skew", "loss_spike", "loss_divergence", "gradient_explosion")
    return _trained(seed, Hooks(before=before), onset, Label(names, 1, 5, rank=odd), ranks=4)


def rank_gradient(seed: int) -> Labelled:
    """One rank gets another sum from the all-reduce than the others, from one step on."""
    onset, odd = onset_of(seed, "rank_gradient"), (seed + 1) % 4

    def gradient(step: int, training: Training) -> None:
        if step >= onset:
            for each in training.models[odd].parameters():
                each.grad.mul_(1.5)

    label = Label(_of("fleet_skew"), 0, 5, rank=odd)
    return _trained(seed, Hooks(gradient=gradient), onset, label, ranks=4)


def straggler(seed: int) -> Labelled:
    """One rank takes 40% longer from one step on."""
    onset, odd = onset_of(seed, "straggler", (150, 250)), (seed + 2) % 4

    def columns(step: int, rank: int, found: Dict[str, Any]) -> None:
        if step >= onset and rank == odd:
            found["step_time_ms"] *= 1.4
            found["forward_ms"] *= 1.4

    label = Label(_of("fleet_skew"), 20, 40, rank=odd)
    return _trained(seed, Hooks(columns=columns), onset, label, ranks=4)


def scaler_overflow(seed: int) -> Labelled:
    """In half precision the gradient overflows at each step, whatever the scale."""
    onset = onset_of(seed, "scaler_overflow")
    hooks = Hooks(batch=lambda step, rank, x, y: (x * (1e6 if step >= onset else 1.0), y))
    setting = Setting.drawn(seed, activation="ReLU")
    training = Training(setting, hooks, loss_scale=1024.0)
    training.run()
    names = _of("non_finite", "gradient_explosion", "loss_spike")
    return _ended(training, onset, Label(names, 1, 3))


def stuck_loader(seed: int) -> Labelled:
    """The loader gives one batch for 100 steps; then what was forgotten shows in the loss."""
    onset = onset_of(seed, "stuck_loader")
    stuck: List[int] = []

    def choose(step: int, ids: List[int]) -> List[int]:
        if step == onset:
            stuck.extend(ids)
        return stuck if onset <= step < onset + 100 else ids

    return _trained(seed, Hooks(choose=choose), onset, Label(_of("sample_anomaly"), 1, 3))


def edge_of_stability(seed: int) -> Labelled:
    """Plain descent on large batches; the learning rate is five times what it was."""
    onset = onset_of(seed, "edge_of_stability")
    factor = random.Random(seed).choice([4.0, 6.0])
    hooks = Hooks(lr=lambda step, lr: lr * factor if step >= onset else lr)
    fixed = {"optimizer": "sgd", "batch": 1024, "lr": 0.3, "schedule": "constant"}
    return _trained(seed, hooks, onset, Label(_UNSTABLE, 2, 80, clue="learning_rate"), **fixed)


def flipped_sign(seed: int) -> Labelled:
    """The gradient has the wrong sign from one step on: the loss climbs."""
    onset = onset_of(seed, "flipped_sign")

    def gradient(step: int, training: Training) -> None:
        if step >= onset:
            for each in training.models[0].parameters():
                each.grad.neg_()

    names = _of("loss_divergence", "loss_spike", "gradient_explosion")
    return _trained(seed, Hooks(gradient=gradient), onset, Label(names, 2, 40))


def bit_flip(seed: int) -> Labelled:
    """One weight is a thousand times what a weight can be."""
    onset = onset_of(seed, "bit_flip")

    def before(step: int, training: Training) -> None:
        if step == onset:
            with training.torch.no_grad():
                weight = training.layers(training.models[0])[1][1].weight
                place = int(weight.grad.abs().argmax())  # one that matters
                weight.view(-1)[place] = 1e4

    names = _of("loss_spike", "loss_divergence", "gradient_explosion", "non_finite")
    return _trained(seed, Hooks(before=before), onset, Label(names, 1, 3))


def small_shard(seed: int) -> Labelled:
    """From one step on all batches come from 96 samples: validation worsens."""
    onset, chance = onset_of(seed, "small_shard"), random.Random(seed)

    def choose(step: int, ids: List[int]) -> List[int]:
        return [chance.randrange(96) for _ in ids] if step >= onset else ids

    label = Label(_of("generalization_gap", "sample_anomaly"), 60, 150)
    return _trained(seed, Hooks(choose=choose), onset, label, steps=900, optimizer="adam")


def bad_restart(seed: int) -> Labelled:
    """The run goes on from its checkpoint with fresh moments, and warms up to 50 times its rate."""
    onset = onset_of(seed, "bad_restart")

    def rate(step: int, lr: float) -> float:
        return lr * min(50.0, 1.0 + max(0, step - onset)) if step >= onset else lr

    hooks = Hooks(lr=rate)
    training = Training(Setting.drawn(seed), hooks)
    training.run(0, onset)
    training.log.end("interrupted")
    training.optimizers = [type(each)(each.param_groups) for each in training.optimizers]
    training.log.begin()
    training.run(onset)
    return _ended(training, onset, Label(_UNSTABLE, 0, 60, clue="restart", attempt=2))


def two_faults(seed: int) -> Labelled:
    """A bad batch that comes and goes, and 150 steps later the learning rate that ends the run."""
    onset = onset_of(seed, "two_faults")

    def batch(step: int, rank: int, x: Any, y: Any) -> Tuple[Any, Any]:
        return (x, (y + 3) % 8) if step == onset - 150 else (x, y)

    hooks = Hooks(lr=lambda step, lr: lr * 80.0 if step >= onset else lr, batch=batch)
    return _trained(seed, hooks, onset, Label(_UNSTABLE, 2, 12, clue="learning_rate"))


def rank_falls_silent(seed: int) -> Labelled:
    """One rank stops reporting; the others go on and its share of the gradient is missing."""
    onset, odd = onset_of(seed, "rank_falls_silent"), seed % 4

    def gradient(step: int, training: Training) -> None:
        if step >= onset:  # what it left in its buffers is summed with the others' gradients
            for together in zip(*(model.parameters() for model in training.models)):
                left = training.torch.randn_like(together[0]) * 3.0
                for each in together:
                    each.grad.add_(left)

    setting = Setting.drawn(seed, ranks=4, optimizer="sgd")
    training = Training(setting, Hooks(gradient=gradient))
    training.run()
    events = [event for event in training.log.events if event.rank != odd or event.record <= onset]
    label = Label(_UNSTABLE, 2, 20, clue="rank_silent", rank=odd)
    return Labelled(events, onset, label)


FAULTS: Mapping[str, Callable[[int], Labelled]] = {
    each.__name__: each
    for each in (
        healthy, lr_jump, poisoned_batch, label_noise, poisoned_moments, layer_cut, dying_relu,
        nan_batch, nan_on_one_rank, rank_weights, rank_gradient, straggler, scaler_overflow,
        stuck_loader, edge_of_stability, flipped_sign, bit_flip, small_shard, bad_restart,
        two_faults, rank_falls_silent,
    )
}  # fmt: skip
"""Name -> the run with it that a seed gives."""


def make(fault: str, seed: int) -> Labelled:
    """The run of one fault and one seed: the same on one machine, whoever asks."""
    return FAULTS[fault](seed)


def _trained(seed: int, hooks: Hooks, onset: int, label: Label, **fixed: Any) -> Labelled:
    training = Training(Setting.drawn(seed, **fixed), hooks)
    training.run()
    return _ended(training, onset, label)


def _ended(training: Training, onset: int, label: Optional[Label]) -> Labelled:
    training.log.end()
    return Labelled(training.log.events, onset, label)
