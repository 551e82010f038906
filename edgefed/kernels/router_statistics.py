"""Router statistics: one accumulation per layer and batch that serves every federated method.

    tokens_per_expert[e] += #{t : e in expert_indices[t]}        gate_sum[e]     += sum_t G[t, e]
    gate_max[e]           = max(gate_max[e], max_t G[t, e])      gate_log_sum[e] += sum_t G[t, e] ln G[t, e]
    gate_complement_log_sum[e] += sum_t (1 - G[t, e]) ln (1 - G[t, e])
    routed_gate_sum[e]   += sum_t sum_k expert_weights[t, k] [expert_indices[t, k] = e]
    attention_sum[e]     += sum_t sum_k received[t] [expert_indices[t, k] = e]     where attention is recorded

G is given (kind "probability"), or computed from a router's logits: softmax, or sigmoid divided by its sum over
experts. The sums are the inputs of HFedMoE (3), (4), (11) and (16), arXiv 2601.00583, and of the activation frequency
of Flux, arXiv 2508.19078. This module sees probabilities, indices and weights, not models.
"""

from __future__ import annotations

import torch

from edgefed.expert_records import LayerProfile
from edgefed.kernels.dispatch import Unsupported, choose, note_backend, run_best
from edgefed.kernels.verdicts import Case
from edgefed.native import dtype_code, isa_code, load_native

TOKENS_PER_EXPERT, GATE_SUM, GATE_MAX, GATE_LOG_SUM, GATE_COMPLEMENT_LOG_SUM, ROUTED_GATE_SUM, ATTENTION_SUM = range(7)
NUM_ROWS = 6
"""Without attention, whose sum is the last row where it is recorded."""


def new_statistics(
    num_experts: int, device: torch.device | str = "cpu", *, attention: bool = False
) -> torch.Tensor:  # fmt: skip
    """Return an empty accumulator (6, E), or (7, E) with ``attention``: one row per sum.

    In float64 (float32 on MPS, which lacks float64).
    """
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(NUM_ROWS + attention, num_experts, dtype=dtype, device=device)


GATE_KINDS = ("probability", "softmax", "sigmoid")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def router_statistics(
    statistics: torch.Tensor,
    router: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    *,
    kind: str = "probability",
    received: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Add one batch of one layer to ``statistics`` in place, without a host synchronization.

    Args:
        statistics: (6, E) from `new_statistics`, on the device of the other arguments.
        router: (T, E) output of the router: probabilities G in [0, 1], each row with sum 1, or logits. Read once; the
            native backend makes no copy of its size.
        expert_indices: (T, K) int64 experts that the router selected.
        expert_weights: (T, K) weights of the experts' outputs.
        kind: "probability", "softmax" or "sigmoid": how G is computed from ``router``.
        received: (T,) floating point, the attention that each token receives; ``statistics`` are (7, E) then.
        backend: "reference", "native" (CPU), "triton" or "cuda" (GPU), or "auto".

    T = 0 changes nothing. Raises ValueError if the shapes do not match, IndexError for an index outside the experts
    (CPU; the CUDA kernel aborts the device, the Triton kernel ignores such a pair). On a GPU the reference adds in no
    fixed order (atomic adds in float64), the kernels in a fixed one; counts are exact.

    """
    if kind not in GATE_KINDS:
        raise ValueError(f"invalid kind {kind!r}, expected one of {', '.join(GATE_KINDS)}")
    num_rows = NUM_ROWS + (received is not None)
    if router.ndim != 2 or statistics.shape != (num_rows, router.shape[1]):
        raise ValueError(
            f"statistics {tuple(statistics.shape)} and router {tuple(router.shape)} must be ({num_rows}, E) and (T, E)"
        )
    if received is not None and received.shape != router.shape[:1]:
        raise ValueError(f"received {tuple(received.shape)} must be (T,) with T = {router.shape[0]}")
    if expert_indices.shape != expert_weights.shape or expert_indices.shape[0] != router.shape[0]:
        raise ValueError(
            f"expert_indices {tuple(expert_indices.shape)} and expert_weights {tuple(expert_weights.shape)} "
            f"must both be (T, K) with T = {router.shape[0]}"
        )
    if router.shape[0] == 0:
        return

    device = router.device.type
    # Every layer of every batch calls this, so the usual case takes a short cut.
    if (
        device == "cpu"
        and statistics.is_contiguous()
        and choose("router_statistics", device, backend) == "native"
        and _why_not(statistics, router, expert_indices, expert_weights) is None
    ):
        _add_native(statistics, router, expert_indices, expert_weights, kind, received)
        note_backend("router_statistics", "native")
        return

    @torch.no_grad()
    def run(name: str) -> None:
        if name == "reference":
            gate = router if kind == "probability" else gate_of(router, kind)
            _add_reference(statistics, gate, expert_indices, expert_weights)
            _add_attention(statistics, expert_indices, received)
            return
        reason = _why_not(statistics, router, expert_indices, expert_weights)
        if reason is not None:
            raise Unsupported(reason)
        sums = statistics if statistics.is_contiguous() else statistics.contiguous()
        if name == "native":
            _add_native(sums, router, expert_indices, expert_weights, kind, received)
        elif name == "cuda":
            from edgefed.kernels.cuda_kernels import cuda_kernels

            cuda_kernels().router_statistics(
                sums, router, expert_indices, expert_weights, GATE_KINDS.index(kind), received
            )
        else:
            from edgefed.triton_kernels.router_statistics import router_statistics as add_triton

            add_triton(sums, router, expert_indices, expert_weights, kind, received)
        if sums is not statistics:
            statistics.copy_(sums)

    run_best("router_statistics", str(router.device), backend, run, case=lambda: _case(router, kind, received))


def _case(router: torch.Tensor, kind: str, received: torch.Tensor | None) -> Case:
    dtype = str(router.dtype).removeprefix("torch.")
    form = "" if received is None else "attention"
    return Case("router_statistics", dtype, kind, width=router.shape[1], form=form)


def _why_not(
    statistics: torch.Tensor, router: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> str | None:
    """Return why no kernel supports these tensors, or None."""
    for what, tensor, dtypes in (
        ("the router's output", router, _DTYPES),
        ("expert weights", weights, _DTYPES),
        ("statistics", statistics, (torch.float64,)),
        ("expert indices", indices, (torch.int64,)),
    ):
        if tensor.dtype not in dtypes:
            return f"no kernel for {what} in {tensor.dtype}"
    return None


def gate_of(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Compute G (T, E), at least float32, from logits; ``kind`` as in `router_statistics`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "softmax":
        return torch.softmax(logits, dim=-1)
    scores = torch.sigmoid(logits) if kind == "sigmoid" else logits
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def _add_native(
    statistics: torch.Tensor, router: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, kind: str,
    received: torch.Tensor | None,
) -> None:  # fmt: skip
    library = load_native()
    router, indices, weights = router.contiguous(), indices.contiguous(), weights.contiguous()
    tokens, experts = router.shape
    error = library.ef_router_statistics(
        statistics.data_ptr(), router.data_ptr(), dtype_code(router.dtype), GATE_KINDS.index(kind),
        indices.data_ptr(), weights.data_ptr(), dtype_code(weights.dtype), tokens, experts,
        indices.shape[1], isa_code(library), torch.get_num_threads(),
    )  # fmt: skip
    if error == -5:
        raise IndexError(f"an expert index is outside 0..{experts - 1}")
    if error:
        raise RuntimeError(f"the native router statistics failed with code {error}")
    _add_attention(statistics, indices, received)


def _add_reference(
    statistics: torch.Tensor, gate: torch.Tensor, expert_indices: torch.Tensor, expert_weights: torch.Tensor
) -> None:
    """The specification, for probabilities G (T, E)."""
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    dtype = statistics.dtype
    flat_indices = expert_indices.reshape(-1)  # (T*K,)
    flat_weights = expert_weights.reshape(-1).to(dtype)  # (T*K,)
    statistics[TOKENS_PER_EXPERT].index_add_(0, flat_indices, torch.ones_like(flat_weights))
    statistics[ROUTED_GATE_SUM].index_add_(0, flat_indices, flat_weights)
    statistics[GATE_SUM] += gate.sum(dim=0, dtype=dtype)
    statistics[GATE_LOG_SUM] += torch.special.xlogy(gate, gate).sum(dim=0, dtype=dtype)  # 0 ln 0 = 0
    # log1p is exact for the small gates of many experts, where 1 - G rounds; a normalized sigmoid may exceed 1.
    at_most_1 = gate.clamp(max=1)
    complement_log = torch.special.xlog1py(1 - at_most_1, -at_most_1)
    statistics[GATE_COMPLEMENT_LOG_SUM] += complement_log.sum(dim=0, dtype=dtype)
    torch.maximum(statistics[GATE_MAX], gate.amax(dim=0).to(dtype), out=statistics[GATE_MAX])


def _add_attention(statistics: torch.Tensor, expert_indices: torch.Tensor, received: torch.Tensor | None) -> None:
    """Add the attention (T,) that the tokens of each expert receive, if it is recorded."""
    if received is not None:
        per_pair = received.to(statistics.dtype).unsqueeze(1).expand_as(expert_indices)  # (T, K)
        statistics[ATTENTION_SUM].index_add_(0, expert_indices.reshape(-1), per_pair.reshape(-1))


def to_layer_profile(statistics: torch.Tensor, num_tokens: int) -> LayerProfile:
    """Copy an accumulator to the host (one synchronization) as a `LayerProfile` over ``num_tokens`` tokens."""
    rows = statistics.detach().to(device="cpu", dtype=torch.float64).numpy()
    return LayerProfile(
        num_tokens=num_tokens,
        tokens_per_expert=rows[TOKENS_PER_EXPERT].copy(),
        gate_sum=rows[GATE_SUM].copy(),
        gate_max=rows[GATE_MAX].copy(),
        gate_log_sum=rows[GATE_LOG_SUM].copy(),
        gate_complement_log_sum=rows[GATE_COMPLEMENT_LOG_SUM].copy(),
        routed_gate_sum=rows[ROUTED_GATE_SUM].copy(),
        attention_sum=rows[ATTENTION_SUM].copy() if len(rows) > NUM_ROWS else None,
    )
