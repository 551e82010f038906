"""Charges the work on one model as if it were another, larger one.

A model small enough to be trained thirty times over on one machine is never short of anything on a real device. So the
devices of a simulation are charged with the memory, operations and bytes of a `cost shape`, OLMoE-1B-7B say, while the
training is that of the small model. Layers and experts correspond in proportion: MoE layer j of L' in the cost shape is
layer floor(j L / L') of the model, and a device that holds a quarter of that layer's experts holds a quarter of these.
Tokens, steps and sequences are the same in both. Arithmetic only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from edgefed.costs.shapes import LayerShape, ModelShape
from edgefed.costs.step_setup import ADAPTER_BYTES, StepSetup
from edgefed.hardware.facts import MemoryKind
from edgefed.moe.units import LORA_SUFFIX
from edgefed.protocol.messages import UnitInfo

STEP_DEVICES: Mapping[MemoryKind, str] = {
    MemoryKind.DISCRETE: "cuda",
    MemoryKind.UNIFIED: "unified",
    MemoryKind.CPU: "cpu",
}
FILE = "file"
"""Kind of what is no unit: config.json, tokenizer.json, ..."""


def byte_kind(unit: UnitInfo) -> str:
    """``expert``, ``router`` or ``dense``, with ``:lora`` behind it for an adapter."""
    return unit.kind + (LORA_SUFFIX if unit.key.endswith(LORA_SUFFIX) else "")


@dataclasses.dataclass(frozen=True)
class CostShape:
    """``shape`` is what is charged; ``experts_per_layer`` are the model's own.

    ``dtype``: of weights and activations in the cost shape; None: as the model's own. ``gpu_optimizer``: see `setup`.
    """

    shape: ModelShape
    experts_per_layer: tuple[int, ...]
    dtype: str | None = "bfloat16"
    gpu_optimizer: str = "adamw_8bit"

    @classmethod
    def same(cls, shape: ModelShape, gpu_optimizer: str = "adamw_8bit") -> CostShape:
        """The model is charged with what it is."""
        return cls(shape, shape.experts_per_layer, None, gpu_optimizer)

    @property
    def experts_ratio(self) -> float:
        """Experts of the cost shape for each of the model's."""
        return sum(self.shape.experts_per_layer) / sum(self.experts_per_layer)

    def layer_of(self, layer: int) -> int:
        """The model's MoE layer that stands for MoE layer ``layer`` of the cost shape."""
        return layer * len(self.experts_per_layer) // len(self.shape.experts_per_layer)

    def counts(self, counts: Sequence[float]) -> tuple[int, ...]:
        """Experts per MoE layer of the cost shape, for ``counts`` of the model's; rounded up, so none becomes none."""
        found = []
        for layer, size in enumerate(self.shape.experts_per_layer):
            at = self.layer_of(layer)
            found.append(min(size, -int(-counts[at] * size // self.experts_per_layer[at])))
        return tuple(found)

    def shares(self, shares: Sequence[float]) -> tuple[float, ...]:
        """A number of each of the model's MoE layers, for each of the cost shape."""
        return tuple(shares[self.layer_of(layer)] for layer in range(len(self.shape.experts_per_layer)))

    def setup(self, setup: StepSetup, kind: MemoryKind) -> StepSetup:
        """How a step is done on a device of this ``kind`` that is done so with the model here.

        ``gpu_optimizer`` counts on GPUs whatever is installed here: 8-bit moments change the training hardly.
        """
        optimizer = setup.optimizer if kind is MemoryKind.CPU else self.gpu_optimizer
        return dataclasses.replace(
            setup, dtype=self.dtype or setup.dtype, device=STEP_DEVICES[kind], optimizer=optimizer
        )

    def byte_ratios(self, units: Sequence[UnitInfo], setup: StepSetup) -> dict[str, float]:
        """Bytes of the cost shape per byte of the model, by kind of unit; 1 for files, and where a kind has none."""
        own: dict[str, int] = {}
        for unit in units:
            own[byte_kind(unit)] = own.get(byte_kind(unit), 0) + unit.size_bytes
        charged = _bytes_by_kind(self.shape, setup)
        ratios = {kind: charged[kind] / size if charged.get(kind) else 1.0 for kind, size in own.items() if size}
        return {FILE: 1.0, **ratios}


def _bytes_by_kind(shape: ModelShape, setup: StepSetup) -> dict[str, float]:
    """Bytes that cross a network for the whole model, as it is stored by the aggregator: nothing quantised."""

    def adapters(pairs: Sequence[tuple[int, int]]) -> int:
        return ADAPTER_BYTES * sum(setup.lora_rank * (size_in + size_out) for size_in, size_out in pairs)

    def total(size) -> float:
        return float(sum(size(layer) for layer in shape.layers))

    def routers(layer: LayerShape) -> int:
        return sum(i * o for i, o in layer.router_matrices) + sum(layer.router_vectors)

    experts = total(lambda layer: layer.num_experts * layer.parameters_per_expert)
    return {
        "expert": experts * setup.width,
        "router": total(routers) * setup.width,
        "dense": (shape.num_parameters - experts - total(routers)) * setup.width + shape.own_dtype_bytes,
        "expert:lora": total(lambda layer: layer.num_experts * adapters(layer.expert_matrices)),
        "router:lora": total(lambda layer: adapters(layer.router_matrices)),
        "dense:lora": total(lambda layer: adapters(layer.attention_matrices)),
    }
