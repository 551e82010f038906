"""Neuron energy, summed on the device beside the products of a layer: `edgefed.kernels.neuron_energy`.

    energy[s, j] += sum_p (expert_weights[pair(p)] hidden[p, j])^2 * sum_h down_s[h, j]^2     over the positions p of s

A program owns a block of neurons of one slot: it adds up the rows of the slot, then unpacks its columns of the down
projection for their norms. So nothing of size (T*K, I) or (H, I) is written, nothing is added atomically, and a slot
without a row costs one load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .grouped_matmul import FORMATS
from .nf4 import nf4_value
from .projection import Group, Projection, Unsupported
from .sort_pairs import SortedPairs
from .tensor_types import ceil_div, compute_type, device_table

DTYPES = (torch.float32, torch.float64)
NEURONS, ROWS, DEPTH = 64, 32, 32
"""Tile of a program: neurons, rows of a step of the first sum, and of the second."""


@triton.jit(do_not_specialize=["group"])
def neuron_energy_kernel(
    energy,
    energy_offset,
    hidden,
    expert_weights,
    order,
    offsets,
    slot_group,
    weight,
    weight_offset,
    absmax,
    absmax_offset,
    table,  # values of NF4
    group,
    I: tl.constexpr,  # noqa: E741 - the field's letter
    H: tl.constexpr,
    FORMAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # W_down is (I, H), else (H, I)
    SPLIT: tl.constexpr,  # columns of ``hidden``: even ones first
    BLOCKSIZE: tl.constexpr,  # values per absmax, NF4
    COMPUTE: tl.constexpr,  # dtype that weights are unpacked to
    BI: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
):
    """Add the energies of one block of neurons of one slot. See `add_neuron_energy`."""
    slot = tl.program_id(1)
    if tl.load(slot_group + slot) != group:
        return
    begin = tl.load(offsets + slot)
    end = tl.load(offsets + slot + 1)
    if begin == end:
        return
    n = tl.program_id(0) * BI + tl.arange(0, BI)
    is_neuron = n < I
    column = tl.where(n % 2 == 0, n // 2, n // 2 + I // 2) if SPLIT else n
    squares = tl.zeros((BI,), tl.float32)
    for start in range(begin, end, BR):
        row = start + tl.arange(0, BR)
        is_row = row < end
        pair = tl.load(order + row, mask=is_row, other=0)
        factor = tl.load(expert_weights + pair, mask=is_row, other=0.0).to(tl.float32)
        at = hidden + row.to(tl.int64)[:, None] * I + column[None, :]
        x = tl.load(at, mask=is_row[:, None] & is_neuron[None, :], other=0.0).to(tl.float32) * factor[:, None]
        squares += tl.sum(x * x, axis=0)

    w = weight + tl.load(weight_offset + slot)
    if FORMAT > 0:
        scales = absmax + tl.load(absmax_offset + slot)
    norms = tl.zeros((BI,), tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        mask = (h < H)[:, None] & is_neuron[None, :]
        at = n[None, :] * H + h[:, None] if TRANSPOSED else h[:, None] * I + n[None, :]  # (BH, BI)
        if FORMAT == 1:
            code = tl.load(w + at // 2, mask=mask, other=0).to(tl.int32)
            code = tl.where(at % 2 == 0, code >> 4, code & 15)
            top = tl.load(scales + at // BLOCKSIZE, mask=mask, other=0.0)
            v = (nf4_value(table, code) * top).to(COMPUTE).to(tl.float32)
        elif FORMAT == 2:
            if TRANSPOSED:
                top = tl.load(scales + n, mask=is_neuron, other=0.0)[None, :]
            else:
                top = tl.load(scales + h, mask=h < H, other=0.0)[:, None]
            v = tl.load(w + at, mask=mask, other=0).to(tl.float32)
            v = (v * (top * 0.007874015748031496)).to(COMPUTE).to(tl.float32)
        else:
            v = tl.load(w + at, mask=mask, other=0.0).to(tl.float32)
        norms += tl.sum(v * v, axis=0)

    to = energy + tl.load(energy_offset + slot) + n
    total = tl.load(to, mask=is_neuron, other=0.0)
    tl.store(to, total + (squares * norms).to(energy.dtype.element_ty), mask=is_neuron)


@dataclasses.dataclass(frozen=True)
class EnergySums:
    """The accumulators (I,) of all slots: ``base`` and (S,) int64 offsets from it, in elements."""

    base: torch.Tensor
    offsets: torch.Tensor


def energy_sums(accumulators: Sequence[torch.Tensor], num_slots: int, width: int, device: torch.device) -> EnergySums:
    """Return the accumulators as the kernel takes them; their tensors need not share a storage.

    Raises ValueError unless there are ``num_slots`` of ``width`` neurons, Unsupported for a dtype, stride or device
    without a kernel.
    """
    if len(accumulators) != num_slots or any(each.shape != (width,) for each in accumulators):
        shapes = sorted({tuple(each.shape) for each in accumulators})
        raise ValueError(
            f"expected {num_slots} accumulators of shape ({width},), found {len(accumulators)} of {shapes}"
        )
    base = accumulators[0]
    if base.dtype not in DTYPES or any(
        each.dtype != base.dtype or each.device != device or not each.is_contiguous() for each in accumulators
    ):
        raise Unsupported(f"energies must be contiguous, in float32 or float64, on {device}")
    start, size = base.data_ptr(), base.element_size()
    offsets = tuple((each.data_ptr() - start) // size for each in accumulators)
    if any((each.data_ptr() - start) % size for each in accumulators):
        raise Unsupported(f"energies must be aligned to their own {size} bytes")
    return EnergySums(base, device_table(offsets, torch.int64, device))


def add_neuron_energy(
    sums: EnergySums,
    hidden: torch.Tensor,
    expert_weights: torch.Tensor,
    pairs: SortedPairs,
    down: Projection,
    *,
    is_split: bool,
) -> None:
    """Add the energies of a layer's neurons to ``sums``, one launch per group of slots, without a synchronization.

    Args:
        sums: the accumulators.
        hidden: (T*K, I) by position, what the down projection multiplies; contiguous.
        expert_weights: (T, K) by pair, contiguous.
        pairs: the sorted pairs.
        down: the down projection of all slots.
        is_split: the rows of NF4 slots have their even columns first.

    """
    width = hidden.shape[1]
    for group in down.groups:
        _launch(sums, hidden, expert_weights, pairs, down, group, width, is_split=is_split)


def _launch(
    sums: EnergySums, hidden: torch.Tensor, expert_weights: torch.Tensor, pairs: SortedPairs, down: Projection,
    group: Group, width: int, *, is_split: bool,
) -> None:  # fmt: skip
    matrices = group.matrices
    neuron_energy_kernel[(ceil_div(width, NEURONS), pairs.num_slots)](
        sums.base,
        sums.offsets,
        hidden,
        expert_weights,
        pairs.order,
        pairs.offsets,
        down.slot_group,
        matrices.weight.base,
        matrices.weight.offsets,
        matrices.absmax.base if matrices.absmax else hidden,
        matrices.absmax.offsets if matrices.absmax else pairs.offsets,
        hidden if matrices.table is None else matrices.table,
        group.index,
        I=width,
        H=down.size_out,
        FORMAT=FORMATS[matrices.format],
        TRANSPOSED=down.is_transposed,
        SPLIT=is_split and group.reads_split(last=not down.is_transposed),
        BLOCKSIZE=matrices.blocksize,
        COMPUTE=compute_type(matrices.dtype),
        BI=NEURONS,
        BR=ROWS,
        BH=DEPTH,
        num_warps=4,
        num_stages=2,
    )
