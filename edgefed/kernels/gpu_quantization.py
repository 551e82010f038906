"""Quantization on a GPU by Triton or the CUDA library, for `edgefed.kernels.quantization`.

Both write the bytes of the reference. Quantization waits for the device once, to check that all weights are finite;
dequantization never waits.
"""

from __future__ import annotations

import importlib

import torch

from edgefed.kernels.dispatch import Unsupported


def quantize(name: str, stack: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed and absmax of a contiguous stack (S, rows, columns), by "triton" or "cuda".

    Raises ValueError if a weight is not finite (int8: beyond float16), Unsupported for shapes without a kernel.
    """
    if name == "cuda":
        from edgefed.kernels.cuda_kernels import cuda_kernels

        return cuda_kernels().quantize(stack, format, blocksize)
    _refuse_part_blocks(format, stack.shape[-2] * stack.shape[-1], blocksize)
    if stack.numel():
        extremes = torch.stack(torch.aminmax(stack))  # NaN if any weight is NaN
        if format == "int8":
            extremes = extremes.to(torch.float16)
        if not torch.isfinite(extremes).all():
            raise ValueError("a weight is infinite, NaN or too large for float16")
    triton = importlib.import_module("edgefed.triton_kernels.quantize")
    packed, absmax = triton.quantize(stack, format, blocksize)
    return packed, absmax


def dequantize(
    name: str, packed: torch.Tensor, scales: torch.Tensor, format: str, blocksize: int, out: torch.Tensor
) -> None:
    """Write the values into ``out``, contiguous, (rows, columns) or (S, rows, columns)."""
    if name == "cuda":
        from edgefed.kernels.cuda_kernels import cuda_kernels

        cuda_kernels().dequantize(packed, scales, format, blocksize, out)
        return
    _refuse_part_blocks(format, out.shape[-2] * out.shape[-1], blocksize)
    importlib.import_module("edgefed.triton_kernels.quantize").dequantize(packed, scales, out, format, blocksize)


def _refuse_part_blocks(format: str, size: int, blocksize: int) -> None:
    if format == "nf4" and size % blocksize:
        raise Unsupported(f"an expert of {size} weights does not divide into blocks of {blocksize}")
