"""The cases of `bench_masked_experts.py --device cuda`: one OLMoE layer on a GPU, beside other implementations.

    edgefed-triton, edgefed-cuda   every backend of masked experts that can run here
    edgefed-reference              the reference, which runs where nothing else is proved
    grouped_mm, eager              transformers' own, on bfloat16 weights
    bitsandbytes                   whole NF4 stacks dequantized, then grouped_mm, as its parametrization does

A limit is max(bytes / bandwidth, operations / rate) with both of the same run, bytes of the distinct experts that are
hit as they are stored, operations of the pairs that are computed. Times are of the device, with a cold cache; wall
times with the host in them, the host's own, its waits and the peak of memory stand beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from gpu_limits import Stopwatch
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from edgefed.kernels import dispatch
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, masked_experts
from edgefed.kernels.quantization import quantize_experts

BYTES = {"bf16": 2.0, "int8": 1.0, "nf4": 0.5625}
RANK = 16


@dataclasses.dataclass(frozen=True)
class Size:
    hidden: int = 2048
    width: int = 1024
    experts: int = 64
    top_k: int = 8
    forward_tokens: tuple[int, ...] = (1, 4, 15, 16, 64, 256, 1024, 4096)
    training_tokens: int = 4096
    resident: int = 8

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.width


SMALL = Size(hidden=128, width=64, experts=8, top_k=2, forward_tokens=(1, 20), training_tokens=24, resident=3)


def swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * value


def backends(device: str) -> list[str]:
    """Return the backends that can run here, the reference last. Raises SystemExit if it is the only one."""
    found = dispatch.provable_backends("masked_experts", device)
    for row in dispatch.backend_table():
        if row.operation == "masked_experts" and row.device_type == device and not row.available:
            print(f"without {row.name}: {row.reason}", flush=True)
    if not found:
        raise SystemExit("nothing to measure")
    return [*found, "reference"]


class Layer:
    """One layer's weights in every form; a form is made on first use."""

    def __init__(self, size: Size, device: str):
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.config = OlmoeConfig(
            hidden_size=size.hidden, intermediate_size=size.width, num_experts=size.experts,
            num_experts_per_tok=size.top_k,
        )  # fmt: skip
        self.config._experts_implementation = "eager"
        with torch.device(device):
            self.experts = OlmoeExperts(self.config).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(std=0.02)
        self._slots: dict[str, list[SlotWeights]] = {}
        self._bnb: tuple | None = None

    def slots(self, form: str, *, trains: bool = False) -> list[SlotWeights]:
        if form not in self._slots:
            up, down = self.experts.gate_up_proj.data, self.experts.down_proj.data
            if form == "bf16":
                pairs = [(nn.Parameter(one), nn.Parameter(other)) for one, other in zip(up, down, strict=True)]
            else:
                pairs = list(zip(quantize_experts(up, form), quantize_experts(down, form), strict=True))
            self._slots[form] = [SlotWeights(*pair) for pair in pairs]
        if form == "bf16" and not trains:
            return [SlotWeights(slot.up.detach(), slot.down.detach()) for slot in self._slots[form]]
        return self._slots[form]

    def with_adapters(self, slots: list[SlotWeights]) -> list[SlotWeights]:
        def pair(weight) -> LowRankPair:
            rows, columns = weight.shape
            made = (torch.randn(*shape, device=self.device).mul_(0.02) for shape in ((RANK, columns), (rows, RANK)))
            return LowRankPair(*(nn.Parameter(tensor.to(torch.bfloat16)) for tensor in made), 1.0)

        return [dataclasses.replace(slot, up_lora=pair(slot.up), down_lora=pair(slot.down)) for slot in slots]

    def peer(self, name: str, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.config._experts_implementation = name
        return self.experts(x, indices, weights)

    def bitsandbytes(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Dequantize the whole stacks, then multiply."""
        import bitsandbytes.functional as functional
        from torch.nn.utils import stateless

        if self._bnb is None:
            stacks = {"gate_up_proj": self.experts.gate_up_proj, "down_proj": self.experts.down_proj}
            self._bnb = {name: functional.quantize_4bit(t.data, quant_type="nf4") for name, t in stacks.items()}
        dense = {name: functional.dequantize_4bit(*packed) for name, packed in self._bnb.items()}
        self.config._experts_implementation = "grouped_mm"
        return stateless._functional_call(self.experts, dense, (x, indices, weights), {})


def has_bitsandbytes() -> bool:
    try:
        import bitsandbytes.functional  # noqa: F401
    except ImportError:
        return False
    return True


def route(size: Size, num_tokens: int, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, size.hidden, generator=generator).to(device, torch.bfloat16)
    logits = torch.randn(num_tokens, size.experts, generator=generator)
    weights, indices = torch.softmax(logits, dim=1).topk(size.top_k, dim=1)
    return x, indices.to(device), weights.to(device, torch.bfloat16)


def row(watch: Stopwatch, runs: dict, bytes_read: float, operations: float, machine: dict, repetitions: int) -> dict:
    """Times, host times, waits and peaks of all, and the share of the limit that each backend of edgefed reaches."""
    times = watch.interleaved(runs, repetitions)
    of_bytes = bytes_read / (machine["read_gb_per_s"] * 1e9)
    of_operations = operations / (machine["bfloat16_gop_per_s"] * 1e9)
    limit = max(of_bytes, of_operations)
    ours = {name: value for name, value in times.items() if name.startswith("edgefed")}
    best = min(value for name, value in ours.items() if name != "edgefed-reference")
    return {
        "ms": {name: round(value * 1e3, 4) for name, value in times.items()},
        "wall_ms": {name: round(value * 1e3, 4) for name, value in watch.wall_times(runs, repetitions).items()},
        "host_ms": {name: round(watch.host_time(run, 3) * 1e3, 4) for name, run in runs.items()},
        "host_waits": {name: watch.host_waits(run) for name, run in runs.items()},
        "peak_mib": {
            name: None if peak is None else round(peak / 2**20, 1)
            for name, peak in ((name, watch.peak_bytes(run)) for name, run in runs.items())
        },
        "limit_ms": round(limit * 1e3, 4),
        "limited_by": "bytes" if of_bytes >= of_operations else "arithmetic",
        "share_of_limit": {name: round(limit / value, 3) for name, value in ours.items()},
        **{f"faster_than_{name}": round(value / best, 2) for name, value in times.items() if name not in ours},
    }


def forward_case(layer: Layer, form: str, num_tokens: int, watch: Stopwatch, machine: dict, repetitions: int) -> dict:
    size, device = layer.size, layer.device
    batch, slots = route(size, num_tokens, num_tokens, device), layer.slots(form)
    runs: dict[str, Callable[[], object]] = {
        f"edgefed-{name}": lambda name=name: masked_experts(*batch, slots, activation=swiglu, backend=name)
        for name in backends(device)
    }
    runs["grouped_mm"] = lambda: layer.peer("grouped_mm", *batch)
    if form == "bf16":
        runs["eager"] = lambda: layer.peer("eager", *batch)
    if form == "nf4" and has_bitsandbytes():
        runs["bitsandbytes"] = lambda: layer.bitsandbytes(*batch)
    distinct = len(set(batch[1].flatten().tolist()))
    operations = 2 * num_tokens * size.top_k * size.weights
    with torch.no_grad():
        found = row(watch, runs, distinct * size.weights * BYTES[form], operations, machine, repetitions)
    return {"tokens": num_tokens, "distinct_experts": distinct, **found}


def training_case(
    layer: Layer, trainable: int, frozen: int, adapters: bool, peers: tuple[str, ...], watch: Stopwatch, machine: dict,
    repetitions: int,
) -> dict:  # fmt: skip
    """Forward and backward: ``trainable`` bfloat16 experts, ``frozen`` NF4 ones (with ``adapters``), others absent."""
    size, device = layer.size, layer.device
    x, indices, weights = route(size, size.training_tokens, 0, device)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    dense = layer.slots("bf16", trains=True)
    packed = layer.slots("nf4")[trainable : trainable + frozen] if frozen else []
    slots = [*dense[:trainable], *(layer.with_adapters(packed) if adapters else packed)]
    slot_indices = torch.where(indices < trainable + frozen, indices, -1)
    gradient = torch.randn_like(x)
    trained = [t for s in slots for p in (s.up_lora, s.down_lora) if p for t in (p.lora_a, p.lora_b)]
    trained += [t for slot in dense for t in (slot.up, slot.down)]

    def clear() -> None:
        for tensor in (x, weights, *trained):
            tensor.grad = None
        layer.experts.zero_grad(set_to_none=True)

    def ours(name: str) -> None:
        clear()
        masked_experts(x, slot_indices, weights, slots, activation=swiglu, backend=name).backward(gradient)

    def other(name: str) -> None:
        clear()
        function = layer.bitsandbytes if name == "bitsandbytes" else lambda *batch: layer.peer(name, *batch)
        function(x, indices, weights).backward(gradient)

    runs: dict[str, Callable[[], object]] = {
        f"edgefed-{name}": lambda name=name: ours(name) for name in backends(device)
    }
    for name in peers:
        if name != "bitsandbytes" or has_bitsandbytes():
            runs[name] = lambda name=name: other(name)
    trainable_pairs, pairs = int((indices < trainable).sum()), int((slot_indices >= 0).sum())
    operations = 2 * size.weights * (2 * pairs + trainable_pairs)
    bytes_read = size.weights * (2 * (trainable * BYTES["bf16"] + frozen * BYTES["nf4"]) + trainable * BYTES["bf16"])
    found = row(watch, runs, bytes_read, operations, machine, repetitions)
    clear()
    return {"tokens": size.training_tokens, "pairs": pairs, "trainable_pairs": trainable_pairs, **found}


def cases(layer: Layer, watch: Stopwatch, machine: dict, repetitions: int) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Name and function of each case."""
    size = layer.size
    for form in ("nf4", "int8", "bf16"):
        for tokens in size.forward_tokens:
            yield (
                f"{form}-{tokens}",
                lambda form=form, tokens=tokens: forward_case(layer, form, tokens, watch, machine, repetitions),
            )
    all_of, few = size.experts, size.resident
    for name, trainable, frozen, adapters, peers in (
        (f"train-{all_of}-trainable", all_of, 0, False, ("grouped_mm", "eager")),
        (f"train-{few}-resident", few, 0, False, ("grouped_mm",)),
        (f"train-{few}-trainable-{all_of - few}-nf4", few, all_of - few, False, ()),
        (f"train-{all_of}-nf4", 0, all_of, False, ("bitsandbytes",)),
        (f"train-{all_of}-nf4-lora", 0, all_of, True, ()),
    ):
        yield (
            name,
            lambda trainable=trainable, frozen=frozen, adapters=adapters, peers=peers: training_case(
                layer, trainable, frozen, adapters, peers, watch, machine, max(3, repetitions // 3)
            ),
        )
