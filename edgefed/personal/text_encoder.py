"""The small transformer that text clients share: token ids -> one vector per token.

    e_t = U E[x_t]                              E (vocab, 64), U 64 -> 256: the vocabulary is most of what travels
    h   = h + Attention(LayerNorm(h))           2 layers, 4 heads of 64, rotary positions: no length is too long
    h   = h + W2 GELU(W1 LayerNorm(h))          hidden width 1024
    out = LayerNorm(h)

Parameters: 1,596,928, and 64 per token of the vocabulary (2,048 tokens: 1,728,000; 50,304 tokens: 4,816,384).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROTARY_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """``embedding``: width of a token's own vector; ``hidden``: of the two-layer networks."""

    width: int = 256
    layers: int = 2
    heads: int = 4
    hidden: int = 1024
    embedding: int = 64


class TextEncoder(nn.Module):
    """ids (B, T) and mask (B, T), 1 on real tokens, which come first -> (B, T, width).

    ``causal``: a token sees itself and those before it; otherwise all real tokens. Weights are the same for both.
    What is given for padding is meaningless.
    """

    def __init__(self, vocab_size: int, shape: EncoderShape = EncoderShape()):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.embedding)
        self.widen = nn.Linear(shape.embedding, shape.width, bias=False)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
        length = ids.shape[1]
        seen = mask.bool()[:, None, None, :]  # (B, 1, 1, T): keys
        if causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        hidden = self.widen(self.embedding(ids))
        turn = _rotation(length, hidden.shape[-1] // self.layers[0].heads, ids.device)
        for layer in self.layers:
            hidden = layer(hidden, seen, turn)
        return self.norm(hidden)


class _Layer(nn.Module):
    def __init__(self, shape: EncoderShape):
        super().__init__()
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.hidden_norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, shape.hidden)
        self.down = nn.Linear(shape.hidden, shape.width)

    def forward(self, hidden: Tensor, seen: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads) each
        mixed = F.scaled_dot_product_attention(_turned(q, *turn), _turned(k, *turn), v, attn_mask=seen)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(self.hidden_norm(hidden))))


def _rotation(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions (Su et al., arXiv 2104.09864), (T, size / 2) each."""
    rates = _ROTARY_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
