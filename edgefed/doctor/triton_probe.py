"""The smallest Triton kernel that loads, multiplies under a mask and stores. Imported in a worker process only."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x_ptr, scale_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Out (rows, columns) = x * scale (rows,); one program a row, BLOCK >= columns."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    tl.store(out_ptr + row * columns + column, x * tl.load(scale_ptr + row), mask=inside)
