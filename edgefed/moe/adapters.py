"""LoRA adapters (arXiv 2106.09685): initial values, and parametrizations of router and attention weights.

    W_effective = W + (alpha / rank) B A        A (R, in), B (out, R), both in float32

Adapters of experts are part of the expert bank; see `edgefed.moe.bank`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from edgefed.errors import CheckpointError
from edgefed.moe.units import ADAPTER_DTYPE, LORA_SUFFIX, FixedTensors, TrainScope, check_tensors, copy_into
from edgefed.protocol.ranks import is_factor, leading_part


class LowRankUpdate(nn.Module):
    """Parametrization of one weight (out, in). Both matrices are zero until they are loaded."""

    def __init__(self, weight: torch.Tensor, rank: int, scale: float, device: torch.device):
        super().__init__()
        size_out, size_in = weight.shape
        self.scale = scale
        self.lora_a = nn.Parameter(torch.zeros(rank, size_in, dtype=ADAPTER_DTYPE, device=device))
        self.lora_b = nn.Parameter(torch.zeros(size_out, rank, dtype=ADAPTER_DTYPE, device=device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight plus its low-rank update, in the weight's dtype."""
        return weight + low_rank_product(self.lora_a, self.lora_b, self.scale).to(weight.dtype)


def low_rank_product(lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * B A, (out, in), in the dtype of the adapter."""
    return (lora_b @ lora_a) * scale


def initial_adapter(key: str, sizes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Return the initial adapter of unit ``key``: A Kaiming-uniform (a = sqrt 5, as in PEFT), B zero.

    ``sizes`` maps each matrix to (in, out). The values depend only on ``seed`` and ``key``, so all clients start from
    the same A, whichever experts are resident.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    tensors = {}
    for name, (size_in, size_out) in sizes.items():
        bound = size_in**-0.5
        a = torch.rand(rank, size_in, generator=generator, dtype=ADAPTER_DTYPE)
        tensors[f"{name}.lora_a"] = (2.0 * a - 1.0) * bound
        tensors[f"{name}.lora_b"] = torch.zeros(size_out, rank, dtype=ADAPTER_DTYPE)
    return tensors


def _updates(unit: FixedTensors) -> dict[str, LowRankUpdate]:
    found = {}
    for name, place in unit.matrices.items():
        parametrization = place.parametrization()
        if parametrization is not None:
            found[name] = cast(LowRankUpdate, parametrization[0])
    return found


def install_adapter(unit: FixedTensors, scope: TrainScope, device: torch.device) -> None:
    """Install a zero adapter on each weight of the unit, replacing an existing one."""
    remove_adapter(unit)
    for place in unit.matrices.values():
        update = LowRankUpdate(place.get(), scope.lora_rank, scope.lora_scale, device)
        for module, attribute in place.owners:
            # unsafe=True only skips the trial run, which fails for a weight that is still on the meta device.
            parametrize.register_parametrization(module, attribute, update, unsafe=True)


def remove_adapter(unit: FixedTensors, *, merge: bool = False) -> None:
    """Remove the adapter. With ``merge``, add its update to the weight first."""
    for name, update in _updates(unit).items():
        place = unit.places[name]
        merged = update(place.get().float()).detach() if merge else None
        for module, attribute in place.owners:
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        if merged is not None:
            with torch.no_grad():
                place.get().copy_(merged)


def adapter_tensors(unit: FixedTensors) -> dict[str, nn.Parameter]:
    """Return the parameters of the installed adapter by tensor name; empty without an adapter."""
    return {
        f"{name}.{part}": getattr(update, part)
        for name, update in _updates(unit).items()
        for part in ("lora_a", "lora_b")
    }


def leading_adapter(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Return what a device of ``rank`` has of an adapter: the leading rows of A and columns of B (`protocol.ranks`)."""
    return {
        name: tensor[leading_part(name, rank)].contiguous() if is_factor(name) and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def load_adapter(unit: FixedTensors, tensors: Mapping[str, torch.Tensor], rank: int | None = None) -> None:
    """Copy values, the leading ``rank`` or all, into the installed adapter.

    Raises CheckpointError if there is none or the tensors do not fit.
    """
    key, targets = unit.key + LORA_SUFFIX, adapter_tensors(unit)
    tensors = tensors if rank is None else leading_adapter(tensors, rank)
    if not targets:
        raise CheckpointError(f"{unit.key!r} has no adapter installed: apply a plan with LoRA first")
    check_tensors(key, tensors, {name: tuple(target.shape) for name, target in targets.items()})
    for name, target in targets.items():
        copy_into(key, name, target, tensors[name])


def adapter_factors(module: nn.Module, ending: str) -> list[nn.Parameter]:
    """Return the parameters of all adapters whose tensors end in ``ending``, ``.lora_a`` or ``.lora_b``."""
    factor = re.compile(rf"{ending.removeprefix('.')}(_\d+)?$")  # of an expert, its id follows
    return [parameter for name, parameter in module.named_parameters() if factor.search(name)]
