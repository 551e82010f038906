"""The held-out loss is cross-entropy alone, and the load-balancing loss of resident experts is computed by edgefed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from edgefed.expert_records import ExpertPlan, Role
from edgefed.methods.registry import make_method
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.encoding import TokenBlocks
from edgefed.training.loss import batch_loss, evaluate_loss
from edgefed.training.steps import run_steps, step_setup, train_scope

sys.path.insert(0, str(Path(__file__).parent))
import toy_training  # noqa: E402

AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def blocks_of(rows=6, length=16):
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[::2, : length // 2] = -100  # rows count differently
    return TokenBlocks(ids, labels)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@pytest.mark.parametrize("chunked", [False, True])
def test_held_out_loss_is_cross_entropy_at_every_batch_size(family, chunked):
    module = toy_training.build(family, **AUX).eval()
    blocks = blocks_of()
    with torch.no_grad():
        logits = module(input_ids=blocks.input_ids, output_router_logits=False).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), blocks.labels[:, 1:].flatten()).item()
    for batch_size in (1, 2, 4, 6):
        assert evaluate_loss(module, blocks, batch_size, chunked=chunked) == pytest.approx(expected, rel=1e-5)
    assert module.config.output_router_logits is True


def planned(family, resident=None, **changes):
    """(model, plan) with all experts trainable, or with ``resident`` of each layer."""
    module = toy_training.build(family, **changes)
    model = MoeModel(module, discover_layers(module), device=torch.device("cpu"))
    units = {spec.key: {n: t.clone() for n, t in tensors.items()} for spec, tensors in model.iter_units()}
    if resident is None:
        plan = ExpertPlan.full(model.experts_per_layer, Role.TRAINABLE)
    else:
        layers = len(model.experts_per_layer)
        plan = ExpertPlan.of(model.experts_per_layer, [sorted(resident)] * layers, [[]] * layers)
    model.apply_plan(plan, MemorySource(units), train_scope(TrainingConfig()))
    return model, plan


def terms_of(model, blocks):
    with model.balancing() as terms:
        batch_loss(model.module, blocks.input_ids, blocks.labels)
    return terms


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_balancing_loss_of_a_layer_is_that_of_transformers(family):
    model, _ = planned(family)
    blocks = blocks_of()
    terms = terms_of(model, blocks)
    output = model.module(input_ids=blocks.input_ids, output_router_logits=True)
    top_k = model.module.config.num_experts_per_tok
    for term, logits in zip(terms, output.router_logits, strict=True):
        expected = load_balancing_loss_func((logits,), logits.shape[-1], top_k)
        assert term.item() == pytest.approx(expected.item(), rel=1e-5)
        assert term.requires_grad


def test_balancing_loss_counts_resident_experts_only():
    model, _ = planned("mixtral", resident={0, 1, 2})
    for term in terms_of(model, blocks_of()):
        # Two of three experts are chosen for each token: even load is 2, all tokens on the same two 3.
        assert 1.5 < term.item() < 3.0
    model, _ = planned("mixtral", resident={0, 1})
    for term in terms_of(model, blocks_of()):
        assert term.item() == pytest.approx(2.0, rel=1e-5)  # two residents share all tokens: always even


def spread(outcome):
    loads = [layer.tokens_per_expert / layer.tokens_per_expert.sum() for layer in outcome.record.layers]
    return float(sum((load**2).sum() * len(load) for load in loads)) / len(loads)  # 1 where even


def run(family="mixtral", balancing=None, checkpointing=False, **changes):
    model, plan = planned(family, **changes)
    training = TrainingConfig(local_steps=60, batch_size=4, sequence_length=16, learning_rate=2e-2, balancing=balancing)
    setup = step_setup(model, training, checkpointing=checkpointing)
    method = make_method("fedavg", {})
    return run_steps(model, plan, method, blocks_of(), training, compute_share=1.0, seed=0, setup=setup)


def test_training_with_the_balancing_loss_evens_the_load():
    without, with_loss = run(balancing=0.0), run(balancing=1.0)
    assert spread(with_loss) < spread(without)
    assert with_loss.starved_experts <= without.starved_experts


def test_the_default_follows_the_configuration():
    plain, off = run(), run(balancing=0.0)
    assert plain.loss == off.loss  # this configuration has none
    assert run(**AUX).loss == run(balancing=0.5).loss
    assert run(balancing=0.0, **AUX).loss == off.loss


def test_balancing_loss_is_the_same_with_checkpointing():
    assert run(balancing=0.5, checkpointing=True).loss == pytest.approx(run(balancing=0.5).loss, rel=1e-4)


def test_expert_tokens_are_those_that_trained_the_expert():
    outcome = run(resident={0, 1, 2})
    record = outcome.record.layers[0]
    assert set(outcome.expert_tokens) <= {(layer, expert) for layer in range(2) for expert in (0, 1, 2)}
    in_layer = sum(tokens for (layer, _), tokens in outcome.expert_tokens.items() if layer == 0)
    assert in_layer == 2 * outcome.num_tokens  # every token has two experts, absent ones replaced
    assert record.tokens_per_expert[3:].sum() > 0  # the router's own choice goes elsewhere, too
