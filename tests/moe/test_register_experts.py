"""`edgefed.register_experts()`: any transformers model computes its experts with edgefed, and says the same."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import edgefed
from edgefed.kernels.dispatch import why_not_native

_spec = importlib.util.spec_from_file_location("_toy_models", Path(__file__).with_name("toy_models.py"))
_toy_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_toy_models)
FAMILIES = _toy_models.FAMILIES

BACKENDS = ["reference", *(["native"] if why_not_native() is None else [])]
WIDE = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)  # multiples of 64, as native products want


def build(family: str, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    options = {**FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def wide(family: str) -> dict:
    width = {"intermediate_size": 64} if "moe_intermediate_size" not in FAMILIES[family] else {}
    if "moe_intermediate_size" in FAMILIES[family]:
        width = {"moe_intermediate_size": 64}
    return {**WIDE, **width}


def logits_and_gradients(model, implementation: str, ids: torch.Tensor):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_as_eager_and_learns_the_same(family, backend, monkeypatch):
    monkeypatch.setenv("EDGEFED_KERNELS", backend)
    edgefed.register_experts()
    edgefed.register_experts()
    for changes in ({}, wide(family) if family in ("olmoe", "mixtral", "qwen3_moe") else {}):
        model = build(family, **changes)
        ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
        expected, expected_gradients = logits_and_gradients(model, "eager", ids)
        found, gradients = logits_and_gradients(model, "edgefed", ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_bfloat16_is_as_near_to_float32_as_eager_is(family, monkeypatch):
    edgefed.register_experts()
    exact = build(family, **wide(family))
    ids = torch.randint(3, 90, (1, 31), generator=torch.Generator().manual_seed(2))
    model = copy.deepcopy(exact).to(torch.bfloat16)
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        errors = {}
        for implementation in ("eager", "edgefed"):
            model.set_experts_implementation(implementation)
            errors[implementation] = float((model(input_ids=ids).logits.float() - expected).norm() / expected.norm())
    assert errors["edgefed"] < 1.5 * errors["eager"] + 1e-3


def test_generation_runs_with_it():
    edgefed.register_experts()
    model = build("olmoe", **wide("olmoe"))
    ids = torch.tensor([[5, 6, 7]])
    answers = []
    for implementation in ("eager", "edgefed"):
        model.set_experts_implementation(implementation)
        answers.append(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0))
    assert torch.equal(*answers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_of_another_device_is_dropped(backend, monkeypatch):
    """transformers marks it with the number of experts, in versions before 5.18 always, later in expert parallelism."""
    monkeypatch.setenv("EDGEFED_KERNELS", backend)
    edgefed.register_experts()
    experts = build("olmoe", **wide("olmoe")).model.layers[0].mlp.experts
    experts.config._experts_implementation = "edgefed"
    x, weights = torch.randn(4, 64), torch.rand(4, 2)
    indices = torch.tensor([[0, 8], [8, 8], [3, 1], [8, 2]])
    with torch.no_grad():
        found = experts(x, indices, weights)
        kept = torch.where(indices < 8, weights, 0.0)
        expected = experts(x, indices.clamp(max=7), kept)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found[1].eq(0).all()
