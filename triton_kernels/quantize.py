"""Quantization and dequantization of NF4 and INT8, bit for bit as `edgefed.kernels.quantization` defines them.

A stack (S, rows, columns) is one call. The kernels write what fits a `QuantizedMatrix`: packed and absmax.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .nf4 import nf4_table, nf4_value
from .tensor_types import ceil_div, next_power_of_2

VALUES_PER_PROGRAM = 2048
MAX_COLUMNS = 2048  # of a row at once, int8


@triton.jit
def _nf4_code(x):
    """float32 in [-1, 1] -> the code of the nearest of the sixteen values: the number of midpoints below.

    The midpoints are rounded to float32, as (code[i] + code[i + 1]) / 2 is there.
    """
    code = (x > -0.8480963706970215).to(tl.int32)
    code += (x > -0.6106328964233398).to(tl.int32)
    code += (x > -0.4599952697753906).to(tl.int32)
    code += (x > -0.33967941999435425).to(tl.int32)
    code += (x > -0.23460739850997925).to(tl.int32)
    code += (x > -0.13791173696517944).to(tl.int32)
    code += (x > -0.045525018125772476).to(tl.int32)
    code += (x > 0.03979014977812767).to(tl.int32)
    code += (x > 0.120255246758461).to(tl.int32)
    code += (x > 0.2035212516784668).to(tl.int32)
    code += (x > 0.2920137643814087).to(tl.int32)
    code += (x > 0.3893125355243683).to(tl.int32)
    code += (x > 0.5016634464263916).to(tl.int32)
    code += (x > 0.6427869200706482).to(tl.int32)
    code += (x > 0.8614784479141235).to(tl.int32)
    return code


@triton.jit(do_not_specialize=["num_blocks"])
def quantize_nf4_kernel(values, packed, absmax, num_blocks, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Quantize BLOCKS blocks per program."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    half = tl.arange(0, BLOCKSIZE // 2)
    at = values + block[:, None] * BLOCKSIZE + 2 * half[None, :]
    even = tl.load(at, mask=is_block[:, None], other=0.0).to(tl.float32)
    odd = tl.load(at + 1, mask=is_block[:, None], other=0.0).to(tl.float32)
    top = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
    tiny = tl.full((BLOCKS,), 1e-38, tl.float32)  # as a literal, a subnormal number is float64 up to Triton 3.8
    factor = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), tl.maximum(top, tiny))[:, None]
    even = tl.minimum(tl.maximum(even * factor, -1.0), 1.0)
    odd = tl.minimum(tl.maximum(odd * factor, -1.0), 1.0)
    code = (_nf4_code(even) << 4) | _nf4_code(odd)
    tl.store(packed + block[:, None] * (BLOCKSIZE // 2) + half[None, :], code.to(tl.uint8), mask=is_block[:, None])
    tl.store(absmax + block, top, mask=is_block)


@triton.jit(do_not_specialize=["num_blocks"])
def dequantize_nf4_kernel(packed, absmax, table, values, num_blocks, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """Dequantize BLOCKS blocks per program."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    half = tl.arange(0, BLOCKSIZE // 2)
    at = block[:, None] * (BLOCKSIZE // 2) + half[None, :]
    code = tl.load(packed + at, mask=is_block[:, None], other=0).to(tl.int32)
    top = tl.load(absmax + block, mask=is_block, other=0.0)[:, None]
    value = tl.interleave(nf4_value(table, code >> 4) * top, nf4_value(table, code & 15) * top)
    to = values + block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(to, value.to(values.dtype.element_ty), mask=is_block[:, None])


@triton.jit
def quantize_int8_kernel(values, packed, absmax, COLUMNS: tl.constexpr, BC: tl.constexpr):
    """Quantize one row per program, which reads it twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BC)
    largest = tl.zeros((BC,), tl.float32)
    for start in range(0, COLUMNS, BC):
        x = tl.load(values + row * COLUMNS + start + column, mask=start + column < COLUMNS, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float16).to(tl.float32)))
    top = tl.max(largest, axis=0)
    # Two roundings, as torch computes 127 / absmax; 0 for a row of zeros.
    factor = tl.where(top > 0.0, tl.div_rn(1.0, tl.where(top > 0.0, top, 1.0)) * 127.0, 0.0)
    for start in range(0, COLUMNS, BC):
        mask = start + column < COLUMNS
        x = tl.load(values + row * COLUMNS + start + column, mask=mask, other=0.0).to(tl.float32)
        x = x.to(tl.float16).to(tl.float32)
        # Adding and taking away 1.5 * 2^23 rounds to nearest, ties to even.
        rounded = (x * factor + 12582912.0) - 12582912.0
        tl.store(packed + row * COLUMNS + start + column, rounded.to(tl.int8), mask=mask)
    tl.store(absmax + row, top)


@triton.jit
def dequantize_int8_kernel(packed, absmax, values, COLUMNS: tl.constexpr, BC: tl.constexpr):
    """Dequantize one row and BC columns per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = column < COLUMNS
    x = tl.load(packed + row * COLUMNS + column, mask=mask, other=0).to(tl.float32)
    x = x * tl.load(absmax + row) * 0.007874015748031496
    tl.store(values + row * COLUMNS + column, x.to(values.dtype.element_ty), mask=mask)


def _on_its_device(function):
    """Launch on the device of the first argument, not on the current one."""

    @functools.wraps(function)
    def guarded(tensor, *args, **options):
        with torch.cuda.device_of(tensor):
            return function(tensor, *args, **options)

    return guarded


@_on_its_device
def quantize(weights: torch.Tensor, format: str, blocksize: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize (S, rows, columns), float32, float16 or bfloat16, to packed and absmax, without synchronization.

    nf4: uint8 (S, rows * columns / 2) and float32 (S, blocks); int8: int8 (S, rows, columns) and float32 (S, rows).
    What is not finite is for the caller to refuse. Raises ValueError when an expert is no whole number of blocks.
    """
    experts, rows, columns = weights.shape
    weights, device, size = weights.contiguous(), weights.device, rows * columns
    if format == "int8":
        packed = torch.empty(weights.shape, dtype=torch.int8, device=device)
        absmax = torch.empty(experts, rows, device=device)
        if packed.numel():
            quantize_int8_kernel[(experts * rows,)](
                weights,
                packed,
                absmax,
                columns,
                min(next_power_of_2(columns), MAX_COLUMNS),
                num_warps=4,
                enable_fp_fusion=False,  # the product is rounded before the sum, as on the CPU
            )
        return packed, absmax
    if size % blocksize:
        raise ValueError(f"experts of {rows} x {columns} do not divide into blocks of {blocksize}")
    packed = torch.empty(experts, size // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(experts, size // blocksize, device=device)
    if packed.numel():
        blocks = max(VALUES_PER_PROGRAM // blocksize, 1)
        quantize_nf4_kernel[(ceil_div(absmax.numel(), blocks),)](
            weights, packed, absmax, absmax.numel(), blocksize, blocks, num_warps=4, enable_fp_fusion=False
        )
    return packed, absmax


@_on_its_device
def dequantize(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, format: str, blocksize: int = 64) -> None:
    """Write the values to ``out``, contiguous, of the weights' shape and any float dtype."""
    if out.numel() == 0:
        return
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if format == "int8":
        columns = out.shape[-1]
        block = min(next_power_of_2(columns), MAX_COLUMNS)
        dequantize_int8_kernel[(absmax.numel(), ceil_div(columns, block))](
            packed, absmax, out, columns, block, num_warps=4, enable_fp_fusion=False
        )
        return
    if absmax.numel() * blocksize != out.numel():
        raise ValueError(f"{absmax.numel()} blocks of {blocksize} do not fill {tuple(out.shape)}")
    blocks = max(VALUES_PER_PROGRAM // blocksize, 1)
    dequantize_nf4_kernel[(ceil_div(absmax.numel(), blocks),)](
        packed,
        absmax,
        nf4_table(out.device),
        out,
        absmax.numel(),
        blocksize,
        blocks,
        num_warps=4,
        enable_fp_fusion=False,
    )
