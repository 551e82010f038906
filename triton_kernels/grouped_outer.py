"""Weight gradients of trainable slots: sums over the rows of a slot, in the order of the rows.

    outer        out[i] (N1, N2) = sum over the positions p of slot i of  left[l(p), :]^T right[r(p), :]
    column sums  out[i] (N)      = sum over the positions p of slot i of  rows[p, :]

A slot without a row gets zeros. One program owns one tile of one slot and walks its rows alone, so nothing is added
atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .grouped_matmul import TileConfig
from .sort_pairs import SortedPairs
from .tensor_types import ceil_div, compute_type, dot_precision, next_power_of_2

FEW_ROWS = TileConfig(rows=64, columns=64, depth=32, warps=4, stages=3)
MANY_ROWS = TileConfig(rows=128, columns=128, depth=32, warps=8, stages=3)
MAX_NARROW = 64


@triton.jit
def grouped_outer_kernel(
    left,
    right,
    out,
    order,
    offsets,
    slot_ids,
    N1: tl.constexpr,
    N2: tl.constexpr,
    LEFT_TOP_K: tl.constexpr,  # > 0: row p of ``left`` is token order[p] // LEFT_TOP_K; 0: row p is p
    RIGHT_TOP_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BR: tl.constexpr,
):
    """Compute one tile of the sum over a slot's rows of left[p]^T right[p]. See `grouped_outer`."""
    tiles_2: tl.constexpr = (N2 + B2 - 1) // B2
    tile = tl.program_id(0)
    index = tl.program_id(1)
    slot = tl.load(slot_ids + index)
    start = tl.load(offsets + slot)
    end = tl.load(offsets + slot + 1)
    n1 = (tile // tiles_2) * B1 + tl.arange(0, B1)
    n2 = (tile % tiles_2) * B2 + tl.arange(0, B2)
    acc = tl.zeros((B1, B2), tl.float32)
    for row in range(start, end, BR):
        position = row + tl.arange(0, BR)
        is_row = position < end
        if LEFT_TOP_K > 0 or RIGHT_TOP_K > 0:
            pair = tl.load(order + position, mask=is_row, other=0)
        at_left = (pair // LEFT_TOP_K).to(tl.int64) if LEFT_TOP_K > 0 else position.to(tl.int64)
        at_right = (pair // RIGHT_TOP_K).to(tl.int64) if RIGHT_TOP_K > 0 else position.to(tl.int64)
        x = tl.load(left + at_left[:, None] * N1 + n1[None, :], mask=is_row[:, None] & (n1 < N1)[None, :], other=0.0)
        y = tl.load(right + at_right[:, None] * N2 + n2[None, :], mask=is_row[:, None] & (n2 < N2)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x.to(COMPUTE)), y.to(COMPUTE), acc, input_precision=PRECISION)
    to = out + index.to(tl.int64) * (N1 * N2) + n1[:, None] * N2 + n2[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(n1 < N1)[:, None] & (n2 < N2)[None, :])


@triton.jit
def column_sums_kernel(rows, out, offsets, slot_ids, N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """Sum the rows of one slot, in order. One program per slot and block of columns."""
    slot = tl.load(slot_ids + tl.program_id(1))
    end = tl.load(offsets + slot + 1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for row in range(tl.load(offsets + slot), end, BR):
        position = row + tl.arange(0, BR)
        mask = (position < end)[:, None] & (n < N)[None, :]
        x = tl.load(rows + position.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
        acc += tl.sum(x.to(tl.float32), axis=0)
    tl.store(out + tl.program_id(1) * N + n, acc.to(out.dtype.element_ty), mask=n < N)


def outer_config(n1: int, n2: int, rows_per_tile: int, itemsize: int) -> TileConfig:
    """Return the tile of an (n1, n2) gradient: narrow if one side is a rank, wide if a slot has many rows.

    Narrow sides are 16, 32 or 64, on the left or on the right: with the two others, eight forms.
    """
    if min(n1, n2) < MAX_NARROW:
        narrow = max(16, next_power_of_2(min(n1, n2)))
        rows, columns = (64, narrow) if n2 <= n1 else (narrow, 64)
        return TileConfig(rows, columns, FEW_ROWS.depth, FEW_ROWS.warps, FEW_ROWS.stages)
    return MANY_ROWS if rows_per_tile == 128 and itemsize == 2 else FEW_ROWS


def grouped_outer(
    left: torch.Tensor,
    right: torch.Tensor,
    pairs: SortedPairs,
    slot_ids: torch.Tensor,
    dtype: torch.dtype,
    *,
    left_is_tokens: bool = False,
    right_is_tokens: bool = False,
) -> torch.Tensor:
    """Compute the gradient of each slot of ``slot_ids`` (int32, on the device): (num_ids, N1, N2) in ``dtype``.

    ``left`` (T or T*K, N1) and ``right`` (T or T*K, N2) are contiguous; by position unless said to be tokens.
    """
    n1, n2 = left.shape[1], right.shape[1]
    out = torch.empty(slot_ids.shape[0], n1, n2, dtype=dtype, device=left.device)
    wide = torch.promote_types(left.dtype, right.dtype)
    config = outer_config(n1, n2, pairs.rows_per_tile, wide.itemsize)
    grid = (ceil_div(n1, config.rows) * ceil_div(n2, config.columns), slot_ids.shape[0])
    grouped_outer_kernel[grid](
        left,
        right,
        out,
        pairs.order,
        pairs.offsets,
        slot_ids,
        N1=n1,
        N2=n2,
        LEFT_TOP_K=pairs.top_k if left_is_tokens else 0,
        RIGHT_TOP_K=pairs.top_k if right_is_tokens else 0,
        COMPUTE=compute_type(wide),
        PRECISION=dot_precision(wide),
        B1=config.rows,
        B2=config.columns,
        BR=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def column_sums(rows: torch.Tensor, pairs: SortedPairs, slot_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute the sum of the rows (T*K, N) of each slot of ``slot_ids``: (num_ids, N) in ``dtype``."""
    n = rows.shape[1]
    out = torch.empty(slot_ids.shape[0], n, dtype=dtype, device=rows.device)
    column_sums_kernel[(ceil_div(n, 64), slot_ids.shape[0])](
        rows, out, pairs.offsets, slot_ids, N=n, BN=64, BR=32, num_warps=4
    )
    return out
