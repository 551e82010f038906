"""Held-out loss: the one number that says whether training helped."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks


@torch.no_grad()
def evaluate_loss(
    module: torch.nn.Module,
    blocks: TokenBlocks,
    batch_size: int,
    *,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Mean cross-entropy per predicted token, in nats; the mean is over tokens, not over batches.

    Returns NaN when there is no block. The module's training flag is left as it was.
    """
    was_training = module.training
    module.eval()
    total, tokens = 0.0, 0
    try:
        for input_ids, labels in blocks.batches(batch_size):
            # transformers averages over the predicted tokens of the batch: the labels but the first, shifted.
            predicted = int((labels[:, 1:] != IGNORED_LABEL).sum())
            total += module(input_ids=input_ids, labels=labels, use_cache=False).loss.item() * predicted
            tokens += predicted
            on_batch(input_ids.numel())
    finally:
        module.train(was_training)
    return total / tokens if tokens else math.nan
