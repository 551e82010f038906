"""The sixteen values of NF4 (QLoRA, arXiv 2305.14314, appendix E), as code: no table in memory, no spills."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nf4_value(code):
    """int32 codes 0..15 -> float32. A tree of fifteen selects on the four bits."""
    b3 = (code & 8) != 0
    b2 = (code & 4) != 0
    b1 = (code & 2) != 0
    b0 = (code & 1) != 0
    v00 = tl.where(b0, -0.6961928009986877, -1.0)
    v01 = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    v02 = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    v03 = tl.where(b0, 0.0, -0.09105003625154495)
    v10 = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    v11 = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    v12 = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    v13 = tl.where(b0, 1.0, 0.7229568362236023)
    low = tl.where(b2, tl.where(b1, v03, v02), tl.where(b1, v01, v00))
    high = tl.where(b2, tl.where(b1, v13, v12), tl.where(b1, v11, v10))
    return tl.where(b3, high, low)
