"""The language model's loss without its logits: the output embedding is applied to few tokens at a time.

    loss = 1/n * sum_i CE(head(h_i), y_i),     i over the n positions with a label, y_i the next token

transformers computes logits (T, V) for all tokens at once and in float32: for a vocabulary of 150 000 they are the
largest tensor of a training step. Here `CHUNK_TOKENS` rows exist at a time; backward computes them again. Positions
without a label are not computed at all.

head is what the model's own forward does behind its decoder: output embedding, logit scaling, soft-capping. It is not
rebuilt here: the model's forward runs with its decoder replaced by one that returns the chunk. A model whose own loss
has more terms (a router's balancing loss) is found by `chunking_problem`, which compares the two numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from edgefed.costs.step_setup import CHUNK_TOKENS
from edgefed.training.encoding import IGNORED_LABEL

_PROBE_TOKENS = 48
_SAME = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Largest relative difference of the two losses; 2e-3 in other dtypes. The loss itself is float32 in transformers."""


def chunked_loss(
    module: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, num_items: int | None = None
) -> torch.Tensor:
    """The loss of ``module`` (a transformers causal language model) on (B, S) ids and labels, as a scalar.

    ``labels`` are not shifted; -100 is ignored. The sum over labels is divided by ``num_items``, by default the number
    of labels that a token stands before. Same value and gradients as the model's own loss where `chunking_problem`
    returns nothing. Zero (with a graph) without any label.
    """
    output = module.base_model(input_ids=input_ids, use_cache=False)
    hidden = output.last_hidden_state  # (B, S, H)
    shell = dataclasses.replace(output, last_hidden_state=None)  # some models' heads pass other fields on
    targets = labels[:, 1:].to(hidden.device)  # (B, S - 1)
    learned = targets != IGNORED_LABEL
    states, targets = hidden[:, :-1][learned], targets[learned]  # (n, H), (n,)
    if not len(targets):
        return hidden.sum() * 0.0
    total = hidden.new_zeros((), dtype=torch.float32)
    # split gives one backward node for all chunks; slicing would make a gradient of full size per chunk.
    for chunk, wanted in zip(states.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(
                _chunk_loss, module, shell, chunk, wanted, use_reentrant=False, preserve_rng_state=False
            )
        else:
            total = total + _chunk_loss(module, shell, chunk, wanted)
    return total / (num_items or len(targets))


def _chunk_loss(module: nn.Module, shell: ModelOutput, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of (n, H) states against (n,) tokens; float32 like transformers."""
    with _decoder_returning(module, dataclasses.replace(shell, last_hidden_state=states.unsqueeze(0))):
        logits = module(inputs_embeds=states.unsqueeze(0), use_cache=False).logits
    return F.cross_entropy(logits.squeeze(0).float(), targets, reduction="sum")


@contextlib.contextmanager
def _decoder_returning(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Within it the model's decoder does nothing and returns ``output``."""
    decoder = module.base_model

    def forward(*args: object, **kwargs: object) -> ModelOutput:
        return output

    decoder.forward = forward  # hides the class's own
    try:
        yield
    finally:
        del decoder.forward


def structural_problem(module: nn.Module) -> str:
    """Why the loss cannot be taken apart, as far as the model's structure and configuration tell; empty if it can."""
    if module.base_model is module:
        return "its decoder cannot be told from its output embedding"
    config = module.config.get_text_config()
    if getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0):
        return "it adds a balancing loss of its routers (router_aux_loss_coef)"
    return ""


def chunking_problem(module: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> str:
    """Why the chunked loss may not be used with this model; empty when it gives the model's own loss.

    Compares the two on at most 48 tokens in the mode that the module is in (same random numbers for both), without
    gradients. Changes nothing but counters of tokens served.
    """
    if problem := structural_problem(module):
        return problem
    ids, wanted = input_ids[:1, :_PROBE_TOKENS], labels[:1, :_PROBE_TOKENS]
    if not bool((wanted[:, 1:] != IGNORED_LABEL).any()):
        wanted = ids
    try:
        with torch.no_grad():
            own, ours = (
                float(_with_seed(compute))
                for compute in (
                    lambda: module(input_ids=ids, labels=wanted, use_cache=False).loss,
                    lambda: chunked_loss(module, ids, wanted),
                )
            )
    except (AttributeError, TypeError, ValueError) as error:
        return f"its forward cannot be split: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    limit = _SAME.get(next(module.parameters()).dtype, 2e-3)
    if not abs(own - ours) <= limit * max(abs(own), 1e-3):
        return f"its own loss is {own:.6g}, cross entropy alone is {ours:.6g}: it has terms beside it"
    return ""


def _with_seed(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return compute()
