"""The backward pass of a SwiGLU expert between its two projections, and the gradient of its gate weight.

With g, u the two halves of the up projection, h = silu(g) u, y = W_down h weighted by w, and q = W_down^T dy (without
the weight):

    dw = q . h        (the expert's output is not needed: dy . W_down h = W_down^T dy . h)
    dg = w q u silu'(g),   du = w q silu(g)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .sort_pairs import SortedPairs
from .tensor_types import next_power_of_2


@triton.jit
def swiglu_kernel(
    gate_up, hidden, order, offsets, slots, slot_is_split, NUM_SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    BI: tl.constexpr
):  # fmt: skip
    """Hidden h (T*K, I) from gate_up (T*K, 2I), even columns first where the slot's flag says so. One program a row."""
    position = tl.program_id(0).to(tl.int64)
    if position >= tl.load(offsets + NUM_SLOTS):
        return
    is_split = tl.load(slot_is_split + tl.load(slots + tl.load(order + position))) != 0
    for start in range(0, WIDTH, BI):
        i = start + tl.arange(0, BI)
        mask = i < WIDTH
        column = tl.where(is_split, tl.where(i < WIDTH // 2, 2 * i, 2 * i - WIDTH + 1), i)
        g = tl.load(gate_up + position * (2 * WIDTH) + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gate_up + position * (2 * WIDTH) + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(hidden + position * WIDTH + i, (g * tl.sigmoid(g) * u).to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    gate_up, hidden_grad, gate_up_grad, order, offsets, expert_weights, weight_grad, NUM_SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, BI: tl.constexpr
):  # fmt: skip
    """Write [dg, du] to gate_up_grad, which may be gate_up, and w h to q, from gate_up (T*K, 2I) and q (T*K, I).

    One program per row.
    """
    position = tl.program_id(0).to(tl.int64)
    if position >= tl.load(offsets + NUM_SLOTS):
        return
    pair = tl.load(order + position)
    weight = tl.load(expert_weights + pair).to(tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for start in range(0, WIDTH, BI):
        i = start + tl.arange(0, BI)
        mask = i < WIDTH
        at = position * (2 * WIDTH) + i
        q_at = hidden_grad + position * WIDTH + i
        g = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(gate_up + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
        q = tl.load(q_at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        h = silu * u
        total += q * h
        q *= weight
        dg = q * u * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(gate_up_grad + at, dg.to(gate_up_grad.dtype.element_ty), mask=mask)
        tl.store(gate_up_grad + at + WIDTH, (q * silu).to(gate_up_grad.dtype.element_ty), mask=mask)
        tl.store(q_at, (weight * h).to(hidden_grad.dtype.element_ty), mask=mask)
    tl.store(weight_grad + pair, tl.sum(total, axis=0).to(weight_grad.dtype.element_ty))


def swiglu(
    gate_up: torch.Tensor, hidden: torch.Tensor, pairs: SortedPairs, slots: torch.Tensor, slot_is_split: torch.Tensor
) -> None:
    """Write h (T*K, I); ``slots`` (T, K) by pair and ``slot_is_split`` (S,) as the kernel reads them."""
    width = hidden.shape[1]
    swiglu_kernel[(pairs.num_pairs,)](
        gate_up,
        hidden,
        pairs.order,
        pairs.offsets,
        slots,
        slot_is_split,
        pairs.num_slots,
        width,
        min(next_power_of_2(width), 1024),
        num_warps=4,
    )


def swiglu_backward(
    gate_up: torch.Tensor,
    hidden_grad: torch.Tensor,
    gate_up_grad: torch.Tensor,
    pairs: SortedPairs,
    expert_weights: torch.Tensor,
) -> torch.Tensor:
    """Run the kernel and return the gradient of ``expert_weights`` (T, K): 0 at dropped pairs."""
    weight_grad = torch.zeros_like(expert_weights)
    width = hidden_grad.shape[1]
    swiglu_backward_kernel[(pairs.num_pairs,)](
        gate_up,
        hidden_grad,
        gate_up_grad,
        pairs.order,
        pairs.offsets,
        expert_weights,
        weight_grad,
        pairs.num_slots,
        width,
        min(next_power_of_2(width), 1024),
        num_warps=4,
    )
    return weight_grad


_measured: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def is_swiglu(activation: Callable[[torch.Tensor], torch.Tensor], width: int) -> bool:
    """Return whether ``activation`` maps (P, 2 * width) to silu(first half) * second half, by one run per layer.

    It is tried on a few rows on the host, so a gate with parameters on the GPU is not recognised and stays itself.
    """
    owner = getattr(activation, "__self__", activation)
    key = (getattr(activation, "__name__", ""), width)
    try:
        known = _measured.setdefault(owner, {})
    except TypeError:  # cannot be referred to weakly: measured each time
        known = {}
    if key not in known:
        known[key] = _computes_swiglu(activation, width)
    return known[key]


@torch.no_grad()
def _computes_swiglu(activation: Callable[[torch.Tensor], torch.Tensor], width: int) -> bool:
    gate = torch.linspace(-12.0, 12.0, 4 * width).reshape(4, width)
    up = torch.linspace(11.0, -9.0, 4 * width).reshape(width, 4).t()
    expected = torch.nn.functional.silu(gate) * up
    try:
        found = activation(torch.cat([gate, up], dim=1))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5)
