"""How much attention each token receives, in any model that takes its attention function from transformers' registry.

While a capture is open, the model's own eager attention runs in pieces of queries, so that no (B, heads, S, S) tensor
is ever whole in memory, and the columns of its matrix are summed on the way. Whatever that function does (grouped keys,
sliding windows, soft caps, sinks, latent attention) is in the result. For the queries q that can see token j

    received[j] = mean over q of ( mean over heads of A[head, q, j] )

Padding (a two-dimensional ``attention_mask`` given to the model) neither looks nor is seen: it receives 0.

An expert layer takes the attention of its own decoder layer. Where that layer mixes tokens without an attention matrix
(Mamba, linear attention, convolutions, a block of experts alone) it takes that of the last attention before it, and
where there is none, every token counts alike (1.0): `AttentionCapture.notes` says so.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from edgefed.errors import UnsupportedArchitecture

IMPLEMENTATION = "edgefed_attention_received"
PIECE_BYTES = 8 * 1024 * 1024
"""Attention weights in float32 that exist at a time; softmax and its casts take about `PIECE_COPIES` of them."""
PIECE_COPIES = 4


class AttentionCapture:
    """Context manager: the attention that tokens receive in the forward passes of ``module`` within it.

    Passes may run in several threads, each its own. Slower than the model's attention; changes its results by rounding.
    """

    def __init__(self, module: PreTrainedModel):
        self._module = module
        self._pass = threading.local()
        self._paths = {id(owner): path for path, owner in module.named_modules()}
        self._restore: list[Callable[[], object]] = []
        self._borrowed: dict[str, str] = {}
        self._uniform: set[str] = set()

    def __enter__(self) -> AttentionCapture:
        AttentionInterface.register(IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
        for owner in self._module.modules():
            owner.edgefed_attention = self
        before = [(config, config._attn_implementation) for config in _configs(self._module)]
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        # A pass may go through the decoder alone, without the head.
        hook = self._module.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._restore = [hook.remove, lambda: _set_implementations(before)]
        return self

    def __exit__(self, *error: object) -> None:
        for restore in self._restore:
            restore()
        for owner in self._module.modules():
            del owner.edgefed_attention

    def of(self, experts_path: str, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Attention (T,), at least float32, that the tokens of the pass that runs now receive where these experts are.

        Raises UnsupportedArchitecture when the last attention saw other tokens.
        """
        received = getattr(self._pass, "received", None)
        if received is None:
            self._uniform.add(experts_path)
            return torch.ones(num_tokens, device=device)
        if received.numel() != num_tokens:
            raise UnsupportedArchitecture(
                f"{experts_path!r} has {num_tokens} tokens, the attention before it ({self._pass.path!r}) had "
                f"{received.numel()}: the attention that its tokens receive cannot be told",
                remedy="Profile without attention.",
            )
        layer = _decoder_layer(experts_path)
        if layer and not f"{self._pass.path}.".startswith(layer):
            self._borrowed[experts_path] = self._pass.path
        return received.reshape(-1).to(device)

    @property
    def notes(self) -> list[str]:
        """What was not the attention of an expert layer's own decoder layer, in words; empty where all of it was."""
        notes = []
        if self._uniform:
            notes.append(f"{_some(self._uniform)} no attention matrix before it: its tokens count alike")
        if self._borrowed:
            where = self._borrowed[min(self._borrowed)]
            notes.append(f"{_some(self._borrowed)} none in its own decoder layer: it takes the last before ({where})")
        return notes

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        self._pass.received = self._pass.path = None
        self._pass.real = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None  # (B, S)

    def run(
        self,
        module: nn.Module,
        eager: Callable,
        query: torch.Tensor,  # (B, heads, Q, d)
        key: torch.Tensor,  # (B, key heads, K, d)
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: object,
    ) -> torch.Tensor:
        """``eager`` in pieces: its output (B, Q, heads, d). Keeps what the keys receive."""
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        real = getattr(self._pass, "real", None)
        if real is None or real.shape != (batch, queries):
            real = torch.ones(batch, queries, dtype=torch.bool, device=query.device)
        sums = torch.zeros(batch, keys, device=query.device)
        visible = torch.zeros(batch, keys, device=query.device)
        outputs = []
        for row, start, end in _pieces(batch, heads, queries, keys):
            part = slice(row.start, row.stop), slice(start, end)
            mask = _part(attention_mask, part, batch, queries, keys)
            pairwise = {name: _part(option, part, batch, queries, keys) for name, option in kwargs.items()}
            output, weights = eager(
                module, query[part[0], :, part[1]], key[part[0]], value[part[0]], mask, **pairwise
            )  # (b, q, heads, d), (b, heads, q, K)
            looks = real[part].to(weights.device)  # (b, q)
            sums[part[0]] += torch.einsum("bqk,bq->bk", weights.mean(dim=1, dtype=torch.float32), looks.float())
            visible[part[0]] += _visible(mask, looks, weights.shape)
            outputs.append((start, output))
        if queries == keys:
            received = sums / visible.clamp_min(1)
            self._pass.received = torch.where(real, received, 0.0)
            self._pass.path = self._paths.get(id(module), type(module).__name__)
        rows: list[list[torch.Tensor]] = []
        for start, output in outputs:
            if start == 0:
                rows.append([])
            rows[-1].append(output)
        return torch.cat([torch.cat(row, dim=1) for row in rows])


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs: object
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls."""
    eager = _eager_of(module)
    output = module.edgefed_attention.run(module, eager, query, key, value, attention_mask, **kwargs)
    return output, None


def _eager_of(module: nn.Module) -> Callable:
    """The eager attention of a module's own file, which transformers would call by default."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise UnsupportedArchitecture(
        f"no eager attention is written beside {type(module).__name__}: what its tokens receive cannot be told",
        remedy="Profile without attention.",
    )


def _configs(module: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that a part of the model reads, the whole model's first."""
    found: dict[int, PretrainedConfig] = {}
    for owner in module.modules():
        config = getattr(owner, "config", None)
        if isinstance(config, PretrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


def _set_implementations(before: list[tuple[PretrainedConfig, str | None]]) -> None:
    for config, implementation in before:  # a configuration passes it on to those within it, which come later
        config._attn_implementation = implementation


def _pieces(batch: int, heads: int, queries: int, keys: int) -> Iterator[tuple[slice, int, int]]:
    """(rows, first query, end) so that the weights of a piece, float32, take at most `PIECE_BYTES` or one query."""
    per_query = 4 * heads * max(keys, 1)
    rows = min(batch, max(1, PIECE_BYTES // (per_query * max(queries, 1))))
    length = queries if rows > 1 else max(1, PIECE_BYTES // per_query)
    for first in range(0, batch, rows):
        for start in range(0, queries, length):
            yield slice(first, min(batch, first + rows)), start, min(queries, start + length)


def _part(value: object, part: tuple[slice, slice], batch: int, queries: int, keys: int) -> object:
    """The rows and queries of a tensor over (query, key) pairs; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or value.shape[-2:] != (queries, keys):
        return value
    value = value[..., part[1], :]
    return value[part[0]] if value.ndim == 4 and value.shape[0] == batch else value


def _visible(mask: torch.Tensor | None, looks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """How many queries that look (b, q) can see each key, (b, K); the mean over heads where these differ."""
    rows, _, _, keys = shape
    if mask is None:
        return looks.sum(dim=1, keepdim=True).expand(rows, keys).float()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[..., :keys].float().mean(dim=1).expand(rows, -1, keys)  # (b, q, K)
    return torch.einsum("bqk,bq->bk", seen, looks.float())


def _some(paths: Collection[str]) -> str:
    return f"{min(paths)} has" if len(paths) == 1 else f"each of {len(paths)} expert layers, {min(paths)} first, has"


def _decoder_layer(path: str) -> str:
    """``model.layers.3.`` of ``model.layers.3.mlp.experts``; empty where no part of the path is a number."""
    found = re.match(r"(?:.*?\.)??\d+\.", path)
    return found.group() if found else ""
