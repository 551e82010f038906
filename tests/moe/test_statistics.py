"""Recorded router statistics, compared with a recomputation from the router's outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefed.expert_records import ExpertPlan
from edgefed.moe.gate_probe import gate_probabilities, router_logits_of
from edgefed.moe.units import TrainScope

NAMES = (
    "tokens_per_expert", "gate_sum", "gate_max", "gate_log_sum", "gate_complement_log_sum", "routed_gate_sum"
)  # fmt: skip


def slow_record(model, batches):
    """Per layer and expert, token by token, from hooks of this test."""
    seen = {layer.ordinal: [] for layer in model.layers}
    hooks = []
    for layer in model.layers:
        logits = {}
        hooks.append(
            layer.router.register_forward_hook(
                lambda m, args, output, logits=logits: logits.update(
                    value=router_logits_of(output).detach().reshape(-1, 8)
                )
            )
        )
        hooks.append(
            layer.experts.register_forward_pre_hook(
                lambda m, args, logits=logits, layer=layer: seen[layer.ordinal].append(
                    (gate_probabilities(logits["value"], layer.gate_kind), args[1].clone(), args[2].detach().clone())
                )
            )
        )
    with torch.no_grad():
        for batch in batches:
            model.module(batch)
    for hook in hooks:
        hook.remove()
    records = []
    for layer in model.layers:
        record = {name: np.zeros(8) for name in NAMES}
        tokens = 0
        for gate, indices, weights in seen[layer.ordinal]:
            for g, chosen, weight in zip(gate.double().numpy(), indices.tolist(), weights.tolist(), strict=True):
                tokens += 1
                record["gate_sum"] += g
                record["gate_max"] = np.maximum(record["gate_max"], g)
                record["gate_log_sum"] += g * np.log(g)
                record["gate_complement_log_sum"] += (1 - g) * np.log(1 - g)
                for expert, w in zip(chosen, weight, strict=True):
                    record["tokens_per_expert"][expert] += 1
                    record["routed_gate_sum"][expert] += w
        records.append((tokens, record))
    return records


def assert_record(record, expected):
    for layer, (tokens, values) in zip(record.layers, expected, strict=True):
        assert layer.num_tokens == tokens
        for name in NAMES:
            np.testing.assert_allclose(getattr(layer, name), values[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_of_the_full_model(toy):
    model = toy.full()
    batches = [toy.input_ids, toy.input_ids[:1, :3]]
    with model.record_statistics() as recorder, torch.no_grad():
        for batch in batches:
            model.module(batch)
        record = recorder.take()
    assert record.num_tokens == 23
    assert record.experts_per_layer == (8, 8)
    assert_record(record, slow_record(model, batches))
    for layer, layer_record in zip(model.layers, record.layers, strict=True):
        assert layer_record.tokens_per_expert.sum() == 23 * layer.top_k
        assert layer_record.gate_sum.sum() == pytest.approx(23, rel=1e-5)


def test_while_streaming_equals_the_full_model(toy):
    full = toy.full()
    model, source = toy.device(toy.units())
    with model.streaming(source), model.record_statistics() as recorder:
        model.module(toy.input_ids)
    assert_record(recorder.take(), slow_record(full, [toy.input_ids]))


def test_absent_experts_count_as_the_router_chose_them(toy):
    """The record is of the router's full choice and its weights, whichever experts are resident. First layer only:
    below, the hidden states are those of the reduced model.
    """
    full = toy.full()
    model, source = toy.device(toy.units())
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, [[1], [1]]), source, TrainScope())
    with model.record_statistics() as recorder, torch.no_grad():
        model.module(toy.input_ids)
    record = recorder.take()
    expected_tokens, expected = slow_record(full, [toy.input_ids])[0]
    assert record.layers[0].num_tokens == expected_tokens
    for name in NAMES:
        np.testing.assert_allclose(getattr(record.layers[0], name), expected[name], rtol=1e-5, atol=1e-7)
    assert sum(model.served_tokens().values()) == 2 * 20  # every token gets the one resident expert


def test_take_resets_and_leaving_the_context_stops(olmoe):
    model = olmoe.full()
    with model.record_statistics() as recorder:
        model.module(olmoe.input_ids)
        assert recorder.take().num_tokens == 20
        assert recorder.take().num_tokens == 0
        model.module(olmoe.input_ids[:1])
    model.module(olmoe.input_ids)
    assert recorder.take().num_tokens == 10
