"""Count the bytes of a model's tensors. Tests and benchmarks compare the memory model with these counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import nn

from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.bank import ExpertBank
from edgefed.moe.offloading import offloaded


@dataclasses.dataclass(frozen=True)
class ExpertMemory:
    """Bytes of the resident experts: weights (with adapters), gradients and optimizer state.

    Offloaded tensors are not counted.
    """

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the three parts."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind ``tensors``, counting each storage once. Meta tensors count as 0."""
    storages = {}
    for tensor in tensors:
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def gradients(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the existing gradients, without those of offloaded parameters."""
    return [p.grad for p in parameters if p.grad is not None and offloaded(p) is None]


def expert_tensors(layers: Iterable[ExpertLayer]) -> list[torch.Tensor]:
    """Return all resident expert weights: those of banks, quantized ones included, or the stacks of a full model."""
    tensors: list[torch.Tensor] = []
    for layer in layers:
        bank = getattr(layer.experts, "edgefed_bank", None)
        if isinstance(bank, ExpertBank):
            tensors.extend(bank.weights())
        else:
            found = (layer.experts._parameters.get(parameter.name) for parameter in layer.parameters)
            tensors.extend(tensor for tensor in found if tensor is not None)
    return tensors


def expert_memory(layers: Iterable[ExpertLayer], optimizer: torch.optim.Optimizer | None = None) -> ExpertMemory:
    """Count the experts' weights, their gradients and the state that ``optimizer`` has for them."""
    parameters = [tensor for tensor in expert_tensors(layers) if offloaded(tensor) is None]
    state = {} if optimizer is None else optimizer.state
    moments = (value for p in parameters if p in state for value in state[p].values())
    return ExpertMemory(
        weight_bytes=storage_bytes(parameters),
        gradient_bytes=storage_bytes(gradients(parameters)),
        optimizer_bytes=storage_bytes(value for value in moments if isinstance(value, torch.Tensor)),
    )


def model_memory(module: nn.Module, layers: Iterable[ExpertLayer]) -> dict[str, int]:
    """Count the bytes of all tensors of a model: "dense" (with buffers), "experts" and "gradients"."""
    experts = expert_tensors(layers)
    ids = {id(tensor) for tensor in experts}
    parameters = list(module.parameters())
    return {
        "dense": storage_bytes(tensor for tensor in (*parameters, *module.buffers()) if id(tensor) not in ids),
        "experts": storage_bytes(tensor for tensor in experts if offloaded(tensor) is None),
        "gradients": storage_bytes(gradients(parameters)),
    }
