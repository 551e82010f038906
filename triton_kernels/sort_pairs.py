"""Sort the (token, k) pairs of a layer by slot, and split them into tiles of work, without waiting for the device.

A pair p = t * K + k has slot s(p) in [-1, S). The result is a stable counting sort: within a slot the pairs keep
their order, and dropped pairs (slot -1) have no position at all.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from .tensor_types import ceil_div, next_power_of_2

MAX_ONE_HOT = 8192  # elements of a (pairs, slots) tile: 64 registers a thread with four warps
MAX_COUNTS = 4096  # elements of a (blocks, slots) tile; several are in registers
MAX_SLOTS = 2048


@triton.jit
def _one_hot(slots, pair, num_pairs, slot, SP: tl.constexpr):
    """(BLOCK, SP) int32: 1 where the pair's slot is the column's."""
    mine = tl.load(slots + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
    return (mine[:, None] == slot[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs"])
def count_pairs_kernel(slots, counts, num_pairs, S: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr):
    """Counts (num_blocks, S) int32: pairs of each slot in each block of pairs."""
    block = tl.program_id(0)
    slot = tl.arange(0, SP)
    one_hot = _one_hot(slots, block * BLOCK + tl.arange(0, BLOCK), num_pairs, slot, SP)
    tl.store(counts + block * S + slot, tl.sum(one_hot, axis=0), mask=slot < S)


@triton.jit(do_not_specialize=["num_blocks", "max_tiles"])
def schedule_tiles_kernel(
    counts,
    offsets,
    tile_slot,
    tile_row,
    num_blocks,
    max_tiles,
    S: tl.constexpr,
    SP: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Turn ``counts`` into the first position of each (block, slot), in one program. Writes two more results.

    offsets (S + 1) int32: first position of each slot, then the number of pairs that are not dropped
    tile_slot, tile_row (max_tiles) int32: slot and first position of each tile of at most BM pairs; slot -1 at the end
    """
    slot = tl.arange(0, SP)
    row = tl.arange(0, ROWS)
    before = tl.zeros((SP,), tl.int32)
    for start in range(0, num_blocks, ROWS):
        at = (start + row)[:, None] * S + slot[None, :]
        mask = ((start + row) < num_blocks)[:, None] & (slot < S)[None, :]
        count = tl.load(counts + at, mask=mask, other=0)
        tl.store(counts + at, tl.cumsum(count, axis=0) - count + before[None, :], mask=mask)
        before += tl.sum(count, axis=0)
    last = tl.cumsum(before, axis=0)
    first = last - before
    tl.store(offsets + slot, first, mask=slot < S)
    tl.store(offsets + S, tl.sum(before, axis=0))
    tiles = (before + BM - 1) // BM
    tiles_last = tl.cumsum(tiles, axis=0)
    tiles_first = tiles_last - tiles
    num_tiles = tl.sum(tiles, axis=0)
    for start in range(0, max_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        owner = ((tiles_first[None, :] <= tile[:, None]) & (tile[:, None] < tiles_last[None, :])).to(tl.int32)
        position = tl.sum(owner * (first - tiles_first * BM)[None, :], axis=1) + tile * BM
        is_tile = tile < num_tiles
        tl.store(tile_slot + tile, tl.where(is_tile, tl.sum(owner * slot[None, :], axis=1), -1), mask=tile < max_tiles)
        tl.store(tile_row + tile, tl.where(is_tile, position, 0), mask=tile < max_tiles)


@triton.jit(do_not_specialize=["num_pairs"])
def place_pairs_kernel(
    slots, counts, offsets, order, position, num_pairs, S: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr
):
    """order[position of p] = p and position[p] = position of p (-1 if dropped), both (num_pairs) int32."""
    block = tl.program_id(0)
    slot = tl.arange(0, SP)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    one_hot = _one_hot(slots, pair, num_pairs, slot, SP)
    start = tl.load(counts + block * S + slot, mask=slot < S, other=0)
    start += tl.load(offsets + slot, mask=slot < S, other=0)
    rank = tl.cumsum(one_hot, axis=0) - 1 + start[None, :]
    has_slot = tl.sum(one_hot, axis=1) > 0
    at = tl.where(has_slot, tl.sum(one_hot * rank, axis=1), -1)
    tl.store(position + pair, at, mask=pair < num_pairs)
    tl.store(order + at, pair, mask=(pair < num_pairs) & has_slot)


@dataclasses.dataclass(frozen=True)
class SortedPairs:
    """The pairs of one layer and batch, by slot. All tensors int32, on the device of the tokens.

    ``order`` (T*K,) and ``position`` (T*K,) are written by `place_pairs_kernel` (``order`` is undefined after the last
    pair that is not dropped), ``offsets`` (S+1,), ``tile_slot`` and ``tile_row`` (max_tiles,) by
    `schedule_tiles_kernel`.
    """

    order: torch.Tensor
    position: torch.Tensor
    offsets: torch.Tensor
    tile_slot: torch.Tensor
    tile_row: torch.Tensor
    top_k: int
    rows_per_tile: int

    @property
    def num_pairs(self) -> int:
        """T * K, dropped pairs included: the number that the host knows."""
        return self.order.shape[0]

    @property
    def num_slots(self) -> int:
        """Number of slots S."""
        return self.offsets.shape[0] - 1

    @property
    def max_tiles(self) -> int:
        """Upper bound of the number of tiles."""
        return self.tile_slot.shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors that autograd saves."""
        return (self.order, self.position, self.offsets, self.tile_slot, self.tile_row)


def sort_pairs(slot_indices: torch.Tensor, num_slots: int, rows_per_tile: int) -> SortedPairs:
    """Sort the pairs of ``slot_indices`` (T, K), int32 or int64 in [-1, num_slots), T*K > 0 and num_slots > 0.

    A slot outside the range counts as dropped; whoever knows indices on the host checks them there. Three launches,
    no synchronization. Raises ValueError above MAX_SLOTS slots.
    """
    if num_slots > MAX_SLOTS:
        raise ValueError(f"{num_slots} slots in one layer; the maximum is {MAX_SLOTS}")
    slots = slot_indices.reshape(-1).contiguous()
    num_pairs, device = slots.shape[0], slots.device
    padded = max(next_power_of_2(num_slots), 2)
    block = min(max(MAX_ONE_HOT // padded, 4), 256)
    num_blocks = ceil_div(num_pairs, block)
    rows = min(max(MAX_COUNTS // padded, 1), next_power_of_2(num_blocks))
    max_tiles = ceil_div(num_pairs, rows_per_tile) + min(num_slots, num_pairs)

    def new(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    counts = new(num_blocks * num_slots)
    order, position, offsets = new(num_pairs), new(num_pairs), new(num_slots + 1)
    tile_slot, tile_row = new(max_tiles), new(max_tiles)
    count_pairs_kernel[(num_blocks,)](slots, counts, num_pairs, num_slots, padded, block)
    schedule_tiles_kernel[(1,)](
        counts,
        offsets,
        tile_slot,
        tile_row,
        num_blocks,
        max_tiles,
        num_slots,
        padded,
        rows_per_tile,
        rows,
        max(min(MAX_COUNTS // padded, 64), 1),
    )
    place_pairs_kernel[(num_blocks,)](slots, counts, offsets, order, position, num_pairs, num_slots, padded, block)
    return SortedPairs(order, position, offsets, tile_slot, tile_row, slot_indices.shape[1], rows_per_tile)
