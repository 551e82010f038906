"""Quantized and merged experts compute the same as their unpacked weights, in less memory."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref

import numpy as np
import pytest
import torch

from edgefed.costs.memory import StepSetup, training_memory
from edgefed.errors import CheckpointError, ConfigError
from edgefed.expert_records import ExpertPlan, MergedGroup, Role
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe.accounting import expert_memory, storage_bytes
from edgefed.moe.merged_cache import merge_experts
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.units import MemorySource, TrainScope

STORAGES = ("nf4", "int8")
TRAINABLE, FROZEN = [[0, 5, 6], [3]], [[2], [1, 4]]


def some_experts(model: MoeModel) -> ExpertPlan:
    return ExpertPlan.of(model.experts_per_layer, TRAINABLE, FROZEN)


def unpacked(model: MoeModel, units: dict, plan: ExpertPlan, scope: TrainScope, storage: str) -> dict:
    """Return the units with each frozen matrix replaced by the dequantized values of its packed form."""
    found = {key: dict(tensors) for key, tensors in units.items()}
    for layer in model.layers:
        for expert in plan.resident(layer.ordinal).tolist():
            if scope.experts == "full" and expert in plan.trainable(layer.ordinal):
                continue
            for parameter in layer.matrices:
                tensors = found[layer.expert_key(expert)]
                packed = quantize_experts(tensors[parameter.name], storage)
                tensors[parameter.name] = dequantize_experts(packed, backend="reference")
    return found


def train_once(model: MoeModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits, computed with gradients enabled (int8 products then do not round x), and gradients by name."""
    output = model.module(input_ids=input_ids, labels=input_ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_packed_bank_computes_and_trains_as_its_unpacked_weights(toy, storage, mode):
    scope = TrainScope(experts=mode, lora_rank=2)
    units = toy.units(scope)
    generator = torch.Generator().manual_seed(1)
    for key, tensors in units.items():
        if key.endswith(":lora"):
            for value in tensors.values():  # an adapter that is zero would hide much
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    model, source = toy.device(units)
    plan = some_experts(model)
    model.apply_plan(plan, source, scope, storage=storage)
    dense, _ = toy.device(units)
    dense.apply_plan(plan, MemorySource(unpacked(model, units, plan, scope, storage)), scope)
    ours, our_gradients = train_once(model, toy.input_ids)
    expected, gradients = train_once(dense, toy.input_ids)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    assert len(gradients) > 4
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    untouched, _ = toy.device(units)
    untouched.apply_plan(plan, source, scope)
    assert not torch.allclose(ours, train_once(untouched, toy.input_ids)[0], atol=1e-4), (
        "quantization must change the result"
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("mode", ["full", "lora", "none"])
def test_packed_bytes_are_those_of_the_memory_model(toy, storage, mode):
    scope = TrainScope(experts=mode, router="none", lora_rank=2)
    model, source = toy.device(toy.units(scope))
    plan = some_experts(model)
    plain = _weight_bytes(model, plan, source, scope, None)
    found = _weight_bytes(model, plan, source, scope, storage)
    assert model.storage == storage
    assert found < plain
    setup = StepSetup(1, 8, "float32", expert_storage=storage, experts=mode, router="none", lora_rank=2)
    layers = range(plan.num_layers)
    resident, trainable = [plan.num_slots(i) for i in layers], [len(plan.trainable(i)) for i in layers]
    parts = training_memory(shape_from_config(model.config), setup, resident, trainable).parts
    assert parts["resident experts"] + parts["trainable experts"] == found
    matrices = sum(p.numel() for layer in model.layers for p in layer.experts.edgefed_bank.parameters() if p.ndim == 2)
    trained = sum(p.numel() for p in model.trainable_parameters() if p.ndim == 2)
    if mode != "lora":  # only trainable matrices are unpacked
        assert matrices == trained
    # The module's parameters and buffers include each packed tensor once.
    everything = storage_bytes((*model.module.parameters(), *model.module.buffers()))
    assert model.memory_bytes()["dense"] + found == everything


def _weight_bytes(model, plan, source, scope, storage):
    model.apply_plan(plan, source, scope, storage=storage)
    return expert_memory(model.layers).weight_bytes


def test_packed_slots_are_one_stack_per_matrix(toy):
    model, source = toy.device(toy.units())
    model.apply_plan(some_experts(model), source, TrainScope(), storage="nf4")
    layer = model.layers[1]
    bank = layer.experts.edgefed_bank
    assert set(bank.stacks()) == {p.name for p in layer.matrices}
    for name, stack in bank.stacks().items():
        assert len(stack) == 2
        assert stack.packed.is_contiguous()
        assert stack.absmax.is_contiguous()
        assert bank.storages()[name].shape[0] == 1
        for slot in (1, 2):
            assert bank.packed(slot)[name].packed.data_ptr() == stack.packed[slot - 1].data_ptr()
        with pytest.raises(KeyError):
            bank.parameter(name, 1)
    assert bank.packed(0) == {}
    assert set(bank.tensors(0)) == {p.name for p in layer.parameters}


@contextlib.contextmanager
def saved_for_backward(seen: list):
    def pack(tensor):
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_frozen_packed_layer_saves_tokens_indices_and_packed_weights(olmoe, storage, kernels, monkeypatch):
    """No unpacked matrix is saved for the backward pass, and the saved bytes do not grow with the resident experts."""
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    model, source = olmoe.device(olmoe.units())
    per_layer = model.experts_per_layer
    tokens = 6
    hidden = torch.randn(tokens, 32, requires_grad=True)
    for frozen in (4, 8):
        plan = ExpertPlan.of(per_layer, [[], []], [range(frozen), range(8)])
        model.apply_plan(plan, source, TrainScope(experts="none", router="none"), storage=storage)
        layer = model.layers[0]
        bank = layer.experts.edgefed_bank
        indices = torch.arange(2).expand(tokens, 2)
        weights = torch.rand(tokens, 2, requires_grad=True)
        runtime = layer.experts.edgefed_runtime
        runtime.missing = "skip"
        seen: list[torch.Tensor] = []
        with saved_for_backward(seen):
            out = runtime.forward(hidden, indices, weights)
        packed = {t.untyped_storage().data_ptr() for t in bank.weights()}
        others = [t for t in seen if t.untyped_storage().data_ptr() not in packed]
        per_pair = 32 + 16 * 2 * 3  # a token, and a few arrays as wide as the expert
        assert sum(t.numel() for t in others) <= tokens * 2 * (4 * per_pair)
        assert not any(tuple(t.shape) in [p.shape for p in layer.matrices] for t in others)
        out.sum().backward()
        assert hidden.grad is not None
        assert weights.grad is not None


def test_new_values_are_quantized_again(toy):
    units = toy.units()
    model, source = toy.device(units)
    model.apply_plan(some_experts(model), source, TrainScope(), storage="nf4")
    layer = model.layers[0]
    bank = layer.experts.edgefed_bank
    key = layer.expert_key(2)
    other = {name: value + 0.5 for name, value in units[key].items()}
    model.load_unit(key, other)
    for name, matrix in bank.packed(3).items():
        expected = quantize_experts(other[name], "nf4")
        assert torch.equal(matrix.packed, expected.packed)
        assert torch.equal(matrix.absmax, expected.absmax)
    for name, parameter in bank.tensors(3).items():
        assert torch.equal(parameter, other[name])
    with pytest.raises(CheckpointError, match="bfloat16"):
        model.load_unit(key, {name: value.to(torch.bfloat16) for name, value in other.items()})
    with pytest.raises(CheckpointError, match="must have the tensors"):
        model.load_unit(key, {})
    model.load_unit(layer.expert_key(5), other_trainable := {n: v + 1 for n, v in units[layer.expert_key(5)].items()})
    assert all(torch.equal(p, other_trainable[name]) for name, p in bank.tensors(1).items())


def test_slots_are_collected_once_and_again_after_a_cast(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(some_experts(model), source, TrainScope(), storage="nf4")
    bank = model.layers[0].experts.edgefed_bank
    last = len(bank) - 1
    assert all(bank.slots()[slot] is bank.slots()[slot] for slot in (0, last))
    scheduled = bank.slots(scheduled=())[0]
    assert not scheduled.up.requires_grad
    assert bank.slots()[0].up.requires_grad
    model.module.to(torch.bfloat16)
    assert {bank.slots()[slot].up.dtype for slot in (0, last)} == {torch.bfloat16}


def test_moving_and_casting_do_not_change_packed_tensors(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(some_experts(model), source, TrainScope(), storage="nf4")
    bank = model.layers[0].experts.edgefed_bank
    before = {name: (stack.packed.clone(), stack.absmax.clone()) for name, stack in bank.stacks().items()}
    model.module.to(torch.bfloat16)
    assert bank.dtype == model.dtype == torch.bfloat16
    for name, stack in bank.stacks().items():
        assert torch.equal(stack.packed, before[name][0])
        assert torch.equal(stack.absmax, before[name][1])
        assert stack.dtype == torch.bfloat16
        assert bank._buffers[f"{name}_packed"] is stack.packed
    with torch.no_grad():
        assert model.module(olmoe.input_ids).logits.isfinite().all()
    assert model.memory_bytes()["experts"] == storage_bytes(bank.weights()) + storage_bytes(
        model.layers[1].experts.edgefed_bank.weights()
    )


def test_updates_have_trained_tensors_and_no_unpacked_ones(toy):
    for mode, kinds in (("full", {"expert"}), ("lora", {"expert"})):
        scope = TrainScope(experts=mode, router="none", lora_rank=2)
        model, source = toy.device(toy.units(scope))
        model.apply_plan(some_experts(model), source, scope, storage="nf4")
        sent = list(model.trained_units())
        assert {spec.kind for spec, _ in sent} == kinds
        assert len(sent) == 4
        for spec, tensors in sent:
            assert spec.key.endswith(":lora") == (mode == "lora")
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
            if mode == "full":
                assert set(tensors) == {p.name for p in model.layers[0].parameters}
        train_once(model, toy.input_ids)
        assert model.experts_with_gradient()


def test_the_full_model_comes_back_from_a_packed_plan(toy):
    model, source = toy.device(toy.units())
    model.apply_plan(some_experts(model), source, TrainScope(), storage="int8")
    model.restore(source)
    assert model.storage is None
    with torch.no_grad():
        torch.testing.assert_close(model.module(toy.input_ids).logits, toy.logits, rtol=1e-5, atol=2e-6)


def test_weights_that_cannot_be_packed_are_refused(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    with pytest.raises(ConfigError, match="invalid storage format of experts 'fp4': must be int8, nf4"):
        model.apply_plan(some_experts(model), source, TrainScope(), storage="fp4")
    key = "model.layers.0.mlp.experts.2"
    units[key]["down_proj"][0, 0] = math.inf
    with pytest.raises(CheckpointError, match=r"'down_proj' of '.*experts.2' cannot be stored as nf4"):
        model.apply_plan(some_experts(model), source, TrainScope(), storage="nf4")
    assert model.plan is None
    assert model.storage is None
    assert model.expert_memory_bytes() == 0
    units[key]["down_proj"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match="float16"):
        model.apply_plan(some_experts(model), source, TrainScope(), storage="int8")
    wide = {k: {n: t.double() if "experts" in k else t for n, t in tensors.items()} for k, tensors in units.items()}
    with pytest.raises(ConfigError, match="experts in float64 cannot be stored as nf4"):
        model.apply_plan(some_experts(model), MemorySource(wide), TrainScope(), storage="nf4")


# --- merged experts -----------------------------------------------------------------------------------------------


class CountingSource:
    """Return fresh copies and count how many are alive at once."""

    def __init__(self, source):
        self.source, self.alive, self.most_alive = source, set(), 0
        self.read_keys: list[str] = []

    def read(self, key):
        self.read_keys.append(key)
        tensors = {name: tensor.clone() for name, tensor in self.source.read(key).items()}
        first = next(iter(tensors.values()))
        self.alive.add(weakref.ref(first, lambda dead: self.alive.discard(dead)))
        self.most_alive = max(self.most_alive, len(self.alive))
        return tensors


def merged_plan(absent: bool) -> ExpertPlan:
    """Layer 0: trainable 0, 5; frozen 2; merged {1, 4, 7} and {3, 6}, or 6 absent. Layer 1: one group of all but 3."""
    first = np.full(8, Role.MERGED, dtype=np.int8)
    first[[0, 5]], first[2] = Role.TRAINABLE, Role.FROZEN
    groups = [MergedGroup((1, 4, 7), (0.5, 0.125, 0.375)), MergedGroup((3, 6), (0.25, 0.75))]
    if absent:
        first[6], groups[1] = Role.ABSENT, MergedGroup((3,), (1.0,))
    second = np.full(8, Role.MERGED, dtype=np.int8)
    second[3] = Role.TRAINABLE
    others = tuple(expert for expert in range(8) if expert != 3)
    return ExpertPlan((first, second), (tuple(groups), (MergedGroup(others, (1 / 7,) * 7),)))


def with_members_replaced(model, units: dict, plan: ExpertPlan, scope: TrainScope) -> dict:
    """Give every member of a group the weights of the group and an adapter that changes nothing."""
    found = {key: {name: t.clone() for name, t in tensors.items()} for key, tensors in units.items()}
    for layer in model.layers:
        for group in plan.groups(layer.ordinal):
            keys = [layer.expert_key(expert) for expert in group.experts]
            for parameter in layer.parameters:
                total = 0.0
                for key, weight in zip(keys, group.weights, strict=True):
                    value = units[key][parameter.name].double()
                    if scope.experts == "lora" and len(parameter.shape) == 2:
                        adapter = units[f"{key}:lora"]
                        a, b = (adapter[f"{parameter.name}.{part}"].double() for part in ("lora_a", "lora_b"))
                        update = scope.lora_scale * b @ a
                        value = value + (update.T if layer.is_transposed else update)
                    total = total + weight * value
                for key in keys:
                    found[key][parameter.name] = total.float()
                    if scope.experts == "lora":
                        for value in found[f"{key}:lora"].values():
                            value.zero_()
    return found


def as_frozen(plan: ExpertPlan) -> ExpertPlan:
    return ExpertPlan(tuple(np.where(r == Role.MERGED, Role.FROZEN, r).astype(np.int8) for r in plan.roles))


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_merged_expert_is_its_members_with_one_weight(toy, mode, absent):
    """The same as resident members with the merged weights: gate weights add up, and rerouting is unchanged."""
    scope = TrainScope(experts=mode, lora_rank=2)
    units = toy.units(scope)
    generator = torch.Generator().manual_seed(2)
    for key, tensors in units.items():
        if key.endswith(":lora"):
            for value in tensors.values():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    model, source = toy.device(units)
    plan = merged_plan(absent)
    model.apply_plan(plan, source, scope)
    dense, _ = toy.device(units)
    dense.apply_plan(as_frozen(plan), MemorySource(with_members_replaced(model, units, plan, scope)), scope)
    ours, our_gradients = train_once(model, toy.input_ids)
    expected, gradients = train_once(dense, toy.input_ids)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    served, pairs = model.served_tokens(), toy.input_ids.numel() * model.layers[0].top_k
    assert set(served) == {(0, 0), (0, 5), (0, 2), (0, 1), (0, 3), (1, 3), (1, 0)}
    assert sum(count for (layer, _), count in served.items() if layer == 0) == pairs
    bank = model.layers[0].experts.edgefed_bank
    assert len(bank) == plan.num_slots(0) == 5
    assert bank.is_complete == (not absent)
    assert {spec.expert for spec, _ in model.trained_units() if spec.kind == "expert"} == {0, 5, 3}


@pytest.mark.parametrize("storage", STORAGES)
def test_merged_experts_are_packed_too(olmoe, storage):
    model, source = olmoe.device(olmoe.units())
    plan = merged_plan(False)
    model.apply_plan(plan, source, TrainScope(), storage=storage)
    bank = model.layers[0].experts.edgefed_bank
    group = plan.groups(0)[0]
    layer = model.layers[0]
    merged = merge_experts(lambda expert: source.read(layer.expert_key(expert)), group)
    for name, matrix in bank.packed(3).items():
        assert torch.equal(matrix.packed, quantize_experts(merged[name], storage).packed)
    setup = StepSetup(1, 8, "float32", expert_storage=storage, router="none")
    resident, trainable = [plan.num_slots(i) for i in range(2)], [len(plan.trainable(i)) for i in range(2)]
    parts = training_memory(shape_from_config(model.config), setup, resident, trainable).parts
    assert parts["resident experts"] + parts["trainable experts"] == expert_memory(model.layers).weight_bytes


def test_members_are_read_once_and_one_at_a_time(olmoe):
    model, source = olmoe.device(olmoe.units())
    counting = CountingSource(source)
    plan = merged_plan(True)
    model.apply_plan(plan, counting, TrainScope(), storage="nf4")
    assert sorted(counting.read_keys) == sorted(model.layers[i].expert_key(e) for i, e in plan.resident_keys())
    gc.collect()
    assert counting.most_alive <= 2
    assert not counting.alive


def test_merging_sums_in_float32_and_lets_members_be_aligned():
    values = {0: torch.full((2, 3), 1.0), 1: torch.full((2, 3), 2**-9), 2: torch.full((2, 3), 2**-9)}
    read = lambda expert: {"w": values[expert].to(torch.bfloat16)}  # noqa: E731
    found = merge_experts(read, MergedGroup((0, 1, 2), (0.5, 0.25, 0.25)))["w"]
    exact = torch.tensor(0.5 + 2**-10, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found == exact).all()
    calls = []

    def align(reference, member):
        calls.append((float(reference["w"][0, 0]), float(member["w"][0, 0])))
        return {"w": reference["w"]}

    aligned = merge_experts(read, MergedGroup((0, 1, 2), (0.25, 0.75, 0.0)), align)["w"]
    assert calls == [(2**-9, 1.0)], "the heaviest member is the reference; members of weight 0 are not read"
    assert torch.equal(aligned, values[1].to(torch.bfloat16))


def test_a_member_cannot_be_loaded_on_its_own(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    model.apply_plan(merged_plan(True), source, TrainScope())
    for expert in (1, 4):
        key = f"model.layers.0.mlp.experts.{expert}"
        with pytest.raises(CheckpointError, match="only as part of a merged expert"):
            model.load_unit(key, units[key])
    with pytest.raises(CheckpointError, match="is not resident on this device$"):
        model.load_unit("model.layers.0.mlp.experts.6", units["model.layers.0.mlp.experts.6"])
