"""Time and memory of slices by their width: a training pass of one layer of experts whose neurons are cut to a share.

    python benchmarks/bench_slices.py --json benchmarks/results/slices.json

Forward and backward passes of 8 experts (hidden size 512, 512 neurons each, float32), 512 tokens with 2 experts each,
with native kernels; all gradients. Widths alternate, so that other load on the machine meets all of them alike; times
are medians. "mixed" has experts of 8 different widths with the same number of neurons as the share of 1/4. Memory is
weights, gradients and two moments of the experts, from their tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from provenance import provenance
from torch.nn import functional as F

from edgefed.kernels.masked_experts import SlotWeights, masked_experts

HIDDEN, NEURONS, EXPERTS, TOKENS, TOP_K = 512, 512, 8, 512, 2
CASES = {
    "1": (512,) * 8,
    "1/2": (256,) * 8,
    "1/4": (128,) * 8,
    "1/8": (64,) * 8,
    "mixed": (16, 48, 80, 112, 144, 176, 208, 240),
}


def swiglu(up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second."""
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    indices = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator).requires_grad_()

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(0.02).requires_grad_()

    layers = {
        name: [SlotWeights(up=matrix(2 * width, HIDDEN), down=matrix(HIDDEN, width)) for width in widths]
        for name, widths in CASES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for repeat in range(options.repeats + 2):
        for name, slots in layers.items():
            started = time.perf_counter()
            masked_experts(hidden, indices, weights, slots, activation=swiglu, backend="native").sum().backward()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, slots in layers.items():
        size = sum(4 * tensor.nbytes for slot in slots for tensor in (slot.up, slot.down))
        rows.append({"share": name, "median_ms": 1e3 * statistics.median(seconds[name]), "bytes": size})
    for row in rows:
        row |= {"time_ratio": row["median_ms"] / rows[0]["median_ms"], "bytes_ratio": row["bytes"] / rows[0]["bytes"]}
        print("{share:>6}  {median_ms:8.2f} ms  time {time_ratio:.3f}  memory {bytes_ratio:.3f}".format(**row))
    if options.json:
        options.json.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
