"""The experts of a layer as the CUDA library takes them: tables of addresses, built once for slots that last.

Collecting the tensors of 64 experts takes the host longer than a GPU computes with them. Slots that keep their tensors
(`edgefed.kernels.masked_experts.Slots`) have a place for the finished tables; others get tables for each call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from edgefed.kernels.cuda_kernels import Matrices, Operand, matrix_table
from edgefed.kernels.dispatch import Unsupported
from edgefed.kernels.native_call import Projection, Tensors
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.native import dtype_code

if TYPE_CHECKING:
    from edgefed.kernels.masked_experts import LastingSlots, Slots

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Structure:
    """Everything about the experts of a layer except their tensors. ``up_width`` is 2I, or I of ungated experts."""

    ups: tuple[Projection, ...]
    downs: tuple[Projection, ...]
    dtype: torch.dtype
    up_width: int
    width: int
    is_transposed: bool
    has_nested: bool
    """Whether scales are quantized themselves, so that their values are computed at each call."""

    def slot_of(self) -> dict[int, int]:
        """Return the slot of each tensor that can be trainable, by its index."""
        return {
            index: slot
            for side in (self.ups, self.downs)
            for slot, p in enumerate(side)
            for index in p.trainable()
            if index >= 0
        }


def collect(slots: Slots, is_transposed: bool) -> tuple[Structure, list[torch.Tensor]]:
    """Read every slot. Raises Unsupported if slots differ in dtype or shape, or have one without a kernel."""
    experts = [slots[slot] for slot in range(len(slots))]
    tensors = Tensors()
    ups = tuple(tensors.projection(e.up, e.up_bias, e.up_lora) for e in experts)
    downs = tuple(tensors.projection(e.down, e.down_bias, e.down_lora) for e in experts)
    dtypes = {p.matrix.dtype for p in (*ups, *downs)}
    shapes = {(tuple(e.up.shape), tuple(e.down.shape)) for e in experts}
    if len(dtypes) > 1 or len(shapes) > 1:
        raise Unsupported(f"slots differ in dtype or shape: {sorted(map(str, dtypes))}, {sorted(shapes)}")
    (dtype,), ((up, down),) = dtypes, shapes
    if dtype not in DTYPES:
        raise Unsupported(f"no kernel for weights of {dtype}")
    side = 1 if is_transposed else 0
    stored = [weight for e in experts for weight in (e.up, e.down) if isinstance(weight, QuantizedMatrix)]
    has_nested = any(weight.nested is not None for weight in stored)
    return Structure(ups, downs, dtype, up[side], down[1 - side], is_transposed, has_nested), tensors.all


def _rank(projection: Projection, tensors: Sequence[torch.Tensor]) -> int:
    """Return the rank of the projection's adapter, 0 for none."""
    return 0 if projection.lora is None else tensors[projection.lora[0]].shape[0]


class Factors:
    """The adapters of one rank of a projection: (R, in) and (out, R) of each slot that has one.

    ``fused``: they are also factors of the tables of `Side`.
    """

    def __init__(self, rank: int, side: Sequence[Projection], tensors: list[torch.Tensor], is_transposed: bool):
        own = [p.lora if _rank(p, tensors) == rank else None for p in side]
        self.rank = rank
        self.lora_a = [-1 if lora is None else lora[0] for lora in own]
        self.lora_b = [-1 if lora is None else lora[1] for lora in own]
        self._scales = [0.0 if lora is None else lora[2] for lora in own]
        self._tensors = tensors
        dtypes = {tensors[index].dtype for index in (*self.lora_a, *self.lora_b) if index >= 0}
        self.dtype = next(iter(dtypes))
        # A transposed weight and its adapter are read in different directions; tensor cores need whole eights.
        self.fused = len(dtypes) == 1 and rank % 8 == 0 and not is_transposed

    @functools.cached_property
    def scaled_a(self) -> Matrices:
        """A, with the adapter's scale as the factor of a product."""
        return self._table(self.lora_a, self._scales)

    @functools.cached_property
    def scaled_b(self) -> Matrices:
        """B, with the adapter's scale as the factor of a product."""
        return self._table(self.lora_b, self._scales)

    @functools.cached_property
    def a(self) -> Matrices:
        """A alone."""
        return self._table(self.lora_a, [1.0] * len(self.lora_a))

    @functools.cached_property
    def b(self) -> Matrices:
        """B alone."""
        return self._table(self.lora_b, [1.0] * len(self.lora_b))

    def _table(self, indices: Sequence[int], alphas: Sequence[float]) -> Matrices:
        tensors = self._tensors
        return matrix_table([
            None if index < 0 else Operand(tensors[index], dtype_code(tensors[index].dtype), alpha=alpha)
            for index, alpha in zip(indices, alphas, strict=True)
        ])  # fmt: skip


class Side:
    """One of the two projections of all slots.

    ``fused`` are adapters whose (out, R) is part of ``forward``, and whose (R, in) is part of ``backward``; ``others``
    are those of further ranks, and ``factors`` are all.
    """

    def __init__(self, projections: Sequence[Projection], tensors: list[torch.Tensor], is_transposed: bool):
        self.projections = projections
        self.biases = [p.bias for p in projections]
        ranks = sorted({_rank(p, tensors) for p in projections if p.lora is not None}, reverse=True)
        self.factors = [Factors(rank, projections, tensors, is_transposed) for rank in ranks]
        self.fused = next((each for each in self.factors if each.fused), None)
        self.others = [each for each in self.factors if each is not self.fused]
        self._tensors = tensors

    @functools.cached_property
    def forward(self) -> Matrices:
        """The weights with biases."""
        return self._table(self.biases, self.fused.lora_b if self.fused else None)

    @functools.cached_property
    def backward(self) -> Matrices:
        """The weights without biases."""
        return self._table(None, self.fused.lora_a if self.fused else None)

    def _table(self, biases: Sequence[int] | None, factors: Sequence[int] | None) -> Matrices:
        tensors: list[torch.Tensor | None] = [*self._tensors, None]  # the last is that of index -1
        none = [-1] * len(self.projections)
        return matrix_table([
            Operand(
                self._tensors[p.matrix.data], p.matrix.code, tensors[p.matrix.scale], p.matrix.blocksize, tensors[bias],
                factor=tensors[factor],
            )
            for p, bias, factor in zip(self.projections, biases or none, factors or none, strict=True)
        ])  # fmt: skip


class Layout:
    """A structure with its tensors, which stay where they are as long as this exists.

    Biases of another dtype than the layer's, adapters that are neither of it nor float32, and tensors that are not
    contiguous are converted: ``is_copied`` says that there were any, so that the layout serves one call only.
    """

    def __init__(self, structure: Structure, tensors: Sequence[torch.Tensor]):
        self.structure = structure
        sides = (structure.ups, structure.downs)
        matrices = [p.matrix for side in sides for p in side]
        packed = {index for m in matrices if m.scale >= 0 for index in (m.data, m.scale)}
        adapters = {index for side in sides for p in side if p.lora for index in p.lora[:2]}
        self.tensors = [
            (
                tensor
                if index in packed or (index in adapters and tensor.dtype == torch.float32)
                else tensor.to(structure.dtype)
            ).contiguous()
            for index, tensor in enumerate(tensors)
        ]
        self.given = [tensor.dtype for tensor in tensors]
        self._shapes = [tensor.shape for tensor in tensors]
        self.is_copied = any(own is not given for own, given in zip(self.tensors, tensors, strict=True))
        self.up = Side(structure.ups, self.tensors, structure.is_transposed)
        self.down = Side(structure.downs, self.tensors, structure.is_transposed)
        self.trainable = tuple(index for index, tensor in enumerate(tensors) if tensor.requires_grad)
        self._slot_of = structure.slot_of()

    def as_given(self, index: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Return a gradient with dtype and shape of its tensor."""
        if gradient is None:
            return None
        if gradient.shape != self._shapes[index]:
            gradient = gradient.reshape(self._shapes[index])
        return gradient if gradient.dtype == self.given[index] else gradient.to(self.given[index])

    def trainable_of(self, scheduled: Collection[int] | None) -> tuple[int, ...]:
        """Return the indices of the trainable tensors of the slots ``scheduled``; None for all slots."""
        if scheduled is None:
            return self.trainable
        return tuple(index for index in self.trainable if self._slot_of[index] in scheduled)


def lasting_layout(slots: Slots, is_transposed: bool) -> Layout | None:
    """Return the layout of slots that last, built at the first call; None for others."""
    lasting: LastingSlots | None = getattr(slots, "lasting", None)
    if lasting is None:
        return None
    if "cuda" not in lasting.layouts:
        layout = Layout(*collect(lasting.slots, is_transposed))
        lasting.layouts["cuda"] = None if layout.is_copied or layout.structure.has_nested else layout
    found: Layout | None = lasting.layouts["cuda"]
    return found
