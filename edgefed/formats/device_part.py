"""The part of a model that a device computes with, as a `MergedModel`: slots instead of experts.

A slot is a resident expert, whole or some of its neurons, or a merged expert, as `edgefed.moe.bank` has them: with its
adapter added, and with the values of its storage format. Slices of different widths get neurons of zeros, which add
nothing to the output, up to the widest one of their layer. What the router chooses is mapped to slots as in training.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan
from edgefed.formats.weights import MergedModel, Routing
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts
from edgefed.moe.adapters import low_rank_product
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.bank import ExpertBank
from edgefed.moe.expert_reading import read_expert, read_slice
from edgefed.moe.gate_probe import route_to_resident, router_logits_of
from edgefed.moe.merging.alignment import neuron_aligner
from edgefed.moe.neurons import widen
from edgefed.moe.units import ExpertSource, TrainScope


@dataclasses.dataclass(frozen=True)
class DevicePart:
    """What `edgefed.moe.model.MoeModel.apply_plan` takes. ``aligned``: neurons of merged experts are aligned first."""

    plan: ExpertPlan
    missing: str = "renormalize"
    storage: str | None = None
    aligned: bool = False


class DeviceModel(MergedModel):
    """The tensors and the routing of a device's part of a model. The slots of one layer are in memory at a time.

    ``units`` needs only the experts of the plan. Raises ConfigError if the plan is not of this model, CheckpointError.
    """

    def __init__(
        self, folder: Path, units: ExpertSource, scope: TrainScope | None, part: DevicePart, dtype: torch.dtype | None
    ):
        self._part = part
        self._bank: ExpertBank | None = None
        super().__init__(folder, units, scope, dtype)
        self._align = neuron_aligner(self.layers) if part.aligned else None

    def num_slots(self, layer: ExpertLayer) -> int:
        """Number of slots of a layer, S; 0 if no expert is resident."""
        return self._part.plan.num_slots(layer.ordinal)

    def num_neurons(self, layer: ExpertLayer) -> int:
        """Neurons of the widest slot of a layer."""
        plan = self._part.plan
        return int(plan.neurons[layer.ordinal].sum(axis=1).max()) if plan.neurons else layer.num_neurons

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """Return one tensor of a slot, with its adapter added, as wide as the widest. Raises CheckpointError."""
        layer, own = self._expert_of[name]
        if self._bank is None or self._bank.layer is not layer:
            self._bank = None  # free the old one before the new one is read
            part, cpu = self._part, torch.device("cpu")
            self._bank = ExpertBank(layer, part.plan, self._units, self._scope, cpu, part.storage, self._align)
        slot = self._bank.slots()[expert]
        up = own.startswith(layer.up_name)
        if own.endswith("_bias"):
            bias = slot.up_bias if up else slot.down_bias
            if bias is None:
                raise AssertionError("an expert with a bias has a value of it")
            return widen(layer, own, bias.detach().float(), self.num_neurons(layer))
        weight, pair = (slot.up, slot.up_lora) if up else (slot.down, slot.down_lora)
        dense = dequantize_experts(weight) if isinstance(weight, QuantizedMatrix) else weight.detach()
        dense = dense.float()
        if pair is not None:
            update = low_rank_product(pair.lora_a.detach(), pair.lora_b.detach(), pair.scale)  # (out, in)
            dense = dense + (update.T if layer.is_transposed else update)
        return widen(layer, own, dense, self.num_neurons(layer))

    def routing(self, layer: ExpertLayer) -> Routing:
        """Return what maps the router's choice to slots; call it once per layer, before the model is run."""
        plan, ordinal, part = self._part.plan, layer.ordinal, self._part
        slots, groups = plan.slots(ordinal), plan.groups(ordinal)
        members = [expert for group in groups for expert in group.experts]
        resident = torch.from_numpy(np.concatenate([plan.resident(ordinal), members]).astype(np.int64))
        slot_of = torch.from_numpy(slots)
        reroutes = part.missing == "renormalize" and bool((slots < 0).any())
        bias = None
        if layer.selection_bias is not None:
            bias = operator.attrgetter(layer.selection_bias)(self.module).detach()
        logits: list[torch.Tensor] = []  # not an attribute of a module, which tracing would forbid

        def store(module: Any, args: Any, output: object) -> None:
            found = router_logits_of(output)
            logits[:] = [found.reshape(-1, found.shape[-1])]  # (T, E)

        def route(indices: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = slot_of[indices]
            if reroutes:
                shared = slot_of if groups else None
                chosen, weights = route_to_resident(logits[0], chosen, weights, resident, layer.gate_kind, bias, shared)
            return chosen.clamp_min(0), weights.masked_fill(chosen < 0, 0)

        if reroutes and len(resident):
            layer.router.register_forward_hook(store)
        return route

    def _sample(self, layer: ExpertLayer) -> Mapping[str, torch.Tensor]:
        plan = self._part.plan
        if plan.experts_per_layer != tuple(each.num_experts for each in self.layers):
            raise ConfigError(
                f"the plan is of a model with {plan.experts_per_layer} experts per layer; found "
                f"{tuple(each.num_experts for each in self.layers)}"
            )
        expert = next((expert for ordinal, expert in plan.resident_keys() if ordinal == layer.ordinal), None)
        if expert is None:
            return {p.name: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in layer.parameters}
        neurons = plan.neuron_indices(layer.ordinal, expert)
        if neurons is None:
            return read_expert(layer, expert, self._units)
        return read_slice(layer, expert, self._units, torch.from_numpy(neurons))
