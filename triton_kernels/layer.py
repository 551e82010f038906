"""The experts of a layer as the launches take them: projections, built once for slots that keep their tensors.

Collecting the tensors of 64 experts takes the host longer than a GPU computes with them. Such slots have an attribute
``lasting`` (`edgefed.kernels.masked_experts.Slots`) with a place for what was built; others are collected at each call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection

import torch

from .projection import Projection, SlotLayout, Unsupported, flatten_slot


@dataclasses.dataclass(frozen=True)
class Form:
    """One projection of all slots, and which of its ``num_tensors`` autograd sees: all, or trainable ones.

    ``built`` is the projection of lasting slots, which keeps their tensors. Others are built from the tensors that
    autograd has saved, so that it alone decides how long those stay.
    """

    layouts: tuple[SlotLayout, ...]
    shape: tuple[int, int]
    is_transposed: bool
    next_layouts: tuple[SlotLayout, ...] | None
    num_tensors: int
    indices: tuple[int, ...]
    built: Projection | None = None

    def projection(self, tensors: tuple[torch.Tensor, ...]) -> Projection:
        """Return the projection; ``tensors`` are those that autograd has saved."""
        return self.built or Projection(self.layouts, tensors, self.shape, self.is_transposed, self.next_layouts)

    def needs(self, needed: tuple[bool, ...]) -> tuple[bool, ...]:
        """Return which tensors need gradients, from which of the seen ones do."""
        chosen = {index for index, needs in zip(self.indices, needed, strict=True) if needs}
        return tuple(index in chosen for index in range(self.num_tensors))

    def seen_of(self, values: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the values of the seen tensors, from those of all."""
        return [values[index] for index in self.indices]


class Side:
    """One projection of all slots with its tensors. ``lasts``: it keeps them, and is built now."""

    def __init__(
        self,
        layouts: tuple[SlotLayout, ...],
        tensors: list[torch.Tensor],
        shape: tuple[int, int],
        is_transposed: bool,
        next_layouts: tuple[SlotLayout, ...] | None,
        *,
        lasts: bool,
    ):
        self.layouts, self.tensors, self.shape = layouts, tensors, shape
        self._facts = (layouts, shape, is_transposed, next_layouts, len(tensors))
        self._built = Projection(layouts, tuple(tensors), shape, is_transposed, next_layouts) if lasts else None
        owners = ((slot, place) for slot, part in enumerate(layouts) for place in part.places())
        self._trainable = [(slot, place) for slot, place in owners if place >= 0 and tensors[place].requires_grad]
        dense = {part.weight for part in layouts if part.format == "plain"}
        self._dense_sizes = {place: tensors[place].numel() for _, place in self._trainable if place in dense}

    def form(self, scheduled: Collection[int] | None) -> Form:
        """Return what a call needs, with gradients for the slots ``scheduled``, None for all."""
        if self._built is None or not torch.is_grad_enabled():
            indices = tuple(range(len(self.tensors))) if self._built is None else ()
        else:
            indices = tuple(place for slot, place in self._trainable if scheduled is None or slot in scheduled)
        return Form(*self._facts, indices, self._built)

    def num_trainable(self, form: Form) -> int:
        """Return the number of values of trainable dense weights."""
        return sum(self._dense_sizes.get(index, 0) for index in form.indices)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The experts of a layer. ``dtype`` is that of the rows between the projections.

    ``lasts``: the slots keep the tensors, and none had to be copied.
    """

    up: Side
    down: Side
    dtype: torch.dtype
    has_bias: bool
    lasts: bool


def layer_of(slots, is_transposed: bool) -> Layer:
    """Return the experts by slot, those of lasting slots as built at the first call on the current stream.

    Raises Unsupported for dtypes and layouts without a kernel, and for slots that differ in shape.
    """
    lasting = getattr(slots, "lasting", None)
    if lasting is None:
        return _collect(slots, is_transposed)
    stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else 0
    key = f"triton on stream {stream}"  # tables arrive in the order of a stream
    if key not in lasting.layouts:
        found = _collect(lasting.slots, is_transposed, lasts=True)
        lasting.layouts[key] = found if found.lasts else None
    return lasting.layouts[key] or _collect(slots, is_transposed)


def _collect(slots, is_transposed: bool, *, lasts: bool = False) -> Layer:
    weights = [slots[slot] for slot in range(len(slots))]
    up_tensors: list[torch.Tensor] = []
    down_tensors: list[torch.Tensor] = []
    up = tuple(flatten_slot(w.up, w.up_bias, w.up_lora, up_tensors) for w in weights)
    down = tuple(flatten_slot(w.down, w.down_bias, w.down_lora, down_tensors) for w in weights)
    shapes = [(tuple(w.up.shape), tuple(w.down.shape)) for w in weights]
    for slot, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise Unsupported(f"slot {slot} has matrices of shapes {shape}, slot 0 of {shapes[0]}")
    up_shape, down_shape = shapes[0]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in (*up, *down)))
    kept = {id(tensor) for w in weights for tensor in _tensors_of(w)}
    lasts = lasts and all(id(tensor) in kept for tensor in (*up_tensors, *down_tensors))  # none is a copy
    return Layer(
        Side(up, up_tensors, up_shape, is_transposed, None if is_transposed else down, lasts=lasts),
        Side(down, down_tensors, down_shape, is_transposed, None, lasts=lasts),
        dtype,
        any(part.bias >= 0 for part in (*up, *down)),
        lasts,
    )


def _tensors_of(weights) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = [weights.up_bias, weights.down_bias]
    for pair in (weights.up_lora, weights.down_lora):
        found += [] if pair is None else [pair.lora_a, pair.lora_b]
    for matrix in (weights.up, weights.down):
        found += [matrix] if isinstance(matrix, torch.Tensor) else [matrix.packed, matrix.absmax]
    return found
