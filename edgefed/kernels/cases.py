"""Which `Case` a call is: the same function for calls of training and for those of the proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from edgefed.kernels.native_call import is_swiglu
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.kernels.verdicts import ROWS, Case

if TYPE_CHECKING:
    from edgefed.kernels.masked_experts import Slots, SlotWeights

_ROW_LIMITS = (2, 32)
"""Largest numbers of rows per expert of the first two classes."""


def rows_class(num_pairs: int, num_slots: int) -> int:
    """Return the class of rows per expert, one of ROWS, when ``num_pairs`` pairs are spread over ``num_slots``."""
    few, some, many = ROWS
    if num_pairs <= _ROW_LIMITS[0] * num_slots:
        return few
    return some if num_pairs <= _ROW_LIMITS[1] * num_slots else many


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def masked_experts_case(
    hidden_states: torch.Tensor,
    slot_indices: torch.Tensor,
    slots: Slots,
    activation: Callable[[torch.Tensor], torch.Tensor],
    is_transposed: bool,
    finish: object,
    neuron_energy: object = None,
) -> Case | None:
    """Return the case of a call of `masked_experts`; None for streamed experts and for none at all.

    Reads the first and the last slot: a bank has its trainable experts first and its quantized ones last.
    """
    num_slots = len(slots)
    if num_slots == 0 or getattr(slots, "streamed", False):
        return None
    ends = [slots[slot] for slot in sorted({0, num_slots - 1})]
    up = ends[0].up
    side = 1 if is_transposed else 0
    forms = ["swiglu" if is_swiglu(activation, up.shape[side]) else "other"]
    forms += ["transposed"] if is_transposed else []
    forms += ["bias"] if any(end.up_bias is not None or end.down_bias is not None for end in ends) else []
    forms += ["finish"] if finish is not None else []
    forms += ["energies"] if neuron_energy is not None else []
    dtype = dtype_name(up.dtype)
    if hidden_states.dtype != up.dtype:
        dtype += f"/{dtype_name(hidden_states.dtype)}"
    return Case(
        "masked_experts",
        dtype,
        "+".join(sorted({_storage(end.up) for end in ends})),
        hidden=up.shape[1 - side],
        width=ends[0].down.shape[1 - side],
        rows=rows_class(slot_indices.numel(), num_slots),
        rank=max(end.up_lora.lora_a.shape[0] if end.up_lora is not None else 0 for end in ends),
        trains=_trains(hidden_states, ends),
        form="+".join(forms),
    )


def _storage(weight: torch.Tensor | QuantizedMatrix) -> str:
    if isinstance(weight, QuantizedMatrix):
        return weight.format if weight.nested is None else f"{weight.format} nested"
    return "dense"


def _trains(hidden_states: torch.Tensor, slots: Sequence[SlotWeights]) -> str:
    if not torch.is_grad_enabled():
        return "nothing"
    for slot in slots:
        own = (slot.up, slot.down, slot.up_bias, slot.down_bias)
        adapters = (tensor for pair in (slot.up_lora, slot.down_lora) if pair for tensor in (pair.lora_a, pair.lora_b))
        if any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in (*own, *adapters)):
            return "weights"
    return "tokens" if hidden_states.requires_grad else "nothing"
