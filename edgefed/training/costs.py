"""What a round costs a device in memory, from the manifest and the configuration, before any expert is downloaded."""

from __future__ import annotations

import dataclasses
from collections import Counter

from edgefed.moe.memory import ModelShape, activation_bytes
from edgefed.moe.model import MoeModel
from edgefed.protocol.frames import ITEM_BYTES, tensor_size_bytes
from edgefed.protocol.messages import Manifest, TrainingConfig, UnitInfo

COPIES_TRAINED = 4
"""Weight, gradient and AdamW's two moments, all in the weight's dtype (torch.optim.AdamW)."""


@dataclasses.dataclass(frozen=True)
class TrainingCosts:
    """``fixed_bytes``: everything but routed experts, activations included. ``bytes_per_expert``: one tuned expert."""

    fixed_bytes: int
    bytes_per_expert: int


def training_costs(manifest: Manifest, model: MoeModel, training: TrainingConfig) -> TrainingCosts:
    """Costs of training under ``training``; the largest expert stands for all.

    Activations are the bound of `edgefed.moe.memory.activation_bytes` for one batch.
    """
    fixed, experts = 0, Counter()
    for unit in manifest.units:
        size = _trained_size(unit)
        if unit.kind == "expert":
            experts[unit.layer, unit.expert] += size  # the expert and its adapter, if there is one
        else:
            fixed += size
    first = next(unit for unit in manifest.units if unit.kind == "expert")
    activations = activation_bytes(
        _shape(model, first),
        training.batch_size,
        training.sequence_length,
        ITEM_BYTES[first.tensors[0].dtype],
    )
    return TrainingCosts(fixed_bytes=fixed + activations, bytes_per_expert=max(experts.values()))


def _trained_size(unit: UnitInfo) -> int:
    return sum(map(tensor_size_bytes, unit.tensors)) * (COPIES_TRAINED if unit.trainable else 1)


def _shape(model: MoeModel, expert: UnitInfo) -> ModelShape:
    """Sizes by the names that transformers' configurations share; the experts' from the model itself."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    matrix = next(info for info in expert.tensors if info.name == "down_proj")
    width = sum(matrix.shape) - text.hidden_size  # (d, I) or (I, d)
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    count = getattr(text, "n_shared_experts", None) or getattr(text, "num_shared_experts", None) or 0
    shared = shared or count * width
    return ModelShape(
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        expert_width=width,
        num_experts=max(model.experts_per_layer),
        top_k=max(layer.top_k for layer in model.layers),
        shared_width=shared,
    )
