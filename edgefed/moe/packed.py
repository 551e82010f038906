"""Experts' matrices in 4 or 8 bits: one contiguous stack for the slots of a bank, filled one matrix at a time."""

from __future__ import annotations

import torch

from edgefed.costs.step_setup import BLOCKSIZE
from edgefed.errors import CheckpointError, ConfigError
from edgefed.kernels.quantization import QuantizedMatrix, quantize_experts

EXPERT_STORAGES = ("int8", "nf4")
"""How experts that do not learn may lie in memory, beside the way they come; see `edgefed.kernels.quantization`."""

PACKABLE = (torch.float32, torch.float16, torch.bfloat16)


def check_storage(storage: str | None) -> None:
    """Raise ConfigError unless experts can be stored so. None is the way they come."""
    if storage is not None and storage not in EXPERT_STORAGES:
        raise ConfigError(
            f"experts can be stored as {', '.join(EXPERT_STORAGES)} or the way they come; asked for {storage!r}"
        )


def empty_stack(
    storage: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> QuantizedMatrix:
    """Room for ``count`` matrices of ``shape`` and ``dtype``, of no defined value.

    Raises ConfigError for a dtype that cannot be quantised.
    """
    if dtype not in PACKABLE:
        names = ", ".join(str(known).removeprefix("torch.") for known in PACKABLE)
        raise ConfigError(
            f"experts in {str(dtype).removeprefix('torch.')} cannot be stored as {storage}, only those in {names}",
            remedy="Join with `expert_storage=full`, or serve the model in one of these types.",
        )
    rows, columns = shape
    if storage == "int8":
        packed = torch.empty(count, rows, columns, dtype=torch.int8, device=device)
        absmax = torch.empty(count, rows, device=device)
        return QuantizedMatrix("int8", packed, absmax, (count, rows, columns), columns, dtype)
    size = rows * columns
    packed = torch.empty(count, -(-size // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(count, -(-size // BLOCKSIZE), device=device)
    return QuantizedMatrix("nf4", packed, absmax, (count, rows, columns), BLOCKSIZE, dtype)


def pack_into(stack: QuantizedMatrix, place: int, key: str, name: str, value: torch.Tensor) -> None:
    """Quantise one matrix, where it lies, into a stack. Raises CheckpointError when it does not fit, or cannot be
    quantised: a number that is not finite, or one beyond float16 in int8.
    """
    if value.dtype != stack.dtype or tuple(value.shape) != stack.shape[1:]:
        raise CheckpointError(
            f"{name!r} of unit {key!r} is {value.dtype} {tuple(value.shape)}, the model holds {stack.dtype} "
            f"{stack.shape[1:]}"
        )
    try:
        packed = quantize_experts(value, stack.format, blocksize=BLOCKSIZE)
    except ValueError as error:
        raise CheckpointError(f"{name!r} of unit {key!r} cannot be stored as {stack.format}: {error}") from error
    stack.packed[place].copy_(packed.packed)
    stack.absmax[place].copy_(packed.absmax)
