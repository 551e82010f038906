"""Whether a device can train on experts whose weights lie in 4 or 8 bits: tried out, not believed."""

from __future__ import annotations

import functools

import torch

from edgefed.kernels.dispatch import choose, why_not_native
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe.packed import EXPERT_STORAGES, PACKABLE

_WIDTH = 64
_LARGEST_ERROR = 0.05
"""Of the largest number: twice what one rounding of x to bfloat16 leaves of a product of 64."""


@functools.lru_cache(maxsize=32)
def packing_problem(storage: str, device: str, dtype: torch.dtype) -> str:
    """Why no step can be made on ``device`` with experts of ``dtype`` stored so; empty when one can.

    One expert is quantised, multiplied and gone back through, and compared with its unpacked weights. Once per process.
    """
    if storage not in EXPERT_STORAGES:
        return f"experts cannot be stored as {storage!r}"
    if dtype not in PACKABLE:
        return f"weights in {str(dtype).removeprefix('torch.')} cannot be quantised"
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weights = random(8, _WIDTH), [random(_WIDTH, _WIDTH) / 8 for _ in range(2)]
    try:
        packed = [quantize_experts(weight, storage) for weight in weights]
        unpacked = [dequantize_experts(matrix, torch.float32, backend="reference") for matrix in packed]
        found = _product_and_gradient(x.to(device), [matrix.to(device) for matrix in packed], "auto")
        expected = _product_and_gradient(x.float(), unpacked, "reference")
    except Exception as fault:  # a kernel that is not there, a library that does not fit
        lines = str(fault).strip().splitlines()
        return f"quantised experts fail on {device}: {lines[0] if lines else type(fault).__name__}"
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.float().cpu() - theirs).abs().max()
        if not error <= _LARGEST_ERROR * theirs.abs().max():  # not: what is no number is an error, too
            return f"quantised experts compute something else on {device}"
    return ""


def packing_is_slow(device: str) -> str:
    """Why training on quantised experts is not worth its time on ``device``, though it may work; empty when it is."""
    device_type = torch.device(device).type
    if device_type == "cpu" and choose("masked_experts", device_type) == "reference":
        return f"plain PyTorch would unpack every expert in each step ({why_not_native() or 'EDGEFED_KERNELS'})"
    return ""


def _product_and_gradient(x: torch.Tensor, matrices: list, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.requires_grad_()
    indices = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    weights = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        y = masked_experts(
            x, indices, weights, [SlotWeights(*matrices)], activation=torch.nn.functional.silu, backend=backend
        )
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
    return y.detach(), gradient
