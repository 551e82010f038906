"""How many experts of each layer fit, for models that people ask about. Predicted by the memory model, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from edgefed.bench.report import Fit
from edgefed.costs.memory import ADAPTER_BYTES, DTYPE_BYTES, STORAGE_BYTES, ComputeBudget, StepSetup, compute_budget
from edgefed.costs.shapes import ModelShape
from edgefed.moe.layer_runtime import training_kernels

LORA_RANK = 16
STORAGES = ("bfloat16", "nf4")
"""How experts that do not learn lie in memory: as they come, and as `expert_storage=nf4` stores them."""
CURVE_POINTS = 60


def fit_setup(experts: str, storage: str, optimizer: str, device: str) -> StepSetup:
    """What the table assumes: one text of 512 tokens a step, checkpointing, the loss in chunks, bfloat16."""
    return StepSetup(
        batch_size=1, sequence_length=512, dtype="bfloat16", expert_storage=storage, experts=experts, router="none",
        lora_rank=LORA_RANK, optimizer=optimizer, checkpointing=True, chunked_loss=True, device=device,
        kernels=planned_kernels(device, torch.bfloat16),
    )  # fmt: skip


def planned_kernels(device: str, dtype: torch.dtype) -> str:
    """What experts will train with, before there is a model: `StepSetup.kernels`. On a GPU the reference."""
    return training_kernels((), dtype, device) if device == "cpu" else "reference"


def fits_of(shape: ModelShape, budget: str, usable_bytes: int | None, optimizer: str, device: str) -> Iterable[Fit]:
    """Every mode and storage of one model under one budget; nothing when the budget is unknown."""
    if usable_bytes is None:
        return
    for storage in STORAGES:
        full = compute_budget(shape, fit_setup("full", storage, optimizer, device), usable_bytes)
        lora = compute_budget(shape, fit_setup("lora", storage, "adamw", device), usable_bytes)
        for mode, found, experts, trained in (
            ("profile", full, full.profile_per_layer, 0),
            ("lora", lora, lora.tune_per_layer, lora.tune_per_layer),
            ("full", full, full.keep_per_layer, min(1, full.keep_per_layer)),
        ):
            yield Fit(
                model=shape.name, budget=budget, mode=mode, storage=storage, experts=experts, of=shape.num_experts,
                limit=_limit(found, experts, shape),
                upload_bytes=upload_bytes(shape, mode, trained) if trained else None,
            )  # fmt: skip


def _limit(found: ComputeBudget, experts: int, shape: ModelShape) -> str:
    return "" if experts == shape.num_experts else found.limit


def upload_bytes(shape: ModelShape, mode: str, per_layer: int) -> int:
    """Bytes of one round's update when ``per_layer`` experts of each layer were trained, by LoRA or in full."""
    total = 0
    for layer in shape.moe_layers:
        count = min(per_layer, layer.num_experts)
        if mode == "lora":
            size = ADAPTER_BYTES * LORA_RANK * sum(size_in + size_out for size_in, size_out in layer.expert_matrices)
        else:
            size = DTYPE_BYTES["bfloat16"] * layer.parameters_per_expert
        total += count * size
    return total


def expert_bytes(shape: ModelShape, storage: str = "bfloat16") -> int:
    """One expert of the largest layer as it lies on the disk or in memory."""
    return int(max(layer.parameters_per_expert for layer in shape.moe_layers) * STORAGE_BYTES[storage])


@dataclasses.dataclass(frozen=True)
class Curve:
    """Share of a model's experts (0..1) that can be kept while one trains, over the budget."""

    model: str
    budgets_bytes: tuple[int, ...]
    shares: tuple[float, ...]


def fit_curve(shape: ModelShape, most_bytes: int, optimizer: str, device: str, process_bytes: int = 0) -> Curve:
    """The curve from nothing to ``most_bytes``, of which ``process_bytes`` are no tensors; experts in bfloat16."""
    setup = fit_setup("full", "bfloat16", optimizer, device)
    budgets = tuple(most_bytes * step // CURVE_POINTS for step in range(CURVE_POINTS + 1))
    kept = [compute_budget(shape, setup, size - process_bytes).keep_per_layer for size in budgets]
    return Curve(shape.name, budgets, tuple(count / shape.num_experts for count in kept))
