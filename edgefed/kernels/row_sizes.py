"""Products of an expert's rows in few sizes, so that a process stays small.

Where oneDNN multiplies 16-bit numbers on a CPU, it compiles a kernel for every shape and keeps it: 0.3 to 3.5 MiB for
each number of rows of a 2048 x 2048 matrix. Experts see another number of tokens in every step. Rows are therefore
padded with zeros to one of a few sizes. Zero rows change no result: products are row by row, and as the inner dimension
of a weight's gradient they add nothing. Other dtypes and devices are not padded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

ROW_SIZES = (16, 32, 48, 64, 96, 128, 192, 256)
"""Sizes of up to 256 rows; larger ones are multiples of 256. A product of 25 rows takes as long as one of 8, of 32 half
as long again, of 128 three times as long: it reads the weight."""
BLOCK_ROWS = ROW_SIZES[-1]
"""Rows that are multiplied at a time where products are row by row: bounds the number of sizes and the padded copy."""


@functools.lru_cache(maxsize=8)
def is_compiled(dtype: torch.dtype, device_type: str) -> bool:
    """Return whether oneDNN compiles products of this dtype for their shapes."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def padded_size(rows: int) -> int:
    """Return the size to which ``rows`` are padded: the next of `ROW_SIZES`, or a multiple of 256."""
    return next((size for size in ROW_SIZES if size >= rows), -(-rows // BLOCK_ROWS) * BLOCK_ROWS)


def pad_rows(x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    """Return x (P, in), or x[index], with zero rows up to `padded_size`; as it is where nothing is compiled."""
    rows = x.shape[0] if index is None else index.shape[0]
    size = padded_size(rows) if is_compiled(x.dtype, x.device.type) else rows
    if size == rows:
        return x if index is None else x[index]
    padded = x.new_empty(size, x.shape[1])
    if index is None:
        padded[:rows] = x
    else:
        torch.index_select(x, 0, index, out=padded[:rows])
    padded[rows:] = 0
    return padded


def multiply_rows(
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    low: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Set out (P, N) to x W for weight W (in, N), x (P, in) or x[index]; with ``low`` add scale (x low) W to it.

    ``low`` (in, R) and W (R, N) are an adapter. Results of padded rows are dropped.
    """
    rows = out.shape[0]
    compiled = is_compiled(x.dtype, x.device.type)
    block = BLOCK_ROWS if compiled else max(rows, 1)
    for begin in range(0, rows, block):
        end = min(begin + block, rows)
        source = pad_rows(x[begin:end]) if index is None else pad_rows(x, index[begin:end])
        target = out[begin:end]
        if low is not None:
            source = source @ low
            if compiled:  # a product that adds would be compiled beside this one
                target.add_((source @ weight)[: end - begin], alpha=scale)
            else:
                target.addmm_(source, weight, alpha=scale)
        elif source.shape[0] == end - begin:
            torch.mm(source, weight, out=target)
        else:
            target.copy_((source @ weight)[: end - begin])


class _RowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        out = x.new_empty(x.shape[0], weight.shape[1])
        multiply_rows(x, None, weight, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        if weight is not None:
            d_x = dy.new_empty(dy.shape[0], weight.shape[0])
            multiply_rows(dy, None, weight.t(), d_x)
        if x is not None:
            d_weight = pad_rows(x).t() @ pad_rows(dy)
        return d_x, d_weight


_row_product: Any = _RowProduct.apply


def row_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x W, (P, N), for x (P, in) and W (in, N), and its gradients, in the sizes above where it is compiled."""
    if is_compiled(x.dtype, x.device.type):
        product: torch.Tensor = _row_product(x, weight)
        return product
    return x @ weight
