"""Measure how much attention each token receives, in any model that uses transformers' attention registry.

While a capture is open, the model's own eager attention runs on chunks of queries, so the full (B, heads, S, S)
tensor never exists, and the columns of the attention matrix are summed chunk by chunk. The result includes whatever
that function does: grouped keys, sliding windows, soft caps, sinks, latent attention. Over the queries q that can see
token j,

    received[j] = mean over q of ( mean over heads of A[head, q, j] )

Padding (a two-dimensional ``attention_mask`` given to the model) is excluded as a query and receives 0.

An expert layer uses the attention of its own decoder layer. If that layer mixes tokens without an attention matrix
(Mamba, linear attention, convolution, experts only), it uses the last attention before it. If there is none, every
token counts as 1.0. `AttentionCapture.notes` reports both cases.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import eager_mask

from edgefed.errors import UnsupportedArchitecture

IMPLEMENTATION = "edgefed_attention_received"
_ATTRIBUTE = "edgefed_attention"
PIECE_BYTES = 8 * 1024 * 1024
"""Size of the float32 attention weights of one chunk."""
PIECE_COPIES = 4
"""Softmax and its casts need about this many copies of a chunk."""

EagerAttention = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""transformers' eager attention of a model: output (B, Q, heads, d) and weights (B, heads, Q, K)."""


class AttentionCapture:
    """Context manager that measures the attention that tokens receive in forward passes of ``module``.

    Several threads may run passes at the same time. Slower than the model's own attention implementation; results
    differ from it by rounding.
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
            setattr(owner, _ATTRIBUTE, self)
        before = [(config, config._attn_implementation) for config in _configs(self._module)]
        for config, _ in before:
            config._attn_implementation = IMPLEMENTATION
        # A caller may run the decoder without the head.
        hook = self._module.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._restore = [hook.remove, lambda: _set_implementations(before)]
        return self

    def __exit__(self, *error: object) -> None:
        for restore in self._restore:
            restore()
        for owner in self._module.modules():
            delattr(owner, _ATTRIBUTE)

    def of(self, experts_path: str, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Return the attention (T,) that the tokens of the current pass receive at an expert layer, at least float32.

        Raises UnsupportedArchitecture if the last attention had a different number of tokens.
        """
        received: torch.Tensor | None = getattr(self._pass, "received", None)
        if received is None:
            self._uniform.add(experts_path)
            return torch.ones(num_tokens, device=device)
        if received.numel() != num_tokens:
            raise UnsupportedArchitecture(
                f"cannot measure the attention of the tokens of {experts_path!r}: it has {num_tokens} tokens, but the "
                f"attention before it ({self._pass.path!r}) had {received.numel()}",
                remedy="Profile without attention.",
            )
        layer = _decoder_layer(experts_path)
        if layer and not f"{self._pass.path}.".startswith(layer):
            self._borrowed[experts_path] = self._pass.path
        return received.reshape(-1).to(device)

    @property
    def notes(self) -> list[str]:
        """Messages about expert layers that did not use the attention of their own decoder layer."""
        notes = []
        if self._uniform:
            notes.append(f"no attention matrix before {_some(self._uniform)}: all tokens count equally")
        if self._borrowed:
            where = self._borrowed[min(self._borrowed)]
            notes.append(
                f"no attention matrix in the decoder layer of {_some(self._borrowed)}: "
                f"using the last one before it ({where})"
            )
        return notes

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._pass.received = self._pass.path = None
        self._pass.real = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None  # (B, S)

    def run(
        self,
        module: nn.Module,
        eager: EagerAttention,
        query: torch.Tensor,  # (B, heads, Q, d)
        key: torch.Tensor,  # (B, key heads, K, d)
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run ``eager`` in chunks and return its output (B, Q, heads, d). Stores what the keys receive."""
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
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run the attention function that transformers calls."""
    capture: AttentionCapture = getattr(module, _ATTRIBUTE)
    return capture.run(module, _eager_of(module), query, key, value, attention_mask, **kwargs), None


def _eager_of(module: nn.Module) -> EagerAttention:
    """Return the eager attention defined in the module's own file, as transformers does by default."""
    for kind in type(module).__mro__:
        found: EagerAttention | None = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise UnsupportedArchitecture(
        f"cannot measure the attention of {type(module).__name__}: its file has no eager_attention_forward",
        remedy="Profile without attention.",
    )


def _configs(module: nn.Module) -> list[PretrainedConfig]:
    """Return every configuration that a module of the model reads, the model's own first."""
    found: dict[int, PretrainedConfig] = {}
    for owner in module.modules():
        config = getattr(owner, "config", None)
        if isinstance(config, PretrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())


def _set_implementations(before: list[tuple[PretrainedConfig, str | None]]) -> None:
    for config, implementation in before:  # setting it on a configuration also sets its nested ones, which come later
        config._attn_implementation = implementation


def _pieces(batch: int, heads: int, queries: int, keys: int) -> Iterator[tuple[slice, int, int]]:
    """Yield (rows, first query, end) such that a chunk's float32 weights take at most `PIECE_BYTES`, or one query."""
    per_query = 4 * heads * max(keys, 1)
    rows = min(batch, max(1, PIECE_BYTES // (per_query * max(queries, 1))))
    length = queries if rows > 1 else max(1, PIECE_BYTES // per_query)
    for first in range(0, batch, rows):
        for start in range(0, queries, length):
            yield slice(first, min(batch, first + rows)), start, min(queries, start + length)


def _part(value: Any, part: tuple[slice, slice], batch: int, queries: int, keys: int) -> Any:
    """Return the rows and queries of a tensor over (query, key) pairs; any other value unchanged."""
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or value.shape[-2:] != (queries, keys):
        return value
    value = value[..., part[1], :]
    return value[part[0]] if value.ndim == 4 and value.shape[0] == batch else value


def _visible(mask: torch.Tensor | None, looks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Count the queries of ``looks`` (b, q) that can see each key, (b, K); the mean over heads where they differ."""
    rows, _, _, keys = shape
    if mask is None:
        return looks.sum(dim=1, keepdim=True).expand(rows, keys).float()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[..., :keys].float().mean(dim=1).expand(rows, -1, keys)  # (b, q, K)
    return torch.einsum("bqk,bq->bk", seen, looks.float())


def _some(paths: Collection[str]) -> str:
    return min(paths) if len(paths) == 1 else f"each of {len(paths)} expert layers (first: {min(paths)})"


def _decoder_layer(path: str) -> str:
    """Return ``model.layers.3.`` for ``model.layers.3.mlp.experts``; empty if no part of the path is a number."""
    found = re.match(r"(?:.*?\.)??\d+\.", path)
    return found.group() if found else ""
