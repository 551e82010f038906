"""Puts the experts of a layer back as the stacks that transformers made, adapters merged into them."""

from __future__ import annotations

import torch
from torch import nn

from edgefed.moe.adapters import low_rank_product
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.bank import check_expert, check_expert_adapter
from edgefed.moe.scope import TrainScope
from edgefed.moe.sources import ExpertSource
from edgefed.moe.units import LORA_SUFFIX, copy_into


def restore_layer(layer: ExpertLayer, source: ExpertSource, scope: TrainScope, device: torch.device) -> None:
    """Give ``layer`` its 3-D parameters again, one expert read at a time. Raises CheckpointError."""
    for expert in range(layer.num_experts):
        key = layer.expert_key(expert)
        for name, value in read_merged(layer, expert, source, scope).items():
            if expert == 0:
                stack = torch.empty(layer.num_experts, *value.shape, dtype=value.dtype, device=device)
                layer.experts.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            copy_into(key, name, getattr(layer.experts, name).data[expert], value)


def read_merged(layer: ExpertLayer, expert: int, source: ExpertSource, scope: TrainScope) -> dict[str, torch.Tensor]:
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
