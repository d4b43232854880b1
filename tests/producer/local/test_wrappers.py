"""Models that are wrapped: DDP, FSDP, torch.compile. Two ranks over gloo, in processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.producer.local.ranks import on_ranks
from tests.producer.local.watched import Fault, Watch, faulty, flip_a_bit, healthy
from torch import nn
from torch.nn import functional

LAYER = "blocks.1.0"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.is_blocked = False
        self.first = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, 4)

    def forward(self, given: torch.Tensor) -> Any:
        hidden = self.first(given)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        if self.is_blocked:
            hidden = hidden.detach() + 0.0 * hidden
        return self.head(hidden)


def wrapped(kind: str) -> Any:
    """The model as it is trained."""
    model = Net()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "ddp, compiled":
        return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        return fully_shard(model)
    if kind == "fsdp2, bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    if kind.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
            use_orig_params="original" in kind,
            device_id=torch.device("cpu"),
        )
    if kind.startswith("compile "):
        return torch.compile(model, backend=kind.split()[1])
    if kind == "compiled in place":
        model.compile(backend="aot_eager")
    if kind == "a compiled block":
        blocks: Any = model.blocks
        blocks[0] = torch.compile(blocks[0], backend="aot_eager")
    if kind == "a block compiled in place":
        model.blocks[0].compile(backend="aot_eager")
    return model


class Training:
    """Regression on data of the rank's own."""

    def __init__(self, kind: str, rank: int = 0) -> None:
        self.kind, self.rank = kind, rank

    def __call__(self, watch: Watch) -> None:
        model = wrapped(self.kind)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        watch.attach(model, optimizer)
        target = torch.randn(8, 4)
        data_of_rank = torch.Generator().manual_seed(self.rank)
        for _ in watch.steps():
            data = torch.randn(32, 8, generator=data_of_rank)
            loss: Any = functional.mse_loss(model(data).float(), data @ target)
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()


def flip(prefix: str, name: str = f"{LAYER}.weight") -> Fault:
    return Fault("hardware_integrity", LAYER, flip_a_bit(prefix + name), at=60)


def kill(model: Any, optimizer: Any) -> None:
    for name, each in model.named_parameters():
        local: Any = getattr(each, "_local_tensor", each)
        name = name.replace("_fsdp_wrapped_module.", "")
        if f"{LAYER}.weight" in name:
            local.mul_(0.01)
        if f"{LAYER}.bias" in name:
            local.fill_(-30.0)


def block(model: Any, optimizer: Any) -> None:
    """No gradient reaches what lies before the head."""
    for each in model.modules():
        each.is_blocked = True


DEAD = Fault("activation_sparsity", "blocks.1.1", kill, at=60)
BLOCKED = Fault("gradient_flow", "first", block, at=60)


def on_a_rank(rank: int, world: int, kind: str) -> None:
    """A healthy run, then one of each fault, all in one process: to start it is most of the time.

    FSDP of old lays parameters into one flat tensor, which a rank sees a part of.
    """
    healthy(Training(kind, rank), steps=80)
    faulty(Training(kind, rank), DEAD)
    if kind != "fsdp1, original":
        faulty(Training(kind, rank), BLOCKED)
        faulty(Training(kind, rank), flip("module." if kind == "ddp" else ""))


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        "fsdp2",
        pytest.param("fsdp2, bf16", marks=pytest.mark.slow),
        pytest.param("fsdp1, original", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_silent_and_unchanged_and_each_names_its_faults(kind: str) -> None:
    on_ranks(on_a_rank, 2, kind)


COMPILED = {
    "compile eager": ["activations"],
    "compile aot_eager": ["activations"],
    "compiled in place": ["activations"],
    "a compiled block": [],
    "a block compiled in place": [],
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler reads them
@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_model_is_silent_and_unchanged(kind: str) -> None:
    healthy(Training(kind), steps=80, notes=COMPILED[kind])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler reads them
@pytest.mark.parametrize("kind", COMPILED)
def test_a_flipped_bit_in_a_compiled_model_is_named(kind: str) -> None:
    prefix = "_orig_mod." if kind.startswith("compile ") else ""
    faulty(Training(kind), flip(prefix))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_features_that_die_beside_a_compiled_block_are_named() -> None:
    faulty(Training("a compiled block"), DEAD)
