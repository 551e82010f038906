"""Shapes: published parameter totals, and configurations counted without weights, for every family of the toys."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from edgefed.costs.shapes import KNOWN_SHAPES
from edgefed.errors import UnsupportedArchitecture
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model_shape import decoder_layer_paths, shape_from_config

_spec = importlib.util.spec_from_file_location("_toy_models", Path(__file__).with_name("toy_models.py"))
_toy_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_toy_models)

HUB = {
    "OLMoE-1B-7B": ("olmoe", dict(intermediate_size=1024)),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        dict(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
            num_key_value_heads=16, vocab_size=151936, num_experts=60, num_experts_per_tok=4,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        ),
    ),
    "gpt-oss-20b": ("gpt_oss", dict(num_hidden_layers=24, num_local_experts=32)),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        dict(
            hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            vocab_size=151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        ),
    ),
    "Mixtral-8x7B": ("mixtral", {}),
}  # fmt: skip
"""Values of the configurations on the hub that differ from transformers' defaults."""


@pytest.mark.parametrize(
    ("name", "billions", "experts", "top_k"),
    [
        ("OLMoE-1B-7B", 6.92, 64, 8),
        ("Qwen1.5-MoE-A2.7B", 14.32, 60, 4),
        ("gpt-oss-20b", 20.91, 32, 4),
        ("Qwen3-30B-A3B", 30.53, 128, 8),
        ("Mixtral-8x7B", 46.70, 8, 2),
    ],
)
def test_published_totals(name, billions, experts, top_k):
    shape = KNOWN_SHAPES[name]
    assert round(shape.num_parameters / 1e9, 2) == billions
    assert (shape.num_experts, shape.top_k) == (experts, top_k)


@pytest.mark.parametrize("name", HUB)
def test_recorded_shapes_equal_those_of_the_configuration(name):
    """Everything but buffers (rotary frequencies), and the shared expert's gate of one output."""
    family, sizes = HUB[name]
    found = shape_from_config(AutoConfig.for_model(family, **sizes), name)
    known = KNOWN_SHAPES[name]
    assert 0 <= found.own_dtype_bytes <= 4096
    layers = tuple(dataclasses.replace(layer, dense_width=layer.dense_width // 2 * 2) for layer in found.layers)
    assert dataclasses.replace(found, own_dtype_bytes=0, layers=layers) == known


@pytest.mark.parametrize("family", [*_toy_models.FAMILIES, *_toy_models.MORE_FAMILIES])
def test_counts_are_those_of_the_model(family, toys):
    """Every supported family: each parameter is counted once; layers are in order."""
    model = toys(family).full()
    shape = shape_from_config(model.config)
    parameters = {id(parameter): parameter.numel() for parameter in model.module.parameters()}
    assert shape.num_parameters == sum(parameters.values())
    assert shape.experts_per_layer == model.experts_per_layer
    assert [layer.parameters_per_expert for layer in shape.moe_layers] == [
        layer.parameters_per_expert for layer in model.layers
    ]
    assert len(shape.layers) == model.config.get_text_config().num_hidden_layers
    paths = decoder_layer_paths(model.module, model.layers)
    has_experts = [any(layer.experts_path.startswith(f"{path}.") for layer in model.layers) for path in paths]
    assert has_experts == [bool(layer.num_experts) for layer in shape.layers]
    assert all(layer.mixer_width or layer.dense_width or layer.num_experts for layer in shape.layers)
    assert all(0 < layer.kept_by_gate < 20 for layer in shape.moe_layers)


def test_no_weight_is_allocated():
    """30 billion parameters are counted in the memory of a few buffers."""
    family, sizes = HUB["Qwen3-30B-A3B"]
    from edgefed.moe.loading import build_skeleton

    module = build_skeleton(AutoConfig.for_model(family, **sizes))
    assert all(parameter.is_meta for parameter in module.parameters())
    assert len(discover_layers(module)) == 48


def test_dense_layers_and_own_dtypes():
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, n_group=4, topk_group=2,
    )  # fmt: skip
    config.dtype = torch.bfloat16
    shape = shape_from_config(config)
    assert [layer.num_experts for layer in shape.layers] == [0, 8, 8]
    assert [layer.dense_width for layer in shape.layers] == [2 * 48, 2 * 16, 2 * 16]
    assert shape.scores == "float32", "8 + 8 numbers of a query against 8 of a value: no fused attention on a CPU"


def test_a_dense_model_is_refused():
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(UnsupportedArchitecture, match="dense model"):
        shape_from_config(config)
