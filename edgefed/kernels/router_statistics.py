"""Router statistics: one accumulation per layer and batch that serves every federated method.

    tokens_per_expert[e] += #{t : e in expert_indices[t]}        gate_sum[e]     += sum_t G[t, e]
    gate_max[e]           = max(gate_max[e], max_t G[t, e])      gate_log_sum[e] += sum_t G[t, e] ln G[t, e]
    gate_complement_log_sum[e] += sum_t (1 - G[t, e]) ln (1 - G[t, e])
    routed_gate_sum[e]   += sum_t sum_k expert_weights[t, k] [expert_indices[t, k] = e]

The sums are the inputs of HFedMoE (3), (4), (11) and (16), arXiv 2601.00583, and of the activation frequency of Flux,
arXiv 2508.19078. This file knows no model: it sees probabilities, indices and weights.
"""

from __future__ import annotations

import torch

from edgefed.experts import LayerRecord

TOKENS_PER_EXPERT, GATE_SUM, GATE_MAX, GATE_LOG_SUM, GATE_COMPLEMENT_LOG_SUM, ROUTED_GATE_SUM = range(6)
NUM_ROWS = 6


def new_statistics(num_experts: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An empty accumulator, (6, E), one row per sum. float64, or float32 where the device has no float64 (MPS)."""
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(NUM_ROWS, num_experts, dtype=dtype, device=device)


@torch.no_grad()
def router_statistics(
    statistics: torch.Tensor,
    gate: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
) -> None:
    """Add one batch of one layer to ``statistics`` in place, without a host synchronisation.

    Args:
        statistics: (6, E) from `new_statistics`, on the device of the other arguments.
        gate: (T, E) router probabilities G in [0, 1], each row with sum 1. Read once, not kept.
        expert_indices: (T, K) int64 experts that the router chose.
        expert_weights: (T, K) the weights that the layer multiplies with.

    T = 0 changes nothing. Raises ValueError when the shapes do not belong together. The order of the additions is not
    fixed on CUDA (atomic adds in float64); counts are exact.
    """
    if gate.ndim != 2 or statistics.shape != (NUM_ROWS, gate.shape[1]):
        raise ValueError(f"statistics {tuple(statistics.shape)} and gate {tuple(gate.shape)} must be (6, E) and (T, E)")
    if expert_indices.shape != expert_weights.shape or expert_indices.shape[0] != gate.shape[0]:
        raise ValueError(
            f"expert_indices {tuple(expert_indices.shape)} and expert_weights {tuple(expert_weights.shape)} "
            f"must both be (T, K) with T = {gate.shape[0]}"
        )
    if gate.shape[0] == 0:
        return
    dtype = statistics.dtype
    flat_indices = expert_indices.reshape(-1)  # (T*K,)
    flat_weights = expert_weights.reshape(-1).to(dtype)  # (T*K,)
    statistics[TOKENS_PER_EXPERT].index_add_(0, flat_indices, torch.ones_like(flat_weights))
    statistics[ROUTED_GATE_SUM].index_add_(0, flat_indices, flat_weights)
    statistics[GATE_SUM] += gate.sum(dim=0, dtype=dtype)
    statistics[GATE_LOG_SUM] += torch.special.xlogy(gate, gate).sum(dim=0, dtype=dtype)  # 0 ln 0 = 0
    # log1p keeps the small gates of many experts, where 1 - G rounds; a normalised sigmoid may pass 1 by one bit.
    at_most_1 = gate.clamp(max=1)
    complement_log = torch.special.xlog1py(1 - at_most_1, -at_most_1)
    statistics[GATE_COMPLEMENT_LOG_SUM] += complement_log.sum(dim=0, dtype=dtype)
    torch.maximum(statistics[GATE_MAX], gate.amax(dim=0).to(dtype), out=statistics[GATE_MAX])


def to_layer_record(statistics: torch.Tensor, num_tokens: int) -> LayerRecord:
    """Copy an accumulator to the host (the one synchronisation) as a `LayerRecord` over ``num_tokens`` tokens."""
    rows = statistics.detach().to(device="cpu", dtype=torch.float64).numpy()
    return LayerRecord(
        num_tokens=num_tokens,
        tokens_per_expert=rows[TOKENS_PER_EXPERT].copy(),
        gate_sum=rows[GATE_SUM].copy(),
        gate_max=rows[GATE_MAX].copy(),
        gate_log_sum=rows[GATE_LOG_SUM].copy(),
        gate_complement_log_sum=rows[GATE_COMPLEMENT_LOG_SUM].copy(),
        routed_gate_sum=rows[ROUTED_GATE_SUM].copy(),
    )
