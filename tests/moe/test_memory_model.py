"""The memory model's exact parts against the tensors of real models."""

from __future__ import annotations

import pytest
import torch

from edgefed.costs.memory import StepSetup, training_memory
from edgefed.expert_records import ExpertPlan
from edgefed.moe.accounting import expert_memory, model_memory, storage_bytes
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.units import TrainScope


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("attention", ["none", "full", "lora"])
def test_static_bytes_are_the_counted_ones(mode, attention, toy):
    """Every family: weights, adapters, buffers, gradients and optimizer state, tensor by tensor."""
    router = "lora" if mode == "lora" else "full"
    scope = TrainScope(experts=mode, router=router, attention=attention, lora_rank=4)
    units = toy.units(scope)
    model, source = toy.device(units)
    shape = shape_from_config(model.config)
    trainable = [[0, 1, 2], *([3] for _ in model.layers[1:])]
    frozen = [[4], *([5, 6] for _ in model.layers[1:])]
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, trainable, frozen), source, scope)
    trained = model.trainable_parameters()
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # every expert has a token
    optimizer.step()
    setup = StepSetup(
        1, 8, "float32", experts=mode, router=router, attention=attention, lora_rank=4
    )  # fmt: skip
    resident = [len(t) + len(f) for t, f in zip(trainable, frozen, strict=True)]
    estimate = training_memory(shape, setup, resident, [len(t) for t in trainable])
    counted, experts = model_memory(model.module, model.layers), expert_memory(model.layers, optimizer)
    counters = sum(b.nbytes for layer in model.layers for b in layer.experts.edgefed_bank.buffers())
    assert estimate.parts["resident experts"] + estimate.parts["trainable experts"] == experts.weight_bytes
    assert estimate.parts["dense"] == counted["dense"] - counters
    states = storage_bytes(t for state in optimizer.state.values() for t in state.values())
    assert estimate.parts["optimizer"] == states
    temporary = estimate.phases["optimizer"] - sum(
        estimate.parts[name] for name in ("dense", "resident experts", "trainable experts", "optimizer", "workspace")
    )
    largest = max(parameter.nbytes for parameter in trained)
    assert temporary - 3 * largest == counted["gradients"]
