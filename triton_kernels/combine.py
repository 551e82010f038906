"""From rows by position back to tokens: y[t] = sum over k of w[t, k] rows[position[t, k]], added in the order of k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .sort_pairs import SortedPairs
from .tensor_types import ceil_div, next_power_of_2


@triton.jit
def combine_kernel(
    rows, position, expert_weights, out, TOP_K: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr
):
    """out[t] (N) = sum over k of w[t, k] rows[position[t, k]]. One program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for k in range(0, TOP_K):
        at = tl.load(position + token * TOP_K + k).to(tl.int64)
        if at >= 0:
            x = tl.load(rows + at * N + n, mask=n < N, other=0.0).to(tl.float32)
            if WEIGHTED:
                x *= tl.load(expert_weights + token * TOP_K + k).to(tl.float32)
            acc += x
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def combine_backward_kernel(
    grad, rows, position, expert_weights, rows_grad, weight_grad, TOP_K: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr
):  # fmt: skip
    """rows_grad[position] = w grad[t] and weight_grad[t, k] = grad[t] . rows[position]. One program per pair."""
    pair = tl.program_id(0).to(tl.int64)
    token = pair // TOP_K
    at = tl.load(position + pair).to(tl.int64)
    if at < 0:
        return
    weight = tl.load(expert_weights + pair).to(tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        dy = tl.load(grad + token * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += dy * tl.load(rows + at * N + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(rows_grad + at * N + n, (weight * dy).to(rows_grad.dtype.element_ty), mask=n < N)
    tl.store(weight_grad + pair, tl.sum(total, axis=0).to(weight_grad.dtype.element_ty))


def combine(
    rows: torch.Tensor, pairs: SortedPairs, dtype: torch.dtype, expert_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute (T, N) in ``dtype`` from rows (T*K, N) by position, summed in float32; a plain sum without weights."""
    num_tokens, width = pairs.num_pairs // pairs.top_k, rows.shape[1]
    out = torch.empty(num_tokens, width, dtype=dtype, device=rows.device)
    block = min(next_power_of_2(width), 1024)
    combine_kernel[(num_tokens, ceil_div(width, block))](
        rows,
        pairs.position,
        rows if expert_weights is None else expert_weights,
        out,
        pairs.top_k,
        width,
        expert_weights is not None,
        block,
        num_warps=4,
    )
    return out


def combine_backward(
    grad: torch.Tensor, rows: torch.Tensor, pairs: SortedPairs, expert_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of ``rows`` (T*K, N; zero without a pair) and ``expert_weights`` (T, K; 0 if dropped)."""
    rows_grad, weight_grad = torch.zeros_like(rows), torch.zeros_like(expert_weights)
    width = rows.shape[1]
    combine_backward_kernel[(pairs.num_pairs,)](
        grad,
        rows,
        pairs.position,
        expert_weights,
        rows_grad,
        weight_grad,
        pairs.top_k,
        width,
        min(next_power_of_2(width), 1024),
        num_warps=4,
    )
    return rows_grad, weight_grad
