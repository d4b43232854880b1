"""A GPT in one page: causal attention and perceptrons, one character a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SmallGPT"]


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to its input.

    Only queries and keys are normalised. LayerNorm on the residual stream would make the network
    indifferent to the size of its weights, and a learning rate far too high would do it less harm.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, context, width) in and out."""
        x = x + self._attend(x)
        hidden = functional.gelu(self.mlp_in(x))
        out: Tensor = x + self.mlp_out(hidden)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        shape = (batch, context, self.heads, width // self.heads)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.attention_in(x).split(width, dim=2)
        )
        query = functional.layer_norm(query, shape[3:])
        key = functional.layer_norm(key, shape[3:])
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, context, width))
        return out


class SmallGPT(nn.Module):
    """Token ids (batch, context) in, logits (batch, context, vocabulary) out."""

    def __init__(
        self, vocabulary: int, context: int = 32, width: int = 96, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                std = 0.1 / math.sqrt(2 * layers) if residual else 0.1
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for the next token at every place."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x: Tensor = self.token(ids) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits
