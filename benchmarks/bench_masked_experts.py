"""The experts of an OLMoE layer, beside transformers' own implementations.

    python benchmarks/bench_masked_experts.py --json benchmarks/results/masked_experts_cpu.json
    python benchmarks/bench_masked_experts.py --device cuda --json benchmarks/results/masked_experts_gpu.json
    python benchmarks/bench_masked_experts.py --rehearse           small GPU cases on the CPU, to check that they run
    python benchmarks/bench_masked_experts.py --case nf4-1          one case, short
    python benchmarks/bench_masked_experts.py --clock processor --threads 1     beside other programs
    EDGEFED_ISA=avx512_bf16 python benchmarks/bench_masked_experts.py           without AMX
    python benchmarks/bench_masked_experts.py --crossover           from which size tiles are faster than rows

Every case times edgefed and its peers in turn and keeps the shortest. Its limit is
max(bytes / bandwidth, operations / peak): bytes of the experts that have tokens, as stored, operations of the
computed pairs, bandwidth and peak of the same run. Inputs of one token rotate over eight sets of
experts, so that weights come from memory and not from the cache. A GPU's cases are in `gpu_experts.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import cpu_limits
import gpu_experts
import torch
from cpu_limits import interleaved, limits
from gpu_limits import Stopwatch, device_facts
from provenance import provenance
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from edgefed.kernels import native_products
from edgefed.kernels.masked_experts import SlotWeights, masked_experts
from edgefed.kernels.quantization import quantize_experts
from edgefed.native import ISA_CODES, isa_code, load_native

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1024, 64, 8
WEIGHTS = 3 * HIDDEN * WIDTH
BYTES = {"bf16": 2.0, "int8": 1.0, "nf4": 0.5625}


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * value


class Layer:
    """One layer's weights in every form; a form is made on first use."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        torch.manual_seed(0)
        self.config = OlmoeConfig(
            hidden_size=HIDDEN, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K
        )
        self.config._experts_implementation = "eager"
        self.experts = OlmoeExperts(self.config).to(dtype)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(std=0.02)
        self._slots: dict[str, list[SlotWeights]] = {}

    def slots(self, form: str, *, trains: bool = False) -> list[SlotWeights]:
        if form not in self._slots:
            up, down = self.experts.gate_up_proj.data, self.experts.down_proj.data
            if form == "bf16":
                self._slots[form] = [SlotWeights(nn.Parameter(up[e]), nn.Parameter(down[e])) for e in range(EXPERTS)]
            else:
                ups, downs = quantize_experts(up, form), quantize_experts(down, form)
                self._slots[form] = [SlotWeights(ups[e], downs[e]) for e in range(EXPERTS)]
        slots = self._slots[form]
        if form == "bf16" and not trains:
            return [SlotWeights(slot.up.detach(), slot.down.detach()) for slot in slots]
        return slots

    def peer(self, name: str, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.config._experts_implementation = name
        return self.experts(x, indices, weights)


def route(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    weights, indices = torch.softmax(torch.randn(num_tokens, EXPERTS, generator=generator), dim=1).topk(TOP_K, dim=1)
    return x, indices, weights.to(torch.bfloat16)


def row(times: dict[str, float], bytes_read: float, operations: float, peak_dtype: str, machine: dict) -> dict:
    """Times in ms, the limit, and the share of it that edgefed reaches."""
    peak = machine[f"{peak_dtype}_gop_per_s"] or machine["float32_gop_per_s"]
    of_bytes = bytes_read / (machine["read_gb_per_s"] * 1e9)
    of_operations = operations / (peak * 1e9) if peak else 0.0
    limit = max(of_bytes, of_operations)
    ours = times["edgefed"]
    return {
        "ms": {name: round(value * 1e3, 3) for name, value in times.items()},
        "limit_ms": round(limit * 1e3, 3),
        "limited_by": "bytes" if of_bytes >= of_operations else "arithmetic",
        "share_of_limit": round(limit / ours, 3),
        **{f"faster_than_{name}": round(value / ours, 2) for name, value in times.items() if name != "edgefed"},
    }


def forward_case(layer: Layer, form: str, num_tokens: int, peers: tuple[str, ...], machine: dict, reps: int) -> dict:
    batches = [route(num_tokens, seed) for seed in range(8 if num_tokens == 1 else 1)]
    turn = dict.fromkeys(("edgefed", *peers), 0)

    def take(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        turn[name] += 1
        return batches[turn[name] % len(batches)]

    slots = layer.slots(form)
    runs: dict[str, Callable[[], object]] = {
        "edgefed": lambda: masked_experts(*take("edgefed"), slots, activation=swiglu, backend="native")
    }
    for name in peers:
        runs[name] = lambda name=name: layer.peer(name, *take(name))
    with torch.no_grad():
        times = interleaved(runs, reps * (8 if num_tokens == 1 else 1))
    distinct = max(len(set(indices.flatten().tolist())) for _, indices, _ in batches)
    operations = 2 * num_tokens * TOP_K * WEIGHTS
    rates = {dtype: machine[f"{dtype}_gop_per_s"] or 0 for dtype in ("int8", "bfloat16")}
    peak = "int8" if form == "int8" and rates["int8"] > rates["bfloat16"] else "bfloat16"
    return {"distinct_experts": distinct, **row(times, distinct * WEIGHTS * BYTES[form], operations, peak, machine)}


def training_case(
    layer: Layer, trainable: int, frozen: int, peers: tuple[str, ...], machine: dict, reps: int, keep: bool | None
) -> dict:
    """Forward and backward of 512 tokens: ``trainable`` bfloat16 experts, ``frozen`` NF4 ones, others absent."""
    x, indices, weights = route(512, 0)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    dense = layer.slots("bf16", trains=True)
    slots = [*dense[:trainable], *(layer.slots("nf4")[trainable : trainable + frozen] if frozen else [])]
    slot_indices = torch.where(indices < trainable + frozen, indices, -1)
    gradient = torch.randn_like(x)

    def clear() -> None:
        x.grad = weights.grad = None
        for slot in dense:
            slot.up.grad = slot.down.grad = None
        layer.experts.zero_grad(set_to_none=True)

    def ours() -> None:
        clear()
        y = masked_experts(x, slot_indices, weights, slots, activation=swiglu, backend="native", keep_activations=keep)
        y.backward(gradient)

    def peer(name: str) -> None:
        clear()
        layer.peer(name, x, indices, weights).backward(gradient)

    runs: dict[str, Callable[[], object]] = {"edgefed": ours}
    runs.update({name: lambda name=name: peer(name) for name in peers})
    times = interleaved(runs, reps)
    clear()
    trainable_pairs = int((indices < trainable).sum())
    pairs = int((slot_indices >= 0).sum())
    operations = 2 * WEIGHTS * (2 * pairs + trainable_pairs)
    bytes_read = 2 * WEIGHTS * (trainable * BYTES["bf16"] + frozen * BYTES["nf4"]) + trainable * WEIGHTS * BYTES["bf16"]
    return {
        "pairs": pairs,
        "trainable_pairs": trainable_pairs,
        **row(times, bytes_read, operations, "bfloat16", machine),
    }


def cases(layer: Layer, machine: dict, reps: int) -> dict[str, Callable[[], dict]]:
    def forward(form: str, num_tokens: int, *peers: str) -> Callable[[], dict]:
        return lambda: forward_case(layer, form, num_tokens, peers or ("grouped_mm",), machine, reps)

    def training(trainable: int, frozen: int, *peers: str, keep: bool | None = None) -> Callable[[], dict]:
        return lambda: training_case(layer, trainable, frozen, peers, machine, max(2, reps // 2), keep)

    return {
        **{f"{form}-{t}": forward(form, t) for form in ("nf4", "int8", "bf16") for t in (1, 16, 64, 512)},
        "train-64-trainable": training(64, 0, "grouped_mm"),
        "train-8-resident": training(8, 0, "grouped_mm"),
        "train-8-trainable-56-nf4": training(8, 56),
        "train-8-trainable-56-nf4-recompute": training(8, 56, keep=False),
        "train-64-nf4": training(0, 64),
        "train-64-trainable-eager": lambda: training_case(layer, 64, 0, ("eager",), machine, 1, None),
    }


def crossover(repetitions: int) -> dict:
    """Time of one 2048 x 2048 product by kernel and rows of x, ms: the source of ROWS_LIMIT."""
    dense = torch.randn(8, HIDDEN, HIDDEN).mul_(0.02).to(torch.bfloat16)
    table: dict = {}
    chosen = native_products.choose_kernel
    try:
        for form in ("nf4", "int8", "bf16"):
            stored = dense if form == "bf16" else quantize_experts(dense, form)
            for rows in (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128):
                tensors, entries = [], []
                for e in range(len(dense)):
                    data = [dense[e]] if form == "bf16" else [stored[e].packed, stored[e].scales()]
                    code = native_products.DTYPE_CODES[{"bf16": "bfloat16"}.get(form, form)]
                    entries.append(
                        (
                            native_products.Matrix(
                                len(tensors), len(tensors) + 1 if form != "bf16" else -1, code, (HIDDEN, HIDDEN), 64,
                                torch.bfloat16,
                            ),
                            e * rows,
                            (e + 1) * rows,
                        )
                    )  # fmt: skip
                    tensors += data
                x = torch.randn(len(dense) * rows, HIDDEN).to(torch.bfloat16)
                names = ["ROWS", "TILES", "TORCH"] + (["ROWS_INT8", "TILES_INT8"] if form == "int8" else [])

                def run(name: str, entries=entries, tensors=tensors, x=x) -> None:
                    native_products.choose_kernel = lambda *_: getattr(native_products, name)
                    native_products.grouped_product(entries, tensors, x, None, x.shape[0], False, True)

                times = interleaved({name: lambda name=name: run(name) for name in names}, repetitions)
                table[f"{form}-{rows}"] = {name: round(t * 1e3 / len(dense), 4) for name, t in times.items()}
                print(form, rows, table[f"{form}-{rows}"], flush=True)
    finally:
        native_products.choose_kernel = chosen
    return table


def on_gpu(device: str, wanted: list[str] | None, repetitions: int) -> dict:
    """All cases of `gpu_experts`; on the CPU small ones, as a rehearsal."""
    watch = Stopwatch(device)
    machine = watch.limits()
    print(device_facts(device), machine, flush=True)
    result: dict = {"provenance": provenance(), **device_facts(device), "limits": machine, "cases": {}}
    layer = gpu_experts.Layer(gpu_experts.Size() if device == "cuda" else gpu_experts.SMALL, device)
    for name, run in gpu_experts.cases(layer, watch, machine, repetitions):
        if not wanted or name in wanted:
            result["cases"][name] = run()
            print(name, json.dumps(result["cases"][name]), flush=True)
    return result | {"limits_after": watch.limits()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", action="append", help="run only this case; may be given more than once")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall",
        help="processor: processor time, for a machine that does other work too; with --threads 1",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="the cases of a GPU with small shapes on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cuda" or options.rehearse:
        result = on_gpu("cpu" if options.rehearse else "cuda", options.case, options.repetitions)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    if options.clock == "processor":
        cpu_limits.clock = time.process_time
    machine = limits()
    print(machine, flush=True)
    library = load_native()
    isa = next(name for name, code in ISA_CODES.items() if code == isa_code(library))
    run_facts = {"threads": options.threads, "clock": options.clock, "instruction_set": isa}
    result = {"provenance": provenance(), **run_facts, "limits": machine, "cases": {}}
    if options.crossover:
        result["crossover_ms"] = crossover(options.repetitions)
    else:
        layer = Layer()
        for name, run in cases(layer, machine, options.repetitions).items():
            if not options.case or name in options.case:
                result["cases"][name] = run()
                print(name, json.dumps(result["cases"][name]), flush=True)
    result["limits_after"] = limits()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
