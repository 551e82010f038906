"""Quantisation on a GPU: what `edgefed.kernels.quantization` asks of Triton and of the CUDA library.

Both write the bytes of the reference. The one wait for the device is for the answer whether all weights are finite;
dequantising never waits.
"""

from __future__ import annotations

import importlib

import torch

from edgefed.kernels.dispatch import Unsupported


def quantize(name: str, stack: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed and absmax of a contiguous stack (S, rows, columns), by "triton" or "cuda".

    Raises ValueError where a weight is not finite (int8: beyond float16), Unsupported for what has no kernel.
    """
    if name == "cuda":
        return _cuda().quantize(stack, format, blocksize)
    _refuse_part_blocks(format, stack.shape[-2] * stack.shape[-1], blocksize)
    if stack.numel():
        extremes = torch.stack(torch.aminmax(stack))  # not a number where any is
        if format == "int8":
            extremes = extremes.to(torch.float16)
        if not torch.isfinite(extremes).all():
            raise ValueError("a weight is infinite, not a number, or too large for float16")
    return importlib.import_module("edgefed.triton_kernels.quantize").quantize(stack, format, blocksize)


def dequantize(
    name: str, packed: torch.Tensor, scales: torch.Tensor, format: str, blocksize: int, out: torch.Tensor
) -> None:
    """Write the values into ``out``, contiguous, (rows, columns) or (S, rows, columns)."""
    if name == "cuda":
        _cuda().dequantize(packed, scales, format, blocksize, out)
        return
    _refuse_part_blocks(format, out.shape[-2] * out.shape[-1], blocksize)
    importlib.import_module("edgefed.triton_kernels.quantize").dequantize(packed, scales, out, format, blocksize)


def _cuda():
    from edgefed.kernels.cuda_kernels import cuda_kernels

    return cuda_kernels()


def _refuse_part_blocks(format: str, size: int, blocksize: int) -> None:
    if format == "nf4" and size % blocksize:
        raise Unsupported(f"an expert of {size} weights is no whole number of blocks of {blocksize}")
