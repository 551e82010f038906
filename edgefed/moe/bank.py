"""The resident experts of one layer.

For each tensor of an expert, the bank has one contiguous storage over all slots, and one leaf parameter per slot that
is a view of its part. Kernels read all slots as one tensor, while autograd and the optimizer see single experts: an
expert without a token gets no gradient, and no optimizer state before its first step.

Matrices that are not trainable can be quantized into one packed stack: those of frozen and merged experts, and the base
weights of experts whose adapters are trainable (QLoRA, arXiv 2305.14314). Biases and adapters are never quantized. Each
expert is quantized as soon as it is read, so at most one is unquantized in memory at a time.

In a sliced plan, experts have different widths: a storage is then a `RaggedStack`, and a packed matrix has no stack.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from edgefed.errors import CheckpointError
from edgefed.expert_records import ExpertPlan
from edgefed.kernels.masked_experts import LastingSlots, Slots, SlotWeights
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_reading import read_adapter, read_expert, read_slice
from edgefed.moe.expert_stream import ExpertStream
from edgefed.moe.merged_cache import Align, MergedCache, merged_tensors
from edgefed.moe.neurons import sliced_shape, to_table
from edgefed.moe.offloading import Offloaded, OffloadSpace, mark_offloaded, release
from edgefed.moe.slots import (
    PACKABLE,
    BankSlots,
    Perturbation,
    PerturbedSlots,
    RaggedStack,
    SplitStack,
    empty_stack,
    pack_into,
    typical_weight,
)
from edgefed.moe.units import LORA_SUFFIX, Copy, ExpertSource, TrainScope, check_tensors, copy_into
from edgefed.protocol.messages import NEURON_INDEX

_LORA_PARTS = (".lora_a", ".lora_b")
_Stack = torch.Tensor | RaggedStack | SplitStack


class ExpertBank(nn.Module):
    """The S slots of ``layer`` according to ``plan``: trainable experts, then frozen ones, then merged groups.

    Reads each expert once from ``source``. If experts train by LoRA, each expert's adapter is read too: a frozen expert
    uses the adapter that others trained, and a merged expert has the adapters of its members added to their weights.

    Args:
        layer: the MoE layer.
        plan: which experts are resident.
        source: the weights of experts and adapters.
        scope: what trains.
        device: where the weights are computed with.
        storage: format of matrices that are not trainable, one of `edgefed.moe.slots.EXPERT_STORAGES`; None: as read.
        align: neuron alignment of merged experts, see `merge_experts`.
        merged: cache of merged experts of earlier rounds.
        offload: where weights are stored instead of ``device``: all unquantized ones in an `OffloadSpace`, those that
            are not trainable in an `ExpertStream`, if it streams this layer.
        copy: copies what was read, or packed, to its place.

    Raises:
        CheckpointError: a unit does not fit the layer.
        ConfigError: the experts cannot be stored in this format.
        StorageError: offloading or the cache failed.

    """

    slot_of: torch.Tensor
    """Slot of each expert, (E,) int64, -1 where absent."""
    resident: torch.Tensor
    """Ids of the experts that tokens can be routed to, int64: resident ones, then members of merged ones."""
    served_tokens: torch.Tensor
    """Tokens that each slot has computed, (S,) int64."""
    trained_tokens: torch.Tensor
    """Tokens that each slot has computed while it was trained, (S,) int64."""

    def __init__(
        self,
        layer: ExpertLayer,
        plan: ExpertPlan,
        source: ExpertSource,
        scope: TrainScope,
        device: torch.device,
        storage: str | None = None,
        align: Align | None = None,
        merged: MergedCache | None = None,
        offload: OffloadSpace | ExpertStream | None = None,
        copy: Copy = torch.Tensor.copy_,
    ):
        super().__init__()
        ordinal = layer.ordinal
        resident, groups, slots = plan.resident(ordinal), plan.groups(ordinal), plan.slots(ordinal)
        self.layer = layer
        self.experts = (*(int(expert) for expert in resident), *(group.experts[0] for group in groups))
        """Expert of each slot; the first member of a merged one."""
        self.num_resident = len(resident)
        """Slots that are not merged experts."""
        self.num_trainable = len(plan.trainable(ordinal)) if scope.experts != "none" else 0
        self.is_complete = bool((slots >= 0).all())
        """Whether no expert of the layer is absent."""
        self.lora_scale = scope.lora_scale if scope.experts == "lora" else None
        self._num_full = num_full = self.num_trainable if scope.experts == "full" else 0
        self._storage_format = storage
        self._copy = copy
        self._first_packed = len(self.experts) if storage is None else num_full
        self.perturbation: Perturbation | None = None
        """While set, one slot appears moved."""
        self.neurons: tuple[torch.Tensor, ...] = ()
        """Neurons of each slot, int64 ascending; () if the plan has whole experts."""
        if plan.neurons:
            masks = plan.neurons[ordinal]
            self.neurons = tuple(torch.from_numpy(np.flatnonzero(masks[expert])) for expert in resident)
        self._storage: dict[str, _Stack] = {}
        self._packed: dict[str, QuantizedMatrix] = {}
        self.stream = offload if isinstance(offload, ExpertStream) and offload.streams(ordinal) else None
        self.offload = offload if isinstance(offload, OffloadSpace) else None
        self.slot_table: dict[int, SlotWeights] = {}
        """Slots as kernels take them, each built once: collecting the tensors of a layer takes the host longer than a
        GPU computes with them."""
        self._layouts: dict[str, Any] = {}
        self._training_space: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = {}
        members = np.array([expert for group in groups for expert in group.experts], dtype=np.int64)
        for name, value in (
            ("slot_of", torch.from_numpy(slots)),
            ("resident", torch.from_numpy(np.concatenate([resident, members]).astype(np.int64))),
            ("served_tokens", torch.zeros(len(self.experts), dtype=torch.int64)),
            ("trained_tokens", torch.zeros(len(self.experts), dtype=torch.int64)),
        ):
            self.register_buffer(name, value.to(device), persistent=False)
        for slot, expert in enumerate(resident.tolist()):
            key = layer.expert_key(expert)
            self._fill(slot, key, self._read(slot, source), slot < num_full, device)
            if scope.experts == "lora":
                adapter = self._read(slot, source, scope.lora_rank)
                self._fill(slot, key + LORA_SUFFIX, adapter, slot < self.num_trainable, device)
        for slot, group in enumerate(groups, start=len(resident)):
            tensors = merged_tensors(layer, group, source, scope, align, merged)
            self._fill(slot, f"{layer.experts_path}.{'+'.join(map(str, group.experts))}", tensors, False, device)
        self.release()

    def __len__(self) -> int:
        return len(self.experts)

    def _read(self, slot: int, source: ExpertSource, rank: int | None = None) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a slot, or with ``rank`` of its adapter."""
        layer, expert = self.layer, self.experts[slot]
        if self.neurons:
            return read_slice(layer, expert, source, self.neurons[slot], rank=rank)
        return read_expert(layer, expert, source) if rank is None else read_adapter(layer, expert, source, rank)

    def _fill(
        self, slot: int, key: str, tensors: Mapping[str, torch.Tensor], trainable: bool, device: torch.device
    ) -> None:
        is_adapter = key.endswith(LORA_SUFFIX)
        for name, value in tensors.items():
            is_matrix = value.ndim == 2 and not is_adapter
            if is_matrix and self._storage_format is not None and slot >= self._first_packed:
                stack, place = self._place_packed(name, slot)
                if stack not in self._packed:
                    count = 1 if self.neurons else len(self) - self._first_packed
                    shape = (value.shape[0], value.shape[1])
                    empty = functools.partial(self._empty_far, device)
                    self._set_packed(stack, empty_stack(self._storage_format, count, shape, value.dtype, empty))
                pack_into(self._packed[stack], place, key, name, value, self._copy)
                continue
            if name not in self._storage:
                count = self.num_resident if is_adapter else self._first_packed if is_matrix else len(self)
                self._storage[name] = self._empty(name, count, tuple(value.shape), value.dtype, device)
            copy_into(key, name, self._storage[name][slot], value, self._copy)
            # .data gives the view its own version counter: an optimizer step on one expert is not a change of others.
            parameter = nn.Parameter(self._storage[name].data[slot], requires_grad=trainable)
            self.register_parameter(self._parameter_name(name, slot), parameter)
            if self.stream is not None and slot >= self._num_near(is_adapter):
                mark_offloaded(parameter, Offloaded())
            elif self.offload is not None:
                mark_offloaded(parameter, self._offloaded(self.offload, name, slot, parameter, is_adapter))

    def _empty(self, name: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Stack:
        if self.offload is not None:
            return self.offload.empty((count, *shape), dtype)
        num_near = count if self.stream is None else min(count, self._num_near(name.endswith(_LORA_PARTS)))

        def stack(first: int, last: int) -> torch.Tensor | RaggedStack:
            far = first >= num_near

            def empty(sizes: tuple[int, ...]) -> torch.Tensor:
                return self._empty_far(device, sizes, dtype) if far else torch.empty(sizes, dtype=dtype, device=device)

            if not self.neurons:
                return empty((last - first, *shape))
            shapes = [sliced_shape(self.layer, name, shape, len(neurons)) for neurons in self.neurons[first:last]]
            return RaggedStack.empty(shapes, lambda size: empty((size,)))

        return stack(0, count) if num_near == count else SplitStack(stack(0, num_near), stack(num_near, count))

    def _empty_far(self, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return storage for frozen weights."""
        if self.stream is not None:
            return self.stream.empty(self.layer.ordinal, shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    def _num_near(self, is_adapter: bool) -> int:
        """Return how many slots have trainable adapters, or other trainable tensors: these are never streamed."""
        return self.num_trainable if is_adapter else self._num_full

    def _offloaded(
        self, space: OffloadSpace, name: str, slot: int, parameter: nn.Parameter, is_adapter: bool
    ) -> Offloaded:
        """Reserve space for the gradient and the moments of an offloaded parameter."""
        if not parameter.requires_grad:
            return Offloaded()
        if name not in self._training_space:
            shape = (self.num_trainable, *parameter.shape)
            self._training_space[name] = space.gradients_and_moments(shape, parameter.dtype)
        beside = tuple(self.tensors(slot).values()) if is_adapter else ()
        reserved = self._training_space[name]
        if reserved is None:
            return Offloaded(beside=beside)
        gradient, first, second = (stack[slot] for stack in reserved)
        return Offloaded(gradient, (first, second), beside)

    def release(self) -> None:
        """Release the memory of offloaded or streamed weights until they are needed again."""
        if self.stream is not None:
            self.stream.release()
        elif self.offload is not None:
            release(storage for storage in self._storage.values() if isinstance(storage, torch.Tensor))

    def _place_packed(self, name: str, slot: int) -> tuple[str, int]:
        """Return the name of the packed stack with a matrix, and its place there: slices have a stack each."""
        return (f"{name}_{slot}", 0) if self.neurons else (name, slot - self._first_packed)

    def _set_packed(self, name: str, stack: QuantizedMatrix) -> None:
        """Store a packed stack. Its tensors are buffers, so that the module's memory includes them."""
        self._packed[name] = stack
        self.register_buffer(f"{name}_packed", stack.packed, persistent=False)
        self.register_buffer(f"{name}_absmax", stack.absmax, persistent=False)

    def _parameter_name(self, name: str, slot: int) -> str:
        return f"{name.replace('.', '_')}_{self.experts[slot]}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertBank:
        """Move or cast the bank. Parameters stay views of one storage, and offloaded weights stay where they are.

        A cast does not change packed weights, only the dtype that they are dequantized to.
        """
        self.slot_table.clear()
        self._layouts.clear()
        if self.offload is None:
            self._storage = {
                name: fn(storage) if isinstance(storage, torch.Tensor) else storage.apply(fn)
                for name, storage in self._storage.items()
            }
        for name, storage in self._storage.items():
            for slot in range(len(storage)):
                parameter = self.parameter(name, slot)
                grad, parameter.grad = parameter.grad, None
                parameter.data = storage.data[slot]
                parameter.grad = None if grad is None else fn(grad)
        for name, stack in self._packed.items():
            cast_to = fn(torch.empty(0, dtype=stack.dtype, device=stack.device))
            dtype = cast_to.dtype if cast_to.dtype in PACKABLE else stack.dtype
            moved = stack if self.stream is not None else stack.to(cast_to.device)
            self._set_packed(name, dataclasses.replace(moved, dtype=dtype))
        packed = {f"{name}_{part}" for name in self._packed for part in ("packed", "absmax")}
        for name, buffer in self._buffers.items():
            if name not in packed and buffer is not None:
                self._buffers[name] = fn(buffer)
        return self

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the weights, after dequantization; None without a slot."""
        matrix = self.layer.up_name
        if matrix in self._storage:
            return self._storage[matrix].dtype
        packed = self.packed(len(self) - 1) if len(self) else {}
        return packed[matrix].dtype if matrix in packed else None

    def parameter(self, name: str, slot: int) -> nn.Parameter:
        """Return the leaf of one tensor of one slot; ``name`` as in the unit (``down_proj``, ``down_proj.lora_a``).

        Raises KeyError if the tensor is packed.
        """
        return cast(nn.Parameter, self._parameters[self._parameter_name(name, slot)])

    def tensors(self, slot: int, *, adapter: bool = False) -> dict[str, nn.Parameter]:
        """Return the parameters of the slot's unit that are not packed, or of its adapter unit, by tensor name."""
        return {
            name: self.parameter(name, slot)
            for name, storage in self._storage.items()
            if name.endswith(_LORA_PARTS) == adapter and slot < len(storage)
        }

    def unit_tensors(self, slot: int, *, adapter: bool = False) -> dict[str, torch.Tensor]:
        """Return the values of the slot's unit, or of its adapter unit, as the run stores them: what is uploaded."""
        tensors = {name: tensor.detach() for name, tensor in self.tensors(slot, adapter=adapter).items()}
        if not self.neurons:
            return tensors
        index = {NEURON_INDEX: self.neurons[slot].to(torch.int32)}
        return to_table(self.layer, self.layer.expert_key(self.experts[slot]), tensors) | index

    def packed(self, slot: int) -> dict[str, QuantizedMatrix]:
        """Return views of the quantized matrices of the slot's unit by tensor name; empty if nothing is packed."""
        if slot < self._first_packed:
            return {}
        places = {p.name: self._place_packed(p.name, slot) for p in self.layer.matrices}
        return {name: self._packed[stack][place] for name, (stack, place) in places.items() if stack in self._packed}

    def storages(self) -> Mapping[str, _Stack]:
        """Return the contiguous storages of slots 0, 1, ... by tensor name, for kernels that take all slots at once."""
        return self._storage

    def stacks(self) -> Mapping[str, QuantizedMatrix]:
        """Return the packed stacks by tensor name. Their slots follow those of the same tensor in `storages`."""
        return self._packed

    def weights(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that stores weights, quantized or not."""
        yield from self.parameters()
        for stack in self._packed.values():
            yield from (tensor for tensor in (stack.packed, stack.absmax) if tensor is not None)

    def slot(self, expert: int) -> int:
        """Return the slot of a resident expert. Raises CheckpointError if it is absent or merged."""
        if expert not in self.experts[: self.num_resident]:
            key = self.layer.expert_key(expert)
            if 0 <= expert < self.layer.num_experts and int(self.slot_of[expert]) >= 0:
                raise CheckpointError(f"expert {key!r} is resident only as part of a merged expert: apply a plan again")
            raise CheckpointError(f"expert {key!r} is not resident on this device")
        return self.experts.index(expert)

    def load(self, expert: int, tensors: Mapping[str, torch.Tensor], *, adapter: bool = False) -> None:
        """Copy new values into a resident expert or its adapter, quantizing packed tensors. Raises CheckpointError."""
        key = self.layer.expert_key(expert) + (LORA_SUFFIX if adapter else "")
        slot = self.slot(expert)
        targets = self.tensors(slot, adapter=adapter)
        stacks = {} if adapter or slot < self._first_packed else self._packed
        if self.neurons:
            raise CheckpointError(f"{key!r} is resident as a slice: apply a plan again")
        shapes = {name: tuple(target.shape) for name, target in targets.items()}
        check_tensors(key, tensors, shapes | {name: stack.shape[1:] for name, stack in stacks.items()})
        for name, target in targets.items():
            copy_into(key, name, target, tensors[name])
        for name, stack in stacks.items():
            pack_into(stack, slot - self._first_packed, key, name, tensors[name])

    @property
    def lasting(self) -> LastingSlots | None:
        """The slots with what kernels derive from them; None if weights are offloaded.

        A streamed layer has the same addresses whenever it is loaded.
        They refer to the bank, so the bank does not keep them: in a reference cycle it would outlive its plan until the
        garbage collector runs, and its memory with it.
        """
        return LastingSlots(BankSlots(self, None), self._layouts) if self.offload is None else None

    def slots(self, scheduled: Collection[int] | None = None) -> Slots:
        """Return the experts for `masked_experts`. With ``scheduled``, trainable experts of other ids are detached."""
        slots = BankSlots(self, scheduled)
        return slots if self.perturbation is None else PerturbedSlots(slots, self.perturbation)

    @contextlib.contextmanager
    def perturbed(self, expert: int, *, seed: int, size: float) -> Iterator[None]:
        """Within this context, a resident expert appears moved by ``size`` times a random direction."""
        self.perturbation = Perturbation(self.slot(expert), seed, size)
        try:
            yield
        finally:
            self.perturbation = None

    def typical_weight(self, expert: int) -> float:
        """Return the root mean square of the trainable part of a resident expert: its weights, or its adapter."""
        return typical_weight(self.slots()[self.slot(expert)])

    def gradients(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Yield (expert id, gradients) of each expert that the next optimizer step will change."""
        for slot in range(self.num_trainable):
            parameters = (*self.tensors(slot).values(), *self.tensors(slot, adapter=True).values())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                yield self.experts[slot], gradients
