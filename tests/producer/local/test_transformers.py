"""Hugging Face's models as people train them: healthy, and with a fault of each kind put in."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List

import pytest
import torch
from tests.producer.local.watched import Fault, Watch, faulty, flip_a_bit, healthy

transformers = pytest.importorskip("transformers")

WORDS, LENGTH = 64, 24


def gpt2(**more: Any) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4, **more
        )
    )


def llama(**more: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **more,
        )
    )  # fmt: skip


def bert(**more: Any) -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64, **more,
        )
    )  # fmt: skip


def mixtral(**more: Any) -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=64, **more,
        )
    )  # fmt: skip


def t5(**more: Any) -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0, **more,
        )
    )  # fmt: skip


def vit(**more: Any) -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=16, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64, num_labels=4, **more,
        )
    )  # fmt: skip


MODELS: Dict[str, Callable[[], Any]] = {
    "gpt2 eager": lambda: gpt2(attn_implementation="eager"),
    "gpt2 sdpa": lambda: gpt2(attn_implementation="sdpa"),
    "llama eager": lambda: llama(attn_implementation="eager"),
    "llama sdpa": lambda: llama(attn_implementation="sdpa"),
    "bert eager": lambda: bert(attn_implementation="eager"),
    "bert sdpa": lambda: bert(attn_implementation="sdpa"),
    "mixtral": mixtral,
    "t5": t5,
    "vit": vit,
}
QUICK = ("gpt2 sdpa", "llama eager", "bert sdpa")


def each_of(names: Iterable[str]) -> List[Any]:
    """The names as parameters of a test; all but some are slow."""
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


CENTRES = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def loss_of(model: Any) -> Any:
    if "ViT" in type(model).__name__:
        labels = torch.randint(0, 4, (16,))
        return model(pixel_values=CENTRES[labels] + torch.randn(16, 1, 16, 16), labels=labels).loss
    # a walk over the words: the next is one of three
    walk = torch.randint(0, 3, (16, LENGTH)).cumsum(1) + torch.randint(0, WORDS, (16, 1))
    walk = walk % WORDS
    if "Masked" in type(model).__name__:
        hidden = torch.rand(walk.shape) < 0.3
        return model(walk.masked_fill(hidden, 0), labels=walk.masked_fill(~hidden, -100)).loss
    return model(walk, labels=walk).loss


def training(make: Callable[[], Any], checkpointing: str = "") -> Callable[[Watch], None]:
    def run(watch: Watch) -> None:
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
            )
        if checkpointing == "reentrant":
            model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        watch.attach(model, optimizer)
        for _ in watch.steps():
            loss = loss_of(model)
            loss.backward()
            watch.step(loss)
            optimizer.step()
            optimizer.zero_grad()

    return run


@pytest.mark.parametrize("name", each_of(MODELS))
def test_a_healthy_run_is_silent_and_unchanged(name: str) -> None:
    healthy(training(MODELS[name]), steps=100)


@pytest.mark.parametrize("checkpointing", ["reentrant", "by hooks"])
@pytest.mark.parametrize("name", each_of(["gpt2 eager", "gpt2 sdpa", "llama eager", "llama sdpa"]))
def test_so_is_one_with_gradient_checkpointing(name: str, checkpointing: str) -> None:
    healthy(training(MODELS[name], checkpointing), steps=80)


def scale(name: str, by: float) -> Callable[[Any, Any], None]:
    def act(model: Any, _optimizer: Any) -> None:
        dict(model.named_parameters())[name].mul_(by)

    return act


def sharpen(kind: str) -> Callable[[Any, Any], None]:
    """Queries and keys of one layer a hundred times as large: each looks at one key."""

    def act(model: Any, _optimizer: Any) -> None:
        for name, each in model.named_parameters():
            if kind == "gpt2" and name == "transformer.h.1.attn.c_attn.weight":
                each[:, :64].mul_(30.0)
            if (
                kind == "llama"
                and name.startswith("model.layers.1.self_attn.")
                and ("q_proj" in name or "k_proj" in name)
            ):
                each.mul_(30.0)
            if (
                kind == "bert"
                and "encoder.layer.1.attention.self" in name
                and ("query" in name or "key" in name)
            ):
                each.mul_(30.0)

    return act


PLACES = {
    "gpt2": ("transformer.h.1.attn", "transformer.h.1.mlp.c_fc"),
    "llama": ("model.layers.1.self_attn", "model.layers.1.mlp.up_proj"),
    "bert": ("bert.encoder.layer.1.attention.self", "bert.encoder.layer.1.intermediate.dense"),
}
ATTENTIVE = [name for name in MODELS if name.split()[0] in PLACES]


@pytest.mark.parametrize("name", each_of(ATTENTIVE))
def test_attention_that_collapses_is_named(name: str) -> None:
    kind = name.split()[0]
    faulty(
        training(MODELS[name]),
        Fault("attention_collapse", PLACES[kind][0], sharpen(kind), at=60),
    )


@pytest.mark.parametrize("checkpointing", ["reentrant", "by hooks"])
@pytest.mark.parametrize("name", ["gpt2 sdpa", "llama eager"])
def test_so_is_one_behind_gradient_checkpointing(name: str, checkpointing: str) -> None:
    kind = name.split()[0]
    faulty(
        training(MODELS[name], checkpointing),
        Fault("attention_collapse", PLACES[kind][0], sharpen(kind), at=60),
    )


@pytest.mark.parametrize("name", each_of(ATTENTIVE))
def test_weights_that_grow_and_bits_that_flip_are_named(name: str) -> None:
    layer = PLACES[name.split()[0]][1]
    grow = scale(f"{layer}.weight", 100.0)
    faulty(training(MODELS[name]), Fault("weight_imbalance", layer, grow, at=60))
    flip = flip_a_bit(f"{layer}.weight")
    faulty(training(MODELS[name]), Fault("hardware_integrity", layer, flip, at=60))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["", "reentrant", "by hooks"])
def test_features_that_die_are_named(checkpointing: str) -> None:
    def kill(model: Any, _optimizer: Any) -> None:
        layer = model.transformer.h[1].mlp.c_fc
        layer.weight.mul_(0.01)
        layer.bias.fill_(-30.0)

    made: Callable[[], Any] = lambda: gpt2(activation_function="relu")  # noqa: E731
    faulty(
        training(made, checkpointing),
        Fault("activation_sparsity", "transformer.h.1.mlp.act", kill, at=60),
    )
