"""One forward pass over the data that records how the router uses every expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from edgefed.errors import ModelNotFound
from edgefed.experts import RouterRecord
from edgefed.moe.model import MoeModel
from edgefed.moe.scope import TrainScope
from edgefed.moe.sources import ExpertSource
from edgefed.training.encoding import TokenBlocks


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a checkpoint; code that comes with it is never run. Raises ModelNotFound when there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as fault:
        raise ModelNotFound(
            f"no tokenizer that transformers can load in {source}: {str(fault).splitlines()[0]}",
            remedy="Put tokenizer.json and tokenizer_config.json beside the model's config.json.",
        ) from fault


def spread_blocks(blocks: TokenBlocks, max_tokens: int) -> TokenBlocks:
    """At most ``max_tokens`` tokens of whole blocks, spread evenly over the data (0: all)."""
    length = blocks.input_ids.shape[1]
    limit = len(blocks) if max_tokens <= 0 else min(len(blocks), max(1, max_tokens // length))
    picked = torch.linspace(0, len(blocks) - 1, limit).round().long()
    return TokenBlocks(blocks.input_ids[picked], blocks.labels[picked])


@torch.no_grad()
def profile_blocks(
    model: MoeModel,
    blocks: TokenBlocks,
    source: ExpertSource | None = None,
    *,
    scope: TrainScope | None = None,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> RouterRecord:
    """Run ``blocks`` forward through the full model and return the router's statistics.

    With a ``source`` the experts are read from it one at a time and dropped again, so the pass needs the memory of the
    dense part and one expert, and ``scope`` says which adapters it has. Without, the model must hold all its experts.
    """
    module = model.module
    was_training = module.training
    module.eval()
    try:
        if source is None:
            return _forward_all(model, blocks, batch_size, on_batch)
        with model.streaming(source, scope):
            return _forward_all(model, blocks, batch_size, on_batch)
    finally:
        module.train(was_training)


def _forward_all(
    model: MoeModel, blocks: TokenBlocks, batch_size: int, on_batch: Callable[[int], None]
) -> RouterRecord:
    with model.record_statistics() as statistics:
        for input_ids, _ in blocks.batches(batch_size):
            # The routers are all that counts: one row of logits, not one per token, keeps a large vocabulary small.
            model.module(input_ids=input_ids.to(model.module.device), use_cache=False, logits_to_keep=1)
            on_batch(input_ids.numel())
        return statistics.take()
