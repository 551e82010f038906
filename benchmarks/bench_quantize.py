"""Quantizing and dequantizing experts, beside bitsandbytes if it is installed.

    python benchmarks/bench_quantize.py --json benchmarks/results/quantize.json
    python benchmarks/bench_quantize.py --device cuda --json benchmarks/results/quantize_gpu.json
    python benchmarks/bench_quantize.py --rehearse       small GPU cases on the CPU, to check that they run

Rates are millions of parameters a second of one 2048 x 2048 matrix (GPU: a stack of 64), the shortest of runs in turn.
The limit is what reading the weights and writing the result takes at the bandwidth of the same run.
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
from gpu_experts import backends
from gpu_limits import Stopwatch, device_facts
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


def measure(
    weights: torch.Tensor, peer, bandwidth: float, repetitions: int, time_all: Callable = interleaved,
    names: tuple[str, ...] = ("auto",),
) -> dict:  # fmt: skip
    """Rates of both directions and formats for weights of one dtype, by each of our backends ``names``."""
    rows: dict[str, dict] = {}
    ours = {"edgefed" if name == "auto" else f"edgefed-{name}": name for name in names}
    flat = weights.reshape(-1, weights.shape[-1])
    for format in ("nf4", "int8"):
        packed = quantize_experts(weights, format)
        out = torch.empty_like(weights)
        packers: dict[str, Callable[[], object]] = {}
        unpackers: dict[str, Callable[[], object]] = {}
        for label, name in ours.items():
            packers[label] = lambda format=format, name=name: quantize_experts(weights, format, backend=name)
            unpackers[label] = lambda packed=packed, out=out, name=name: dequantize_experts(
                packed, out=out, backend=name
            )
        if peer is not None and format == "nf4":
            codes, state = peer.quantize_4bit(weights, quant_type="nf4")
            packers["bitsandbytes"] = lambda: peer.quantize_4bit(weights, quant_type="nf4")
            unpackers["bitsandbytes"] = lambda codes=codes, state=state: peer.dequantize_4bit(codes, state)
        elif peer is not None:
            half = flat.half()
            values, absmax, _ = peer.int8_vectorwise_quant(half)
            packers["bitsandbytes"] = lambda half=half: peer.int8_vectorwise_quant(half)
            unpackers["bitsandbytes"] = lambda values=values, absmax=absmax: peer.int8_vectorwise_dequant(
                values, absmax
            )
        moved = weights.numel() * weights.element_size() + packed.size_bytes
        for direction, runs in (("quantize", packers), ("dequantize", unpackers)):
            times = time_all(runs, repetitions)
            best = min(times[label] for label in ours)
            rows[f"{format} {direction}"] = {
                "m_parameters_per_s": {name: round(weights.numel() / t / 1e6) for name, t in times.items()},
                "share_of_limit": round(moved / bandwidth / best, 3),
                **{f"faster_than_{name}": round(t / best, 1) for name, t in times.items() if name not in ours},
            }
    return rows


def on_gpu(device: str, repetitions: int) -> dict:
    """A stack of 64 matrices on a GPU; on the CPU a small one, as a rehearsal."""
    watch, peer = Stopwatch(device), bitsandbytes_functional()
    machine = watch.limits()
    result: dict = {"provenance": provenance(), **device_facts(device), "limits": machine, "cases": {}}
    shape = (64, SIZE, SIZE) if device == "cuda" else (2, 128, 128)
    for name, dtype in DTYPES.items():
        weights = torch.randn(shape, device=device).mul_(0.02).to(dtype)
        bandwidth = machine["read_gb_per_s"] * 1e9
        rows = measure(weights, peer, bandwidth, repetitions, watch.interleaved, tuple(backends(device)))
        result["cases"][name] = rows
        print(name, json.dumps(rows, indent=1), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="what a GPU would run, small and on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device == "cuda" or options.rehearse:
        result = on_gpu("cpu" if options.rehearse else "cuda", options.repetitions)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    machine, peer = limits(), bitsandbytes_functional()
    result = {
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
