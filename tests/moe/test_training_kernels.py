"""Planned models train with the native kernels where those can run: predicted, and with the reference's results."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from edgefed.expert_records import ExpertPlan
from edgefed.kernels import dispatch, masked_experts, native_experts
from edgefed.moe import layer_runtime
from edgefed.moe.units import TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.savings import checkpointing, make_optimizer
from edgefed.training.steps import step_setup, take_step

NATIVE = pytest.mark.skipif(dispatch.why_not_native() is not None, reason="needs the native library")
FULL = TrainScope()
LORA = TrainScope(experts="lora", router="lora", lora_rank=2)
TRAINABLE, FROZEN = [[0, 5, 6], [3, 4]], [[2], [7]]


@pytest.fixture(autouse=True)
def without_requested_kernels(monkeypatch):
    monkeypatch.delenv("EDGEFED_KERNELS", raising=False)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the backends that compute experts from here on, call by call."""
    calls: list[str] = []

    def count(owner, function: str, name: str) -> None:
        original = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *a, **k: (calls.append(name), original(*a, **k))[1])

    count(native_experts, "masked_experts", "native")
    count(masked_experts, "masked_experts_reference", "reference")
    return calls


def planned(toy, scope=FULL, dtype=torch.float32, storage=None):
    units = toy.units(scope)
    model, source = toy.device(units)
    model.module.to(dtype)
    plan = ExpertPlan.of(model.experts_per_layer, TRAINABLE, FROZEN)
    cast = {
        key: {name: t.to(dtype) if ".lora" not in name else t for name, t in tensors.items()}
        for key, tensors in units.items()
    }
    model.apply_plan(plan, type(source)(cast), scope, storage=storage)
    model.module.train()
    return model


def gradients(model, toy, again=False, schedule=None) -> dict[str, torch.Tensor | None]:
    model.set_schedule(schedule)
    with checkpointing(model.module, again):
        model.module(input_ids=toy.input_ids, labels=toy.input_ids, use_cache=False).loss.backward()
    found = {name: parameter.grad for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    model.module.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-7) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, g in found.items() if g is None] == [name for name, g in expected.items() if g is None]
    for name, gradient in found.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol)


# --- the choice ---------------------------------------------------------------------------------------------------


@NATIVE
def test_the_predicted_kernels_run(olmoe, ran, monkeypatch):
    model = planned(olmoe)
    for requested, expected in ((None, "native"), ("native", "native"), ("reference", "reference")):
        if requested:
            monkeypatch.setenv("EDGEFED_KERNELS", requested)
        assert step_setup(model, TrainingConfig(local_steps=1)).kernels == model.training_kernels() == expected
        ran.clear()
        gradients(model, olmoe)
        assert set(ran) == {expected}


@NATIVE
def test_a_dtype_without_a_kernel_uses_the_reference_and_is_logged(olmoe, ran, caplog):
    model = planned(olmoe, dtype=torch.float64)
    with dispatch.temporary_backends(), caplog.at_level(logging.INFO, "edgefed.kernels.dispatch"):
        assert step_setup(model, TrainingConfig(local_steps=1)).kernels == "reference"
    assert "no kernel for torch.float64" in caplog.text
    gradients(model, olmoe)
    assert set(ran) == {"reference"}


@NATIVE
def test_one_layer_with_an_operation_on_outputs_makes_all_layers_use_the_reference(olmoe):
    layers = olmoe.full().layers
    assert layer_runtime.training_kernels(layers, torch.float32, "cpu") == "native"
    last = dataclasses.replace(layers[-1], has_post_expert_norm=True)
    last.experts.post_expert_norm = torch.nn.Identity()
    assert layer_runtime.training_kernels((*layers[:-1], last), torch.float32, "cpu") == "reference"


def test_without_the_native_library_the_plan_uses_the_reference(olmoe, ran):
    model = planned(olmoe)
    with dispatch.temporary_backends():
        for operation in dispatch.OPERATIONS:
            dispatch.register_backend(operation, "native", "cpu", lambda device: "not built")
        assert step_setup(model, TrainingConfig(local_steps=1)).kernels == "reference"
        gradients(model, olmoe)
    assert set(ran) == {"reference"}


# --- the same training --------------------------------------------------------------------------------------------


@NATIVE
@pytest.mark.parametrize("scope", [FULL, LORA], ids=["full", "lora"])
def test_gradients_are_those_of_the_reference(toy, scope, ran, monkeypatch):
    """Every family; trainable, frozen and absent experts, and one that the schedule leaves out of a batch."""
    model = planned(toy, scope)
    schedules = (None, lambda layer, record: TRAINABLE[layer][:1])
    for again in (False, True):
        for schedule in schedules:
            ran.clear()
            found = gradients(model, toy, again, schedule)
            assert set(ran) == {"native"}
            with monkeypatch.context() as context:
                context.setenv("EDGEFED_KERNELS", "reference")
                expected = gradients(model, toy, again, schedule)
            assert_same(found, expected)
            assert any(g is not None and g.abs().sum() > 0 for g in found.values())


@NATIVE
def test_gradients_in_bfloat16_are_as_exact_as_those_of_the_reference(olmoe, monkeypatch):
    found = gradients(planned(olmoe, dtype=torch.bfloat16), olmoe)
    monkeypatch.setenv("EDGEFED_KERNELS", "reference")
    rounded = gradients(planned(olmoe, dtype=torch.bfloat16), olmoe)
    exact = gradients(planned(olmoe), olmoe)

    def error(some: dict) -> float:
        off = sum(float((some[n].float() - g).square().sum()) for n, g in exact.items() if g is not None and n in some)
        return (off / sum(float(g.square().sum()) for g in exact.values() if g is not None)) ** 0.5

    assert error(found) < 1.2 * error(rounded) < 0.2


@NATIVE
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantized_frozen_experts_give_the_gradients_of_the_reference(olmoe, storage, ran, monkeypatch):
    for scope in (FULL, LORA):
        model = planned(olmoe, scope, storage=storage)
        ran.clear()
        found = gradients(model, olmoe)
        assert set(ran) == {"native"}, "trainable experts use no rounded activations and do not need the reference"
        with monkeypatch.context() as context:
            context.setenv("EDGEFED_KERNELS", "reference")
            assert_same(found, gradients(model, olmoe))


@NATIVE
def test_an_expert_without_a_token_gets_no_gradient(olmoe, ran):
    model = planned(olmoe)
    model.module(input_ids=olmoe.input_ids[:1, :1]).logits.sum().backward()
    served = model.served_tokens()
    assert set(ran) == {"native"}
    for layer in model.layers:
        bank = layer.experts.edgefed_bank
        for slot in range(bank.num_trainable):
            hit = served[layer.ordinal, bank.experts[slot]] > 0
            assert all((tensor.grad is not None) == hit for tensor in bank.tensors(slot).values())
    assert not all(served[layer, expert] for layer, experts in enumerate(TRAINABLE) for expert in experts)


@NATIVE
@pytest.mark.parametrize("again", [False, True], ids=["saved", "checkpointing"])
def test_two_runs_are_bitwise_the_same(olmoe, again, ran):
    def weights_after_three_steps() -> list[torch.Tensor]:
        model = planned(olmoe, dtype=torch.bfloat16)
        setup = step_setup(model, TrainingConfig(local_steps=3), checkpointing=again)
        parameters = list(model.trainable_parameters())
        optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-2, weight_decay=0.1)
        for _ in range(3):
            take_step(
                model, optimizer, parameters, olmoe.input_ids, olmoe.input_ids, setup=setup, max_grad_norm=1.0
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
        return [parameter.detach().clone() for parameter in parameters]

    before = [p.detach().clone() for p in planned(olmoe, dtype=torch.bfloat16).trainable_parameters()]
    first, second = weights_after_three_steps(), weights_after_three_steps()
    assert set(ran) == {"native"}
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(first, before, strict=True))
