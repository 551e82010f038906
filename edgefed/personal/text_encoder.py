"""The small transformer that text clients share: token ids -> one vector per token.

    h   = E[x]                                  (vocab, 256)
    h   = h + Attention(LayerNorm(h))           2 layers, 4 heads of 64, rotary positions: no length is too long
    h   = h + W2 GELU(W1 LayerNorm(h))          hidden width 1024
    out = LayerNorm(h)

Parameters: 1,577,984, and 256 per token of the vocabulary (2,048 tokens: 2,102,272; 50,304 tokens: 14,455,808). All of
them travel: a run does well with a small tokenizer.

For classification every token sees the whole text; for next-token prediction, with the same weights, only what comes
before it. So clients of both tasks can share a run, though theta then has to do both.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROTARY_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """``hidden``: width between the two maps of a layer."""

    width: int = 256
    layers: int = 2
    heads: int = 4
    hidden: int = 1024


TEXT_SMALL = EncoderShape()


class TextEncoder(nn.Module):
    """ids (B, T) and mask (B, T), 1 on real tokens, of which each row has one at least -> (B, T, width).

    ``causal``: a token sees itself and the real ones before it, so padding must come last; otherwise all real ones.
    What is given for padding is meaningless.
    """

    def __init__(self, vocab_size: int, shape: EncoderShape = TEXT_SMALL):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self._head_size = shape.width // shape.heads

    def forward(self, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
        hidden = self.embedding(ids)
        seen = mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        if causal:
            seen = seen & seen.new_ones(ids.shape[1], ids.shape[1]).tril()  # (B, 1, T, T)
        turn = _rotation(ids.shape[1], self._head_size, hidden)
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
        mixed = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, attn_mask=seen)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(self.hidden_norm(hidden))))


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: vectors (B, T, width), mask (B, T), 1 where real, at least one in a row -> (B, width)."""
    kept = mask.to(vectors.dtype).unsqueeze(-1)
    return (vectors * kept).sum(1) / kept.sum(1)


def running_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens up to each token, (B, T, width); the last real token's is `masked_mean`."""
    kept = mask.to(vectors.dtype).unsqueeze(-1)
    return (vectors * kept).cumsum(1) / kept.cumsum(1)


def _rotation(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions (Su et al., arXiv 2104.09864), (T, size / 2) each."""
    rates = _ROTARY_BASE ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
