"""Quantising and dequantising experts on the CPU, beside bitsandbytes where it is installed.

    python benchmarks/bench_quantize.py --json benchmarks/results/quantize_cpu.json

Rates are millions of parameters a second of one 2048 x 2048 matrix, the shortest of runs in turn. The limit is what
reading the weights and writing the result takes at the bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_limits import interleaved, limits
from provenance import provenance

from edgefed.kernels.quantization import dequantize_experts, quantize_experts

SIZE = 2048
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bitsandbytes_functional():
    """The module, or None."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            import bitsandbytes.functional as functional
        except ImportError:
            return None
    return functional


def measure(weights: torch.Tensor, peer, bandwidth: float, repetitions: int) -> dict:
    """Rates of both directions and formats for weights of one dtype."""
    rows: dict[str, dict] = {}
    for format in ("nf4", "int8"):
        ours = quantize_experts(weights, format)
        out = torch.empty_like(weights)
        packers: dict[str, Callable[[], object]] = {"edgefed": lambda format=format: quantize_experts(weights, format)}
        unpackers: dict[str, Callable[[], object]] = {
            "edgefed": lambda ours=ours, out=out: dequantize_experts(ours, out=out)
        }
        if peer is not None and format == "nf4":
            packed, state = peer.quantize_4bit(weights, quant_type="nf4")
            packers["bitsandbytes"] = lambda: peer.quantize_4bit(weights, quant_type="nf4")
            unpackers["bitsandbytes"] = lambda packed=packed, state=state: peer.dequantize_4bit(packed, state)
        elif peer is not None:
            half = weights.half()
            values, absmax, _ = peer.int8_vectorwise_quant(half)
            packers["bitsandbytes"] = lambda half=half: peer.int8_vectorwise_quant(half)
            unpackers["bitsandbytes"] = lambda values=values, absmax=absmax: peer.int8_vectorwise_dequant(
                values, absmax
            )
        moved = weights.numel() * weights.element_size() + ours.size_bytes
        for direction, runs in (("quantise", packers), ("dequantise", unpackers)):
            times = interleaved(runs, repetitions)
            rows[f"{format} {direction}"] = {
                "m_parameters_per_s": {name: round(weights.numel() / t / 1e6) for name, t in times.items()},
                "share_of_limit": round(moved / bandwidth / times["edgefed"], 3),
                **{
                    f"faster_than_{name}": round(t / times["edgefed"], 1)
                    for name, t in times.items()
                    if name != "edgefed"
                },
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine, peer = limits(), bitsandbytes_functional()
    result: dict = {
        "provenance": provenance(),
        "threads": options.threads,
        "limits": machine,
        "peer": None if peer is None else "bitsandbytes " + __import__("bitsandbytes").__version__,
        "cases": {},
    }
    for name, dtype in DTYPES.items():
        weights = torch.randn(SIZE, SIZE).mul_(0.02).to(dtype)
        result["cases"][name] = measure(weights, peer, machine["read_gb_per_s"] * 1e9, options.repetitions)
        print(name, json.dumps(result["cases"][name], indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
