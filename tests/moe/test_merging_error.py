"""Error of the layers' outputs with merged experts, compared with a computation by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_error import layer_output_errors

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan, MergedGroup, Role
from edgefed.kernels.masked_experts import masked_experts
from edgefed.moe.bank import ExpertBank
from edgefed.moe.gate_probe import split_expert_arguments
from edgefed.moe.merging.alignment import neuron_aligner
from edgefed.moe.merging.clustering import expert_embeddings
from edgefed.moe.merging.plan import plan_merging
from edgefed.moe.units import MemorySource, TrainScope

DENSE = TrainScope(experts="none", router="none")


def merged_plan(layers, groups, trainable=()):
    roles = np.full(8, Role.FROZEN, dtype=np.int8)
    roles[list(trainable)] = Role.TRAINABLE
    for group in groups:
        roles[list(group.experts)] = Role.MERGED
    return ExpertPlan((roles,) * layers, (tuple(groups),) * layers)


GROUPS = (MergedGroup((0, 3, 5), (0.5, 0.2, 0.3)), MergedGroup((1, 2), (1.0, 0.0)))


def calls(model, input_ids):
    """(hidden_states, indices, weights, output) of each layer."""
    seen = []
    hooks = [
        layer.experts.register_forward_hook(
            lambda m, args, kwargs, out: seen.append((*split_expert_arguments(args, kwargs), out)), with_kwargs=True
        )
        for layer in model.layers
    ]
    with torch.no_grad():
        model.module(input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_merged_layer_equals_a_computation_by_hand(toy):
    """Members replaced by their weighted mean in the full layer, token by token, pair by pair."""
    model = toy.full()
    units = toy.units()
    layer = model.layers[0]
    hidden, indices, weights, _ = calls(model, toy.input_ids)[0]
    plan = merged_plan(len(model.layers), GROUPS, trainable=[4])
    bank = ExpertBank(layer, plan, MemorySource(units), DENSE, torch.device("cpu"))
    found = masked_experts(
        hidden,
        bank.slot_of[indices],
        weights,
        bank.slots(),
        activation=layer.experts._apply_gate if layer.has_gate else layer.experts.act_fn,
        is_transposed=layer.is_transposed,
    )
    with torch.no_grad():
        for group in GROUPS:
            for p in layer.parameters:
                stack = getattr(layer.experts, p.name)
                mean = sum(
                    w * units[layer.expert_key(e)][p.name] for e, w in zip(group.experts, group.weights, strict=True)
                )
                for expert in group.experts:
                    stack[expert].copy_(mean)
        expected = torch.stack(
            [
                sum(
                    layer.experts(hidden[t : t + 1], indices[t : t + 1, k : k + 1], weights[t : t + 1, k : k + 1])[0]
                    for k in range(indices.shape[1])
                )
                for t in range(len(hidden))
            ]
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rerouting_keeps_the_sum_of_the_gate(toy):
    model = toy.full()
    bank = ExpertBank(
        model.layers[0], merged_plan(len(model.layers), GROUPS), MemorySource(toy.units()), DENSE, torch.device("cpu")
    )
    _, indices, weights, _ = calls(model, toy.input_ids)[0]
    slots = bank.slot_of[indices]
    assert (slots >= 0).all()
    per_slot = torch.zeros(len(weights), len(bank)).scatter_add_(1, slots, weights.float())
    per_expert = torch.zeros(len(weights), 8).scatter_add_(1, indices, weights.float())
    torch.testing.assert_close(per_slot.sum(1), weights.float().sum(1))
    for group in GROUPS:
        slot = int(bank.slot_of[group.experts[0]])
        torch.testing.assert_close(per_slot[:, slot], per_expert[:, list(group.experts)].sum(1))


def test_merging_identical_experts_changes_nothing(toy):
    model, units = toy.full(), toy.units()
    for layer in model.layers:
        for group in GROUPS:
            for expert in group.experts:
                for name, value in units[layer.expert_key(group.experts[0])].items():
                    units[layer.expert_key(expert)][name].copy_(value)
                    with torch.no_grad():
                        getattr(layer.experts, name)[expert].copy_(value)
    errors = layer_output_errors(
        model, {"merged": merged_plan(len(model.layers), GROUPS)}, MemorySource(units), [toy.input_ids]
    )
    assert errors["merged"].max() < 1e-5


def test_the_error_is_measured_for_each_layer_separately(olmoe):
    model, source = olmoe.full(), MemorySource(olmoe.units())
    plans = {
        "nothing": ExpertPlan.full((8, 8)),
        "merged": merged_plan(2, GROUPS),
        "one": merged_plan(2, [MergedGroup(tuple(range(8)), (1 / 8,) * 8)]),
    }
    batches = [olmoe.input_ids[:1], olmoe.input_ids[1:, :4]]
    errors = layer_output_errors(model, plans, source, batches)
    assert errors["nothing"].max() < 1e-5
    assert (errors["merged"] > 0.01).all()
    assert (errors["one"] > errors["merged"]).all()
    squares, differences = np.zeros(2), np.zeros(2)
    for batch in batches:
        for ordinal, (hidden, indices, weights, output) in enumerate(calls(model, batch)):
            layer = model.layers[ordinal]
            bank = ExpertBank(layer, plans["merged"], source, DENSE, torch.device("cpu"))
            found = masked_experts(
                hidden, bank.slot_of[indices], weights, bank.slots(), activation=layer.experts._apply_gate
            )
            squares[ordinal] += output.square().sum().item()
            differences[ordinal] += (found - output).square().sum().item()
    np.testing.assert_allclose(errors["merged"], np.sqrt(differences / squares), rtol=1e-4)
    assert not model.layers[0].experts._forward_hooks or len(calls(model, olmoe.input_ids)) == 2


def test_tokens_can_count_by_the_attention_they_receive(olmoe):
    """One token has weight 1; the sums over several are weighted by the attention that a second capture measures."""
    model, source, plans = olmoe.full(), MemorySource(olmoe.units()), {"merged": merged_plan(2, GROUPS)}
    single = [olmoe.input_ids[:1, :1]]
    np.testing.assert_allclose(
        layer_output_errors(model, plans, source, single, by_attention=True)["merged"],
        layer_output_errors(model, plans, source, single)["merged"],
        rtol=1e-5,
    )
    weighted = layer_output_errors(model, plans, source, [olmoe.input_ids], by_attention=True)["merged"]
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        first = model.module(olmoe.input_ids, output_attentions=True).attentions[0]  # (B, heads, S, S)
    seen = torch.arange(first.shape[-1], 0, -1)
    received = (first.mean(1).sum(1) / seen).reshape(-1)
    hidden, indices, weights, output = calls(model, olmoe.input_ids)[0]
    layer = model.layers[0]
    bank = ExpertBank(layer, plans["merged"], source, DENSE, torch.device("cpu"))
    found = masked_experts(hidden, bank.slot_of[indices], weights, bank.slots(), activation=layer.experts._apply_gate)
    difference, square = ((found - output).square().sum(1) * received).sum(), (output.square().sum(1) * received).sum()
    assert weighted[0] == pytest.approx((difference / square).sqrt().item(), rel=1e-3)


def test_the_error_of_a_model_that_streams_is_the_same(olmoe):
    plans = {"merged": merged_plan(2, GROUPS)}
    full = layer_output_errors(olmoe.full(), plans, MemorySource(olmoe.units()), [olmoe.input_ids])
    model, source = olmoe.device(olmoe.units())
    with model.streaming(source):
        streamed = layer_output_errors(model, plans, source, [olmoe.input_ids])
    np.testing.assert_allclose(streamed["merged"], full["merged"], rtol=1e-4)


def test_a_plan_that_leaves_an_expert_out_is_refused(olmoe):
    plan = ExpertPlan.of((8, 8), [[0, 1], [0, 1]])
    with pytest.raises(ConfigError, match="'part'"):
        layer_output_errors(olmoe.full(), {"part": plan}, MemorySource(olmoe.units()), [olmoe.input_ids])


def test_from_profile_to_a_merged_model(toy):
    """Profile with attention, points, plan, merged experts with aligned neurons: every pair finds its expert."""
    model, source = toy.device(toy.units())
    with model.streaming(source), model.record_statistics(attention=True) as recorder:
        model.module(toy.input_ids)
    record = recorder.take()
    resident = ExpertPlan.of(model.experts_per_layer, [[0, 1]] * len(model.layers), [[7]] * len(model.layers))
    plan = plan_merging(record, resident, expert_embeddings(model.layers, source), 2 * len(model.layers) + 1)
    model.apply_plan(plan, source, TrainScope(), align=neuron_aligner(model.layers))
    with torch.no_grad():
        logits = model.module(toy.input_ids).logits
    assert logits.isfinite().all()
    assert plan.num_resident == 3 * len(model.layers) + 2 * len(model.layers) + 1
    assert sum(model.served_tokens().values()) == sum(layer.top_k for layer in model.layers) * toy.input_ids.numel()
