"""The smallest Triton kernel that loads, multiplies under a mask and stores. Imported in a worker process only."""

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def scale_rows(x_ptr: Any, scale_ptr: Any, out_ptr: Any, columns: Any, BLOCK: tl.constexpr) -> None:
    """Out (rows, columns) = x * scale (rows,); one program a row, BLOCK >= columns."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * columns + column, x * tl.load(scale_ptr + row), mask=inside)
