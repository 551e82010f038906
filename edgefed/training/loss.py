"""The language model's loss: cross-entropy per predicted token, whole or in chunks, for training and evaluation.

    loss = 1/n * sum_i CE(head(h_i), y_i),     i over the n positions with a label, y_i the next token

It is cross-entropy alone: a model whose configuration asks for its routers' balancing loss does not add it here
(`edgefed.training.steps` does, for the resident experts).

transformers computes logits (T, V) for all tokens at once and in float32: for a vocabulary of 150,000 they are the
largest tensor of a training step. The chunked loss has `CHUNK_TOKENS` rows at a time, computes them again in the
backward pass, and skips positions without a label.

head is what the model's own forward does behind its decoder: output embedding, logit scaling, soft-capping. It is not
rebuilt here: the model's forward runs with its decoder replaced by one that returns the chunk. A model whose own loss
has other terms is found by `chunking_problem`, which compares the two numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from edgefed.costs.step_setup import CHUNK_TOKENS
from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks

_PROBE_TOKENS = 48
_SAME = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest relative difference of the two losses; 2e-3 in other dtypes. The loss itself is float32 in transformers."""


def batch_loss(
    module: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, *, chunked: bool = False
) -> torch.Tensor:
    """Return the mean cross-entropy of a batch (B, S), a scalar; see `chunked_loss` for ``chunked``."""
    input_ids, labels = input_ids.to(module.device), labels.to(module.device)
    if chunked:
        return chunked_loss(module, input_ids, labels)
    with without_router_loss(module):
        return cast(torch.Tensor, module(input_ids=input_ids, labels=labels, use_cache=False).loss)


@torch.no_grad()
def evaluate_loss(
    module: PreTrainedModel,
    blocks: TokenBlocks,
    batch_size: int,
    *,
    chunked: bool = False,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Return the mean cross-entropy per predicted token, in nats; the mean is over tokens, not over batches.

    Returns NaN for no blocks. The module's training flag is restored. Neither ``chunked`` nor the batch size changes
    the result; both change the memory that it takes.
    """
    was_training = module.training
    module.train(False)
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


def chunked_loss(
    module: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, num_items: int | None = None
) -> torch.Tensor:
    """Return the loss of a causal language model on (B, S) ids and labels, as a scalar, without its logits.

    ``labels`` are not shifted; -100 is ignored. The sum over labels is divided by ``num_items``, by default the number
    of labels that have a token before them. Same value and gradients as the model's own loss if `chunking_problem`
    returns an empty string. Zero (with a graph) without any label.
    """
    output = decoder_of(module)(input_ids=input_ids, use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state  # (B, S, H)
    shell = dataclasses.replace(output, last_hidden_state=None)  # some models' heads pass other fields on
    targets = labels[:, 1:].to(hidden.device)  # (B, S - 1)
    in_loss = targets != IGNORED_LABEL
    states, targets = hidden[:, :-1][in_loss], targets[in_loss]  # (n, H), (n,)
    if not len(targets):
        return hidden.sum() * 0.0
    total = hidden.new_zeros((), dtype=torch.float32)
    # split gives one backward node for all chunks; slicing would make a gradient of full size per chunk.
    chunks, wanted = torch.split(states, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS)
    for chunk, targets_of_chunk in zip(chunks, wanted, strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(
                _chunk_loss, module, shell, chunk, targets_of_chunk, use_reentrant=False, preserve_rng_state=False
            )
            total = total + cast(torch.Tensor, part)
        else:
            total = total + _chunk_loss(module, shell, chunk, targets_of_chunk)
    return total / (num_items or len(targets))


def _chunk_loss(module: PreTrainedModel, shell: Any, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of cross-entropies of (n, H) states against (n,) tokens, in float32 like transformers."""
    with _decoder_returning(module, dataclasses.replace(shell, last_hidden_state=states.unsqueeze(0))):
        logits = module(inputs_embeds=states.unsqueeze(0), use_cache=False).logits
    return F.cross_entropy(logits.squeeze(0).float(), targets, reduction="sum")


def decoder_of(module: PreTrainedModel) -> Any:
    """Return the decoder below the output embedding, as a callable."""
    return module.base_model


@contextlib.contextmanager
def _decoder_returning(module: PreTrainedModel, output: Any) -> Iterator[None]:
    """Within it the model's decoder does nothing and returns ``output``."""
    decoder = decoder_of(module)

    def forward(*args: object, **kwargs: object) -> Any:
        return output

    decoder.forward = forward  # hides the class's own
    try:
        with without_router_loss(module):  # the shell has no router logits to take it on
            yield
    finally:
        del decoder.forward


@contextlib.contextmanager
def without_router_loss(module: PreTrainedModel) -> Iterator[None]:
    """Within it the model adds no balancing loss of its routers, whatever its configuration asks for."""
    config = module.config.get_text_config()
    asked = getattr(config, "output_router_logits", False)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def configured_balancing(module: PreTrainedModel) -> float:
    """Return the coefficient of the balancing loss that the model's configuration asks for; 0 if it does not."""
    config = module.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def structural_problem(module: PreTrainedModel) -> str:
    """Return why the loss cannot be taken apart, as far as the model's structure shows; empty if it can."""
    if decoder_of(module) is module:
        return "its decoder cannot be separated from its output embedding"
    return ""


def chunking_problem(module: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> str:
    """Return why the chunked loss cannot be used with this model; empty if it equals the model's own cross-entropy.

    Compares the two on at most 48 tokens in the module's current mode (same random numbers for both), without
    gradients. Changes nothing but counters of tokens served.
    """
    if problem := structural_problem(module):
        return problem
    ids, wanted = input_ids[:1, :_PROBE_TOKENS].to(module.device), labels[:1, :_PROBE_TOKENS].to(module.device)
    if not bool((wanted[:, 1:] != IGNORED_LABEL).any()):
        wanted = ids
    try:
        with torch.no_grad():
            own = float(_with_seed(lambda: batch_loss(module, ids, wanted)))
            ours = float(_with_seed(lambda: chunked_loss(module, ids, wanted)))
    except (AttributeError, TypeError, ValueError) as error:
        return f"its forward cannot be split: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    limit = _SAME.get(next(module.parameters()).dtype, 2e-3)
    if not abs(own - ours) <= limit * max(abs(own), 1e-3):
        return f"its own loss is {own:.6g}, cross-entropy alone is {ours:.6g}: it has other terms"
    return ""


def _with_seed(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return compute()
