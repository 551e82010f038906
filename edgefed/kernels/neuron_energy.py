"""Neuron energy: how much each neuron of an expert adds to the output of its layer, over the tokens of a batch.

    energy[j] += sum_p (expert_weights[p] act[p, j])^2 ||down_j||^2        over the pairs p of the expert

``act`` is the expert's activation and down_j the column of the down projection that neuron j multiplies: a neuron adds
the vector ``expert_weights[p] act[p, j] down_j`` to the output of token p. `edgefed.methods.slices` chooses by it. The
experts function calls this while the activation is in memory, so nothing of size (P, I) is kept.
"""

from __future__ import annotations

import torch

from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts

ROWS = 256
"""Pairs per product, which bounds the float32 copies of activations."""


def add_neuron_energy(
    energy: torch.Tensor,
    act: torch.Tensor,
    expert_weights: torch.Tensor,
    down: torch.Tensor | QuantizedMatrix,
    *,
    is_transposed: bool,
) -> None:
    """Add the pairs of one expert to ``energy`` in place.

    Args:
        energy: (I,) float64 or float32.
        act: (P, I), what the down projection multiplies.
        expert_weights: (P,) weights of the pairs.
        down: (H, I), or (I, H) if ``is_transposed``.
        is_transposed: see ``down``.
    """
    matrix = dequantize_experts(down) if isinstance(down, QuantizedMatrix) else down.detach()
    norms = matrix.float().square().sum(dim=1 if is_transposed else 0)  # (I,)
    squares = torch.zeros_like(norms)
    for begin in range(0, act.shape[0], ROWS):
        rows = slice(begin, begin + ROWS)
        weighted = act[rows].detach().float() * expert_weights[rows].detach().float().unsqueeze(1)
        squares += weighted.square_().sum(dim=0)
    energy += (squares * norms).to(energy.dtype)
