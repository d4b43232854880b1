"""Four small models with data they can learn, for the local detector's benchmark."""

from __future__ import annotations

import math
import random
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from torch import nn
from torch.nn import functional

__all__ = ["ARCHITECTURES", "Gpt", "Trainee", "trainee"]

_CLASSES = 10
_VOCABULARY = 48
_SENTENCES = 12  # in a batch of the GPTs
_RATES = (1.0, 2.0, 0.5)


class Trainee(NamedTuple):
    """A model in training, and the places where faults can be put."""

    model: Any
    optimizer: Any
    scheduler: Any
    batch: Callable[[], Tuple[torch.Tensor, torch.Tensor]]
    before_activation: Any  # its bias moves what the activation gets
    hidden: Any  # a layer with weights whose output is activated
    after_activation: Any  # the layer that takes the activated values
    starved: Any  # a layer whose gradient can vanish
    query: List[Any]  # layers whose first third of outputs are queries
    chance: random.Random  # how strong a fault is

    def loss(self, given: torch.Tensor, wanted: torch.Tensor) -> Any:
        """Cross entropy, over all tokens where there are tokens."""
        logits = self.model(given)
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1))


class Convolutions(nn.Module):
    """Three convolutions with batch normalisation; its ReLUs are no modules."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 16, 32, 32)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[each], channels[each + 1], 3, padding=1) for each in range(3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(each) for each in channels[1:])
        self.head = nn.Linear(32, _CLASSES)

    def forward(self, images: torch.Tensor) -> Any:
        """Logits of (batch, 3, height, width)."""
        for convolution, norm in zip(self.convolutions, self.norms):
            images = functional.relu(norm(convolution(images)))
        return self.head(images.mean((2, 3)))


class Block(nn.Module):
    """A block of a GPT, with explicit or fused attention."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, stream: torch.Tensor) -> Any:
        """The residual stream, (batch, tokens, width)."""
        batch, tokens, width = stream.shape
        together = self.query_key_value(self.norm_1(stream))
        query, key, value = together.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            mixed = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
        stream = stream + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return stream + self.down(functional.gelu(self.up(self.norm_2(stream))))


class Gpt(nn.Module):
    """A causal language model over a few tokens."""

    def __init__(
        self, *, fused: bool, width: int = 64, layers: int = 3, heads: int = 4, length: int = 32
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, fused=fused) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> Any:
        """Logits of (batch, tokens)."""
        stream = self.tokens(tokens) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def trainee(architecture: str, seed: int, steps: int) -> Trainee:
    """A fresh one: AdamW, linear warm-up over a tenth of ``steps``, cosine decay to a tenth.

    ``seed`` draws the weights, the data, the learning rate (0.5, 1 or 2 times the usual one) and
    the layers where faults are put.
    """
    _seed(seed)
    return ARCHITECTURES[architecture](seed, steps)


def _mlp(seed: int, steps: int) -> Trainee:
    layers: List[nn.Module] = []
    for inputs in (32, 96, 96):
        layers.extend((nn.Linear(inputs, 96), nn.ReLU()))
    model = nn.Sequential(*layers, nn.Linear(96, _CLASSES))
    teacher = torch.randn(32, _CLASSES, generator=_dice(seed))
    dice = _dice(seed + 1)

    def batch() -> Tuple[torch.Tensor, torch.Tensor]:
        given = torch.randn(64, 32, generator=dice)
        return given, (given @ teacher).argmax(1)

    at = 2 * (seed % 3)
    places = (model[at], model[at], model[at + 2], model[2 if seed % 2 else 0])
    return _ready(model, (2e-3, seed), steps, batch, places, [])


def _cnn(seed: int, steps: int) -> Trainee:
    model = Convolutions()
    patterns = torch.randn(_CLASSES, 3, 8, 8, generator=_dice(seed))
    dice = _dice(seed + 1)

    def batch() -> Tuple[torch.Tensor, torch.Tensor]:
        wanted = torch.randint(0, _CLASSES, (32,), generator=dice)
        return patterns[wanted] + 1.5 * torch.randn(32, 3, 8, 8, generator=dice), wanted

    at = seed % 2
    hidden, behind = model.convolutions[at], model.convolutions[at + 1]
    places = (model.norms[at], hidden, behind, model.convolutions[seed // 2 % 2])
    return _ready(model, (2e-3, seed), steps, batch, places, [])


def _gpt(seed: int, steps: int, *, fused: bool) -> Trainee:
    model: Any = Gpt(fused=fused, width=48)
    follows = torch.randint(0, _VOCABULARY, (_VOCABULARY, 3), generator=_dice(seed))
    dice = _dice(seed + 1)

    def batch() -> Tuple[torch.Tensor, torch.Tensor]:
        tokens = [torch.randint(0, _VOCABULARY, (_SENTENCES,), generator=dice)]
        for _ in range(32):
            which = torch.randint(0, 3, (_SENTENCES,), generator=dice)
            tokens.append(follows[tokens[-1], which])
        together = torch.stack(tokens, 1)
        return together[:, :-1], together[:, 1:]

    block, starved = model.blocks[seed % 3], model.blocks[(seed + 1) % 3]
    places = (block.up, block.up, block.down, starved.up)
    order = [(seed + each) % 3 for each in range(3)]
    queries = [model.blocks[each].query_key_value for each in order]
    return _ready(model, (1e-3, seed), steps, batch, places, queries)


def _ready(
    model: nn.Module,
    rate_and_seed: Tuple[float, int],
    steps: int,
    batch: Callable[[], Tuple[torch.Tensor, torch.Tensor]],
    places: Tuple[Any, Any, Any, Any],
    queries: List[Any],
) -> Trainee:
    usual_rate, seed = rate_and_seed
    rate = usual_rate * _RATES[seed % len(_RATES)]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Trainee(model, optimizer, scheduler, batch, *places, queries, random.Random(seed))


def _seed(seed: int) -> None:
    everything: Any = torch
    everything.manual_seed(seed)


def _dice(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ARCHITECTURES: Dict[str, Callable[[int, int], Trainee]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "gpt explicit": lambda seed, steps: _gpt(seed, steps, fused=False),
    "gpt fused": lambda seed, steps: _gpt(seed, steps, fused=True),
}
