"""Small models trained on data of known quality, and what Argus records of it.

Three tasks, each made from a seed and without downloads. *mlp*: Gaussian clusters, several a class,
that overlap; Adam. *gpt*: a two-layer transformer on a second-order Markov chain; Adam, warm-up and
cosine; its labels are the next tokens. *cnn*: class patterns at random places under noise; SGD with
momentum. A sample is served as fresh data (each once), in passes over a shuffled set of fewer, or
as a list with copies whose ids differ, as a crawl gives it: then ids reveal nothing.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, Iterator, List, Literal, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from plarv_schemas.events import StepEvent

__all__ = ["TASKS", "Quality", "Serving", "trajectory"]

Serving = Literal["passes", "copies"]
_PIXELS = 12
_TOKENS = 16  # of a sequence
_VOCABULARY = 24


class Quality(NamedTuple):
    """What the data of one run is worth, each from 0 to 1."""

    unique: float = 1.0  # different samples / samples served
    right: float = 1.0  # labels that were not replaced by a random other one
    serving: Serving = "passes"


class _Task(NamedTuple):
    make: Callable[[int, torch.Generator], Tuple[Tensor, Tensor]]  # inputs and labels
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    rate: Callable[[float], float]  # of the learning rate, at a share of the run
    num_labels: int
    steps: int
    batch: int


def trajectory(
    name: str, quality: Quality, seed: int, steps: Optional[int] = None
) -> Iterator[StepEvent]:
    """The steps of one run, as `argus.step(loss, sample_...)` would have recorded them.

    A sequence gives the mean loss and the mean predicted entropy of its tokens; an image or a
    point also confidence, margin and whether it was right.
    """
    task = TASKS[name]
    num_steps = steps or task.steps
    chance = torch.Generator().manual_seed(seed)
    torch.default_generator.manual_seed(seed + 1)
    served = num_steps * task.batch
    inputs, labels = task.make(max(task.batch, round(quality.unique * served)), chance)
    labels = _damaged(labels, quality.right, task.num_labels, chance)
    order, ids = _served(len(labels), served, quality.serving, chance)
    model = task.model()
    optimizer = task.optimizer(model)
    full_rate = float(optimizer.param_groups[0]["lr"])
    for step in range(num_steps):
        at = slice(step * task.batch, (step + 1) * task.batch)
        rate = full_rate * task.rate(step / num_steps)
        optimizer.param_groups[0]["lr"] = rate
        logits: Tensor = model(inputs[order[at]])
        wanted = labels[order[at]]
        losses = functional.cross_entropy(logits.movedim(-1, 1), wanted, reduction="none")
        loss = losses.mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), math.inf))
        optimizer.step()
        yield StepEvent(
            "run", "session", step, 0, step, loss=loss.item(), grad_norm=norm, current_lr=rate,
            batch_size=task.batch, sample_ids=_listed(ids[at]),
            **_signals(logits.detach(), wanted, losses.detach()),
        )  # fmt: skip


def _signals(logits: Tensor, labels: Tensor, losses: Tensor) -> Dict[str, Any]:
    chances = functional.softmax(logits, -1)
    entropies = -(chances * chances.clamp_min(1e-30).log()).sum(-1)
    if losses.dim() > 1:
        return {
            "sample_losses": _listed(losses.mean(-1)),
            "sample_entropies": _listed(entropies.mean(-1)),
        }
    own = logits.gather(-1, labels[:, None])
    others = logits.scatter(-1, labels[:, None], -math.inf).amax(-1)
    return {
        "sample_losses": _listed(losses),
        "sample_entropies": _listed(entropies),
        "sample_confidences": _listed(chances.amax(-1)),
        "sample_margins": _listed(own[:, 0] - others),
        "sample_correct": _listed((logits.argmax(-1) == labels).int()),
    }


def _listed(values: Tensor) -> Tuple[Any, ...]:
    untyped: Any = values  # a list of what, its type does not say
    return tuple(untyped.tolist())


def _damaged(labels: Tensor, right: float, num_labels: int, chance: torch.Generator) -> Tensor:
    wrong = torch.rand(labels.shape, generator=chance) >= right
    shift = torch.randint(1, num_labels, labels.shape, generator=chance)
    return torch.where(wrong, (labels + shift) % num_labels, labels)


def _served(
    num_unique: int, served: int, serving: Serving, chance: torch.Generator
) -> Tuple[Tensor, Tensor]:
    """Which sample comes when, and the id that the loader gives it."""
    passes = -(-served // num_unique)
    if serving == "copies":
        order = torch.arange(served) % num_unique
        return order[torch.randperm(served, generator=chance)], torch.arange(served)
    shuffled: List[Tensor] = [torch.randperm(num_unique, generator=chance) for _ in range(passes)]
    order = torch.cat(shuffled)[:served]
    return order, order


# Gaussian clusters.


def _points(count: int, chance: torch.Generator) -> Tuple[Tensor, Tensor]:
    centres = torch.randn(60, 20, generator=chance)
    cluster = torch.randint(0, 60, (count,), generator=chance)
    return centres[cluster] + 0.8 * torch.randn(count, 20, generator=chance), cluster % 10


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 10)
    )


# A Markov chain of second order.


def _sequences(count: int, chance: torch.Generator) -> Tuple[Tensor, Tensor]:
    """Token t + 1 leans on t, with a preference that t - 1 shifts."""
    table = torch.softmax(2.5 * torch.randn(_VOCABULARY, 2, _VOCABULARY, generator=chance), -1)
    tokens = torch.randint(0, _VOCABULARY, (count, _TOKENS + 1), generator=chance)
    for place in range(2, _TOKENS + 1):
        odds = table[tokens[:, place - 1], tokens[:, place - 2] % 2]
        tokens[:, place] = torch.multinomial(odds, 1, generator=chance)[:, 0]
    return tokens[:, :-1], tokens[:, 1:].contiguous()


class _GPT(nn.Module):
    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.places = nn.Parameter(0.02 * torch.randn(_TOKENS, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.last = nn.LayerNorm(width)
        self.out = nn.Linear(width, _VOCABULARY)
        self.mask: Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_TOKENS))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.tokens(tokens) + self.places
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.out(self.last(hidden))
        return logits


# Patterns at random places.


def _images(count: int, chance: torch.Generator) -> Tuple[Tensor, Tensor]:
    patterns = torch.randn(8, 5, 5, generator=chance)
    labels = torch.randint(0, 8, (count,), generator=chance)
    images = 0.7 * torch.randn(count, 1, _PIXELS, _PIXELS, generator=chance)
    rows, columns = torch.randint(0, _PIXELS - 4, (2, count, 1), generator=chance)
    reach = torch.arange(5)
    which = torch.arange(count)[:, None, None]
    images[which, 0, (rows + reach)[:, :, None], (columns + reach)[:, None, :]] += patterns[labels]
    return images, labels


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * (_PIXELS // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, 8),
    )  # fmt: skip


def _adam(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=rate)

    return build


def _momentum(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)

    return build


def _constant(_done: float) -> float:
    return 1.0


def _cosine(done: float) -> float:
    return min(1.0, 20.0 * done + 0.02) * (0.55 + 0.45 * math.cos(math.pi * done))


TASKS: Dict[str, _Task] = {
    "mlp": _Task(_points, _mlp, _adam(2e-3), _constant, num_labels=10, steps=1000, batch=32),
    "gpt": _Task(_sequences, _GPT, _adam(3e-3), _cosine, _VOCABULARY, steps=500, batch=24),
    "cnn": _Task(_images, _cnn, _momentum(0.02), _constant, num_labels=8, steps=700, batch=32),
}
"""By architecture. *cnn* took no part in the making of the score."""
