"""Ways in which people train, healthy and with a fault put in: precision, schedules, tricks."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Dict, Tuple, Type, cast

import pytest
import torch
from tests.producer.local.watched import Fault, Watch, faulty, flip_a_bit, healthy
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

CLASSES = 4


class Net(nn.Module):
    """Convolutions with BatchNorm, dropout, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.middle, self.drop = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Dropout(0.1)
        self.wide, self.head = nn.Linear(8 * 16, 64), nn.Linear(64, CLASSES)

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.norm(self.first(given)).relu()
        hidden = self.drop(self.middle(hidden).relu()).flatten(1)
        return self.head(functional.gelu(self.wide(hidden)))


CENTRES = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def batch(size: int = 32) -> Any:
    labels = torch.randint(0, CLASSES, (size,))
    return CENTRES[labels] + torch.randn(size, 1, 8, 8), labels


class Setting:
    """What a training does otherwise than the plain one; each test overrides a part."""

    notes: Tuple[str, ...] = ()
    loud: Tuple[str, ...] = ()  # checks that speak, rightly

    def model(self) -> Any:
        return Net()

    def optimizer(self, model: Any) -> Any:
        return torch.optim.AdamW(model.parameters(), 2e-3)

    def schedule(self, optimizer: Any) -> Any:
        return None

    def around(self) -> Any:
        return contextlib.nullcontext()

    def loss(self, model: Any) -> Any:
        data, labels = batch()
        return functional.cross_entropy(model(data), labels)

    def backward(self, loss: Any) -> None:
        loss.backward()

    def update(self, optimizer: Any) -> None:
        optimizer.step()

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        """What follows the optimizer's step."""

    def __call__(self, watch: Watch) -> None:
        model = self.model()
        optimizer = self.optimizer(model)
        schedule = self.schedule(optimizer)
        watch.attach(model, optimizer)
        for step in watch.steps():
            with self.around():
                loss = self.loss(model)
            self.backward(loss)
            watch.step(loss)
            self.update(optimizer)
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
            self.after(model, optimizer, step)


# -- precision


class Autocast(Setting):
    def around(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


class Scaled(Setting):
    """fp16 with a scaler that grows every 10 steps until it overflows, and skips a step."""

    def __init__(self) -> None:
        self.scaler: Any = torch.amp.GradScaler("cpu", 2.0**16, growth_interval=10)

    def around(self) -> Any:
        return torch.autocast("cpu", torch.float16)

    def backward(self, loss: Any) -> None:
        self.scaler.scale(loss).backward()

    def update(self, optimizer: Any) -> None:
        self.scaler.step(optimizer)
        self.scaler.update()


class Clipped(Scaled):
    """Unscaled before it is clipped, as the manual says."""

    def update(self, optimizer: Any) -> None:
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        super().update(optimizer)


class Half(Setting):
    """All weights in bf16: many updates round to nothing, from the beginning."""

    def model(self) -> Any:
        return Net().bfloat16()

    def loss(self, model: Any) -> Any:
        data, labels = batch()
        return functional.cross_entropy(model(data.bfloat16()).float(), labels)


class Double(Setting):
    def model(self) -> Any:
        return Net().double()

    def loss(self, model: Any) -> Any:
        data, labels = batch()
        return functional.cross_entropy(model(data.double()), labels)


# -- schedules


class Warm(Setting):
    """Ten steps of warm-up from nothing, then a cosine to zero."""

    def schedule(self, optimizer: Any) -> Any:
        def rate(step: int) -> float:
            return min(1.0, step / 10) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / 150)))

        return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


class Drops(Setting):
    """A tenth of the rate at 50 and again at 100."""

    def schedule(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [50, 100])


class Restarts(Setting):
    def schedule(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 30)


class Cycles(Setting):
    def schedule(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=151)


# -- what is in the model


class Experts(nn.Module):
    """Four experts for single rows: some get none for a time, one never does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.router = nn.Linear(64, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4)
        )
        self.head = nn.Linear(32, CLASSES)
        self.step = 0

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.body(given.flatten(1)).relu()
        scores = self.router(hidden).softmax(-1)
        hidden_from = self.step < 40 or 70 <= self.step < 110
        allowed = scores.masked_fill(torch.tensor([False, False, hidden_from, True]), float("-inf"))
        share, chosen = allowed.max(-1)
        out = hidden
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            # no look whether there are any: an empty batch goes through, as in many libraries
            out = out.index_add(0, rows, expert(hidden[rows]) * share[rows, None])
        self.step += 1
        return self.head(out)


class Mixture(Setting):
    def model(self) -> Any:
        return Experts()


class Tied(nn.Module):
    """Embedding and head share weights; one block of several is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.embed(given)
        for block in self.blocks[:2]:
            hidden = hidden + functional.silu(block(hidden))
        return self.head(hidden)


class Language(Setting):
    """Each token follows from the one before."""

    def model(self) -> Any:
        return Tied()

    def loss(self, model: Any) -> Any:
        given = torch.randint(0, 50, (16, 12))
        return functional.cross_entropy(
            model(given).flatten(0, 1), ((given * 7 + 3) % 50).flatten()
        )


class SparseTables(Setting):
    """A big table with sparse gradients, which SparseAdam trains, before a layer that stays."""

    def model(self) -> Any:
        return nn.Sequential(nn.EmbeddingBag(5000, 16, sparse=True), nn.ReLU(), nn.Linear(16, 4))

    def optimizer(self, model: Any) -> Any:
        return torch.optim.SparseAdam(model[0].parameters(), 1e-2)

    def loss(self, model: Any) -> Any:
        given = torch.randint(0, 5000, (32, 6))
        return functional.cross_entropy(model(given), given[:, 0] % 4)

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        model.zero_grad()


class WeightNorm(Setting):
    def model(self) -> Any:
        model = Net()
        parametrizations.weight_norm(model.wide)
        parametrizations.spectral_norm(model.head)
        return model


class Pruned(Setting):
    def after(self, model: Any, optimizer: Any, step: int) -> None:
        if step == 60:  # half of the weights are held at zero from here on
            cast(Any, prune).l1_unstructured(model.wide, "weight", 0.5)


class Unfrozen(Setting):
    """A pretrained body is opened from the top, layer by layer."""

    def model(self) -> Any:
        model = Net()
        for each in (model.first, model.norm, model.middle, model.wide):
            each.requires_grad_(False)
        return model

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        opened = {40: model.wide, 70: model.middle, 100: model.first}
        if step in opened:
            opened[step].requires_grad_(True)


class AddsGroups(Setting):
    """The same with the usual way for optimizers: a group of parameters is added when opened."""

    def optimizer(self, model: Any) -> Any:
        return torch.optim.AdamW(model.head.parameters(), 2e-3)

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        opened = {40: model.wide, 70: model.middle}
        if step in opened:
            optimizer.add_param_group({"params": list(opened[step].parameters()), "lr": 5e-4})


# -- what code does to weights


class Averaged(Setting):
    """An EMA beside the weights, put in for an evaluation every 10 steps, and taken out again."""

    def __init__(self) -> None:
        self.kept: Dict[str, Any] = {}

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        with torch.no_grad():
            named = dict(model.named_parameters())
            if not self.kept:
                self.kept = {name: each.detach().clone() for name, each in named.items()}
            for name, each in named.items():
                self.kept[name].lerp_(each, 0.01)
            if step % 10 == 9:
                own = {name: each.detach().clone() for name, each in named.items()}
                for name, each in named.items():
                    each.copy_(self.kept[name])
                model.eval()
                model(batch()[0])
                model.train()
                for name, each in named.items():
                    each.copy_(own[name])


class Clamped(Setting):
    """A critic's weights, held within bounds after each step."""

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        with torch.no_grad():
            for each in model.parameters():
                each.clamp_(-0.15, 0.15)


class ClampedByData(Setting):
    """The same past torch's knowledge."""

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        for each in model.parameters():
            each.data = each.data.clamp(-0.15, 0.15)


class Lookahead(Setting):
    """Every five steps back half of the way to where it was."""

    def __init__(self) -> None:
        self.slow: Any = None

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        if self.slow is None:
            self.slow = [each.detach().clone() for each in model.parameters()]
        if step % 5 == 4:
            for slow, each in zip(self.slow, model.parameters()):
                slow.lerp_(each.detach(), 0.5)
                each.data.copy_(slow)


class Reloaded(Setting):
    """The best weights are put back now and then, at no regular time."""

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        if step == 30:
            self.best = {key: value.clone() for key, value in model.state_dict().items()}
        if step in (47, 90, 97):
            model.load_state_dict(self.best)


class Reset(Setting):
    """The head is made anew in the middle: the loss leaps, and nothing else is told."""

    loud = ("loss_spike",)

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        if step == 75:
            model.head.reset_parameters()


class Accumulated(Setting):
    """One report an optimizer step, four backwards each."""

    def loss(self, model: Any) -> Any:
        for _ in range(3):
            (super().loss(model) / 4).backward()
        return super().loss(model) / 4


class AccumulatedReports(Setting):
    """A report a micro-batch, an optimizer step every fourth."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, optimizer: Any) -> None:
        self.count += 1
        if self.count % 4 == 0:
            optimizer.step()
            self.zero(optimizer)

    def zero(self, optimizer: Any) -> None:
        type(optimizer).zero_grad(optimizer)

    def __call__(self, watch: Watch) -> None:
        model = self.model()
        optimizer = self.optimizer(model)
        watch.attach(model, optimizer)
        for _ in watch.steps():
            loss = self.loss(model) / 4
            loss.backward()
            watch.step(loss)
            self.update(optimizer)


class AfterTheStep(Setting):
    """step() is called after the optimizer's step and zero_grad."""

    def __call__(self, watch: Watch) -> None:
        model = self.model()
        optimizer = self.optimizer(model)
        watch.attach(model, optimizer)
        for _ in watch.steps():
            loss = self.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss)


class Evaluated(Setting):
    """An evaluation every 20 steps, by no_grad in training mode too (as some forget eval())."""

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        if step % 20 == 19:
            model.eval()
            with torch.no_grad():
                model(torch.zeros(64, 1, 8, 8))
            model.train()
        if step % 20 == 9:
            with torch.no_grad():
                model(torch.zeros(64, 1, 8, 8))


class ZeroInPlace(Setting):
    """zero_grad(set_to_none=False)."""

    def after(self, model: Any, optimizer: Any, step: int) -> None:
        optimizer.zero_grad(set_to_none=False)

    def optimizer(self, model: Any) -> Any:
        optimizer = super().optimizer(model)
        own = optimizer.zero_grad
        optimizer.zero_grad = lambda set_to_none=False: own(set_to_none=set_to_none)
        return optimizer


class Shrinks(Setting):
    """The last batch of each epoch is small, some batches hold a single row."""

    def __init__(self) -> None:
        self.count = 0

    def loss(self, model: Any) -> Any:
        self.count += 1
        data, labels = batch((32, 32, 32, 7, 2)[self.count % 5])
        return functional.cross_entropy(model(data), labels)


class Penalized(Setting):
    """A gradient penalty: a backward through a backward."""

    def loss(self, model: Any) -> Any:
        data, labels = batch()
        data.requires_grad_(True)
        scores = model(data)
        (slope,) = torch.autograd.grad(scores.sum(), data, create_graph=True)
        return functional.cross_entropy(scores, labels) + 0.01 * slope.square().mean()


class Grafted(Setting):
    """Gradients made by functional calls (as for per-sample gradients), set by hand."""

    notes = ("activations of",)

    def model(self) -> Any:
        model: Any = Net()
        model.norm = nn.GroupNorm(2, 8)
        return model

    def loss(self, model: Any) -> Any:
        data, labels = batch()
        named = dict(model.named_parameters())

        def of(parameters: Any) -> Any:
            scores = torch.func.functional_call(model, parameters, (data,))
            return functional.cross_entropy(scores, labels)

        gradients, loss = torch.func.grad_and_value(of)(named)
        for name, each in named.items():
            each.grad = gradients[name]
        return loss

    def backward(self, loss: Any) -> None:
        """It is done."""


SETTINGS: Dict[str, Type[Setting]] = {
    each.__name__: each
    for each in (
        Setting, Autocast, Scaled, Clipped, Half, Double, Warm, Drops, Restarts, Cycles, Mixture,
        Language, SparseTables, WeightNorm, Pruned, Unfrozen, AddsGroups, Averaged, Clamped,
        ClampedByData, Lookahead, Reloaded, Reset, Accumulated, AccumulatedReports, AfterTheStep,
        Evaluated, ZeroInPlace, Shrinks, Penalized, Grafted,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_healthy_run_is_silent_and_unchanged(name: str) -> None:
    setting = SETTINGS[name]
    healthy(lambda watch: setting()(watch), notes=setting.notes, loud=setting.loud)


# where code edits many elements in the same interval, or parameters have other names
OTHERS = ("Clamped", "ClampedByData", "Mixture", "Language", "SparseTables", "WeightNorm", "Pruned",
          "Reset")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in OTHERS])
def test_a_flipped_bit_is_named(name: str) -> None:
    setting = SETTINGS[name]
    flip = Fault("hardware_integrity", "wide", flip_a_bit("wide.weight"), at=83)
    faulty(lambda watch: setting()(watch), flip)


LAYERS = {
    "Mixture": "experts.1.0", "Language": "blocks.2", "SparseTables": "0", "WeightNorm": "middle",
    "Pruned": "middle",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_flipped_bit_of_odd_layers_is_named(name: str) -> None:
    """An expert without tokens, a layer that is never called, a table with sparse gradients."""
    layer, setting = LAYERS[name], SETTINGS[name]
    flip = Fault("hardware_integrity", layer, flip_a_bit(f"{layer}.weight"), at=83)
    faulty(lambda watch: setting()(watch), flip)
