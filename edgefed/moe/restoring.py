"""Puts the experts of a layer back as the stacks that transformers made, adapters merged into them."""

from __future__ import annotations

import torch
from torch import nn

from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_reading import read_with_adapter
from edgefed.moe.scope import TrainScope
from edgefed.moe.sources import ExpertSource
from edgefed.moe.units import copy_into


def restore_layer(layer: ExpertLayer, source: ExpertSource, scope: TrainScope, device: torch.device) -> None:
    """Give ``layer`` its 3-D parameters again, one expert read at a time. Raises CheckpointError."""
    for expert in range(layer.num_experts):
        key = layer.expert_key(expert)
        for name, value in read_with_adapter(layer, expert, source, scope).items():
            if expert == 0:
                stack = torch.empty(layer.num_experts, *value.shape, dtype=value.dtype, device=device)
                layer.experts.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            copy_into(key, name, getattr(layer.experts, name).data[expert], value)
