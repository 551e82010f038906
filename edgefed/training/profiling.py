"""One forward pass over the data that records how the router uses every expert."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch

from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.moe.lockstep import run_in_lockstep
from edgefed.moe.model import MoeModel
from edgefed.moe.units import ExpertSource, TrainScope
from edgefed.training.encoding import TokenBlocks

Enough = Callable[[Sequence[ActivationProfile]], int]
"""Decides how many blocks a profile takes next; see `profile_blocks`."""
NUM_GROUPS = 8
"""Groups of batches whose energies of neurons are kept apart: 4 bytes each for every neuron of the model."""


@dataclasses.dataclass(frozen=True)
class ProfilePass:
    """How an activation profile is made.

    Attributes:
        residency: Experts in memory at a time: "all", "layer" or "expert" (`edgefed.moe.lockstep`).
        storage: How they are stored; None is the model's dtype.
        batch_size: Blocks of text in a batch.
        concurrent_batches: Batches that go through the layers side by side, 0 for all. With residency "layer" each
            expert is read once for all of them.
    """

    residency: str = "expert"
    storage: str | None = None
    batch_size: int = 8
    concurrent_batches: int = 1


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
    profile_pass: ProfilePass = ProfilePass(),
    *,
    scope: TrainScope | None = None,
    attention: bool = False,
    neurons: bool = False,
    enough: Enough | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> ActivationProfile:
    """Run ``blocks`` forward through the full model and return the router's statistics.

    With ``enough``, the pass may end before the last block. Each stage of it reads experts again.

    With a ``source``, experts are read from it as ``profile_pass`` says, with the adapters of ``scope``. Without, the
    model must have all its experts, and of ``profile_pass`` only the batch size counts. Router logits differ between
    passes by rounding only, unless experts are quantized.

    Args:
        model: The model.
        blocks: Text.
        source: Reads experts.
        profile_pass: What is in memory at a time.
        scope: Which adapters the experts have.
        attention: Also record the attention that tokens receive.
        neurons: Also record the energies of neurons; needs a ``source``.
        enough: Called with the profile of each block so far, at first with none; returns how many blocks to profile
            next, 0 to end. With ``neurons``, with the profiles of `NUM_GROUPS` groups of batches.
        on_batch: Called with the number of tokens done; a share of the layers where batches go side by side.
        on_message: Called with a note where attention cannot be recorded.
    """
    module = model.module
    was_training = module.training
    module.train(False)
    grouped = bool(enough and neurons)
    part_tokens = blocks.input_ids.shape[1] if enough and not neurons else 0
    if source is None:
        profile_pass = dataclasses.replace(profile_pass, concurrent_batches=1)
        experts: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        experts = model.streaming(source, scope, residency=profile_pass.residency, storage=profile_pass.storage)
    try:
        with (
            model.record_statistics(
                attention=attention, neurons=neurons, part_tokens=part_tokens, num_groups=NUM_GROUPS if grouped else 0
            ) as recorder,
            experts,
        ):
            if enough is None:
                _forward_all(model, blocks, profile_pass, on_batch)
                profile = recorder.take()
            else:
                parts: list[ActivationProfile] = []
                done = 0
                while more := min(enough(parts), len(blocks) - done):
                    rows = slice(done, done + more)
                    stage = TokenBlocks(blocks.input_ids[rows], blocks.labels[rows])
                    _forward_all(model, stage, profile_pass, on_batch)
                    parts = recorder.groups() if grouped else parts + recorder.take_parts()
                    done += more
                profile = functools.reduce(operator.add, parts)
            for note in recorder.attention.notes if recorder.attention else ():
                on_message(f"attention: {note}")
            return profile
    finally:
        module.train(was_training)


def _forward_all(
    model: MoeModel, blocks: TokenBlocks, profile_pass: ProfilePass, on_batch: Callable[[int], None]
) -> None:
    # The routers are all that counts. The head would cost more than its logits: for one row per sequence and a frozen
    # weight, torch copies that weight once per sequence.
    decoder = model.module.base_model

    def forward(input_ids: torch.Tensor) -> None:
        decoder(input_ids=input_ids.to(model.module.device), use_cache=False)

    batches = [input_ids for input_ids, _ in blocks.batches(profile_pass.batch_size)]
    concurrent = profile_pass.concurrent_batches or len(batches)
    for first in range(0, len(batches), concurrent):
        group = batches[first : first + concurrent]
        tokens = sum(input_ids.numel() for input_ids in group)
        if len(group) == 1:
            forward(group[0])
            on_batch(tokens)
            continue
        done = 0

        def count_round(number: int, tokens: int = tokens) -> None:
            nonlocal done
            share = min(tokens, tokens * number // (len(model.layers) + 1))
            on_batch(share - done)
            done = share

        passes = [functools.partial(forward, input_ids) for input_ids in group]
        run_in_lockstep(passes, model.module.device, count_round)


def activation_error(estimate: ActivationProfile, truth: ActivationProfile) -> float:
    """Mean over layers of the mean over experts with f_e > 0 of |f_hat_e - f_e| / f_e, f_e the activation frequency.

    The measure of Flux (arXiv 2508.19078). Raises ValueError when the records are of different models, or without a
    token.
    """
    errors = []
    for found, real in _pairs(estimate, truth):
        used = real.frequency > 0
        errors.append(np.mean(np.abs(found.frequency - real.frequency)[used] / real.frequency[used]))
    return float(np.mean(errors))


def top_k_agreement(estimate: ActivationProfile, truth: ActivationProfile, count: int | None = None) -> float:
    """Share of the ``count`` most used experts of a layer that are also the estimate's; mean over layers.

    None: as many as a token gets. Raises as `activation_error`.
    """
    shares = []
    for found, real in _pairs(estimate, truth):
        most = count or max(1, round(float(real.frequency.sum())))
        best = [set(np.argsort(-layer.frequency, kind="stable")[:most].tolist()) for layer in (found, real)]
        shares.append(len(best[0] & best[1]) / len(best[1]))
    return float(np.mean(shares))


def _pairs(estimate: ActivationProfile, truth: ActivationProfile) -> list[tuple[LayerProfile, LayerProfile]]:
    if estimate.experts_per_layer != truth.experts_per_layer:
        raise ValueError(f"records of layers with {estimate.experts_per_layer} and {truth.experts_per_layer} experts")
    if not truth.num_tokens:
        raise ValueError("the true record has no token")
    return list(zip(estimate.layers, truth.layers, strict=True))
