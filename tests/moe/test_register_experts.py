"""`edgefed.register_experts()`: a transformers model computes its experts with edgefed, with the same results."""

from __future__ import annotations

import copy
import importlib.util
import io
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
def test_every_family_has_the_logits_and_gradients_of_eager(family, backend, monkeypatch):
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
    """Transformers marks it with the number of experts, in versions before 5.18 always, later in expert parallelism."""
    monkeypatch.setenv("EDGEFED_KERNELS", backend)
    edgefed.register_experts()
    experts = build("olmoe", **wide("olmoe")).model.layers[0].mlp.experts
    experts.config._experts_implementation = "edgefed"
    x, weights = torch.randn(4, 64), torch.rand(4, 2)
    indices = torch.tensor([[0, 8], [8, 8], [3, 1], [8, 2]])
    with torch.no_grad():
        found = experts(x, indices, weights)
        valid = torch.where(indices < 8, weights, 0.0)
        expected = experts(x, indices.clamp(max=7), valid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found[1].eq(0).all()


# --- what transformers' model tests require of an implementation --------------------------------------------------

THREE = ["olmoe", "mixtral", "qwen3_moe"]
"""Families whose model tests in transformers were run with "edgefed" (tests/kernels/transformers_suite.py)."""


@pytest.fixture
def both():
    """f(model) under "eager" and under "edgefed", as a pair."""
    edgefed.register_experts()

    def compare(model, function):
        results = []
        for implementation in ("eager", "edgefed"):
            model.set_experts_implementation(implementation)
            results.append(function(model))
        return results

    return compare


def prompt(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(use_cache=False),
        dict(num_beams=3, num_return_sequences=2),
        dict(do_sample=True, top_k=20),
        dict(num_beams=2, do_sample=True),
        dict(cache_implementation="static", disable_compile=True),
        dict(prompt_lookup_num_tokens=3, eos_token_id=2),  # old versions cannot do without one here
    ],
    ids=["greedy", "no cache", "beams", "sampling", "beam sampling", "static cache", "assisted"],
)
@pytest.mark.parametrize("family", THREE)
def test_generation_gives_the_same_tokens(both, family, options):
    ids = prompt(1 if "prompt_lookup_num_tokens" in options else 2)

    def generate(model):
        torch.manual_seed(7)
        defaults = dict(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**defaults, **options})

    expected, found = both(build(family, **wide(family)), generate)
    assert 6 < expected.shape[1] <= 13
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", THREE)
def test_padding_on_the_left_changes_no_answer(family):
    edgefed.register_experts()
    model = build(family, **wide(family))
    model.set_experts_implementation("edgefed")
    ids = prompt()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], dim=1)
    mask = (torch.arange(11) >= 5).long().expand(2, -1)
    with torch.no_grad():
        plain = model(input_ids=ids).logits[:, -1]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", THREE)
def test_gradient_checkpointing_gives_the_same_gradients(family, use_reentrant):
    edgefed.register_experts()
    model = build(family, **wide(family)).train()
    model.set_experts_implementation("edgefed")
    ids, found = prompt(), []
    for checkpointing in (False, True):
        if checkpointing:
            # The first name is that of transformers 5.20 and newer.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", THREE)
def test_a_saved_model_can_be_loaded_and_names_no_implementation(family, tmp_path):
    edgefed.register_experts()
    model = build(family, **wide(family))
    model.set_experts_implementation("edgefed")
    model.save_pretrained(tmp_path)
    assert "edgefed" not in (tmp_path / "config.json").read_text()  # loading it does not need edgefed
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="edgefed")
    assert again.config._experts_implementation == "edgefed"
    assert type(model)(again.config)  # a configuration with that name builds a model
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=prompt()).logits, model(input_ids=prompt()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", THREE)
def test_autocast_and_half_precision_train(both, family, dtype):
    """Under autocast, tokens come in another dtype than the weights."""
    ids = prompt()

    def autocast(model):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return [output.logits.float().detach(), *(p.grad for n, p in model.named_parameters() if "experts" in n)]

    for expected, found in zip(*both(build(family, **wide(family)), autocast), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.05
    half = build(family, dtype=dtype, **wide(family))
    half.set_experts_implementation("edgefed")
    output = half(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", THREE)
def test_the_balancing_loss_still_reads_the_router(both, family):
    ids = prompt()

    def losses(model):
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        gradient = torch.autograd.grad(output.loss, model.model.layers[0].mlp.gate.weight)[0]
        return [output.aux_loss.detach(), gradient, *(logits.detach() for logits in output.router_logits)]

    for expected, found in zip(*both(build(family, **wide(family)), losses), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", THREE)
def test_a_model_can_be_resized_copied_pickled_and_switched_back(both, family):
    model, ids = build(family, **wide(family)), prompt()
    model.resize_token_embeddings(100)

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected, found = both(model, logits)
    assert found.shape[-1] == 100
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert copied.config._experts_implementation == "edgefed"
        assert torch.equal(logits(copied), found)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="edgefedd"):
        model.set_experts_implementation("edgefedd")
    model.set_experts_implementation("edgefed")
    assert torch.equal(logits(model), found)


# Compiling takes seconds a family: a default run compiles one of them.
@pytest.mark.parametrize("family", [THREE[0], *(pytest.param(family, marks=pytest.mark.full) for family in THREE[1:])])
def test_a_model_with_frozen_experts_compiles_into_one_graph(family):
    edgefed.register_experts()
    model, ids = build(family, **wide(family), num_hidden_layers=1), prompt()
    model.set_experts_implementation("edgefed")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    layer = model.model.layers[0].mlp.requires_grad_(False)
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    gradients = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        output = function(hidden)
        output = output[0] if isinstance(output, tuple) else output
        gradients += torch.autograd.grad(output.square().sum(), hidden)
    torch.testing.assert_close(*gradients)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo reads it of every input of a graph
def test_a_trainable_model_compiles_with_graph_breaks_and_has_the_same_gradients():
    """A graph cannot depend on which experts have tokens, so Python runs the experts between graphs."""
    edgefed.register_experts()
    model, ids = build("olmoe", **wide("olmoe"), num_hidden_layers=1), prompt()
    model.set_experts_implementation("edgefed")
    gradients = []
    for function in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad(set_to_none=True)
        function(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
