"""Whether a device can train with experts quantized to 4 or 8 bits: decided by trying."""

from __future__ import annotations

import functools
from typing import Any, Literal, cast

import torch

from edgefed.errors import first_line
from edgefed.kernels.dispatch import choose, why_not_native
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe.packed import EXPERT_STORAGES, PACKABLE

_WIDTH = 64
_LARGEST_ERROR = 0.05
"""Relative to the largest value: twice the error of a product of 64 values of which x is rounded to bfloat16."""


@functools.lru_cache(maxsize=32)
def packing_problem(storage: str, device: str, dtype: torch.dtype) -> str:
    """Return why ``device`` cannot train with experts of ``dtype`` in this storage; empty if it can.

    Quantizes one expert, runs it forward and backward, and compares with its dequantized weights. Once per process.
    """
    if storage not in EXPERT_STORAGES:
        return f"experts cannot be stored as {storage!r}"
    if dtype not in PACKABLE:
        return f"weights in {str(dtype).removeprefix('torch.')} cannot be quantized"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weights = random(8, _WIDTH), [random(_WIDTH, _WIDTH) / 8 for _ in range(2)]
    try:
        packed = [quantize_experts(weight, cast(Literal["nf4", "int8"], storage)) for weight in weights]
        unpacked = [dequantize_experts(matrix, torch.float32, backend="reference") for matrix in packed]
        found = _product_and_gradient(x.to(device), [matrix.to(device) for matrix in packed], "auto")
        expected = _product_and_gradient(x.float(), unpacked, "reference")
    except Exception as error:  # a missing kernel, an incompatible library
        return f"quantized experts fail on {device}: {first_line(error)}"
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.float().cpu() - theirs).abs().max()
        if not difference <= _LARGEST_ERROR * theirs.abs().max():  # written so that NaN is an error, too
            return f"quantized experts give wrong results on {device}"
    return ""


def packing_is_slow(device: str) -> str:
    """Return why training with quantized experts is too slow on ``device``; empty if it is not."""
    device_type = torch.device(device).type
    if device_type == "cpu" and choose("masked_experts", device_type) == "reference":
        return f"plain PyTorch would dequantize every expert in each step ({why_not_native() or 'EDGEFED_KERNELS'})"
    return ""


def _product_and_gradient(x: torch.Tensor, matrices: list[Any], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.requires_grad_()
    indices = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    weights = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        y = masked_experts(
            x, indices, weights, [SlotWeights(*matrices)], activation=torch.nn.functional.silu, backend=backend
        )
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
    return y.detach(), gradient
