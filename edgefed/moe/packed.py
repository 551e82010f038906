"""Quantized matrices of experts: one contiguous stack for the slots of a bank, filled one matrix at a time."""

from __future__ import annotations

import torch

from edgefed.costs.step_setup import BLOCKSIZE
from edgefed.errors import CheckpointError, ConfigError
from edgefed.kernels.quantization import QuantizedMatrix, quantize_experts

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
    storage: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> QuantizedMatrix:
    """Return an uninitialized stack of ``count`` matrices of ``shape`` and ``dtype``.

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
        packed = torch.empty(count, rows, columns, dtype=torch.int8, device=device)
        absmax = torch.empty(count, rows, device=device)
        return QuantizedMatrix("int8", packed, absmax, (count, rows, columns), columns, dtype)
    size = rows * columns
    packed = torch.empty(count, -(-size // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(count, -(-size // BLOCKSIZE), device=device)
    return QuantizedMatrix("nf4", packed, absmax, (count, rows, columns), BLOCKSIZE, dtype)


def pack_into(stack: QuantizedMatrix, place: int, key: str, name: str, value: torch.Tensor) -> None:
    """Quantize one matrix into position ``place`` of a stack, on the matrix's device.

    Raises CheckpointError if it does not fit the stack or cannot be quantized: because it has a non-finite value, or
    for int8 a value outside the range of float16.
    """
    if value.dtype != stack.dtype or tuple(value.shape) != stack.shape[1:]:
        raise CheckpointError(
            f"{name!r} of unit {key!r} must be {stack.dtype} {stack.shape[1:]}; found {value.dtype} "
            f"{tuple(value.shape)}"
        )
    try:
        packed = quantize_experts(value, stack.format, blocksize=BLOCKSIZE)
    except ValueError as error:
        raise CheckpointError(f"{name!r} of unit {key!r} cannot be stored as {stack.format}: {error}") from error
    stack.packed[place].copy_(packed.packed)
    if stack.absmax is not None and packed.absmax is not None:
        stack.absmax[place].copy_(packed.absmax)
