"""Discovery of MoE layers: the layout of each family, and unsupported models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgefed.errors import UnsupportedArchitecture
from edgefed.moe import loading
from edgefed.moe.architecture import discover_layers
from edgefed.moe.gate_probe import GateNotUnderstood, probe_gate
from edgefed.moe.model import MoeModel

# family -> (gate kind, selection bias relative to its MoE block, what makes it worth a row)
GATES = {
    "olmoe": ("softmax", None, "softmax, not renormalised"),
    "mixtral": ("softmax", None, "softmax, renormalised"),
    "qwen2_moe": ("softmax", None, "shared expert with a gate of its own"),
    "qwen3_moe": ("softmax", None, "norm_topk_prob"),
    "deepseek_v3": ("sigmoid", "gate.e_score_correction_bias", "groups, scaling, bias buffer in the router"),
    "gpt_oss": ("softmax", None, "softmax over the top-k; its bias is in the logits"),
    "deepseek_v2": ("softmax", None, "returns scaled softmax"),
    "ernie4_5_moe": ("softmax", "gate.moe_statics.e_score_correction_bias", "a selection bias beside a softmax"),
    "lfm2_moe": ("sigmoid", "expert_bias", "bias outside the router"),
    "afmoe": ("sigmoid", "expert_bias", "router takes three dimensions and the bias"),
    "minimax_m2": ("sigmoid", "e_score_correction_bias", "bias passed by the block"),
    "granitemoe": ("softmax", None, "softmax over the top-k"),
    "phimoe": ("softmax", None, "sparsemixer: weights follow no formula of ours, the order does"),
    "hunyuan_v1_moe": ("softmax", None, "the router's weight is one level down"),
    "nemotron_h": ("sigmoid", "gate.e_score_correction_bias", "experts narrower than the router's input"),
    "gemma4_text": ("probability", None, "returns probabilities; its block is a whole decoder layer"),
}


@pytest.mark.parametrize("family", GATES)
def test_gate_is_measured(family, build_model):
    model = build_model(family)
    for layer in discover_layers(model):
        kind, bias, _ = GATES[family]
        assert (layer.gate_kind, layer.selection_bias) == (kind, None if bias is None else f"{layer.block_path}.{bias}")
        assert layer.num_experts == 8
        assert layer.top_k == (3 if family == "qwen2_moe" else 2)
        assert layer.router is model.get_submodule(layer.router_path)
        assert layer.experts is model.get_submodule(layer.experts_path)


def test_probing_changes_nothing(build_model):
    model = build_model("deepseek_v3").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator_state = torch.get_rng_state()
    discover_layers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(generator_state, torch.get_rng_state())


def test_dense_layers_before_the_first_moe_layer_do_not_count(toys):
    layers = toys("deepseek_v3").full().layers
    assert [(layer.ordinal, layer.experts_path) for layer in layers] == [
        (0, "model.layers.1.mlp.experts"),
        (1, "model.layers.2.mlp.experts"),
    ]


def test_layouts(toys):
    gpt_oss = toys("gpt_oss").full().layers[0]
    assert gpt_oss.is_transposed
    assert gpt_oss.has_bias
    assert {p.name: p.shape for p in gpt_oss.parameters} == {
        "gate_up_proj": (32, 32), "gate_up_proj_bias": (32,), "down_proj": (16, 32), "down_proj_bias": (32,)
    }  # fmt: skip
    assert [gpt_oss.input_output_sizes(p) for p in gpt_oss.matrices] == [(32, 32), (16, 32)]
    olmoe = toys("olmoe").full().layers[0]
    assert olmoe.input_output_sizes(olmoe.parameters[1]) == (16, 32)
    assert olmoe.parameters_per_expert == 32 * 32 + 32 * 16
    assert olmoe.bytes_per_expert == 4 * 1536


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", "it is a dense model without experts"),
        ("llama4_text", "do not use transformers' experts interface"),
    ],
)
def test_refuses_by_model_type_and_reason(family, reason, toy_configs, tmp_path):
    config = AutoConfig.for_model(family, **toy_configs.REFUSED[family])
    with pytest.raises(UnsupportedArchitecture, match=f"'{family}'.*{reason}"):
        discover_layers(loading.build_skeleton(config))
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=family):
        MoeModel.skeleton(tmp_path)


def test_refuses_an_encoder_decoder(tmp_path):
    AutoConfig.for_model("switch_transformers", num_layers=1, d_model=8, d_ff=8, vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match="switch_transformers"):
        MoeModel.skeleton(tmp_path)


def test_refuses_parameters_that_it_does_not_know(build_model):
    model = build_model("olmoe")
    experts = model.model.layers[1].mlp.experts
    experts.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(
        UnsupportedArchitecture, match="'olmoe'.*layers.1.mlp.experts.* must have the parameters .*found .*scale"
    ):
        discover_layers(model)


def test_refuses_a_router_that_ignores_its_logits(build_model):
    model = build_model("olmoe")

    def forward(hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).shape[0]
        indices = torch.arange(tokens).unsqueeze(1) % 8
        return torch.randn(tokens, 8), torch.ones(tokens, 1), indices

    for layer in model.model.layers:
        layer.mlp.gate.forward = forward
    with pytest.raises(UnsupportedArchitecture, match="neither the weights nor the choice"):
        discover_layers(model)


def test_refuses_a_block_without_router_logits(build_model):
    block = build_model("olmoe").model.layers[0].mlp
    block.gate.forward = lambda hidden_states: {"logits": hidden_states}
    with pytest.raises(GateNotUnderstood, match="the router must return logits; found a dict"):
        probe_gate(block, "gate", "experts", 8)


def test_a_shared_expert_with_one_output_per_expert_is_not_a_router(toy_configs):
    options = {**toy_configs.FAMILIES["qwen2_moe"], "shared_expert_intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **options))
    assert discover_layers(model)[0].router_path == "model.layers.0.mlp.gate"
