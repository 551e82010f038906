"""The types that kernels compute in, by torch dtype; the arithmetic of launch sizes; small tables on the device."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _probe_kernel(x):
    tl.store(x, 0)


INTERPRETED = not isinstance(_probe_kernel, triton.JITFunction)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were decorated): for tests."""


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type of the products of a matrix in ``dtype``.

    The interpreter multiplies the bit patterns of bfloat16 without a word (Triton 3.6 to 3.9): there they are
    widened first. Raises ValueError for a dtype without a kernel.
    """
    if dtype not in TYPES:
        raise ValueError(f"no Triton kernel for {dtype}, expected one of {', '.join(map(str, TYPES))}")
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TYPES[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products, as set by torch.set_float32_matmul_precision; exact by default."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


# `triton.cdiv` and `triton.next_power_of_2` also work in kernels, and take the host 5 us a call for it.
def ceil_div(size: int, part: int) -> int:
    """Return ``size / part``, rounded up."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is not below ``size``; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def device_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability, (8, 0) in the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.lru_cache(maxsize=4096)
def _device_table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device, stream: int) -> torch.Tensor:
    table = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


def device_table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers on the device, copied once without waiting.

    The cache is per stream, because only that stream's order guarantees that the copy has arrived. It holds only
    numbers, never the tensors at the addresses.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _device_table(values, dtype, device, stream)
