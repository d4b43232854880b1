"""Attention is seen wherever it is computed, and its collapse is found; elsewhere it is silent."""

from __future__ import annotations

import math
from typing import Any, Callable, List

import pytest
import torch
from torch import nn
from torch.nn import functional

from plarv.local import LocalDetector

WIDTH, HEADS, TOKENS = 32, 4, 24


class Own(nn.Module):
    """Query, key and value from one layer, and the attention given."""

    def __init__(self, attend: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self.project, self.out, self.attend = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 4),
            attend,
        )

    def forward(self, given: torch.Tensor) -> Any:
        parts = self.project(given).view(*given.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(*parts).transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    """torch's own module, whose weights nobody asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, given: torch.Tensor) -> Any:
        return self.out(self.attention(given, given, given, need_weights=False)[0])


def fused(query: Any, key: Any, value: Any) -> Any:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def masked(query: Any, key: Any, value: Any) -> Any:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def explicit(query: Any, key: Any, value: Any) -> Any:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return functional.softmax(scores, dim=-1) @ value


def sharpen(model: Any) -> None:
    weight = model.attention.in_proj_weight if hasattr(model, "attention") else model.project.weight
    with torch.no_grad():
        weight[: 2 * WIDTH].mul_(60.0)


@pytest.mark.parametrize(
    "make",
    [lambda: Own(fused), lambda: Own(masked), lambda: Own(explicit), Torchs],
    ids=["fused", "masked", "explicit", "multihead"],
)
def test_attention_that_turns_to_single_tokens_is_found_within_10_steps(make: Any) -> None:
    torch.manual_seed(0)
    model: Any = make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    levels: List[str] = []
    with LocalDetector(model, optimizer) as detector:
        for step in range(50):
            if step == 40:
                assert set(levels) == {"ok"}
                assert detector._checks.attention_collapse._ledger._layers
                sharpen(model)
            loss: Any = model(torch.randn(8, TOKENS, WIDTH)).square().mean()
            loss.backward()
            levels.append(detector.step(loss=loss.item()).checks["attention_collapse"].level)
            optimizer.step()
            optimizer.zero_grad()
    assert "critical" in levels[40:]


def test_the_sampled_entropy_is_that_of_the_weights() -> None:
    torch.manual_seed(0)
    seen: List[float] = []
    model = Own(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v))
    given = torch.randn(2, TOKENS, WIDTH)
    with LocalDetector(model, torch.optim.SGD(model.parameters(), 0.1)) as detector:
        assert detector._attention is not None
        detector._attention._take = lambda _step, _name, entropy: seen.append(entropy)
        model(given)
        detector.step()
    query, key, _ = model.project(given).view(2, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)).softmax(-1)
    entropy = -(weights * weights.log()).sum(-1) / math.log(TOKENS)
    rows = list(range(TOKENS - 8, TOKENS))
    assert seen == [pytest.approx(entropy[:, :, rows].mean().item(), abs=1e-5)]


def test_a_softmax_over_classes_or_experts_is_no_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Softmax(dim=-1), nn.Linear(16, 4))
    with LocalDetector(model, torch.optim.SGD(model.parameters(), 0.1)) as detector:
        model(torch.randn(16, 8))
        assert detector.step().checks["attention_collapse"].message == "nothing seen yet"
