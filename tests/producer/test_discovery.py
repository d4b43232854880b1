"""What a model, a loader and an optimizer tell of themselves."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any, Iterator, List

import pytest

torch: Any = pytest.importorskip("torch")

from plarv.discovery import (  # noqa: E402
    batch_size_of,
    describe_model,
    find_optimizer,
    scheduler_of,
    total_steps_of,
    unwrap,
)

Module: Any = torch.nn.Module
IterableDataset: Any = torch.utils.data.IterableDataset


class Block(Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.mix = torch.nn.Linear(16, 16)


class Transformer(Module):  # type: ignore[misc]
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.positions = torch.nn.Embedding(12, 16)
        self.tokens = torch.nn.Embedding(50, 16)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(layers)])
        self.head = torch.nn.Linear(16, 50)


def test_a_model_is_described_from_its_config_first() -> None:
    model = Transformer()
    model.config = SimpleNamespace(
        num_hidden_layers=32, hidden_size=4096, vocab_size=32000, max_position_embeddings=2048
    )
    found = describe_model(model)
    assert found["num_layers"] == 32
    assert found["hidden_dim"] == 4096
    assert found["vocab_size"] == 32000
    assert found["sequence_length"] == 2048
    assert found["dtype"] == "float32"


def test_a_nested_text_config_and_a_dictionary_are_read() -> None:
    inner = {"n_layer": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}
    model = Transformer()
    model.config = SimpleNamespace(text_config=inner)
    found = describe_model(model)
    assert [found["num_layers"], found["hidden_dim"]] == [12, 768]


def test_without_a_config_the_modules_tell() -> None:
    model = Transformer().to(torch.bfloat16)
    assert describe_model(model) == {
        "num_layers": 3,
        "hidden_dim": 16,
        "vocab_size": 50,
        "dtype": "bfloat16",
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def test_a_plain_stack_of_linear_layers_has_as_many_layers() -> None:
    parts: List[Any] = []
    for _ in range(12):
        parts += [torch.nn.Linear(512, 512), torch.nn.ReLU()]
    found = describe_model(torch.nn.Sequential(*parts, torch.nn.Linear(512, 10)))
    assert [found["num_layers"], found["hidden_dim"]] == [13, 512]
    assert "vocab_size" not in found


def test_wrappers_are_looked_through() -> None:
    model = Transformer()
    compiled = torch.nn.Module()
    compiled._orig_mod = model
    parallel = torch.nn.Module()
    parallel.module = compiled
    assert unwrap(parallel) is model
    assert describe_model(parallel)["num_layers"] == 3


def test_a_tokenizer_adds_what_the_model_does_not_tell() -> None:
    tokenizer = SimpleNamespace(model_max_length=128, vocab_size=99)
    model = torch.nn.Linear(4, 4)
    found = describe_model(model, tokenizer)
    assert [found["sequence_length"], found["vocab_size"]] == [128, 99]
    endless = SimpleNamespace(model_max_length=int(1e30), vocab_size=99)
    assert "sequence_length" not in describe_model(model, endless)


class Hostile:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


@pytest.mark.parametrize("thing", [None, 3, "model", object(), SimpleNamespace(config=3)])
def test_what_is_no_model_tells_nothing(thing: object) -> None:
    assert describe_model(thing) == {}
    assert total_steps_of(thing) in (None, 5)
    assert batch_size_of(thing) is None


def test_objects_that_raise_at_every_touch_tell_nothing() -> None:
    assert describe_model(Hostile(), Hostile()) == {}
    assert total_steps_of(Hostile()) is None
    assert batch_size_of(Hostile()) is None


class Stream(IterableDataset):  # type: ignore[misc]
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_a_loader_tells_its_steps_and_batch_size_and_a_stream_does_not() -> None:
    loader = torch.utils.data.DataLoader(list(range(10)), batch_size=4)
    assert total_steps_of(loader) == 3
    assert total_steps_of(loader, epochs=5) == 15
    assert batch_size_of(loader) == 4
    stream = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert total_steps_of(stream) is None
    sampler = torch.utils.data.BatchSampler(range(10), 5, False)
    assert batch_size_of(torch.utils.data.DataLoader(range(10), batch_sampler=sampler)) == 5


def stepped(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_the_optimizer_is_found_when_it_steps_and_the_hook_goes() -> None:
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    before = len(hooks)
    ours, others = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    right = torch.optim.Adam(ours.parameters())
    wrong = torch.optim.SGD(others.parameters(), lr=0.1)
    search = find_optimizer(list(ours.parameters()))
    assert search is not None
    stepped(wrong)
    assert search.optimizer() is None
    stepped(right)
    assert search.optimizer() is right
    assert len(hooks) == before
    gone = weakref.ref(right)
    del right
    gc.collect()
    assert gone() is None
    assert search.optimizer() is None


def test_a_search_that_is_dropped_leaves_no_hook() -> None:
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks
    before = len(hooks)
    search = find_optimizer(list(torch.nn.Linear(2, 2).parameters()))
    assert len(hooks) == before + 1
    del search
    gc.collect()
    assert len(hooks) == before


def test_the_scheduler_of_an_optimizer_is_found_where_there_is_exactly_one() -> None:
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    assert scheduler_of(optimizer) is None
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert scheduler_of(optimizer) is scheduler
    second = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    assert scheduler_of(optimizer) is None
    del second
    gc.collect()
    assert scheduler_of(optimizer) is scheduler
    assert scheduler_of(object()) is None
