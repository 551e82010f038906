"""How useful it is to train an expert: Flux's utility (arXiv 2508.19078), from gradients or from forward passes alone.

    u_c(e) = |D_c^e| sqrt( mean_k ||g_k||^2 )            Oort's form; D_c^e: tokens of client c that reach expert e

g_k is the gradient of a batch's mean loss with respect to the expert, before clipping, for the batches in which a token
reached it. A trainable expert's is at hand in training. That of an expert which is held but does not train is estimated:

    n = 1/M sum_m [ (L(W + s z_m) - L(W - s z_m)) / (2 s) ]^2,    z_m ~ N(0, I) from a seed,    E[n] = ||g||^2

With M directions and P parameters the estimate's relative standard deviation is sqrt(2 / M), whatever P is: (g.z)^2 is
||g||^2 times a chi-squared number of one degree of freedom. It costs 2 M forward passes of one batch per expert and no
memory beyond a forward pass and one expert.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from edgefed.expert_records import ActivationProfile
from edgefed.moe.model import MoeModel
from edgefed.training.steps import batch_loss

STEP = 0.5
"""s of the probes, as a share of the expert's typical weight. A move of one expert sends some tokens to other experts
in the layers above, and the loss jumps there. The fewer the larger s is: a jump weighs 1 / s. Curvature, which is what
a small step would be for, cancels in the central difference up to its second order."""


@dataclasses.dataclass(frozen=True)
class ProbeOutcome:
    """``mean_squares``: (layer, expert) -> estimated squared gradient norm. ``forwards``: passes that it took."""

    mean_squares: dict[tuple[int, int], float]
    forwards: int


@torch.no_grad()
def probe_gradient_norms(
    model: MoeModel,
    experts: Sequence[tuple[int, int]],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    directions: int,
    seed: int,
    chunked: bool = False,
    on_forward: Callable[[], None] = lambda: None,
) -> ProbeOutcome:
    """Estimate ||g||^2 of resident ``experts`` (layer, expert) on one batch (B, S), by forward passes alone.

    The model stays as it is. With adapters their gradient is meant, otherwise that of the expert's own weights; an
    expert that no token of the batch reaches gets 0 without a pass.
    """
    module, found, forwards = model.module, {}, 0
    was_training = module.training
    module.eval()
    try:
        with model.record_statistics() as statistics:
            batch_loss(module, input_ids, labels, chunked=chunked)
            forwards += 1
            on_forward()
            record = statistics.take()
        for layer, expert in experts:
            if record.layers[layer].tokens_per_expert[expert] == 0:
                found[layer, expert] = 0.0
                continue
            total = 0.0
            bank = model.bank(layer)
            size = STEP * bank.typical_weight(expert) or STEP
            for direction in range(directions):
                losses = []
                for sign in (1, -1):
                    z = zlib.crc32(f"{seed}/{layer}/{expert}/{direction}".encode())
                    with bank.perturbed(expert, seed=z, size=sign * size):
                        losses.append(float(batch_loss(module, input_ids, labels, chunked=chunked)))
                    forwards += 1
                    on_forward()
                total += ((losses[0] - losses[1]) / (2 * size)) ** 2
            found[layer, expert] = total / directions
    finally:
        module.train(was_training)
    return ProbeOutcome(found, forwards)


def utilities(
    mean_squares: Mapping[tuple[int, int], float], record: ActivationProfile
) -> tuple[tuple[float | None, ...], ...]:
    """u_c(e) per layer and expert; None where no gradient is known. ``record``: of the tokens that were trained on."""
    rows = []
    for layer, statistics in enumerate(record.layers):
        tokens = statistics.tokens_per_expert
        rows.append(
            tuple(
                float(tokens[e]) * mean_squares[layer, e] ** 0.5 if (layer, e) in mean_squares else None
                for e in range(statistics.num_experts)
            )
        )
    return tuple(rows)
