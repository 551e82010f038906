"""Held-out loss: the one number that says whether training helped."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks
from edgefed.training.steps import batch_loss


@torch.no_grad()
def evaluate_loss(
    module: torch.nn.Module,
    blocks: TokenBlocks,
    batch_size: int,
    *,
    chunked: bool = False,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Mean cross-entropy per predicted token, in nats; the mean is over tokens, not over batches.

    Returns NaN when there is no block. The module's training flag is left as it was. ``chunked``: see `chunked_loss`;
    neither it nor the batch size changes the result, both change the memory that it takes.
    """
    was_training = module.training
    module.eval()
    total, tokens = 0.0, 0
    try:
        for input_ids, labels in blocks.batches(batch_size):
            # transformers averages over the predicted tokens of the batch: the labels but the first, shifted.
            predicted = int((labels[:, 1:] != IGNORED_LABEL).sum())
            if predicted:
                total += batch_loss(module, input_ids, labels, chunked=chunked).item() * predicted
            tokens += predicted
            on_batch(input_ids.numel())
    finally:
        module.train(was_training)
    return total / tokens if tokens else math.nan
