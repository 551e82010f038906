"""How useful it is to train an expert: Flux's utility (arXiv 2508.19078), from gradients or from forward passes alone.

    u_c(e) = |D_c^e| sqrt( mean_k ||g_k||^2 )            Oort's form; D_c^e: tokens of client c that reach expert e

g_k is the gradient of a batch's mean loss with respect to the expert, before clipping, for the batches in which a token
reached it. `GradientNorms` collects it for a trainable expert. For a resident expert that is frozen it is estimated:

    n = 1/M sum_m [ (L(W + s z_m) - L(W - s z_m)) / (2 s) ]^2,    z_m ~ N(0, I) from a seed

If the loss were smooth over a distance s, the mean of n would be ||g||^2, and with M directions its relative standard
deviation would be sqrt(2 / M), whatever the number of parameters: (g.z)^2 is ||g||^2 times a chi-squared number of one
degree of freedom. **With top-k routing it is not smooth**: a move of one expert sends some tokens to other experts in
the layers above. The estimate is biased upwards, 2.7 to 27 times the truth, more so for smaller steps. Use it to rank
experts against each other, not as a norm. An estimate costs 2 M forward passes of one batch per expert and no memory
beyond a forward pass and one expert.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from edgefed.expert_records import ActivationProfile
from edgefed.moe.model import MoeModel
from edgefed.training.loss import batch_loss

STEP = 0.5
"""s of the probes, as a share of the expert's typical weight. The loss jumps where tokens change experts, and a jump
weighs 1 / s in the estimate, so a large step is less biased. Curvature, the usual reason for a small step, cancels in
the central difference up to the second order."""


class GradientNorms:
    """Squared gradient norms of the trainable experts over the batches of a round. `add` follows each backward pass."""

    def __init__(self, model: MoeModel):
        self._model = model
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._batches: dict[tuple[int, int], int] = {}

    def add(self) -> None:
        """Count the gradients that are there now. No host synchronization."""
        for key, gradients in self._model.expert_gradients():
            norms = torch.stack(torch._foreach_norm(gradients))
            squared = norms.double().square().sum()
            self._sums[key] = self._sums[key] + squared if key in self._sums else squared
            self._batches[key] = self._batches.get(key, 0) + 1

    def mean_squares(self) -> dict[tuple[int, int], float]:
        """(layer, expert) -> mean squared norm over the batches in which it had a gradient."""
        return {key: float(total) / self._batches[key] for key, total in self._sums.items()}


@dataclasses.dataclass(frozen=True)
class ProbeOutcome:
    """``mean_squares``: (layer, expert) -> estimated squared gradient norm. ``forwards``: number of forward passes."""

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

    The estimates rank experts; they are not norms (see the module). With adapters, g is the gradient of the adapters,
    otherwise of the expert's own weights. An expert that no token of the batch reaches gets 0 without a pass. The model
    is left unchanged.
    """
    module, found, forwards = model.module, {}, 0
    was_training = module.training
    module.train(False)
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
    """Return u_c(e) per layer and expert, None if no gradient is known; ``record`` is of the tokens trained on."""
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
