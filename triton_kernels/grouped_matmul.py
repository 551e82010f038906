"""Rows of tokens times the matrix of their slot, in every storage format.

    out[p, n] = act( sum_k a[src(p), k] W_s[n, k] + low[p, :] . F_s[:, n] + b_s[n] ) * row_scale[pair(p)]

p runs over the sorted pairs of one group of slots, s is the slot of p. LAST says which way round W_s is stored:

    LAST       (N, K) row-major, the sum runs over the last dimension: forward of nn.Linear
    not LAST   (K, N) row-major, the sum runs over the first: its dX, and the forward of a transposed layer

NF4 packs neighbours of the last dimension into one byte. With LAST that is two neighbours of the sum, so ``a`` comes
with its even columns first and its odd columns after them (`split_columns`), and each byte feeds two products of half
the depth; nibbles are never interleaved (that costs spills). Without LAST the two are neighbours of the output, which
gets two accumulators that are interleaved once, when they are stored. A program whose tile belongs to a slot of
another group ends at once, so a layer that mixes formats is one launch per group and no question to the host.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from .nf4 import nf4_value
from .sort_pairs import SortedPairs
from .tensor_types import ceil_div, compute_type, device_capability, dot_precision, next_power_of_2

FORMATS = {"plain": 0, "nf4": 1, "int8": 2}


@triton.jit
def _swiglu(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["num_tiles", "group"])
def grouped_matmul_kernel(
    a,
    out,
    order,
    offsets,
    tile_slot,
    tile_row,
    slot_group,
    weight,
    weight_offset,
    absmax,
    absmax_offset,
    table,  # values of NF4
    bias,
    bias_offset,
    low,
    factor,
    factor_offset,
    row_scale,
    scale,
    num_tiles,
    group,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,  # > 0: row p of ``a`` is token order[p] // TOP_K; 0: row p is p
    FORMAT: tl.constexpr,
    LAST: tl.constexpr,
    GATED: tl.constexpr,  # W has 2N rows, gate over up; act is SwiGLU (LAST only)
    SPLIT_IN: tl.constexpr,  # columns of ``a``: even ones first (LAST only; NF4 needs it)
    SPLIT_OUT: tl.constexpr,  # the same for ``out`` (LAST only)
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,  # 0: no low-rank term
    RANK_LAST: tl.constexpr,  # the factor is (N, RANK), else (RANK, N)
    HAS_ROW_SCALE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,  # values per absmax, NF4
    ALIGNED: tl.constexpr,  # offsets are multiples of 16 elements
    COMPUTE: tl.constexpr,  # dtype of the products; float32 where the interpreter would get bfloat16 wrong
    PRECISION: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP_M: tl.constexpr = 8,
):
    """Compute one tile of the rows of one slot times its matrix. See `grouped_matmul`."""
    tiles_n: tl.constexpr = (N + BN - 1) // BN
    pid = tl.program_id(0)
    band = pid // (GROUP_M * tiles_n)
    band_rows = tl.minimum(num_tiles - band * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    tile = band * GROUP_M + within % band_rows
    n0 = (within // band_rows) * BN
    slot = tl.load(tile_slot + tile)
    if slot < 0:
        return
    if tl.load(slot_group + slot) != group:
        return

    position = tl.load(tile_row + tile) + tl.arange(0, BM)
    is_row = position < tl.load(offsets + slot + 1)
    pair = tl.load(order + position, mask=is_row, other=0)
    if TOP_K > 0:
        source = tl.where(is_row, pair // TOP_K, 0).to(tl.int64)
    else:
        source = tl.where(is_row, position, 0).to(tl.int64)
    even_n: tl.constexpr = N % BN == 0
    weight_at = tl.load(weight_offset + slot)
    if ALIGNED:
        weight_at = tl.multiple_of(weight_at, 16)
    w = weight + weight_at

    columns = n0 + tl.arange(0, BN)  # where the output stands
    is_column = columns < N
    # n: the matrix row that belongs there
    n = tl.where(columns < N // 2, 2 * columns, 2 * columns - N + 1) if SPLIT_OUT else columns
    safe_n = n
    if not even_n:
        safe_n = tl.where(is_column, n, 0)

    if FORMAT == 1 and not LAST:
        half = n0 // 2 + tl.arange(0, BN // 2)
        k = tl.arange(0, BK)
        scales = absmax + tl.load(absmax_offset + slot)
        a_at = a + source[:, None] * K + k[None, :]
        w_at = w + k[:, None] * (N // 2) + half[None, :]
        acc_even = tl.zeros((BM, BN // 2), tl.float32)
        acc_odd = tl.zeros((BM, BN // 2), tl.float32)
        for k0 in range(0, K, BK):
            x = tl.load(a_at, mask=(k0 + k < K)[None, :], other=0.0).to(COMPUTE)
            code = tl.load(w_at, mask=(k0 + k < K)[:, None] & (half < N // 2)[None, :], other=0).to(tl.int32)
            if BN <= BLOCKSIZE and BLOCKSIZE % BN == 0:
                top = tl.load(scales + ((k0 + k) * N + n0) // BLOCKSIZE, mask=k0 + k < K, other=0.0)[:, None]
            else:
                at = ((k0 + k)[:, None] * N + 2 * half[None, :]) // BLOCKSIZE
                top = tl.load(scales + at, mask=(k0 + k < K)[:, None] & (half < N // 2)[None, :], other=0.0)
            acc_even = tl.dot(x, (nf4_value(table, code >> 4) * top).to(COMPUTE), acc_even, input_precision=PRECISION)
            acc_odd = tl.dot(x, (nf4_value(table, code & 15) * top).to(COMPUTE), acc_odd, input_precision=PRECISION)
            a_at += BK
            w_at += BK * (N // 2)
        acc = tl.interleave(acc_even, acc_odd)
    elif FORMAT == 1:
        j = tl.arange(0, BK // 2)
        scales = absmax + tl.load(absmax_offset + slot)
        a_at = a + source[:, None] * K + j[None, :]
        w_at = w + safe_n[None, :] * (K // 2) + j[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        if GATED:
            acc_up = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            even = tl.load(a_at).to(COMPUTE)
            odd = tl.load(a_at + K // 2).to(COMPUTE)
            code = tl.load(w_at).to(tl.int32)
            top = tl.load(scales + (safe_n * K + k0) // BLOCKSIZE)[None, :]
            acc = tl.dot(even, (nf4_value(table, code >> 4) * top).to(COMPUTE), acc, input_precision=PRECISION)
            acc = tl.dot(odd, (nf4_value(table, code & 15) * top).to(COMPUTE), acc, input_precision=PRECISION)
            if GATED:
                code = tl.load(w_at + N * (K // 2)).to(tl.int32)
                top = tl.load(scales + ((safe_n + N) * K + k0) // BLOCKSIZE)[None, :]
                acc_up = tl.dot(
                    even, (nf4_value(table, code >> 4) * top).to(COMPUTE), acc_up, input_precision=PRECISION
                )
                acc_up = tl.dot(odd, (nf4_value(table, code & 15) * top).to(COMPUTE), acc_up, input_precision=PRECISION)
            a_at += BK // 2
            w_at += BK // 2
    elif SPLIT_IN:  # a plain or INT8 matrix whose rows of ``a`` came split: the low-rank factor of an NF4 slot
        j = tl.arange(0, BK // 2)
        a_at = a + source[:, None] * K + j[None, :]
        w_at = w + safe_n[None, :] * K + 2 * j[:, None]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            is_k = k0 // 2 + j < K // 2
            even = tl.load(a_at, mask=is_k[None, :], other=0.0).to(COMPUTE)
            odd = tl.load(a_at + K // 2, mask=is_k[None, :], other=0.0).to(COMPUTE)
            w_even = tl.load(w_at, mask=is_k[:, None], other=0).to(COMPUTE)
            w_odd = tl.load(w_at + 1, mask=is_k[:, None], other=0).to(COMPUTE)
            acc = tl.dot(even, w_even, acc, input_precision=PRECISION)
            acc = tl.dot(odd, w_odd, acc, input_precision=PRECISION)
            a_at += BK // 2
            w_at += BK
    else:
        k = tl.arange(0, BK)
        a_at = a + source[:, None] * K + k[None, :]
        w_at = w + safe_n[None, :] * K + k[:, None] if LAST else w + k[:, None] * N + safe_n[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        if GATED:
            acc_up = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            if K % BK == 0:
                x = tl.load(a_at).to(COMPUTE)
                v = tl.load(w_at)
            else:
                x = tl.load(a_at, mask=(k0 + k < K)[None, :], other=0.0).to(COMPUTE)
                v = tl.load(w_at, mask=(k0 + k < K)[:, None], other=0)
            if FORMAT == 2 and not LAST:
                top = tl.load(absmax + tl.load(absmax_offset + slot) + k0 + k, mask=k0 + k < K, other=0.0)
                v = v.to(tl.float32) * (top * 0.007874015748031496)[:, None]
            acc = tl.dot(x, v.to(COMPUTE), acc, input_precision=PRECISION)
            if GATED:
                v = tl.load(w_at + N * K) if K % BK == 0 else tl.load(w_at + N * K, mask=(k0 + k < K)[:, None], other=0)
                acc_up = tl.dot(x, v.to(COMPUTE), acc_up, input_precision=PRECISION)
            a_at += BK
            if LAST:
                w_at += BK
            else:
                w_at += BK * N

    if FORMAT == 2 and LAST:  # one scale per matrix row is one per output column: exact products, scaled once
        scales = absmax + tl.load(absmax_offset + slot)
        acc *= (tl.load(scales + safe_n) * 0.007874015748031496)[None, :]
        if GATED:
            acc_up *= (tl.load(scales + N + safe_n) * 0.007874015748031496)[None, :]
    if RANK > 0:
        r = tl.arange(0, RANK_PADDED)
        low_at = low + position.to(tl.int64)[:, None] * RANK + r[None, :]
        x = tl.load(low_at, mask=is_row[:, None] & (r < RANK)[None, :], other=0.0).to(COMPUTE)
        f = factor + tl.load(factor_offset + slot)
        f_at = f + safe_n[None, :] * RANK + r[:, None] if RANK_LAST else f + r[:, None] * N + safe_n[None, :]
        v = tl.load(f_at, mask=(r < RANK)[:, None], other=0.0).to(COMPUTE)
        acc = tl.dot(x, v, acc, input_precision=PRECISION)
        if GATED:
            v = tl.load(f_at + N * RANK, mask=(r < RANK)[:, None], other=0.0).to(COMPUTE)
            acc_up = tl.dot(x, v, acc_up, input_precision=PRECISION)
    acc *= scale
    if HAS_BIAS:
        b = bias + tl.load(bias_offset + slot)
        acc += tl.load(b + safe_n).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(b + N + safe_n).to(tl.float32)[None, :]
    if GATED:
        acc = _swiglu(acc, acc_up)
    if HAS_ROW_SCALE:
        acc *= tl.load(row_scale + pair, mask=is_row, other=0.0).to(tl.float32)[:, None]
    to = out + position.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def split_columns(a: torch.Tensor) -> torch.Tensor:
    """Reorder (R, K) to even columns first, then odd ones, as the product with an NF4 matrix needs."""
    return a.unflatten(1, (-1, 2)).transpose(1, 2).reshape(a.shape)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """The tile of one program (rows, columns, depth of a step), its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


SMALL = TileConfig(rows=16, columns=64, depth=64, warps=4, stages=3)
MIDDLE = TileConfig(rows=64, columns=64, depth=32, warps=4, stages=3)
LARGE = TileConfig(rows=128, columns=64, depth=64, warps=8, stages=3)
LARGE_SHALLOW = TileConfig(rows=128, columns=64, depth=32, warps=8, stages=3)
LARGE_WIDE = TileConfig(rows=128, columns=128, depth=32, warps=8, stages=3)
FLOAT_SMALL = TileConfig(rows=16, columns=32, depth=32, warps=4, stages=3)
FLOAT_MIDDLE = TileConfig(rows=64, columns=32, depth=32, warps=8, stages=3)
CONFIGS = (SMALL, MIDDLE, LARGE, LARGE_SHALLOW, LARGE_WIDE, FLOAT_SMALL, FLOAT_MIDDLE)


def rows_per_tile(num_pairs: int, num_slots: int, itemsize: int) -> int:
    """Return the rows of a tile: about the rows of a slot if no pair is dropped. float32 has at most 64."""
    average = num_pairs / max(num_slots, 1)
    return 16 if average <= 16 else 64 if average <= 96 or itemsize == 4 else 128


def matmul_config(
    rows: int, format: str, last: bool, gated: bool, n: int, itemsize: int, capability: tuple[int, int]
) -> TileConfig:
    """Return the tile for ``rows`` per tile (16, 64 or 128) and products in a type of ``itemsize`` bytes.

    Wide where nothing is unpacked. Shallow steps where two sums are kept of unpacked NF4 on 8.0: its compiler holds
    more registers at once there than for 8.6 and later. Chosen by what fits without spills on every device
    (benchmarks/results/triton_resources.json), not by speed.
    """
    if itemsize == 4:
        return FLOAT_SMALL if rows == 16 else FLOAT_MIDDLE
    if rows < 128:
        return SMALL if rows == 16 else MIDDLE
    if format == "plain" and not gated and n >= LARGE_WIDE.columns:
        return LARGE_WIDE
    has_two_sums = format == "nf4" and (gated or not last)
    return LARGE_SHALLOW if has_two_sums and capability == (8, 0) else LARGE


@dataclasses.dataclass(frozen=True)
class SlotTensors:
    """One tensor of each slot of a group for a kernel: ``base`` and (S,) int64 offsets from it, in elements.

    The tensors need not share a storage; offsets of slots outside the group are 0 and never used.
    """

    base: torch.Tensor
    offsets: torch.Tensor
    aligned: bool


@dataclasses.dataclass(frozen=True)
class SlotMatrices:
    """The matrices (or factors) of a group of slots: all of one format, dtype and shape.

    ``absmax`` is for NF4 (one per ``blocksize`` values) and INT8 (one per row), ``table`` for NF4; ``dtype`` is what
    products are computed in.
    """

    format: str
    weight: SlotTensors
    absmax: SlotTensors | None
    blocksize: int
    dtype: torch.dtype
    table: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class LowRankTerm:
    """``low`` (T*K, R) by position, already scaled, and the factor it is multiplied with: (N, R) or (R, N)."""

    low: torch.Tensor
    factor: SlotTensors
    factor_is_last: bool


def grouped_matmul(
    a: torch.Tensor,
    out: torch.Tensor,
    pairs: SortedPairs,
    slot_group: torch.Tensor,
    group: int,
    matrices: SlotMatrices,
    *,
    last: bool,
    is_tokens: bool = False,
    gated: bool = False,
    split_in: bool = False,
    split_out: bool = False,
    bias: SlotTensors | None = None,
    low_rank: LowRankTerm | None = None,
    row_scale: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Write the rows of ``out`` (T*K, N) whose slot is in ``group``, from ``a`` (T or T*K, K); both contiguous.

    ``slot_group`` (S,) int32 names the group of each slot, on the device. Everything else as in the kernel's head.
    """
    n, k = out.shape[1], a.shape[1]
    config = matmul_config(
        pairs.rows_per_tile, matrices.format, last, gated, n, matrices.dtype.itemsize, device_capability(a.device)
    )
    rank = low_rank.low.shape[1] if low_rank else 0
    grid = (pairs.max_tiles * ceil_div(n, config.columns),)
    grouped_matmul_kernel[grid](
        a,
        out,
        pairs.order,
        pairs.offsets,
        pairs.tile_slot,
        pairs.tile_row,
        slot_group,
        matrices.weight.base,
        matrices.weight.offsets,
        matrices.absmax.base if matrices.absmax else out,
        matrices.absmax.offsets if matrices.absmax else pairs.offsets,
        out if matrices.table is None else matrices.table,
        bias.base if bias else out,
        bias.offsets if bias else pairs.offsets,
        low_rank.low if low_rank else out,
        low_rank.factor.base if low_rank else out,
        low_rank.factor.offsets if low_rank else pairs.offsets,
        row_scale if row_scale is not None else out,
        scale,
        pairs.max_tiles,
        group,
        N=n,
        K=k,
        TOP_K=pairs.top_k if is_tokens else 0,
        FORMAT=FORMATS[matrices.format],
        LAST=last,
        GATED=gated,
        SPLIT_IN=split_in,
        SPLIT_OUT=split_out,
        HAS_BIAS=bias is not None,
        RANK=rank,
        RANK_LAST=bool(low_rank and low_rank.factor_is_last),
        HAS_ROW_SCALE=row_scale is not None,
        BLOCKSIZE=matrices.blocksize,
        ALIGNED=matrices.weight.aligned,
        COMPUTE=compute_type(matrices.dtype),
        PRECISION=dot_precision(matrices.dtype),
        RANK_PADDED=max(next_power_of_2(max(rank, 1)), 16),
        BM=config.rows,
        BN=config.columns,
        BK=config.depth,
        num_warps=config.warps,
        num_stages=config.stages,
    )
