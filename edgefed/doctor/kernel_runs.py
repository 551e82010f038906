"""Arithmetic that is really run on the device and compared with a slower, exact form. For the worker process only.

Each function returns a sentence about what it did, or raises `WrongResult`. Devices are torch names: cpu, cuda:0.
The inputs are drawn on the CPU from a fixed seed, so every device computes the same thing.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NF4_LARGEST_STEP = 0.3038
"""Widest distance of two neighbours in the NF4 table, of a block's absmax (arXiv:2305.14314, appendix E): the two
lowest, -1 and -0.6962. Rounding is off by half of it at most."""


class WrongResult(ArithmeticError):
    """A kernel ran and its result is not what the mathematics say."""


def matmul(device: str, dtype: str) -> str:
    """``A @ B`` of (96, 256) and (256, 64), against the same product in float64.

    Allowed are K = 256 roundings in float32 of |A| |B|, and a few roundings to the result's own type of the result and
    of partial sums, which are as large as results are on average. TF32 is switched off: it has 10 bits and would hide
    a wrong kernel.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    a = torch.randn(96, 256, generator=generator).to(kind)
    b = torch.randn(256, 64, generator=generator).to(kind)
    exact = a.double() @ b.double()
    sums = 256 * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
    allowed = sums + 2 * torch.finfo(kind).eps * (exact.abs() + exact.square().mean().sqrt())
    found = (a.to(device) @ b.to(device)).cpu().double()
    return compare(found, exact, allowed, f"96x256x64 in {dtype}")


def masked_experts(device: str) -> str:
    """The expert layer of edgefed forward and backward in float32, against a dense sum over all experts in float64.

    6 tokens, 3 slots of which one gets no token, top-2 with dropped pairs.
    """
    import torch
    from torch.nn import functional

    from edgefed.kernels.masked_experts import SlotWeights
    from edgefed.kernels.masked_experts import masked_experts as run

    torch.set_float32_matmul_precision("highest")
    tokens, hidden, width, slots = 6, 32, 48, 3
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(tokens, hidden, generator=generator)
    expert_weights = torch.rand(tokens, 2, generator=generator)
    up = [torch.randn(2 * width, hidden, generator=generator) / hidden**0.5 for _ in range(slots)]
    down = [torch.randn(hidden, width, generator=generator) / width**0.5 for _ in range(slots)]
    slot_indices = torch.tensor([[0, 2], [2, -1], [-1, -1], [0, 0], [2, 0], [-1, 2]])
    upstream = torch.randn(tokens, hidden, generator=generator)

    def gated(x: torch.Tensor) -> torch.Tensor:
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value

    def leaves(place: str, dtype: torch.dtype) -> list[torch.Tensor]:
        return [
            t.detach().clone().to(place, dtype).requires_grad_() for t in (hidden_states, expert_weights, *up, *down)
        ]

    found = leaves(device, torch.float32)
    weights = [SlotWeights(up=found[2 + s], down=found[2 + slots + s]) for s in range(slots)]
    output = run(found[0], slot_indices.to(device), found[1], weights, activation=gated)
    torch.autograd.backward(output, upstream.to(device))

    exact = leaves("cpu", torch.float64)
    dense = torch.zeros(tokens, hidden, dtype=torch.float64)
    for slot in range(slots):
        share = (exact[1] * (slot_indices == slot)).sum(dim=1, keepdim=True)  # (T, 1)
        dense = dense + share * functional.linear(
            gated(functional.linear(exact[0], exact[2 + slot])), exact[2 + slots + slot]
        )
    torch.autograd.backward(dense, upstream.double())

    compare(output.detach().cpu().double(), dense.detach(), 1e-4, "the forward pass")
    for name, one, other in zip(("x", "weights", *["up"] * slots, *["down"] * slots), found, exact, strict=True):
        # A slot without a token takes no part in the graph: no gradient there, zeros or none in the dense sum.
        one_grad, other_grad = (torch.zeros_like(t) if t.grad is None else t.grad for t in (one, other))
        compare(one_grad.cpu().double(), other_grad, 1e-4, f"the gradient of {name}")
    return "forward and all gradients, 3 experts"


def nf4(device: str, columns: int) -> str:
    """bitsandbytes: a matrix of ``columns`` columns to NF4 in blocks of 64 and back, on the device.

    A successful import does not prove that it works: on a Jetson it fails here. Rows that are not a multiple of a block
    need their own call: the CPU kernel of bitsandbytes 0.50.2 scales such a row and the next
    ones by the wrong maximum.
    """
    import bitsandbytes.functional as quantizer
    import torch

    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(2))
    packed, state = quantizer.quantize_4bit(weight.to(device), blocksize=64, quant_type="nf4")
    back = quantizer.dequantize_4bit(packed, state).cpu().float()
    absmax = weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True).expand(-1, 64).reshape(16, columns)
    return compare(back, weight, (NF4_LARGEST_STEP / 2 * 1.01) * absmax, f"16x{columns} to NF4 and back")


def int8_product(device: str) -> str:
    """bitsandbytes: the product of LLM.int8 (arXiv 2208.07339) of (24, 128) and (64, 128), against its own integers.

    The codes must be the nearest multiples of each row's maximum / 127, the product of integers exact, and the result
    that of the codes, which is rounded to float16.
    """
    import bitsandbytes.functional as quantizer
    import torch

    generator = torch.Generator().manual_seed(5)
    matrices = [torch.randn(rows, 128, generator=generator).half() for rows in (24, 64)]
    codes, scales = [], []
    for matrix in matrices:
        quantized, absmax, _ = quantizer.int8_vectorwise_quant(matrix.to(device))
        step = matrix.float().abs().amax(dim=1, keepdim=True) / 127
        compare(quantized.cpu() * step, matrix.float(), 0.51 * step.expand(-1, 128), "the 8-bit codes")
        codes.append(quantized)
        scales.append(absmax)
    found = quantizer.int8_mm_dequant(quantizer.int8_linear_matmul(*codes), *scales).cpu().double()
    a, b = (
        code.cpu().double() * scale.cpu().double()[:, None] / 127 for code, scale in zip(codes, scales, strict=True)
    )
    exact = a @ b.T
    return compare(found, exact, 2e-3 * exact.abs() + 1e-3, "24x128x64 in int8")


def eight_bit_step(device: str) -> str:
    """bitsandbytes: a step of the 8-bit AdamW, and on a GPU of the paged one (`edgefed.training.savings`)."""
    from edgefed.training.savings import eight_bit_problem

    names = ["AdamW8bit", "PagedAdamW8bit"] if device.startswith("cuda") else ["AdamW8bit"]
    for name in names:
        if problem := eight_bit_problem(device, name):
            raise WrongResult(problem)
    return f"a step of {' and of '.join(names)}"


def triton_kernel(device: str) -> str:
    """Compile and run a Triton kernel on the device, or in Triton's interpreter when TRITON_INTERPRET is set."""
    import torch

    scale_rows = importlib.import_module("edgefed.doctor.triton_probe").scale_rows
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 48, generator=generator)
    scale = torch.randn(8, generator=generator)
    out = torch.empty(8, 48, device=device)
    started = time.perf_counter()
    scale_rows[(8,)](x.to(device), scale.to(device), out, 48, BLOCK=64)
    compare(out.cpu().double(), x.double() * scale.double()[:, None], 1e-6, "the Triton kernel")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "ran in Triton's interpreter, for want of a GPU"
    return f"compiled and ran in {time.perf_counter() - started:.1f} s"


def native_fold() -> str:
    """Edgefed's own library: the fold of weighted updates in every dtype, bit for bit against numpy."""
    import numpy as np

    from edgefed.kernels.fold import NUMPY, native_backend
    from edgefed.protocol.frames import FLOAT_DTYPES, narrow

    native = native_backend()
    draw = np.random.default_rng(4)
    for dtype in FLOAT_DTYPES:
        raw = np.ascontiguousarray(narrow(draw.standard_normal(1013), dtype))
        start = draw.standard_normal(1013)
        sums = []
        for backend in (NUMPY, native):
            total = start.copy()
            out = np.empty_like(raw)
            backend.fold_block(total, raw, dtype, 0.3)
            backend.narrow_block(total, dtype, out)
            sums.append((total.tobytes(), out.tobytes(), backend.first_nonfinite(raw, dtype)))
        if sums[0] != sums[1]:
            raise WrongResult(f"the native fold of {dtype} gives other bits than numpy")
    return f"folds {', '.join(FLOAT_DTYPES)} to the same bits as numpy"


def compare(found: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor | float, what: str) -> str:
    """Raise `WrongResult` where ``found`` is farther from ``exact`` than ``allowed``, or no number."""
    if found.shape != exact.shape:
        raise WrongResult(f"{what}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    error = (found - exact).abs()
    largest = float(error.max() / exact.abs().max().clamp_min(1e-30))
    wrong = int((~(error <= allowed)).sum())  # a NaN is not below anything
    if wrong:
        raise WrongResult(
            f"{what}: {wrong} of {error.numel()} numbers are wrong, by up to {largest:.1%} of the largest"
        )
    return f"{what}, largest error {largest:.1e} of the largest number"
