"""Reads experts and their adapters from a source, and says what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgefed.errors import CheckpointError
from edgefed.moe.adapters import low_rank_product
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.units import ADAPTER_DTYPE, LORA_SUFFIX, ExpertSource, TrainScope, check_tensors, copy_into
from edgefed.protocol.messages import UnitInfo


def read_with_adapter(
    layer: ExpertLayer, expert: int, source: ExpertSource, scope: TrainScope
) -> dict[str, torch.Tensor]:
    """One expert's tensors with its adapter added, if ``scope`` trains experts by LoRA. Raises CheckpointError."""
    key = layer.expert_key(expert)
    tensors = dict(source.read(key))
    check_expert(layer, key, tensors)
    if scope.experts == "lora":
        adapter = source.read(key + LORA_SUFFIX)
        check_expert_adapter(layer, key + LORA_SUFFIX, adapter, scope.lora_rank)
        for parameter in layer.matrices:
            update = low_rank_product(
                adapter[f"{parameter.name}.lora_a"], adapter[f"{parameter.name}.lora_b"], scope.lora_scale
            )  # (out, in)
            weight = tensors[parameter.name]
            merged = weight.to(update.dtype) + (update.T if layer.is_transposed else update)
            tensors[parameter.name] = merged.to(weight.dtype)
    return tensors


def check_expert(layer: ExpertLayer, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless these are the tensors of one expert of ``layer``."""
    check_tensors(key, tensors, {parameter.name: parameter.shape for parameter in layer.parameters})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name!r} of unit {key!r} is {tensor.dtype}, expected a floating-point type")


def check_expert_adapter(layer: ExpertLayer, key: str, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    """Raise CheckpointError unless these are the adapter of one expert of ``layer``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in layer.matrices:
        size_in, size_out = layer.input_output_sizes(parameter)
        shapes[f"{parameter.name}.lora_a"], shapes[f"{parameter.name}.lora_b"] = (rank, size_in), (size_out, rank)
    check_tensors(key, tensors, shapes)
    for name, tensor in tensors.items():
        if tensor.dtype != ADAPTER_DTYPE:
            raise CheckpointError(f"{name!r} of unit {key!r} is {tensor.dtype}, adapters are {ADAPTER_DTYPE}")


# Units on disk: one safetensors file each, opened only when a unit is asked for.


def raw_array(tensor: torch.Tensor) -> np.ndarray:
    """The raw bits of a tensor as numpy holds them for a frame: bfloat16 as uint16, bool as uint8."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.view(torch.uint8).numpy() if values.dtype == torch.bool else values.numpy()


class FrameSource:
    """An `edgefed.moe.units.ExpertSource` over content-addressed files. Holds paths, never tensors."""

    def __init__(self, units: Iterable[UnitInfo] = (), paths: Mapping[str, Path] | None = None):
        self._paths: dict[str, Path] = {}
        self.add(units, paths or {})

    def add(self, units: Iterable[UnitInfo], paths: Mapping[str, Path]) -> None:
        """Make ``units`` readable; ``paths`` maps their sha256 to local files."""
        for unit in units:
            self._paths[unit.key] = Path(paths[unit.sha256])

    def read(self, unit_key: str) -> dict[str, torch.Tensor]:
        """The tensors of one unit, fresh on the CPU. Raises CheckpointError when it is absent or unreadable."""
        path = self._paths.get(unit_key)
        if path is None:
            raise CheckpointError(f"unit {unit_key!r} is not among the {len(self._paths)} units on this disk")
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read unit {unit_key!r} from {path}: {error}") from error


# Puts the experts of a layer back as the stacks that transformers made, adapters merged into them.


def restore_layer(layer: ExpertLayer, source: ExpertSource, scope: TrainScope, device: torch.device) -> None:
    """Give ``layer`` its 3-D parameters again, one expert read at a time. Raises CheckpointError."""
    for expert in range(layer.num_experts):
        key = layer.expert_key(expert)
        for name, value in read_with_adapter(layer, expert, source, scope).items():
            if expert == 0:
                stack = torch.empty(layer.num_experts, *value.shape, dtype=value.dtype, device=device)
                layer.experts.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            copy_into(key, name, getattr(layer.experts, name).data[expert], value)
