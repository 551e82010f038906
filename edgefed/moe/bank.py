"""The experts of one layer that are on this device, and nothing of those that are not.

For each tensor of an expert the bank owns one contiguous storage (S, ...), slot by slot, and one leaf parameter per
slot that views its part of it. So a kernel can read all slots as one tensor, while autograd and the optimiser see
single experts: one without a token gets no gradient, and no optimiser state before its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from edgefed.errors import CheckpointError
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.scope import TrainScope
from edgefed.moe.sources import ExpertSource
from edgefed.moe.units import ADAPTER_DTYPE, LORA_SUFFIX, check_tensors, copy_into


class ExpertBank(nn.Module):
    """S resident experts of ``layer``: the tuned ones in slots 0..num_tuned-1, then the frozen ones.

    Reads each resident expert once from ``source`` (and its adapter, when the experts train by LoRA: a frozen expert
    carries what others have learned, too). Raises CheckpointError when a unit does not fit the layer.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        resident: np.ndarray,
        num_tuned: int,
        source: ExpertSource,
        scope: TrainScope,
        device: torch.device,
    ):
        super().__init__()
        self.layer = layer
        self.experts = tuple(int(expert) for expert in resident)
        self.num_tuned = num_tuned if scope.experts != "none" else 0
        self.lora_scale = scope.lora_scale if scope.experts == "lora" else None
        self._storage: dict[str, torch.Tensor] = {}
        slot_of = np.full(layer.num_experts, -1, dtype=np.int64)
        slot_of[resident] = np.arange(len(resident))
        self.register_buffer("slot_of", torch.from_numpy(slot_of).to(device), persistent=False)  # (E,)
        self.register_buffer("resident", torch.from_numpy(resident.astype(np.int64)).to(device), persistent=False)
        self.register_buffer("served_tokens", torch.zeros(len(resident), dtype=torch.int64, device=device), False)
        self.register_buffer("trained_tokens", torch.zeros(len(resident), dtype=torch.int64, device=device), False)
        for slot, expert in enumerate(self.experts):
            self._fill(slot, layer.expert_key(expert), source, scope, device)

    def __len__(self) -> int:
        return len(self.experts)

    def _fill(self, slot: int, key: str, source: ExpertSource, scope: TrainScope, device: torch.device) -> None:
        tuned, lora = slot < self.num_tuned, self.lora_scale is not None
        tensors = source.read(key)
        check_expert(self.layer, key, tensors)
        for name, value in tensors.items():
            self._add(slot, name, value, key, trains=tuned and not lora, device=device)
        if lora:
            adapter = source.read(key + LORA_SUFFIX)
            check_expert_adapter(self.layer, key + LORA_SUFFIX, adapter, scope.lora_rank)
            for name, value in adapter.items():
                self._add(slot, name, value, key + LORA_SUFFIX, trains=tuned, device=device)

    def _add(self, slot: int, name: str, value: torch.Tensor, key: str, *, trains: bool, device: torch.device) -> None:
        if name not in self._storage:
            self._storage[name] = torch.empty(len(self.experts), *value.shape, dtype=value.dtype, device=device)
        copy_into(key, name, self._storage[name][slot], value)
        # .data gives the view a version counter of its own: a step of one expert is no change of another.
        parameter = nn.Parameter(self._storage[name].data[slot], requires_grad=trains)
        self.register_parameter(self._parameter_name(name, slot), parameter)

    def _parameter_name(self, name: str, slot: int) -> str:
        return f"{name.replace('.', '_')}_{self.experts[slot]}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertBank:
        """Moves and casts keep the parameters views of one storage."""
        self._storage = {name: fn(storage) for name, storage in self._storage.items()}
        for name, storage in self._storage.items():
            for slot in range(len(self)):
                parameter = self.parameter(name, slot)
                grad, parameter.grad = parameter.grad, None
                parameter.data = storage.data[slot]
                parameter.grad = None if grad is None else fn(grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = fn(buffer)
        return self

    def parameter(self, name: str, slot: int) -> nn.Parameter:
        """The leaf of one tensor of one slot; ``name`` as in the unit (``down_proj``, ``down_proj.lora_a``)."""
        return self._parameters[self._parameter_name(name, slot)]

    def tensors(self, slot: int, *, adapter: bool = False) -> dict[str, nn.Parameter]:
        """The parameters of the slot's unit, or of its adapter unit, by tensor name."""
        return {name: self.parameter(name, slot) for name in self._storage if name.endswith(_LORA_PARTS) == adapter}

    def storages(self) -> Mapping[str, torch.Tensor]:
        """The contiguous storages (S, ...) by tensor name, for kernels that take all slots at once."""
        return self._storage

    def slot(self, expert: int) -> int:
        """Slot of an expert. Raises CheckpointError when it is not resident."""
        if expert not in self.experts:
            raise CheckpointError(f"expert {self.layer.expert_key(expert)!r} is not on this device")
        return self.experts.index(expert)

    def load(self, expert: int, tensors: Mapping[str, torch.Tensor], *, adapter: bool = False) -> None:
        """Copy new values into a resident expert or its adapter. Raises CheckpointError."""
        key = self.layer.expert_key(expert) + (LORA_SUFFIX if adapter else "")
        targets = self.tensors(self.slot(expert), adapter=adapter)
        check_tensors(key, tensors, {name: tuple(target.shape) for name, target in targets.items()})
        for name, target in targets.items():
            copy_into(key, name, target, tensors[name])

    def slots(self, scheduled: Collection[int] | None = None) -> BankSlots:
        """The experts as `masked_experts` takes them; tuned ones outside ``scheduled`` (expert ids) are detached."""
        return BankSlots(self, scheduled)

    def experts_with_gradient(self) -> Iterator[int]:
        """Expert ids whose unit has a gradient now: the next optimiser step changes them."""
        for slot in range(self.num_tuned):
            parameters = (self.parameter(name, slot) for name in self._storage)
            if any(parameter.grad is not None for parameter in parameters):
                yield self.experts[slot]


_LORA_PARTS = (".lora_a", ".lora_b")


class BankSlots:
    """A bank seen by slot, with some slots taken out of the gradient."""

    def __init__(self, bank: ExpertBank, scheduled: Collection[int] | None):
        self._bank = bank
        self._scheduled = scheduled

    def __len__(self) -> int:
        return len(self._bank)

    def __getitem__(self, slot: int) -> SlotWeights:
        bank = self._bank
        tensors: dict[str, torch.Tensor] = {name: bank.parameter(name, slot) for name in bank.storages()}
        if self._scheduled is not None and bank.experts[slot] not in self._scheduled:
            tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        return slot_weights(bank.layer, tensors, bank.lora_scale)


class StreamedSlots:
    """All E experts of a layer, each read when it is needed and kept by nobody. Forward only."""

    streamed = True

    def __init__(self, layer: ExpertLayer, source: ExpertSource, scope: TrainScope, device: torch.device):
        self._layer, self._source, self._scope, self._device = layer, source, scope, device

    def __len__(self) -> int:
        return self._layer.num_experts

    def __getitem__(self, slot: int) -> SlotWeights:
        key = self._layer.expert_key(slot)
        tensors = dict(self._source.read(key))
        check_expert(self._layer, key, tensors)
        if self._scope.experts == "lora":
            adapter = self._source.read(key + LORA_SUFFIX)
            check_expert_adapter(self._layer, key + LORA_SUFFIX, adapter, self._scope.lora_rank)
            tensors.update(adapter)
        scale = self._scope.lora_scale if self._scope.experts == "lora" else None
        return slot_weights(self._layer, {n: t.to(self._device) for n, t in tensors.items()}, scale)


def slot_weights(layer: ExpertLayer, tensors: Mapping[str, torch.Tensor], lora_scale: float | None) -> SlotWeights:
    """Name the tensors of one expert by their part in the computation."""

    def lora(name: str) -> LowRankPair | None:
        if lora_scale is None:
            return None
        return LowRankPair(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], lora_scale)

    up = layer.up_name
    return SlotWeights(
        up=tensors[up],
        down=tensors["down_proj"],
        up_bias=tensors.get(f"{up}_bias"),
        down_bias=tensors.get("down_proj_bias"),
        up_lora=lora(up),
        down_lora=lora("down_proj"),
    )


def check_expert(layer: ExpertLayer, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless these are the tensors of one expert of ``layer``."""
    check_tensors(key, tensors, {parameter.name: parameter.shape for parameter in layer.parameters})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name!r} of unit {key!r} is {tensor.dtype}, expected a floating-point type")


def check_expert_adapter(layer: ExpertLayer, key: str, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    """Raise CheckpointError unless these are the adapter of one expert of ``layer``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in layer.matrices:
        size_in, size_out = layer.input_output_sizes(parameter)
        shapes[f"{parameter.name}.lora_a"], shapes[f"{parameter.name}.lora_b"] = (rank, size_in), (size_out, rank)
    check_tensors(key, tensors, shapes)
    for name, tensor in tensors.items():
        if tensor.dtype != ADAPTER_DTYPE:
            raise CheckpointError(f"{name!r} of unit {key!r} is {tensor.dtype}, adapters are {ADAPTER_DTYPE}")
