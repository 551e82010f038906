"""Router statistics, accumulated on the device in one pass over gate probabilities or logits.

As `edgefed.kernels.router_statistics` defines it: six sums per expert, seven with the attention that tokens receive.
Each program walks its share of the tokens and writes partial sums; a second launch adds the partials to the statistics
in the order of the programs. So the result is the same from run to run, nothing of size T x E is written, and the host
does not wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensor_types import ceil_div, next_power_of_2

GATE_KINDS = {"probability": 0, "softmax": 1, "sigmoid": 2}
"""From a router's output to its gate G; as `edgefed.moe.gate_probe`."""
MAX_PROGRAMS = 64
MAX_TILE = 2048  # elements of a (tokens, experts) tile
ROWS = 6


@triton.jit
def _times_log(value, logarithm):
    """Value * logarithm, 0 where value is 0."""
    return tl.where(value > 0.0, value * logarithm, 0.0)


@triton.jit
def _log_complement(g, u):
    """ln(1 - g), u = 1 - g: where u would round a small g away, by -2 artanh(g / (2 - g)), error below 1e-8 of it."""
    s = g / (2.0 - g)
    z = s * s
    series = (
        -2.0 * s * (1.0 + z * (0.3333333333333333 + z * (0.2 + z * (0.14285714285714285 + z * 0.1111111111111111))))
    )
    return tl.where(g < 0.25, series, tl.log(tl.where(u > 0.0, u, 1.0)))


@triton.jit(do_not_specialize=["num_tokens"])
def router_statistics_kernel(
    scores, indices, weights, received, partials, num_tokens, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr,
    KIND: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Partials (num_programs, ROWS, E) float32: counts, sum G, max G, sum G ln G, sum (1-G) ln (1-G), sum of weights.

    With 7 rows, also the sum of ``received`` over the tokens of each expert.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, EP)
    is_expert = expert < E
    count = tl.zeros((EP,), tl.float32)
    gate_sum = tl.zeros((EP,), tl.float32)
    gate_max = tl.zeros((EP,), tl.float32)
    log_sum = tl.zeros((EP,), tl.float32)
    complement_sum = tl.zeros((EP,), tl.float32)
    routed_sum = tl.zeros((EP,), tl.float32)
    attention_sum = tl.zeros((EP,), tl.float32)
    for start in range(program * BT, num_tokens, tl.num_programs(0) * BT):
        token = start + tl.arange(0, BT)
        is_token = token < num_tokens
        mask = is_token[:, None] & is_expert[None, :]
        at = scores + token.to(tl.int64)[:, None] * E + expert[None, :]
        if KIND == 1:
            x = tl.load(at, mask=mask, other=-float("inf")).to(tl.float32)
            x = tl.where(is_token[:, None], x, 0.0)
            e = tl.exp(x - tl.max(x, axis=1)[:, None])
            g = e / tl.sum(e, axis=1)[:, None]
        else:
            x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            if KIND == 2:
                x = tl.where(mask, tl.sigmoid(x), 0.0)
                g = x / tl.maximum(tl.sum(x, axis=1)[:, None], 1.1754943508222875e-38)
            else:
                g = x
        g = tl.where(mask, g, 0.0)
        gate_sum += tl.sum(g, axis=0)
        gate_max = tl.maximum(gate_max, tl.max(g, axis=0))
        log_sum += tl.sum(_times_log(g, tl.log(tl.where(g > 0.0, g, 1.0))), axis=0)
        u = 1.0 - g
        complement_sum += tl.sum(_times_log(u, _log_complement(g, u)), axis=0)
        if ROWS > 6:
            attention = tl.load(received + token, mask=is_token, other=0.0).to(tl.float32)
        for k in range(0, K):
            pair = token.to(tl.int64) * K + k
            chosen = tl.load(indices + pair, mask=is_token, other=-1).to(tl.int32)
            weight = tl.load(weights + pair, mask=is_token, other=0.0).to(tl.float32)
            hit = chosen[:, None] == expert[None, :]
            count += tl.sum(tl.where(hit, 1.0, 0.0), axis=0)
            routed_sum += tl.sum(tl.where(hit, weight[:, None], 0.0), axis=0)
            if ROWS > 6:
                attention_sum += tl.sum(tl.where(hit, attention[:, None], 0.0), axis=0)
    to = partials + program * (ROWS * E) + expert
    tl.store(to, count, mask=is_expert)
    tl.store(to + E, gate_sum, mask=is_expert)
    tl.store(to + 2 * E, gate_max, mask=is_expert)
    tl.store(to + 3 * E, log_sum, mask=is_expert)
    tl.store(to + 4 * E, complement_sum, mask=is_expert)
    tl.store(to + 5 * E, routed_sum, mask=is_expert)
    if ROWS > 6:
        tl.store(to + 6 * E, attention_sum, mask=is_expert)


@triton.jit(do_not_specialize=["num_programs"])
def add_partials_kernel(
    partials, statistics, num_programs, E: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """Statistics (ROWS, E) float64 += sum of the partials, max for row 2. One program per row and block of experts."""
    row = tl.program_id(0)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    mask = expert < E
    total = tl.load(statistics + row * E + expert, mask=mask, other=0.0)
    for program in range(0, num_programs):
        x = tl.load(partials + (program * ROWS + row) * E + expert, mask=mask, other=0.0).to(tl.float64)
        total = tl.where(row == 2, tl.maximum(total, x), total + x)
    tl.store(statistics + row * E + expert, total, mask=mask)


@torch.no_grad()
def router_statistics(
    statistics: torch.Tensor,
    scores: torch.Tensor,
    expert_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_kind: str = "probability",
    received: torch.Tensor | None = None,
) -> None:
    """Add one batch of one layer to ``statistics`` in place. Two launches, no synchronization.

    Args:
        statistics: (6, E) float64 accumulator; (7, E) with ``received``.
        scores: (T, E) gate probabilities, or the router's logits if ``gate_kind`` is "softmax" or "sigmoid"; read
            once, nothing of that size is written.
        expert_indices: (T, K) experts that the router selected.
        expert_weights: (T, K) weights of their outputs.
        gate_kind: "probability", "softmax" or "sigmoid".
        received: (T,) what each token receives; its sum over the tokens of each expert goes to the last row.

    Sums of one program are float32 (at most T / 64 tokens of them), sums over programs float64; counts are exact up
    to 2^24 tokens a program. Raises ValueError if shapes do not match.

    """
    num_experts = scores.shape[-1]
    rows = ROWS if received is None else ROWS + 1
    if scores.ndim != 2 or statistics.shape != (rows, num_experts):
        raise ValueError(
            f"statistics {tuple(statistics.shape)} and scores {tuple(scores.shape)} must be ({rows}, E) and (T, E)"
        )
    if expert_indices.shape != expert_weights.shape or expert_indices.shape[0] != scores.shape[0]:
        raise ValueError(
            f"expert_indices {tuple(expert_indices.shape)} and expert_weights {tuple(expert_weights.shape)} "
            f"must both be (T, K) with T = {scores.shape[0]}"
        )
    if statistics.dtype != torch.float64 or gate_kind not in GATE_KINDS:
        raise ValueError(
            f"expected float64 statistics and a kind of {', '.join(GATE_KINDS)}, "
            f"found {statistics.dtype} and {gate_kind!r}"
        )
    num_tokens = scores.shape[0]
    if num_tokens == 0:
        return
    padded = max(next_power_of_2(num_experts), 2)
    block = max(min(MAX_TILE // padded, 32), 1)
    num_programs = min(ceil_div(num_tokens, block), MAX_PROGRAMS)
    partials = torch.empty(num_programs, rows, num_experts, dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):
        router_statistics_kernel[(num_programs,)](
            scores.contiguous(),
            expert_indices.contiguous(),
            expert_weights.contiguous(),
            partials if received is None else received.contiguous(),
            partials,
            num_tokens,
            num_experts,
            padded,
            expert_indices.shape[1],
            GATE_KINDS[gate_kind],
            rows,
            block,
            num_warps=4,
        )
        width = min(padded, 64)
        add_partials_kernel[(rows, ceil_div(num_experts, width))](
            partials, statistics, num_programs, num_experts, rows, width, num_warps=2
        )
