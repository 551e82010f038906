"""The profiling record of one MoE layer on the CPU: microseconds a batch, beside what the router does anyway.

    python benchmarks/bench_router_statistics.py --json benchmarks/results/router_statistics_cpu.json

``router`` is the softmax and top-k that the model itself computes; ``native`` and ``reference`` come on top of it.
``counts_only`` is a bincount and a sum of the weights, the least that any profile needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from cpu_limits import interleaved
from provenance import provenance

from edgefed.kernels.router_statistics import new_statistics, router_statistics

CASES = ((512, 64, 8), (2048, 64, 8), (512, 128, 8), (1, 64, 8))
"""(tokens, experts, top-k)."""
TARGET_US = 20.0
CALLS = 50


def measure(tokens: int, experts: int, top_k: int, repetitions: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    gate = torch.softmax(logits, dim=1)
    weights, indices = gate.topk(top_k, dim=1)
    sums = new_statistics(experts)
    mass = torch.zeros(experts, dtype=torch.float64)

    def record(router: torch.Tensor, kind: str, backend: str) -> None:
        for _ in range(CALLS):
            router_statistics(sums, router, indices, weights, kind=kind, backend=backend)

    def route() -> None:
        for _ in range(CALLS):
            torch.softmax(logits, dim=1).topk(top_k, dim=1)

    def count() -> None:
        for _ in range(CALLS):
            torch.bincount(indices.reshape(-1), minlength=experts)
            mass.index_add_(0, indices.reshape(-1), weights.reshape(-1).double())

    times = interleaved(
        {
            "router": route,
            "counts_only": count,
            "native": lambda: record(gate, "probability", "native"),
            "native_from_logits": lambda: record(logits, "softmax", "native"),
            "reference": lambda: record(gate, "probability", "reference"),
        },
        repetitions,
    )
    us = {name: round(t / CALLS * 1e6, 1) for name, t in times.items()}
    return {"tokens": tokens, "experts": experts, "top_k": top_k, "us": us, "target_met": us["native"] <= TARGET_US}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict = {"provenance": provenance(), "threads": options.threads, "target_us": TARGET_US, "cases": []}
    for case in CASES:
        result["cases"].append(measure(*case, options.repetitions))
        print(json.dumps(result["cases"][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
