"""The sixteen values of NF4 (QLoRA, arXiv 2305.14314, appendix E), in memory.

A kernel loads each value by its code. Selecting it by comparisons takes 15 instructions, which the compiler repeats in
every warp of a matrix product. It does not repeat a load, so a block decodes each weight once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tensor_types import device_table

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@triton.jit
def nf4_value(table, code):
    """int32 codes 0..15 -> float32, from `nf4_table`."""
    return tl.load(table + code)


def nf4_table(device: torch.device) -> torch.Tensor:
    """Return the values (16,) float32 on a device."""
    return device_table(VALUES, torch.float32, device)
