"""Reads experts and their adapters from a source, and says what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgefed.errors import CheckpointError
from edgefed.moe.adapters import low_rank_product
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.scope import TrainScope
from edgefed.moe.sources import ExpertSource
from edgefed.moe.units import ADAPTER_DTYPE, LORA_SUFFIX, check_tensors


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
