"""Compile the launches of a layer through Triton's JIT for a GPU that this machine does not have. Nothing runs.

Run as a program, without TRITON_INTERPRET: prints one JSON row per kernel that a forward and backward pass compiles.

    python triton_launches.py CAPABILITY KIND...      one slot of each kind: plain nf4 int8; "lora" gives adapters
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_resources import resources_of

from edgefed.kernels import quantization
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights
from edgefed.triton_kernels.masked_experts import masked_experts

HIDDEN, WIDTH, RANK = 128, 64, 8


class AbsentGpu:
    """The parts of a Triton driver that compiling needs."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


def make_slot(kind: str, lora: bool, dtype: torch.dtype) -> SlotWeights:
    def matrix(rows, columns):
        value = torch.randn(rows, columns).to(dtype)
        if kind == "plain":
            return value.requires_grad_()
        return quantization.quantize_experts(value, kind, backend="reference")

    def pair(rows, columns):
        parts = torch.randn(RANK, columns, requires_grad=True), torch.randn(rows, RANK, requires_grad=True)
        return LowRankPair(*parts, 2.0) if lora else None

    return SlotWeights(
        up=matrix(2 * WIDTH, HIDDEN),
        down=matrix(HIDDEN, WIDTH),
        up_lora=pair(2 * WIDTH, HIDDEN),
        down_lora=pair(HIDDEN, WIDTH),
    )


def main(capability: int, kinds: list[str]) -> None:
    rows: dict[tuple, dict] = {}
    run = triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        row = {"kernel": kernel.fn.__name__, **dataclasses.asdict(resources_of(compiled))}
        rows[compiled.hash] = row
        return compiled

    triton.runtime.driver.set_active(AbsentGpu(capability))
    triton.JITFunction.run = compile_only
    dtype = torch.bfloat16
    slots = [make_slot(kind, "lora" in kinds, dtype) for kind in kinds if kind != "lora"]
    hidden = torch.randn(64, HIDDEN).to(dtype).requires_grad_()
    weights = torch.rand(64, 2, requires_grad=True)
    out = masked_experts(hidden, torch.zeros(64, 2, dtype=torch.int64), weights, slots, activation=swiglu)
    torch.autograd.backward(out, torch.ones_like(out))
    json.dump(list(rows.values()), sys.stdout, indent=1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
