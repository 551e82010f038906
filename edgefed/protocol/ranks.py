"""Ranks of LoRA adapters that differ between the clients of a run.

The adapters of a run have rank R (`TrainingConfig.lora_rank`). A device of rank r, from `min_lora_rank` to R, has and
sends the leading r rows of A and columns of B. What it lacks counts as unchanged, so a client c of rank r contributes

    W_c = [B_c, B'] [A_c; A'] = B_c A_c + B' A'        with the current rows r..R of A as A', columns of B as B'

and its change W_c - B A is what it trained, whatever its rank. Every device has the factor of rank R, alpha / R or
alpha / sqrt(R), so that the leading rows add the same to a weight on each. FlexLoRA (arXiv 2402.11505) and HetLoRA
(2401.06432) take 0 for what a client lacks: each client of a small rank then shrinks what the others have learned.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edgefed.protocol.alternation import LORA_A, LORA_B
from edgefed.protocol.frames import tensor_size_bytes
from edgefed.protocol.messages import TensorInfo, UnitInfo
from edgefed.protocol.training import TrainingConfig


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def leading_shape(info: TensorInfo, rank: int) -> tuple[int, ...]:
    """Shape of what a device of ``rank`` has of a tensor: less of the factors of adapters, all of others."""
    if not is_factor(info.name) or len(info.shape) != 2:
        return tuple(info.shape)
    rows, columns = info.shape
    return (min(rank, rows), columns) if info.name.endswith(LORA_A) else (rows, min(rank, columns))


def leading_part(name: str, rank: int) -> tuple[slice, slice]:
    """Index of what a device of ``rank`` has of a factor, A (R, in) or B (out, R)."""
    part = slice(rank)
    return (part, slice(None)) if name.endswith(LORA_A) else (slice(None), part)


def with_rank(units: Iterable[UnitInfo], rank: int) -> tuple[UnitInfo, ...]:
    """``units`` as a device of ``rank`` sends them; 0: the rank of the run."""
    if not rank:
        return tuple(units)
    return tuple(_with_rank(unit, rank) if unit.trainable else unit for unit in units)


def _with_rank(unit: UnitInfo, rank: int) -> UnitInfo:
    tensors = tuple(msgspec.structs.replace(info, shape=leading_shape(info, rank)) for info in unit.tensors)
    less = sum(map(tensor_size_bytes, unit.tensors)) - sum(map(tensor_size_bytes, tensors))
    return msgspec.structs.replace(unit, tensors=tensors, size_bytes=unit.size_bytes - less)


def smaller_ranks(training: TrainingConfig) -> tuple[int, ...]:
    """Ranks below that of the run from which a device chooses, halves of each other, largest first."""
    found, rank = [], training.lora_rank
    while training.min_lora_rank and rank > training.min_lora_rank:
        rank = max(training.min_lora_rank, rank // 2)
        found.append(rank)
    return tuple(found)


def rank_problem(rank: int, training: TrainingConfig) -> str:
    """Why a device cannot have ``rank`` in a run; "" if it can. 0 is the rank of the run."""
    least = training.min_lora_rank or training.lora_rank
    if rank == 0 or least <= rank <= training.lora_rank:
        return ""
    expected = str(least) if least == training.lora_rank else f"{least} to {training.lora_rank}"
    return f"is {rank}, the run has adapters of rank {expected}"
