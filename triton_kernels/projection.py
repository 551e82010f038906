"""One of the two matrices of every slot of a layer: which slots can share a launch, and the places of their tensors.

Slots whose matrices agree in format, dtype, bias and rank form a group. A group is one launch; a layer has one to
three groups. The host makes the tables of addresses without waiting for the device, which caches them.
"""

from __future__ import annotations

import dataclasses

import torch

from .grouped_matmul import LowRankTerm, SlotMatrices, SlotTensors, grouped_matmul, split_columns
from .nf4 import nf4_table
from .sort_pairs import SortedPairs
from .tensor_types import TYPES, device_table

ALIGNMENT = 16  # elements: what the kernels may assume of an offset


class Unsupported(ValueError):
    """These kernels do not support this layer. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Storage format of one slot's matrix, and indices of its tensors in the flat list of a `Projection`; -1: none."""

    format: str
    dtype: torch.dtype
    blocksize: int
    weight: int
    absmax: int = -1
    bias: int = -1
    lora_a: int = -1
    lora_b: int = -1
    lora_rank: int = 0
    lora_scale: float = 1.0

    def places(self) -> tuple[int, ...]:
        """Indices of all tensors; -1: none."""
        return (self.weight, self.absmax, self.bias, self.lora_a, self.lora_b)

    def group_key(self) -> tuple[object, ...]:
        """What the slots of a group have in common."""
        return (self.format, self.dtype, self.blocksize, self.bias >= 0, self.lora_rank, self.lora_scale)


@dataclasses.dataclass(frozen=True)
class Group:
    """Slots that share their launches."""

    index: int
    layout: SlotLayout
    matrices: SlotMatrices
    bias: SlotTensors | None
    lora_a: SlotMatrices | None
    lora_b: SlotMatrices | None
    is_next_split: bool

    def reads_split(self, *, last: bool) -> bool:
        """Whether its product needs even columns first: NF4 summed over its packed dimension."""
        return last and self.layout.format == "nf4"


def flatten_slot(weight: object, bias: torch.Tensor | None, lora: object | None, tensors: list) -> SlotLayout:
    """Append the tensors of one slot's matrix to ``tensors`` and return their indices.

    ``weight`` is a tensor, or a quantized matrix with ``format``, ``packed``, ``scales()``, ``blocksize``, ``dtype``.
    Raises Unsupported for a dtype or a layout without a kernel.
    """
    if weight.dtype not in TYPES:
        raise Unsupported(f"no Triton kernel for {weight.dtype} weights")

    def add(tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return -1
        tensors.append(tensor if tensor.is_contiguous() else tensor.contiguous())
        return len(tensors) - 1

    parts = {"bias": add(bias)}
    if lora is not None:
        parts["lora_a"], parts["lora_b"] = add(lora.lora_a), add(lora.lora_b)
        parts["lora_rank"], parts["lora_scale"] = lora.lora_a.shape[0], float(lora.scale)
    if isinstance(weight, torch.Tensor):
        return SlotLayout("plain", weight.dtype, 0, add(weight), **parts)
    if weight.format == "nf4" and (weight.shape[1] % 64 or weight.blocksize % 64):
        raise Unsupported(
            f"an nf4 matrix {tuple(weight.shape)} in blocks of {weight.blocksize}: the Triton kernels need rows and "
            "blocks of whole multiples of 64 weights"
        )
    blocksize = weight.blocksize if weight.format == "nf4" else 0
    return SlotLayout(weight.format, weight.dtype, blocksize, add(weight.packed), add(weight.scales()), **parts)


def new_rows(pairs: SortedPairs, width: int, like: torch.Tensor, *, zeros: bool = False) -> torch.Tensor:
    """Allocate a row for each pair, (T*K, width), with the dtype and device of ``like``."""
    return (torch.zeros if zeros else torch.empty)(pairs.num_pairs, width, dtype=like.dtype, device=like.device)


class Projection:
    """The matrices of all S slots: stored (rows, columns) each, ``layouts`` and ``tensors`` as of `flatten_slot`.

    ``is_transposed``: stored (in, out) instead of (out, in). ``next_layouts``: of the projection that reads the output
    of this one, where it may want its columns split.
    """

    def __init__(
        self,
        layouts: tuple[SlotLayout, ...],
        tensors: tuple[torch.Tensor, ...],
        shape: tuple[int, int],
        is_transposed: bool = False,
        next_layouts: tuple[SlotLayout, ...] | None = None,
    ):
        self.layouts, self.tensors, self.shape, self.is_transposed = layouts, tensors, shape, is_transposed
        self.size_in, self.size_out = shape if is_transposed else (shape[1], shape[0])
        members: dict[tuple, list[int]] = {}
        for slot, layout in enumerate(layouts):
            is_next_split = next_layouts is not None and next_layouts[slot].format == "nf4"
            members.setdefault((*layout.group_key(), is_next_split), []).append(slot)
        self._slots_of_group = list(members.values())
        group_of = [0] * len(layouts)
        for index, slots in enumerate(self._slots_of_group):
            for slot in slots:
                group_of[slot] = index
        self.device = tensors[layouts[0].weight].device
        self.slot_group = device_table(tuple(group_of), torch.int32, self.device)
        self.groups = tuple(
            self._group(index, slots, key[-1])
            for index, (key, slots) in enumerate(zip(members, self._slots_of_group, strict=True))
        )

    def _slot_tensors(self, slots: list[int], part: str) -> SlotTensors | None:
        if getattr(self.layouts[slots[0]], part) < 0:
            return None
        found = {slot: self.tensors[getattr(self.layouts[slot], part)] for slot in slots}
        base = found[slots[0]]
        size, start = base.element_size(), base.data_ptr()
        offsets = [0] * len(self.layouts)
        for slot, tensor in found.items():
            if tensor.dtype != base.dtype or tensor.numel() != base.numel() or tensor.device != base.device:
                raise Unsupported(
                    f"{part} of slot {slot} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; that of slot "
                    f"{slots[0]} is {tuple(base.shape)} {base.dtype} on {base.device}"
                )
            offsets[slot], rest = divmod(tensor.data_ptr() - start, size)
            if rest:
                raise Unsupported(f"{part} of slot {slot} is not aligned to its own {size} bytes")
        table = device_table(tuple(offsets), torch.int64, base.device)
        return SlotTensors(base, table, start % 16 == 0 and not any(offset % ALIGNMENT for offset in offsets))

    def _group(self, index: int, slots: list[int], is_next_split: bool) -> Group:
        layout = self.layouts[slots[0]]
        weight, absmax = self._slot_tensors(slots, "weight"), self._slot_tensors(slots, "absmax")

        def factor(part: str) -> SlotMatrices | None:
            tensors = self._slot_tensors(slots, part)
            return None if tensors is None else SlotMatrices("plain", tensors, None, 0, layout.dtype)

        return Group(
            index,
            layout,
            SlotMatrices(
                layout.format,
                weight,
                absmax,
                layout.blocksize,
                layout.dtype,
                nf4_table(self.device) if layout.format == "nf4" else None,
            ),
            self._slot_tensors(slots, "bias"),
            factor("lora_a"),
            factor("lora_b"),
            is_next_split,
        )

    def forward(
        self,
        a: torch.Tensor,
        out: torch.Tensor,
        pairs: SortedPairs,
        *,
        is_tokens: bool = False,
        gated: bool = False,
        is_split: bool = False,
        splits_out: bool = False,
        row_scale: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """out[p] = a[p] W_s + LoRA + bias, by position; SwiGLU of it when ``gated`` (out is then half as wide).

        Args:
            a: (T, in) tokens, or (T*K, in) by position.
            out: (T*K, out) by position, written.
            pairs: the sorted pairs.
            is_tokens: ``a`` has one row per token.
            gated: apply SwiGLU to the result.
            is_split: the rows of ``a`` for NF4 already have their even columns first.
            splits_out: write the rows for the next projection's NF4 matrices with even columns first.
            row_scale: (T*K,) by pair, the last factor.

        Returns each group's low-rank rows (T*K, R), ``scale * a A^T``, or None.

        """
        last = not self.is_transposed
        lows = self.low_rows(a, pairs, is_tokens=is_tokens, is_split=is_split)
        for group, low in zip(self.groups, lows, strict=True):
            reads_split = group.reads_split(last=last)
            self._launch(
                split_columns(a) if reads_split and not is_split else a,
                out,
                pairs,
                group,
                group.matrices,
                last=last,
                is_tokens=is_tokens,
                gated=gated,
                split_in=reads_split,
                split_out=splits_out and group.is_next_split,
                bias=group.bias,
                low_rank=None if low is None else LowRankTerm(low, group.lora_b.weight, True),
                row_scale=row_scale,
            )
        return lows

    def low_rows(
        self, a: torch.Tensor, pairs: SortedPairs, *, is_tokens: bool = False, is_split: bool = False
    ) -> list[torch.Tensor | None]:
        """Each group's low-rank rows (T*K, R), ``scale * a A^T``, or None; arguments as of `forward`."""
        lows: list[torch.Tensor | None] = []
        for group in self.groups:
            low = None
            if group.lora_a is not None:
                low = new_rows(pairs, group.layout.lora_rank, a)
                split_in = is_split and group.reads_split(last=not self.is_transposed)
                self._launch(
                    a, low, pairs, group, group.lora_a, last=True, is_tokens=is_tokens, split_in=split_in,
                    scale=group.layout.lora_scale,
                )  # fmt: skip
            lows.append(low)
        return lows

    def backward(
        self, grad: torch.Tensor, out: torch.Tensor, pairs: SortedPairs, *, is_tokens: bool = False
    ) -> list[torch.Tensor | None]:
        """out[p] = grad[p] W_s^T + LoRA, the gradient of the input by position, from that of the output.

        Returns each group's rows ``scale * grad B`` (T*K, R), which dA needs too, or None.
        """
        lows: list[torch.Tensor | None] = []
        for group in self.groups:
            low = None
            if group.lora_b is not None:
                low = new_rows(pairs, group.layout.lora_rank, grad)
                self._launch(
                    grad, low, pairs, group, group.lora_b, last=False, is_tokens=is_tokens,
                    scale=group.layout.lora_scale,
                )  # fmt: skip
            lows.append(low)
            reads_split = group.reads_split(last=self.is_transposed)
            self._launch(
                split_columns(grad) if reads_split else grad,
                out,
                pairs,
                group,
                group.matrices,
                last=self.is_transposed,
                is_tokens=is_tokens,
                split_in=reads_split,
                low_rank=None if low is None else LowRankTerm(low, group.lora_a.weight, False),
            )
        return lows

    def _launch(self, a: torch.Tensor, out: torch.Tensor, pairs: SortedPairs, group: Group, matrices: SlotMatrices,
                **options) -> None:  # fmt: skip
        grouped_matmul(a, out, pairs, self.slot_group, group.index, matrices, **options)

    def slots_of(self, group: Group) -> list[int]:
        """Return the slots of a group."""
        return self._slots_of_group[group.index]
