"""Experts as tables of neurons: nothing is lost, a slice is an expert, and slices that complement each other add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefed.errors import CheckpointError
from edgefed.expert_records import ExpertPlan, Role
from edgefed.moe.neurons import from_table, slice_tensors, to_table, widen
from edgefed.moe.units import LORA_SUFFIX, MemorySource, TrainScope
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE

NOTHING = TrainScope(experts="none", router="none")


def sliced_plan(model, seed=0, share=0.5, role=Role.TRAINABLE) -> ExpertPlan:
    """Random neurons of every expert, of different widths."""
    rng = np.random.default_rng(seed)
    masks, roles = [], []
    for layer in model.layers:
        mask = rng.random((layer.num_experts, layer.num_neurons)) < share
        mask[0] = False
        mask[1] = True
        masks.append(mask)
        roles.append(np.where(mask.any(axis=1), role, Role.ABSENT).astype(np.int8))
    return ExpertPlan(tuple(roles), neurons=tuple(masks))


def tables(model, units, seed=7):
    """The units as a run with slices stores them."""
    layers = {layer.experts_path: layer for layer in model.layers}
    found = {}
    for key, tensors in units.items():
        layer = layers.get(key.removesuffix(LORA_SUFFIX).rpartition(".")[0])
        found[key] = tensors if layer is None else to_table(layer, key, tensors)
    return found


@pytest.mark.parametrize("experts", ["full", "lora"])
def test_a_table_has_every_number_once_in_rows_of_neurons(toy, experts):
    model = toy.full()
    layer = model.layers[0]
    key = layer.expert_key(2) + (LORA_SUFFIX if experts == "lora" else "")
    tensors = toy.units(TrainScope(experts=experts))[key]
    table = to_table(layer, key, tensors)
    assert table[NEURON_TABLE].shape[0] == layer.num_neurons
    assert sum(t.numel() for t in table.values()) == sum(t.numel() for t in tensors.values())
    back = from_table(layer, key, table, adapter=experts == "lora")
    assert list(back) == list(tensors)
    for name, value in tensors.items():
        assert torch.equal(back[name], value), name
    rows = torch.tensor([0, 3, 7])
    again = from_table(layer, key, {**table, NEURON_TABLE: table[NEURON_TABLE][rows]}, adapter=experts == "lora")
    for name, value in slice_tensors(layer, tensors, rows).items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_widened_slice_has_zeros_for_new_neurons(family, toys):
    from edgefed.moe.model import MoeModel

    model = MoeModel.from_checkpoint(toys(family).folder)
    layer = model.layers[0]
    expert = next(tensors for unit, tensors in model.iter_units() if unit.kind == "expert")
    first = torch.arange(5)
    padded = to_table(layer, "e", {n: widen(layer, n, t, 16) for n, t in slice_tensors(layer, expert, first).items()})
    table = to_table(layer, "e", expert)[NEURON_TABLE]
    assert torch.equal(padded[NEURON_TABLE][:5], table[:5])
    assert not padded[NEURON_TABLE][5:].any()
    assert all(widen(layer, name, tensor, 16) is tensor for name, tensor in expert.items())


def test_a_table_of_another_model_is_refused(olmoe):
    model = olmoe.full()
    with pytest.raises(CheckpointError, match="columns"):
        from_table(model.layers[0], "e", {NEURON_TABLE: torch.zeros(16, 97)}, adapter=False)
    with pytest.raises(CheckpointError, match="several dtypes"):
        to_table(model.layers[0], "e", {"gate_up_proj": torch.zeros(8, 4), "down_proj": torch.zeros(4, 4).half()})


def test_a_sliced_device_computes_the_model_without_the_other_neurons(toy):
    units = toy.units()
    model, source = toy.device(tables(toy.full(), units))
    plan = sliced_plan(model)
    model.apply_plan(plan, source, NOTHING, missing="skip")
    full = toy.full()
    with torch.no_grad():
        for layer, mask in zip(full.layers, plan.neurons, strict=True):
            down = layer.experts.down_proj  # (E, H, I), or (E, I, H)
            keep = torch.from_numpy(mask).to(down.dtype)
            down.mul_(keep[:, :, None] if layer.is_transposed else keep[:, None, :])
            if layer.has_bias:
                layer.experts.down_proj_bias.mul_(keep.amax(dim=1, keepdim=True))  # an absent expert has no bias
        expected, found = full.module(toy.input_ids).logits, model.module(toy.input_ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_gradients_and_uploads_of_slices_are_those_of_the_full_model(toy, kernels, monkeypatch):
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    scope = TrainScope()
    model, source = toy.device(tables(toy.full(), toy.units()))
    plan = sliced_plan(model, share=0.7)
    model.apply_plan(plan, source, scope, missing="skip")
    model.module.train()
    model.module(toy.input_ids, labels=toy.input_ids).loss.backward()
    whole, whole_source = toy.device(toy.units())
    full_width = ExpertPlan(
        tuple(np.full(len(mask), Role.TRAINABLE, np.int8) for mask in plan.neurons),
        neurons=tuple(np.ones_like(mask) for mask in plan.neurons),
    )
    whole.apply_plan(full_width, whole_source, scope)
    with torch.no_grad():
        for layer, mask in zip(whole.layers, plan.neurons, strict=True):
            bank = whole.bank(layer.ordinal)
            for expert in range(layer.num_experts):
                down = bank.parameter("down_proj", expert)
                keep = torch.from_numpy(mask[expert]).to(down.dtype)
                down.mul_(keep[:, None] if layer.is_transposed else keep)
                if layer.has_bias and not mask[expert].any():
                    bank.parameter("down_proj_bias", expert).zero_()
    whole.module.train()
    whole.module(toy.input_ids, labels=toy.input_ids).loss.backward()
    gradients = 0
    for layer in model.layers:
        bank, other = model.bank(layer.ordinal), whole.bank(layer.ordinal)
        for slot, expert in enumerate(bank.experts):
            neurons = torch.from_numpy(plan.neuron_indices(layer.ordinal, expert))
            found = {name: p.grad for name, p in bank.tensors(slot).items()}
            expected = {name: p.grad for name, p in other.tensors(expert).items()}
            if found["down_proj"] is None:
                assert expected["down_proj"] is None
                continue
            for name, value in slice_tensors(layer, expected, neurons).items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
            gradients += 1
    assert gradients
    for unit, tensors in model.trained_units():
        if unit.kind == "expert":
            neurons = plan.neuron_indices(unit.layer, unit.expert)
            assert tensors[NEURON_INDEX].dtype == torch.int32
            assert tensors[NEURON_INDEX].tolist() == neurons.tolist()
            assert torch.equal(tensors[NEURON_TABLE], source.read(unit.key)[NEURON_TABLE][neurons])


def test_memory_of_slices_is_in_proportion_to_their_width(olmoe):
    model, source = olmoe.device(olmoe.units())
    plan = sliced_plan(model, share=0.25)
    model.apply_plan(plan, source, TrainScope(), missing="skip")
    held = sum(int(mask.sum()) for mask in plan.neurons)
    neuron_bytes = model.layers[0].bytes_per_expert / model.layers[0].num_neurons
    assert model.expert_memory_bytes() == held * neuron_bytes


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_frozen_slices_are_quantized(olmoe, storage):
    model, source = olmoe.device(olmoe.units())
    plan = sliced_plan(model, role=Role.FROZEN)
    model.apply_plan(plan, source, TrainScope(), missing="skip")
    with torch.no_grad():
        exact = model.module(olmoe.input_ids).logits
        in_full = model.expert_memory_bytes()
        model.apply_plan(plan, source, TrainScope(), missing="skip", storage=storage)
        rounded = model.module(olmoe.input_ids).logits
    assert 0 < (rounded - exact).abs().max() < 0.2 * exact.abs().max()
    assert model.expert_memory_bytes() < 0.4 * in_full
    assert model.dtype == torch.float32


def test_adapters_of_slices_train_and_are_uploaded_by_neuron(olmoe):
    scope = TrainScope(experts="lora", lora_rank=4)
    model, source = olmoe.device(tables(olmoe.full(), olmoe.units(scope)))
    plan = sliced_plan(model)
    model.apply_plan(plan, source, scope, missing="skip")
    model.module.train()
    model.module(olmoe.input_ids, labels=olmoe.input_ids).loss.backward()
    uploads = {unit.key: tensors for unit, tensors in model.trained_units() if unit.kind == "expert"}
    assert uploads
    for key, tensors in uploads.items():
        whole = source.read(key)
        rows = tensors[NEURON_INDEX].long()
        assert torch.equal(tensors[NEURON_TABLE], whole[NEURON_TABLE][rows])
        assert torch.equal(tensors["gate_up_proj.lora_a"], whole["gate_up_proj.lora_a"])
    assert any(p.grad is not None for p in model.trainable_parameters() if p.shape[0] == 4)


def test_moving_a_sliced_model_keeps_its_values(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(sliced_plan(model), source, TrainScope(), missing="skip")
    with torch.no_grad():
        before = model.module(olmoe.input_ids).logits
        model.module.to(torch.float64)
        after = model.module(olmoe.input_ids).logits
    assert model.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=1e-4, atol=1e-5)


def test_a_slice_is_not_overwritten_by_a_whole_expert(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    model.apply_plan(sliced_plan(model), source, TrainScope(), missing="skip")
    key = model.layers[0].expert_key(1)
    with pytest.raises(CheckpointError, match="slice"):
        model.load_unit(key, units[key])


def test_a_full_model_is_restored_from_tables(olmoe):
    model, source = olmoe.device(tables(olmoe.full(), olmoe.units()))
    model.restore(source)
    with torch.no_grad():
        torch.testing.assert_close(model.module(olmoe.input_ids).logits, olmoe.logits, rtol=1e-5, atol=2e-6)


def test_profiled_energies_are_what_neurons_add(toy):
    from edgefed.training.encoding import TokenBlocks
    from edgefed.training.profiling import ProfilePass, profile_blocks

    full = toy.full()
    expected = [torch.zeros(layer.num_experts, layer.num_neurons, dtype=torch.float64) for layer in full.layers]

    def hook(layer):
        def add(module, args, kwargs):
            x, indices, weights = [*args, *kwargs.values()]
            for token in range(x.shape[0]):
                for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
                    up, down = getattr(module, layer.up_name)[expert], module.down_proj[expert]
                    out = x[token] @ up if layer.is_transposed else up @ x[token]
                    out = out + getattr(module, f"{layer.up_name}_bias")[expert] if layer.has_bias else out
                    h = module._apply_gate(out[None])[0]
                    norms = down.square().sum(1 if layer.is_transposed else 0)
                    expected[layer.ordinal][expert] += (weight * h).square() * norms

        return add

    hooks = [layer.experts.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in full.layers]
    with torch.no_grad():
        full.module(toy.input_ids)
    for each in hooks:
        each.remove()
    blocks = TokenBlocks(toy.input_ids, toy.input_ids)
    for residency in ("expert", "layer"):
        model, source = toy.device(toy.units())
        profile = profile_blocks(
            model, blocks, MemorySource(toy.units()), ProfilePass(residency, None, 1, 1), neurons=True
        )
        for layer, energy in zip(profile.layers, expected, strict=True):
            np.testing.assert_allclose(layer.neuron_energy, energy.numpy(), rtol=2e-3, atol=1e-7)
