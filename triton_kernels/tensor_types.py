"""What a kernel computes in, for a torch dtype."""

from __future__ import annotations

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
    """The type of the products of a matrix in ``dtype``.

    The interpreter multiplies the bit patterns of bfloat16 without a word (Triton 3.6 to 3.9): there they are
    widened first. Raises ValueError for a dtype without a kernel.
    """
    if dtype not in TYPES:
        raise ValueError(f"no Triton kernel computes in {dtype}; there are {', '.join(map(str, TYPES))}")
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TYPES[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are rounded: as torch.set_float32_matmul_precision asks, exact by default."""
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, (8, 0) in the interpreter, which has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
