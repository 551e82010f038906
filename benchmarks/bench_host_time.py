"""Host time of a layer of masked experts on a GPU backend: processor time, with kernels that do nothing.

    python benchmarks/bench_host_time.py --json benchmarks/results/host_time.json

A GPU computes a layer of OLMoE with one token in 0.03 to 0.08 ms (computed from the instructions), so the host must not
take longer. The tensors are on the CPU, and launches return at once; what CUDA or Triton takes to launch is not in it.
``lasting`` slots keep their tensors, as those of a bank; the others are collected at each call.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance
from torch.nn import functional as F

from edgefed.kernels import cuda_experts
from edgefed.kernels.cuda_kernels import CudaKernels
from edgefed.kernels.masked_experts import LastingSlots, LowRankPair, SlotWeights
from edgefed.kernels.quantization import quantize_experts

EXPERTS, TOP_K, HIDDEN, WIDTH, RANK = 64, 8, 64, 64, 8
TARGET_US = 150.0
"""Of a forward pass with lasting slots."""


class Still:
    """A library whose kernels return at once."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: object) -> int:
            return 1024 if name.endswith(("_size", "_scratch")) else 0

        setattr(self, name, function)
        return function


class Lasting(list):
    """Slots that keep their tensors."""

    scheduled = None

    def __init__(self, slots: list[SlotWeights]):
        super().__init__(slots)
        self.lasting = LastingSlots(self)


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def make_slots(rank: int) -> list[SlotWeights]:
    up = quantize_experts(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).bfloat16(), "nf4")
    down = quantize_experts(torch.randn(EXPERTS, HIDDEN, WIDTH).bfloat16(), "nf4")

    def adapter(rows: int, columns: int) -> LowRankPair | None:
        parts = torch.randn(rank, columns).requires_grad_(), torch.randn(rows, rank).requires_grad_()
        return LowRankPair(*parts, 1.0) if rank else None

    return [
        SlotWeights(up[slot], down[slot], up_lora=adapter(2 * WIDTH, HIDDEN), down_lora=adapter(HIDDEN, WIDTH))
        for slot in range(EXPERTS)
    ]


def cuda_layer() -> Callable[..., torch.Tensor]:
    """The CUDA experts with a library that does nothing."""
    kernels = CudaKernels(Still(), emulated=True)
    return lambda hidden, indices, weights, slots: cuda_experts.masked_experts(
        hidden, indices, weights, slots, swiglu, False, kernels=kernels
    )


def triton_layer() -> Callable[..., torch.Tensor] | None:
    """The Triton experts with launches that do nothing; None without Triton."""
    try:
        from edgefed.triton_kernels import combine, gate, grouped_matmul, grouped_outer, masked_experts, sort_pairs
    except ImportError:
        return None

    class NoLaunch:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: None

    for module in (combine, gate, grouped_matmul, grouped_outer, sort_pairs):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, NoLaunch())
    return lambda hidden, indices, weights, slots: masked_experts.masked_experts(
        hidden, indices, weights, slots, activation=swiglu
    )


def shortest_us(run: Callable[[], object], repetitions: int) -> float:
    """Shortest processor time of a call in microseconds: other processes only lengthen one."""
    shortest = float("inf")
    for _ in range(repetitions):
        start = time.process_time()
        run()
        shortest = min(shortest, time.process_time() - start)
    return round(shortest * 1e6, 1)


def measure(layer: Callable[..., torch.Tensor], rank: int, lasting: bool, repetitions: int) -> dict:
    slots = make_slots(rank)
    leaves = [
        part
        for slot in slots
        for pair in (slot.up_lora, slot.down_lora)
        for part in ((pair.lora_a, pair.lora_b) if pair else ())
    ]
    own = Lasting(slots) if lasting else slots
    indices = torch.arange(TOP_K).unsqueeze(0)
    hidden, weights = torch.randn(1, HIDDEN).bfloat16(), torch.rand(1, TOP_K).bfloat16()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return layer(hidden, indices, weights, own)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        inputs = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        layer(inputs[0], indices, inputs[1], own).backward(hidden)

    return {
        "adapters": bool(rank),
        "lasting": lasting,
        "forward_us": shortest_us(forward, repetitions),
        "forward_and_backward_us": shortest_us(both, repetitions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {"backend": name, **measure(layer, rank, lasting, arguments.repetitions)}
        for name, layer in (("cuda", cuda_layer()), ("triton", triton_layer()))
        if layer is not None
        for rank in (0, RANK)
        for lasting in (True, False)
    ]
    for row in rows:
        print(
            f"{row['backend']:7} adapters {row['adapters']!s:5} lasting {row['lasting']!s:5} "
            f"forward {row['forward_us']:7} us, with backward {row['forward_and_backward_us']:8} us"
        )
    if arguments.json:
        facts = {"provenance": provenance(), "experts": EXPERTS, "top_k": TOP_K, "target_us": TARGET_US, "rows": rows}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
