"""The experts of one layer that are on this device, and nothing of those that are not.

For each tensor of an expert the bank owns one contiguous storage, slot by slot, and one leaf parameter per slot that
views its part of it. So a kernel can read all slots as one tensor, while autograd and the optimizer see single
experts: one without a token gets no gradient, and no optimizer state before its first step.

Matrices that do not learn may lie quantised instead, in one packed stack: frozen and merged experts, and the base of
trainable ones whose adapters learn (QLoRA, arXiv 2305.14314). Biases and adapters are never quantised. Each expert is
quantised as it is read, so there is never more than one of them unpacked in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from edgefed.errors import CheckpointError
from edgefed.expert_records import ExpertPlan, MergedGroup
from edgefed.kernels.masked_experts import LowRankPair, Slots, SlotWeights
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_reading import check_expert, check_expert_adapter, read_with_adapter
from edgefed.moe.merged_cache import Align, MergedCache, merge_experts
from edgefed.moe.offloading import Offloaded, OffloadSpace, mark_offloaded, release
from edgefed.moe.packed import PACKABLE, empty_stack, pack_into
from edgefed.moe.perturbation import Perturbation, PerturbedSlots, typical_weight
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, TrainScope, check_tensors, copy_into


class ExpertBank(nn.Module):
    """S slots of ``layer`` as ``plan`` has them: trainable experts, then frozen ones, then merged groups.

    Reads each expert once from ``source`` (and its adapter, when the experts train by LoRA: a frozen expert carries
    what others have learned, too; in a merged one the adapters of its members are added to their weights). ``storage``
    is how matrices that do not learn are kept, see `edgefed.moe.packed`; ``align`` is `merge_experts`'s, ``merged`` has
    merged experts of earlier rounds. With ``offload`` what is not packed lies there instead of on ``device``.
    Raises CheckpointError when a unit does not fit the layer, ConfigError when it cannot be stored so, StorageError.
    """

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
        offload: OffloadSpace | None = None,
    ):
        super().__init__()
        ordinal = layer.ordinal
        resident, groups, slots = plan.resident(ordinal), plan.groups(ordinal), plan.slots(ordinal)
        self.layer = layer
        self.experts = (*(int(expert) for expert in resident), *(group.experts[0] for group in groups))
        """Expert of each slot; of a merged one its first member."""
        self.num_resident = len(resident)
        self.num_trainable = len(plan.trainable(ordinal)) if scope.experts != "none" else 0
        self.is_complete = bool((slots >= 0).all())
        """No expert of the layer is absent."""
        self.lora_scale = scope.lora_scale if scope.experts == "lora" else None
        learning = self.num_trainable if scope.experts == "full" else 0
        self._first_packed = len(self.experts) if storage is None else learning
        self._format = storage
        self.perturbation: Perturbation | None = None
        """One slot appears moved while this is set."""
        self._storage: dict[str, torch.Tensor] = {}
        self._packed: dict[str, QuantizedMatrix] = {}
        self.offload = offload
        self._training: dict[str, tuple[torch.Tensor, ...] | None] = {}
        held = np.concatenate([resident, np.array([e for group in groups for e in group.experts], dtype=np.int64)])
        for name, value in (
            ("slot_of", torch.from_numpy(slots)),  # (E,)
            ("resident", torch.from_numpy(held.astype(np.int64))),  # experts that tokens can go to
            ("served_tokens", torch.zeros(len(self.experts), dtype=torch.int64)),
            ("trained_tokens", torch.zeros(len(self.experts), dtype=torch.int64)),
        ):
            self.register_buffer(name, value.to(device), persistent=False)
        for slot, expert in enumerate(resident.tolist()):
            key = layer.expert_key(expert)
            tensors = source.read(key)
            check_expert(layer, key, tensors)
            self._fill(slot, key, tensors, slot < learning, device)
            if scope.experts == "lora":
                adapter = source.read(key + LORA_SUFFIX)
                check_expert_adapter(layer, key + LORA_SUFFIX, adapter, scope.lora_rank)
                self._fill(slot, key + LORA_SUFFIX, adapter, slot < self.num_trainable, device)
        for slot, group in enumerate(groups, start=len(resident)):
            tensors = _merged_tensors(layer, group, source, scope, align, merged)
            self._fill(slot, f"{layer.experts_path}.{'+'.join(map(str, group.experts))}", tensors, False, device)
        self.release()

    def __len__(self) -> int:
        return len(self.experts)

    def _fill(
        self, slot: int, key: str, tensors: Mapping[str, torch.Tensor], trains: bool, device: torch.device
    ) -> None:
        is_adapter = key.endswith(LORA_SUFFIX)
        for name, value in tensors.items():
            is_matrix = value.ndim == 2 and not is_adapter
            if is_matrix and slot >= self._first_packed:
                if name not in self._packed:
                    count = len(self) - self._first_packed
                    self._hold(name, empty_stack(self._format, count, tuple(value.shape), value.dtype, device))
                pack_into(self._packed[name], slot - self._first_packed, key, name, value)
                continue
            if name not in self._storage:
                count = self.num_resident if is_adapter else self._first_packed if is_matrix else len(self)
                self._storage[name] = self._empty((count, *value.shape), value.dtype, device)
            copy_into(key, name, self._storage[name][slot], value)
            # .data gives the view a version counter of its own: a step of one expert is no change of another.
            parameter = nn.Parameter(self._storage[name].data[slot], requires_grad=trains)
            self.register_parameter(self._parameter_name(name, slot), parameter)
            if self.offload is not None:
                mark_offloaded(parameter, self._place(name, slot, parameter, is_adapter))

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self.offload is not None:
            return self.offload.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    def _place(self, name: str, slot: int, parameter: nn.Parameter, is_adapter: bool) -> Offloaded:
        """Where the gradient and the moments of an offloaded parameter go."""
        if not parameter.requires_grad:
            return Offloaded()
        if name not in self._training:
            shape = (self.num_trainable, *parameter.shape)
            self._training[name] = self.offload.gradients_and_moments(shape, parameter.dtype)
        beside = tuple(self.tensors(slot).values()) if is_adapter else ()
        if (rooms := self._training[name]) is None:
            return Offloaded(beside=beside)
        gradient, first, second = (room[slot] for room in rooms)
        return Offloaded(gradient, (first, second), beside)

    def release(self) -> None:
        """Give up the memory of offloaded weights until they are needed again."""
        if self.offload is not None:
            release(self._storage.values())

    def _hold(self, name: str, stack: QuantizedMatrix) -> None:
        """Keep a packed stack: its tensors are buffers, so that whoever counts a module's memory finds them."""
        self._packed[name] = stack
        self.register_buffer(f"{name}_packed", stack.packed, persistent=False)
        self.register_buffer(f"{name}_absmax", stack.absmax, persistent=False)

    def _parameter_name(self, name: str, slot: int) -> str:
        return f"{name.replace('.', '_')}_{self.experts[slot]}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ExpertBank:
        """Moves and casts keep the parameters views of one storage. What is packed moves; a cast only changes what it
        is unpacked to. What is offloaded stays.
        """
        if self.offload is None:
            self._storage = {name: fn(storage) for name, storage in self._storage.items()}
        for name, storage in self._storage.items():
            for slot in range(len(storage)):
                parameter = self.parameter(name, slot)
                grad, parameter.grad = parameter.grad, None
                parameter.data = storage.data[slot]
                parameter.grad = None if grad is None else fn(grad)
        for name, stack in self._packed.items():
            cast = fn(torch.empty(0, dtype=stack.dtype, device=stack.device))
            dtype = cast.dtype if cast.dtype in PACKABLE else stack.dtype
            self._hold(name, dataclasses.replace(stack.to(cast.device), dtype=dtype))
        packed = {f"{name}_{part}" for name in self._packed for part in ("packed", "absmax")}
        for name, buffer in self._buffers.items():
            if name not in packed:
                self._buffers[name] = fn(buffer)
        return self

    @property
    def dtype(self) -> torch.dtype | None:
        """What its weights are, or are unpacked to; None without a slot."""
        matrix = self.layer.up_name
        if matrix in self._storage:
            return self._storage[matrix].dtype
        return self._packed[matrix].dtype if matrix in self._packed else None

    def parameter(self, name: str, slot: int) -> nn.Parameter:
        """The leaf of one tensor of one slot; ``name`` as in the unit (``down_proj``, ``down_proj.lora_a``).

        Raises KeyError where that is packed.
        """
        return self._parameters[self._parameter_name(name, slot)]

    def tensors(self, slot: int, *, adapter: bool = False) -> dict[str, nn.Parameter]:
        """The parameters of the slot's unit that are not packed, or of its adapter unit, by tensor name."""
        return {
            name: self.parameter(name, slot)
            for name, storage in self._storage.items()
            if name.endswith(_LORA_PARTS) == adapter and slot < len(storage)
        }

    def packed(self, slot: int) -> dict[str, QuantizedMatrix]:
        """The quantised matrices of the slot's unit by tensor name: views. Empty where nothing is packed."""
        place = slot - self._first_packed
        return {name: stack[place] for name, stack in self._packed.items()} if place >= 0 else {}

    def storages(self) -> Mapping[str, torch.Tensor]:
        """The contiguous storages by tensor name, for kernels that take all slots at once: of slots 0, 1, ..."""
        return self._storage

    def stacks(self) -> Mapping[str, QuantizedMatrix]:
        """The packed stacks by tensor name: of the slots behind those that `storages` has of that matrix."""
        return self._packed

    def weights(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds weights."""
        yield from self.parameters()
        for stack in self._packed.values():
            yield from (stack.packed, stack.absmax)

    def slot(self, expert: int) -> int:
        """Slot of an expert that is here as itself. Raises CheckpointError when it is not."""
        if expert not in self.experts[: self.num_resident]:
            key = self.layer.expert_key(expert)
            if 0 <= expert < self.layer.num_experts and self.slot_of[expert] >= 0:
                raise CheckpointError(f"expert {key!r} is on this device only within a merged one: apply a plan again")
            raise CheckpointError(f"expert {key!r} is not on this device")
        return self.experts.index(expert)

    def load(self, expert: int, tensors: Mapping[str, torch.Tensor], *, adapter: bool = False) -> None:
        """Copy new values into a resident expert or its adapter, quantised where it is. Raises CheckpointError."""
        key = self.layer.expert_key(expert) + (LORA_SUFFIX if adapter else "")
        slot = self.slot(expert)
        targets = self.tensors(slot, adapter=adapter)
        stacks = {} if adapter or slot < self._first_packed else self._packed
        shapes = {name: tuple(target.shape) for name, target in targets.items()}
        check_tensors(key, tensors, shapes | {name: stack.shape[1:] for name, stack in stacks.items()})
        for name, target in targets.items():
            copy_into(key, name, target, tensors[name])
        for name, stack in stacks.items():
            pack_into(stack, slot - self._first_packed, key, name, tensors[name])

    def slots(self, scheduled: Collection[int] | None = None) -> Slots:
        """The experts as `masked_experts` takes them; trainable ones outside ``scheduled`` (expert ids) are detached."""
        slots = BankSlots(self, scheduled)
        return slots if self.perturbation is None else PerturbedSlots(slots, self.perturbation)

    @contextlib.contextmanager
    def perturbed(self, expert: int, *, seed: int, size: float) -> Iterator[None]:
        """Within it an expert that is here as itself appears moved by ``size`` times a random direction."""
        self.perturbation = Perturbation(self.slot(expert), seed, size)
        try:
            yield
        finally:
            self.perturbation = None

    def typical_weight(self, expert: int) -> float:
        """Root mean square of what would train of an expert that is here as itself: its weights, or its adapter."""
        return typical_weight(self.slots()[self.slot(expert)])

    def gradients(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """(expert id, gradients) of each expert whose unit has a gradient now: the next optimizer step changes it."""
        for slot in range(self.num_trainable):
            parameters = (*self.tensors(slot).values(), *self.tensors(slot, adapter=True).values())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                yield self.experts[slot], gradients


_LORA_PARTS = (".lora_a", ".lora_b")


def _merged_tensors(
    layer: ExpertLayer,
    group: MergedGroup,
    source: ExpertSource,
    scope: TrainScope,
    align: Align | None,
    cache: MergedCache | None,
) -> Mapping[str, torch.Tensor]:
    """The merged expert of a group: as it was kept, or merged now and kept."""

    def merge() -> dict[str, torch.Tensor]:
        return merge_experts(lambda expert: read_with_adapter(layer, expert, source, scope), group, align)

    return merge() if cache is None else cache.get(layer, group, scope, merge, aligned=align is not None)


class BankSlots:
    """A bank seen by slot, with some slots taken out of the gradient."""

    def __init__(self, bank: ExpertBank, scheduled: Collection[int] | None):
        self._bank = bank
        self._scheduled = scheduled

    def __len__(self) -> int:
        return len(self._bank)

    def __getitem__(self, slot: int) -> SlotWeights:
        bank = self._bank
        tensors: dict[str, torch.Tensor] = {**bank.tensors(slot), **bank.tensors(slot, adapter=True)}
        if self._scheduled is not None and bank.experts[slot] not in self._scheduled:
            tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if bank.offload is not None:
            tensors = {name: bank.offload.near(tensor) for name, tensor in tensors.items()}
        # A merged expert has the adapters of its members in its weights.
        scale = bank.lora_scale if slot < bank.num_resident else None
        return slot_weights(bank.layer, {**tensors, **bank.packed(slot)}, scale)


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


def slot_weights(
    layer: ExpertLayer, tensors: Mapping[str, torch.Tensor | QuantizedMatrix], lora_scale: float | None
) -> SlotWeights:
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
