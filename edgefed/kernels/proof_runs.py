"""One backend in one case, run and compared with the reference. For the worker process of `edgefed.kernels.proof`.

The inputs are random, with dropped pairs, a slot without tokens and a token that goes twice to one slot. The sizes are
those of the case, with at most SLOTS experts: a layer of 64 differs in the number of groups only.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import torch
from torch.nn import functional as F

from edgefed.errors import ConfigError
from edgefed.kernels.dispatch import Unsupported
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, masked_experts
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts, quantize_experts
from edgefed.kernels.router_statistics import gate_of, new_statistics, router_statistics
from edgefed.kernels.verdicts import FASTER, Case

SLOTS = 8
TOP_K = 2
REPEATS = 5
SAMPLE_S = 0.02
"""Calls shorter than this are timed several at a time, so that the host may run ahead as it does in training."""
MOST_CALLS = 20
TOLERANCE = {"float32": 1e-4, "float16": 6e-3, "bfloat16": 4e-2}
"""Largest error, relative to the largest value of a tensor, against float32 throughout: roundings of operands and of
rows between the products."""

Run = Callable[[], list[torch.Tensor]]


def start(device: str, imports: Iterable[str]) -> None:
    """Import what proofs need and start the device. ``imports`` are modules that register further backends."""
    for name in imports:
        importlib.import_module(name)
    torch.set_float32_matmul_precision("highest")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)


def prove(device: str, case: dict[str, Any], backend: str) -> dict[str, object]:
    """Return the fields ``state``, ``reason`` and times of a verdict. Raises what the backend raises."""
    kind = msgspec.convert(case, Case)
    make = {"masked_experts": _experts, "quantize_experts": _quantization, "router_statistics": _statistics}
    try:
        runs, exact, tolerance = make[kind.operation](device, kind, backend)
        found, again = runs[backend](), runs[backend]()
    except ConfigError as error:
        if not isinstance(error.__cause__, Unsupported):
            raise
        return {"state": "unsupported", "reason": str(error.__cause__)}
    problem = _compare(found, exact, tolerance, "gradient" if kind.trains != "nothing" else "result")
    if problem:
        return {"state": "wrong", "reason": problem}
    if not all(torch.equal(one, other) for one, other in zip(found, again, strict=True)):
        return {"state": "wrong", "reason": "other bits from run to run"}
    del found, again, exact
    times = _interleaved(runs, device)
    reference, own = times["reference"], times[backend]
    return {
        "state": "proved" if own * FASTER <= reference else "slower",
        "ms": own * 1e3,
        "reference_ms": reference * 1e3,
        "grouped_mm_ms": times.get("grouped_mm", 0.0) * 1e3,
    }


def _compare(found: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float, further: str) -> str:
    """Return what is wrong with the tensors, "" if nothing is. A NaN is not below any tolerance.

    ``further`` names the tensors after the output.
    """
    for place, (one, other) in enumerate(zip(found, exact, strict=True)):
        what = "the output" if place == 0 else f"{further} {place}"
        if one.shape != other.shape:
            return f"{what} has shape {tuple(one.shape)}, expected {tuple(other.shape)}"
        if one.numel():
            one, other = one.double().cpu(), other.double().cpu()
            error = float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
            if not error <= tolerance:
                return f"{what} is off by {error:.1%} of its largest value, allowed are {tolerance:.2%}"
    return ""


def _interleaved(runs: dict[str, Run], device: str) -> dict[str, float]:
    """Return the shortest wall time of each call in seconds, host included; they take turns.

    The shortest, because other processes only ever lengthen one.
    """

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        run()  # compiles, allocates
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        once = time.perf_counter() - begin
        calls[name] = max(1, min(MOST_CALLS, int(SAMPLE_S / max(once, 1e-6))))
    for _ in range(REPEATS):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                run()
            synchronize()
            samples[name].append((time.perf_counter() - begin) / calls[name])
    return {name: min(values) for name, values in samples.items()}


# --- masked experts ---------------------------------------------------------------------------------------------


def _experts(device: str, case: Case, backend: str) -> tuple[dict[str, Run], list[torch.Tensor], float]:
    weights_dtype, _, hidden_dtype = case.dtype.partition("/")
    dtype, rows_dtype = getattr(torch, weights_dtype), getattr(torch, hidden_dtype or weights_dtype)
    generator = torch.Generator().manual_seed(0)
    slots = [_slot(case, slot, dtype, device, generator) for slot in range(SLOTS)]
    tokens = max(2, SLOTS * case.rows // TOP_K)
    hidden = torch.randn(tokens, case.hidden, generator=generator).to(rows_dtype)
    indices = torch.randint(0, SLOTS - 1, (tokens, TOP_K), generator=generator)  # none for the last slot
    indices[torch.rand(tokens, TOP_K, generator=generator) < 0.1] = -1
    indices[0] = 0
    routing = torch.rand(tokens, TOP_K, generator=generator).to(rows_dtype)
    upstream = torch.randn(tokens, case.hidden, generator=generator).to(rows_dtype)
    forms = case.form.split("+")
    options: dict[str, Any] = {
        "activation": _swiglu if "swiglu" in forms else _other,
        "is_transposed": "transposed" in forms,
        "finish": torch.tanh if "finish" in forms else None,
    }

    def run(name: str, where: str, weights: list[SlotWeights], wide: bool) -> Run:
        kind = torch.float32 if wide else rows_dtype
        x, factors, dy = (tensor.to(where, kind) for tensor in (hidden, routing, upstream))
        places = indices.to(where)
        trains = case.trains != "nothing"
        leaves = [x.requires_grad_(), factors.requires_grad_()] if trains else []
        if case.trains == "weights":
            leaves += [tensor for slot in weights for tensor in _leaves(slot) if tensor.requires_grad]

        def call() -> list[torch.Tensor]:
            energies = torch.zeros(SLOTS, case.width, device=where) if "energies" in forms else None
            with torch.set_grad_enabled(trains):
                out = masked_experts(
                    x, places, factors, weights, backend=name,
                    neuron_energy=None if energies is None else energies.unbind(0), **options,
                )  # fmt: skip
            if not trains:
                return [out] if energies is None else [out, energies]
            grads = torch.autograd.grad(out, leaves, dy, allow_unused=True)
            return [out.detach(), *(torch.zeros(0) if grad is None else grad for grad in grads)]

        return call

    exact = run("reference", device, [_wide(slot) for slot in slots], True)()
    runs = {"reference": run("reference", device, slots, False), backend: run(backend, device, slots, False)}
    peer = _grouped_mm(case, device, slots, hidden, indices, routing)
    if peer is not None:
        runs["grouped_mm"] = peer
    return runs, exact, TOLERANCE[weights_dtype]


def _slot(case: Case, slot: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> SlotWeights:
    """Return a slot: formats take turns; adapters and dense weights are trainable if the case trains weights."""
    forms, formats = case.form.split("+"), case.storage.split("+")
    storage = formats[slot % len(formats)]
    trains = case.trains == "weights"
    up_rows = case.width if "ungated" in forms else 2 * case.width

    def random(*shape: int, scale: float = 1.0, trainable: bool = trains) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator).mul_(scale).to(device, dtype)
        return values.requires_grad_(trainable)

    def matrix(rows: int, columns: int) -> torch.Tensor | QuantizedMatrix:
        shape = (columns, rows) if "transposed" in forms else (rows, columns)
        is_dense = storage == "dense"
        value = random(*shape, scale=columns**-0.5, trainable=trains and is_dense and not case.rank)
        if is_dense:
            return value
        kind, _, nested = storage.partition(" ")
        packed = quantize_experts(value.cpu(), "int8" if kind == "int8" else "nf4", nested=bool(nested))
        return packed.to(device)

    def adapter(rows: int, columns: int) -> LowRankPair | None:
        if not case.rank:
            return None
        return LowRankPair(random(case.rank, columns, scale=columns**-0.5), random(rows, case.rank, scale=0.1), 0.5)

    return SlotWeights(
        up=matrix(up_rows, case.hidden),
        down=matrix(case.hidden, case.width),
        up_bias=random(up_rows, scale=0.1) if "bias" in forms else None,
        down_bias=random(case.hidden, scale=0.1) if "bias" in forms else None,
        up_lora=adapter(up_rows, case.hidden),
        down_lora=adapter(case.hidden, case.width),
    )


def _wide(slot: SlotWeights) -> SlotWeights:
    """Return the slot in float32 throughout, with leaves of its own."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float().requires_grad_(tensor.requires_grad)

    def matrix(weight: torch.Tensor | QuantizedMatrix) -> torch.Tensor:
        if isinstance(weight, QuantizedMatrix):  # as the products see it: rounded to its dtype
            return dequantize_experts(weight, backend="reference").float()
        return leaf(weight)

    def pair(lora: LowRankPair | None) -> LowRankPair | None:
        return None if lora is None else LowRankPair(leaf(lora.lora_a), leaf(lora.lora_b), lora.scale)

    return SlotWeights(
        up=matrix(slot.up),
        down=matrix(slot.down),
        up_bias=None if slot.up_bias is None else leaf(slot.up_bias),
        down_bias=None if slot.down_bias is None else leaf(slot.down_bias),
        up_lora=pair(slot.up_lora),
        down_lora=pair(slot.down_lora),
    )


def _leaves(slot: SlotWeights) -> list[torch.Tensor]:
    tensors = [slot.up, slot.down, slot.up_bias, slot.down_bias]
    for lora in (slot.up_lora, slot.down_lora):
        tensors += [lora.lora_a, lora.lora_b] if lora is not None else []
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def _grouped_mm(
    case: Case, device: str, slots: list[SlotWeights], hidden: torch.Tensor, indices: torch.Tensor,
    routing: torch.Tensor,
) -> Run | None:  # fmt: skip
    """Return transformers' own experts on these weights, for information; None where they do not apply."""
    if case.storage != "dense" or case.form != "swiglu" or case.rank or case.trains != "nothing":
        return None
    try:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        config = OlmoeConfig(
            hidden_size=case.hidden, intermediate_size=case.width, num_experts=SLOTS, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        for name in ("gate_up_proj", "down_proj"):
            rows = [slot.up if name == "gate_up_proj" else slot.down for slot in slots]
            stack = torch.stack([row for row in rows if isinstance(row, torch.Tensor)])
            setattr(experts, name, torch.nn.Parameter(stack, requires_grad=False))
        arguments = hidden.to(device), indices.clamp_min(0).to(device), routing.to(device)

        def run() -> list[torch.Tensor]:
            with torch.no_grad():
                return [experts(*arguments)]

        run()
    except Exception:  # an older transformers, or no grouped product for this device: only the comparison is missing
        return None
    return run


def _swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value


def _other(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * value


# --- quantization and router statistics -------------------------------------------------------------------------


def _quantization(device: str, case: Case, backend: str) -> tuple[dict[str, Run], list[torch.Tensor], float]:
    """To NF4 or INT8 and back: bytes and values are those of the reference."""
    weights = torch.randn(4, 512, 1024, generator=torch.Generator().manual_seed(0)).mul_(0.05)
    weights = weights.to(device, getattr(torch, case.dtype))

    def run(name: str) -> Run:
        def call() -> list[torch.Tensor]:
            packed = quantize_experts(weights, "int8" if case.storage == "int8" else "nf4", backend=name)
            return [packed.packed, packed.scales(), dequantize_experts(packed, backend=name)]

        return call

    runs = {name: run(name) for name in ("reference", backend)}
    return runs, runs["reference"](), 0.0


def _statistics(device: str, case: Case, backend: str) -> tuple[dict[str, Run], list[torch.Tensor], float]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4096, case.width, generator=generator)).to(device, getattr(torch, case.dtype))
    router = gate_of(logits, "softmax").to(logits.dtype) if case.storage == "probability" else logits
    weights, indices = torch.softmax(logits.float(), dim=1).topk(min(8, case.width), dim=1)
    weights = weights.to(logits.dtype)
    attention = case.form == "attention"
    received = torch.rand(len(logits), generator=generator).to(device) if attention else None

    def run(name: str) -> Run:
        def call() -> list[torch.Tensor]:
            sums = new_statistics(case.width, device, attention=attention)
            router_statistics(sums, router, indices, weights, kind=case.storage, received=received, backend=name)
            return list(sums)

        return call

    runs = {name: run(name) for name in ("reference", backend)}
    return runs, runs["reference"](), 1e-5
