"""The shared extractors G(theta): small, the same for every client, and known by name.

The aggregator and the clients build an extractor from its name and a seed, for text also from the size of the run's
vocabulary; only its tensors are exchanged. "cnn1" to "cnn5" are the features of the paper's CNNs. "text-small" is a
small transformer, token ids -> one vector per token:

    h   = E[x]                                  (vocab, 256)
    h   = h + Attention(LayerNorm(h))           2 layers, 4 heads of 64, rotary positions: any length is possible
    h   = h + W2 GELU(W1 LayerNorm(h))          hidden width 1024
    out = LayerNorm(h)

It has 1,577,984 parameters, and 256 per token of the vocabulary (2,048 tokens: 2,102,272; 50,304 tokens: 14,455,808).
All of them are exchanged, so a small tokenizer suits a run. For classification every token attends to the whole text,
for next-token prediction to the tokens before it; the weights are the same, so clients of both tasks can share a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.methods.fedmoe import IMAGES, TEXT, extractor_task
from edgefed.personal.networks import CNNS, IMAGE_SHAPE, cnn_features, masked_mean, running_mean

_ROTARY_BASE = 10000.0


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """Sizes of a `TextEncoder`."""

    width: int = 256
    layers: int = 2
    heads: int = 4
    hidden: int = 1024
    """Hidden width of a layer's feed-forward block."""


TEXT_SMALL = EncoderShape()


class TextEncoder(nn.Module):
    """Token ids (B, T) and a mask (B, T), 1 for real tokens and at least one per row -> (B, T, width)."""

    def __init__(self, vocab_size: int, shape: EncoderShape = TEXT_SMALL):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self._head_size = shape.width // shape.heads

    def forward(self, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
        """Vectors of all tokens; those of padding have no meaning.

        ``causal``: a token attends to itself and the real tokens before it, so padding must come last; otherwise to all
        real tokens.
        """
        hidden = self.embedding(ids)
        visible = mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        if causal:
            visible = visible & visible.new_ones(ids.shape[1], ids.shape[1]).tril()  # (B, 1, T, T)
        rotation = _rotation(ids.shape[1], self._head_size, hidden)
        for layer in self.layers:
            hidden = layer(hidden, visible, rotation)
        normed: Tensor = self.norm(hidden)
        return normed


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

    def forward(self, hidden: Tensor, visible: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, width / heads) each
        mixed = F.scaled_dot_product_attention(_rotated(q, rotation), _rotated(k, rotation), v, attn_mask=visible)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        output: Tensor = hidden + self.down(F.gelu(self.up(self.hidden_norm(hidden))))
        return output


def _rotation(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions (Su et al., arXiv 2104.09864), (T, size / 2) each."""
    rates = _ROTARY_BASE ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


EXTRACTOR_UNIT = "extractor"
"""Key of the unit that holds theta."""


class SharedExtractor(nn.Module):
    """inputs -> features (B, width), or (B, T, width) with one output per token."""

    task: str
    """"images" or "text"."""
    width: int
    """Number of features."""
    gate_in: int
    """Number of inputs of the gate."""

    def gate_features(self, inputs: Any) -> Tensor:
        """Inputs of the gate, (B, gate_in) or (B, T, gate_in)."""
        raise NotImplementedError


class CnnExtractor(SharedExtractor):
    """The features of one of the paper's CNNs, for 32x32 RGB images; 665,048 parameters for cnn5."""

    task = IMAGES

    def __init__(self, name: str):
        super().__init__()
        shape = CNNS[name]
        self.features = cnn_features(shape)
        self.width = shape.hidden[1]
        channels, height, width = IMAGE_SHAPE
        self.gate_in = channels * height * width

    def forward(self, inputs: Tensor) -> Tensor:
        """Features (B, width) of images (B, C, H, W)."""
        features: Tensor = self.features(inputs)
        return features

    def gate_features(self, inputs: Tensor) -> Tensor:
        """The pixels."""
        return inputs.flatten(1)


class TextExtractor(SharedExtractor):
    """`TextEncoder` over the run's tokens; inputs {"input_ids", "attention_mask"}, (B, T) each with padding last.

    With ``per_token`` (next-token prediction) there is one vector per token; it and its gate features do not depend on
    later tokens. Otherwise (classification) the output is the mean over the text.
    """

    task = TEXT

    def __init__(self, vocab_size: int, per_token: bool = False, shape: EncoderShape = TEXT_SMALL):
        super().__init__()
        self.encoder = TextEncoder(vocab_size, shape)
        self.per_token = per_token
        self.width = self.gate_in = shape.width

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of a text, or of each of its tokens."""
        mask = inputs["attention_mask"]
        hidden = self.encoder(inputs["input_ids"], mask, causal=self.per_token)
        return hidden if self.per_token else masked_mean(hidden, mask)

    def gate_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Mean of the token embeddings (per token: up to it), detached so that the gate does not train theta."""
        vectors = self.encoder.embedding(inputs["input_ids"]).detach()
        return (running_mean if self.per_token else masked_mean)(vectors, inputs["attention_mask"])


def make_extractor(name: str, seed: int, *, vocab_size: int | None = None, per_token: bool = False) -> SharedExtractor:
    """Build an extractor with the initial weights of a run, which depend on the seed alone.

    Args:
        name: one of `edgefed.methods.fedmoe.EXTRACTORS`.
        seed: of the run.
        vocab_size: size of the run's vocabulary, for text.
        per_token: one output per token (`TextExtractor`); the weights are the same.

    Raises:
        ConfigError: unknown name.
        ValueError: text without ``vocab_size``.
    """
    task = extractor_task(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task == IMAGES:
            return CnnExtractor(name)
        if vocab_size is None:
            raise ValueError(f"the extractor {name} needs vocab_size")
        return TextExtractor(vocab_size, per_token)
