"""Experts by slot, as the kernels take them (`edgefed.kernels.masked_experts.Slots`), from different places.

    StackSlots       rows of the stacks of a transformers module, gradients included
    BankSlots        the slots of an `edgefed.moe.bank.ExpertBank`
    StreamedSlots    all experts of a layer, each read when it is needed and released afterwards
    PerturbedSlots   other slots with one expert moved in a random direction

`RaggedStack` stores one tensor of slots of different widths, `SplitStack` one whose frozen slots are streamed
(`edgefed.moe.expert_stream`). `slot_weights` builds the weights of one slot; `empty_stack` and `pack_into` store
experts in 4 or 8 bits.

Perturbed slots estimate gradients by forward passes alone. The moved weights are computed when the expert is requested,
one expert at a time, and released afterwards, so resident weights never change: quantized experts can be moved too, and
a failed pass needs no cleanup.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from edgefed.costs.step_setup import BLOCKSIZE
from edgefed.errors import CheckpointError, ConfigError
from edgefed.kernels.masked_experts import LastingSlots, LowRankPair, Slots, SlotWeights
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts, quantize_experts
from edgefed.moe.architecture import ExpertLayer, ExpertsModule
from edgefed.moe.expert_reading import read_adapter, read_expert
from edgefed.moe.units import Copy, ExpertSource, TrainScope

if TYPE_CHECKING:
    from edgefed.moe.bank import ExpertBank

Weight = torch.Tensor | QuantizedMatrix


def slot_weights(
    layer: ExpertLayer,
    tensors: Mapping[str, torch.Tensor],
    quantized: Mapping[str, QuantizedMatrix],
    lora_scale: float | None,
) -> SlotWeights:
    """Assign the tensors of one expert, quantized matrices apart, to their roles in the computation."""

    def lora(name: str) -> LowRankPair | None:
        if lora_scale is None:
            return None
        return LowRankPair(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], lora_scale)

    up = layer.up_name
    return SlotWeights(
        up=quantized[up] if up in quantized else tensors[up],
        down=quantized["down_proj"] if "down_proj" in quantized else tensors["down_proj"],
        up_bias=tensors.get(f"{up}_bias"),
        down_bias=tensors.get("down_proj_bias"),
        up_lora=lora(up),
        down_lora=lora("down_proj"),
    )


class _Stack:
    """One tensor of every slot."""

    _parts: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, slot: int) -> torch.Tensor:
        return self._parts[slot]

    @property
    def data(self) -> list[torch.Tensor]:
        """The tensors, each with a version counter of its own, as of ``Tensor.data``."""
        return [part.data for part in self._parts]


class RaggedStack(_Stack):
    """One tensor of every slot, of different shapes: views of one contiguous storage."""

    def __init__(self, flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]):
        self._flat, self._shapes = flat, tuple(shapes)
        sizes = [math.prod(shape) for shape in self._shapes]
        parts = torch.split(flat.detach(), sizes)
        self._parts = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    @classmethod
    def empty(cls, shapes: Sequence[tuple[int, ...]], empty: Callable[[int], torch.Tensor]) -> RaggedStack:
        """Return an uninitialized stack in the storage ``empty(number of elements)``."""
        return cls(empty(sum(math.prod(shape) for shape in shapes)), shapes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors."""
        return self._flat.dtype

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> RaggedStack:
        """Return the stack with ``fn`` applied to its storage: a move or a cast."""
        return RaggedStack(fn(self._flat), self._shapes)


class SplitStack(_Stack):
    """One tensor of every slot: those of the first slots in ``near``, the others in ``far``."""

    def __init__(self, near: torch.Tensor | RaggedStack, far: torch.Tensor | RaggedStack):
        self._near, self._far = near, far
        self._parts = [part for stack in (near, far) for part in stack.data]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensors."""
        return self._near.dtype

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> SplitStack:
        """Return the stack with ``fn`` applied to ``near``: a move or a cast. ``far`` stays as it is."""
        near = self._near
        return SplitStack(fn(near) if isinstance(near, torch.Tensor) else near.apply(fn), self._far)


class StackSlots:
    """The experts of a transformers module by slot: rows of its own stacks, gradients included.

    Each stack is unbound once. Indexing it for every expert would create a gradient of the size of the stack each time.
    """

    def __init__(self, experts: ExpertsModule):
        self._rows = {name: stack.unbind(0) for name, stack in experts.named_parameters(recurse=False)}
        self._up = "gate_up_proj" if experts.has_gate else "up_proj"
        self._count = experts.num_experts

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, slot: int) -> SlotWeights:
        rows, up = self._rows, self._up
        return SlotWeights(
            up=rows[up][slot],
            down=rows["down_proj"][slot],
            up_bias=rows[f"{up}_bias"][slot] if f"{up}_bias" in rows else None,
            down_bias=rows["down_proj_bias"][slot] if "down_proj_bias" in rows else None,
        )


class BankSlots:
    """The slots of a bank, with some of them detached from the gradient."""

    def __init__(self, bank: ExpertBank, scheduled: Collection[int] | None):
        self._bank = bank
        self._scheduled = scheduled

    def __len__(self) -> int:
        return len(self._bank)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each slot, (S,); () if all experts are whole."""
        return tuple(map(len, self._bank.neurons))

    @property
    def lasting(self) -> LastingSlots | None:
        """See `edgefed.kernels.masked_experts.Slots`."""
        return self._bank.lasting

    @property
    def scheduled(self) -> Collection[int] | None:
        """Slots that are not detached; None if none is."""
        if self._scheduled is None:
            return None
        return {slot for slot, expert in enumerate(self._bank.experts) if expert in self._scheduled}

    def __getitem__(self, slot: int) -> SlotWeights:
        bank = self._bank
        is_lasting = self._scheduled is None and bank.offload is None
        if is_lasting and slot in bank.slot_table:
            return bank.slot_table[slot]
        tensors: dict[str, torch.Tensor] = {**bank.tensors(slot), **bank.tensors(slot, adapter=True)}
        if self._scheduled is not None and bank.experts[slot] not in self._scheduled:
            tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        if bank.offload is not None:
            tensors = {name: bank.offload.near(tensor) for name, tensor in tensors.items()}
        packed = bank.packed(slot)
        if bank.stream is not None:
            tensors = {name: bank.stream.near(tensor) for name, tensor in tensors.items()}
            packed = {name: bank.stream.near_matrix(matrix) for name, matrix in packed.items()}
        # The weights of a merged expert include the adapters of its members.
        scale = bank.lora_scale if slot < bank.num_resident else None
        weights = slot_weights(bank.layer, tensors, packed, scale)
        if is_lasting:
            bank.slot_table[slot] = weights
        return weights


class StreamedSlots:
    """All E experts of a layer, each read when it is needed and released afterwards. Forward only."""

    streamed = True

    def __init__(self, layer: ExpertLayer, source: ExpertSource, scope: TrainScope, device: torch.device):
        self._layer, self._source, self._scope, self._device = layer, source, scope, device

    def __len__(self) -> int:
        return self._layer.num_experts

    def __getitem__(self, slot: int) -> SlotWeights:
        tensors, scale = read_expert(self._layer, slot, self._source), None
        if self._scope.experts == "lora":
            tensors |= read_adapter(self._layer, slot, self._source, self._scope.lora_rank)
            scale = self._scope.lora_scale
        return slot_weights(self._layer, {name: t.to(self._device) for name, t in tensors.items()}, {}, scale)


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """W + ``size`` z for every trainable tensor of ``slot``: its matrices and biases, or its adapters alone.

    z is standard normal and depends only on ``seed``; the negative ``size`` gives the opposite move.
    """

    slot: int
    seed: int
    size: float


class PerturbedSlots:
    """``slots`` with one of them moved."""

    def __init__(self, slots: Slots, perturbation: Perturbation):
        self._slots, self._perturbation = slots, perturbation
        self.widths: tuple[int, ...] = getattr(slots, "widths", ())

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> SlotWeights:
        weights = self._slots[slot]
        if slot != self._perturbation.slot:
            return weights
        size = self._perturbation.size
        generator: torch.Generator | None = None

        def moved(weight: Weight) -> torch.Tensor:
            nonlocal generator
            dense = _dense(weight)
            if generator is None:
                generator = torch.Generator(dense.device).manual_seed(self._perturbation.seed)
            z = torch.randn(dense.shape, generator=generator, device=dense.device, dtype=torch.float32)
            return z.mul_(size).add_(dense).to(dense.dtype)

        def moved_pair(pair: LowRankPair) -> LowRankPair:
            return LowRankPair(moved(pair.lora_a), moved(pair.lora_b), pair.scale)

        if weights.up_lora is not None and weights.down_lora is not None:
            return dataclasses.replace(
                weights, up_lora=moved_pair(weights.up_lora), down_lora=moved_pair(weights.down_lora)
            )
        return dataclasses.replace(
            weights,
            up=moved(weights.up),
            down=moved(weights.down),
            up_bias=None if weights.up_bias is None else moved(weights.up_bias),
            down_bias=None if weights.down_bias is None else moved(weights.down_bias),
        )


def typical_weight(weights: SlotWeights) -> float:
    """Return the root mean square of the tensors that a perturbation moves; 0 for an expert of zeros."""
    pairs = [pair for pair in (weights.up_lora, weights.down_lora) if pair is not None]
    tensors: list[Weight] = [part for pair in pairs for part in (pair.lora_a, pair.lora_b)] or [
        weight for weight in (weights.up, weights.down, weights.up_bias, weights.down_bias) if weight is not None
    ]
    total, count = 0.0, 0
    for tensor in tensors:
        dense = _dense(tensor)
        total += float(dense.double().square().sum())
        count += dense.numel()
    return math.sqrt(total / max(count, 1))


def _dense(weight: Weight) -> torch.Tensor:
    return dequantize_experts(weight) if isinstance(weight, QuantizedMatrix) else weight.detach()


EXPERT_STORAGES = ("int8", "nf4")
"""Quantized formats of experts that are not trainable; see `edgefed.kernels.quantization`."""

PACKABLE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that can be quantized."""


def check_storage(storage: str | None) -> None:
    """Raise ConfigError for an unknown storage format. None stores experts in the dtype of the model."""
    if storage is not None and storage not in EXPERT_STORAGES:
        raise ConfigError(
            f"invalid storage format of experts {storage!r}: must be {', '.join(EXPERT_STORAGES)}, or None for the "
            "dtype of the model"
        )


def empty_stack(
    storage: str,
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor],
) -> QuantizedMatrix:
    """Return an uninitialized stack of ``count`` matrices of ``shape`` and ``dtype``, with tensors from ``empty``.

    Raises ConfigError for a dtype that cannot be quantized.
    """
    if dtype not in PACKABLE:
        names = ", ".join(str(known).removeprefix("torch.") for known in PACKABLE)
        raise ConfigError(
            f"experts in {str(dtype).removeprefix('torch.')} cannot be stored as {storage}; their dtype must be one of "
            f"{names}",
            remedy="Join with `expert_storage=full`, or serve the model in one of these dtypes.",
        )
    rows, columns = shape
    if storage == "int8":
        packed, absmax = empty((count, rows, columns), torch.int8), empty((count, rows), torch.float32)
        return QuantizedMatrix("int8", packed, absmax, (count, rows, columns), columns, dtype)
    size = rows * columns
    packed = empty((count, -(-size // 2)), torch.uint8)
    absmax = empty((count, -(-size // BLOCKSIZE)), torch.float32)
    return QuantizedMatrix("nf4", packed, absmax, (count, rows, columns), BLOCKSIZE, dtype)


def pack_into(
    stack: QuantizedMatrix, place: int, key: str, name: str, value: torch.Tensor, copy: Copy = torch.Tensor.copy_
) -> None:
    """Quantize one matrix into position ``place`` of a stack, on the matrix's device.

    Raises CheckpointError if it does not fit the stack or cannot be quantized: because it has a non-finite value, or
    for int8 a value outside the range of float16.
    """
    if value.dtype != stack.dtype or tuple(value.shape) != stack.shape[1:]:
        raise CheckpointError(
            f"{name!r} of {key!r} must be {stack.dtype} {stack.shape[1:]}; found {value.dtype} {tuple(value.shape)}"
        )
    try:
        packed = quantize_experts(value, stack.format, blocksize=BLOCKSIZE)
    except ValueError as error:
        raise CheckpointError(f"{name!r} of {key!r} cannot be stored as {stack.format}: {error}") from error
    copy(stack.packed[place], packed.packed)
    if stack.absmax is not None and packed.absmax is not None:
        copy(stack.absmax[place], packed.absmax)
