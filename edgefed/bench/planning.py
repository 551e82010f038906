"""What fits: how many experts of each layer, and where the memory of a training step goes.

Everything here is predicted by the memory model (`edgefed.costs`); `edgefed.bench.training_step` measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch

from edgefed.bench.compute import dtype_name
from edgefed.bench.models import BenchModel
from edgefed.bench.network import Line, upload_seconds
from edgefed.bench.report import Fit
from edgefed.costs.memory import (
    ADAPTER_BYTES,
    DTYPE_BYTES,
    STORAGE_BYTES,
    ComputeBudget,
    StepSetup,
    compute_budget,
    training_memory,
)
from edgefed.costs.shapes import KNOWN_SHAPES, ModelShape
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.facts import DeviceFacts, MemoryKind
from edgefed.hardware.memory import process_rss_bytes
from edgefed.moe.layer_runtime import training_kernels
from edgefed.training.savings import eight_bit_problem

LORA_RANK = 16
STORAGES = ("bfloat16", "nf4")
"""Formats of frozen experts in memory: the checkpoint's, and 4 bits."""
STREAMED = "nf4 streamed"
"""In 4 bits, not in memory (`edgefed.moe.expert_stream`)."""
CURVE_POINTS = 60


def fit_setup(experts: str, storage: str, optimizer: str, device: str) -> StepSetup:
    """Return the step that the table assumes: one text of 512 tokens, checkpointing, chunked loss, bfloat16."""
    return StepSetup(
        batch_size=1, sequence_length=512, dtype="bfloat16", expert_storage=storage, experts=experts, router="none",
        lora_rank=LORA_RANK, optimizer=optimizer, checkpointing=True, chunked_loss=True, device=device,
        kernels=planned_kernels(device, torch.bfloat16),
    )  # fmt: skip


def planned_kernels(device: str, dtype: torch.dtype) -> str:
    """Return the kernels that experts will train with, before a model exists (`StepSetup.kernels`)."""
    return training_kernels((), dtype, device) if device == "cpu" else "reference"


def fits_of(shape: ModelShape, budget: str, usable_bytes: int | None, optimizer: str, device: str) -> Iterable[Fit]:
    """Yield every mode and storage of one model under one budget, streamed experts last; nothing if it is unknown."""
    if usable_bytes is None:
        return
    for storage in STORAGES:
        full = compute_budget(shape, fit_setup("full", storage, optimizer, device), usable_bytes)
        lora = compute_budget(shape, fit_setup("lora", storage, "adamw", device), usable_bytes)
        for mode, found, experts, trained in (
            ("profile", full, full.profile_per_layer, 0),
            ("lora", lora, lora.trainable_per_layer, lora.trainable_per_layer),
            ("full", full, full.resident_per_layer, min(1, full.resident_per_layer)),
        ):
            yield Fit(
                model=shape.name, budget=budget, mode=mode, storage=storage, experts=experts, of=shape.num_experts,
                limit=_limit(found, experts, shape),
                upload_bytes=upload_bytes(shape, mode, trained) if trained else None,
            )  # fmt: skip
    every = len(shape.moe_layers)
    streamed = dataclasses.replace(fit_setup("lora", "nf4", "adamw", device), streamed_layers=every)
    found = compute_budget(shape, streamed, usable_bytes)
    experts = found.trainable_per_layer
    yield Fit(
        model=shape.name, budget=budget, mode="lora", storage=STREAMED, experts=experts, of=shape.num_experts,
        limit=_limit(found, experts, shape), upload_bytes=upload_bytes(shape, "lora", experts) if experts else None,
    )  # fmt: skip


def _limit(found: ComputeBudget, experts: int, shape: ModelShape) -> str:
    return "" if experts == shape.num_experts else found.limit


def upload_bytes(shape: ModelShape, mode: str, per_layer: int) -> int:
    """Return the bytes of one round's update with ``per_layer`` trained experts a layer, by LoRA or in full."""
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
    """Return the bytes of one expert of the largest layer, on the disk or in memory."""
    return int(max(layer.parameters_per_expert for layer in shape.moe_layers) * STORAGE_BYTES[storage])


@dataclasses.dataclass(frozen=True)
class Curve:
    """Share of a model's experts (0..1) that can be resident while one trains, over the budget."""

    model: str
    budgets_bytes: tuple[int, ...]
    shares: tuple[float, ...]


def fit_curve(shape: ModelShape, most_bytes: int, optimizer: str, device: str, process_bytes: int = 0) -> Curve:
    """Compute the curve from 0 to ``most_bytes``; ``process_bytes`` are not tensors. Experts in bfloat16."""
    setup = fit_setup("full", "bfloat16", optimizer, device)
    budgets = tuple(most_bytes * step // CURVE_POINTS for step in range(CURVE_POINTS + 1))
    resident = [compute_budget(shape, setup, size - process_bytes).resident_per_layer for size in budgets]
    return Curve(shape.name, budgets, tuple(count / shape.num_experts for count in resident))


# --- the memory of a training step --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlanCase:
    """One way to train: a readable name, the setup, and experts per layer."""

    name: str
    setup: StepSetup
    resident: int
    trainable: int


def plan_cases(model: BenchModel, setup: StepSetup, usable_bytes: int | None) -> list[PlanCase]:
    """Return the ways to compare: a run's defaults, all savings, one trainable expert a layer, and adapters.

    Each has as many experts as fit in ``usable_bytes``, at least one, even if one does not fit.
    """
    saving = dataclasses.replace(setup, checkpointing=True, chunked_loss=True)
    lora = dataclasses.replace(saving, experts="lora")

    def trainable(case: StepSetup) -> int:
        if usable_bytes is None:
            return model.shape.num_experts
        return max(1, compute_budget(model.shape, case, usable_bytes).trainable_per_layer)

    def resident(case: StepSetup) -> int:
        if usable_bytes is None:
            return model.shape.num_experts
        return max(1, compute_budget(model.shape, case, usable_bytes).resident_per_layer)

    return [
        PlanCase("in full, no savings", setup, trainable(setup), trainable(setup)),
        PlanCase("in full, checkpointing and chunked loss", saving, trainable(saving), trainable(saving)),
        PlanCase("one expert a layer in full, the others frozen", saving, resident(saving), 1),
        PlanCase(f"LoRA rank {setup.lora_rank} on all resident experts", lora, trainable(lora), trainable(lora)),
    ]


def predict(model: BenchModel, case: PlanCase, usable_bytes: int | None) -> dict[str, Any]:
    """Predict the peak memory of one way by part, for the whole model."""
    estimate = training_memory(model.shape, case.setup, case.resident, case.trainable)
    return {
        "plan": case.name,
        "model": model.name,
        "resident": case.resident,
        "trainable": case.trainable,
        "of": model.shape.num_experts,
        "setup": dataclasses.asdict(case.setup),
        "parts": dict(estimate.parts),
        "total_bytes": estimate.total_bytes,
        "phase": estimate.phase,
        "phases": dict(estimate.phases),
        "fits": None if usable_bytes is None else estimate.total_bytes <= usable_bytes,
        "measured": None,
    }


# --- everything that is planned for one device --------------------------------------------------------------------


def speed_device(facts: DeviceFacts) -> str:
    """Return the torch device that training runs on: ``cpu`` or ``cuda:N``."""
    return f"cuda:{facts.gpu.cuda_index}" if facts.trains_on_gpu and facts.gpu is not None else "cpu"


class Planner:
    """What fits in one device's budget, and how long its update takes to upload."""

    def __init__(self, facts: DeviceFacts, budget: MemoryBudget, line: Line | None, *, stand_in: bool = False):
        self._facts, self._budget, self._line = facts, budget, line
        self.device = {MemoryKind.CPU: "cpu", MemoryKind.UNIFIED: "unified", MemoryKind.DISCRETE: "cuda"}[facts.kind]
        problem = "" if stand_in and self.device != "cpu" else eight_bit_problem(speed_device(facts))
        self.optimizer = "adamw" if problem else "adamw_8bit"

    def room(self, budget_bytes: int | None) -> int | None:
        """Return the bytes for tensors: on a CPU, the budget includes Python and its libraries."""
        if budget_bytes is None:
            return None
        return max(0, budget_bytes - process_rss_bytes()) if self._facts.kind is MemoryKind.CPU else budget_bytes

    def fits(self, model: BenchModel | None) -> Iterator[Fit]:
        """Yield the fits of all known models and of ``model``, under both budgets."""
        shapes = dict(KNOWN_SHAPES)
        if model is not None and model.name not in shapes:
            shapes = {model.name: model.shape, **shapes}
        for shape in shapes.values():
            for name, size in (("now", self._budget.now_bytes), ("ideal", self._budget.ideal_bytes)):
                for fit in fits_of(shape, name, self.room(size), self.optimizer, self.device):
                    seconds = upload_seconds(fit.upload_bytes, self._line) if fit.upload_bytes and self._line else None
                    yield msgspec.structs.replace(fit, upload_s=seconds)

    def planning(self) -> dict[str, Any]:
        """Return the assumptions of the predictions."""
        own = process_rss_bytes() if self._facts.kind is MemoryKind.CPU else 0
        return {"device": self.device, "optimizer": self.optimizer, "process_bytes": own}

    def uplink(self) -> dict[str, Any]:
        """Describe the uplink; empty without one."""
        line = self._line
        if line is None:
            return {}
        return {
            "name": line.name,
            "up_bytes_per_s": line.sustained_up_bytes_per_s,
            "rtt_ms": line.rtt_ms,
            "basis": line.basis,
        }

    def setup(self, model: BenchModel) -> StepSetup:
        """Return the default step of a run."""
        return StepSetup(
            batch_size=8, sequence_length=128, dtype=dtype_name(model.dtype), device=self.device,
            kernels=planned_kernels(self.device, model.dtype),
        )  # fmt: skip

    def cases(self, model: BenchModel) -> list[PlanCase]:
        """Return the ways to train ``model`` in this budget."""
        return plan_cases(model, self.setup(model), self.room(self._budget.now_bytes))

    def explain(self, model: BenchModel) -> list[dict[str, Any]]:
        """Predict the memory of every way to train ``model``."""
        room = self.room(self._budget.now_bytes)
        return [predict(model, case, room) for case in self.cases(model)]
