"""Router statistics of one MoE layer: microseconds a batch, beside the router itself.

    python benchmarks/bench_router_statistics.py --json benchmarks/results/router_statistics.json
    python benchmarks/bench_router_statistics.py --device cuda --json benchmarks/results/router_statistics_gpu.json
    python benchmarks/bench_router_statistics.py --rehearse       GPU cases on the CPU, to check that they run

``router`` is the softmax and top-k that the model itself computes; ``native`` (a GPU's: ``triton``, ``cuda``) and
``reference`` come on top of it.
``counts_only`` is a bincount and a sum of the weights, the least that any profile needs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_limits import interleaved
from gpu_experts import backends
from gpu_limits import Stopwatch, device_facts
from provenance import provenance

from edgefed.kernels.router_statistics import new_statistics, router_statistics

CASES = ((512, 64, 8), (2048, 64, 8), (512, 128, 8), (1, 64, 8))
"""(tokens, experts, top-k)."""
GPU_CASES = (*CASES, (8192, 64, 8), (8192, 128, 8))
TARGET_US = 20.0
CALLS = 50


def measure(
    tokens: int, experts: int, top_k: int, repetitions: int, *, device: str = "cpu",
    names: tuple[str, ...] = ("native",), time_all: Callable = interleaved,
) -> dict:  # fmt: skip
    """Microseconds of each of our backends ``names`` and of what stands beside them."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).to(device)
    gate = torch.softmax(logits, dim=1)
    weights, indices = gate.topk(top_k, dim=1)
    sums = new_statistics(experts, device)
    mass = torch.zeros(experts, dtype=torch.float64, device=device)

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

    runs: dict[str, Callable[[], object]] = {"router": route, "counts_only": count}
    for name in names:
        runs[name] = lambda name=name: record(gate, "probability", name)
        runs[f"{name}_from_logits"] = lambda name=name: record(logits, "softmax", name)
    runs["reference"] = lambda: record(gate, "probability", "reference")
    times = time_all(runs, repetitions)
    us = {name: round(t / CALLS * 1e6, 1) for name, t in times.items()}
    met = min(us[name] for name in names) <= TARGET_US
    return {"tokens": tokens, "experts": experts, "top_k": top_k, "us": us, "target_met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="what a GPU would run, on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict = {"provenance": provenance(), "target_us": TARGET_US, "cases": []}
    cases, place = CASES, {}
    if options.device == "cuda" or options.rehearse:
        device = "cpu" if options.rehearse else "cuda"
        cases = CASES[-1:] if options.rehearse else GPU_CASES
        place = {"device": device, "names": tuple(backends(device)), "time_all": Stopwatch(device).interleaved}
        result |= device_facts(device)
    else:
        result["threads"] = options.threads
    for case in cases:
        result["cases"].append(measure(*case, options.repetitions, **place))
        print(json.dumps(result["cases"][-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
