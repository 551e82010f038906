"""A device with some experts computes the same as the full model where it can, and has only those in memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from edgefed.errors import CheckpointError, ConfigError
from edgefed.expert_records import ExpertPlan
from edgefed.moe.accounting import expert_memory, storage_bytes
from edgefed.moe.gate_probe import gate_scores, router_logits_of
from edgefed.moe.model import MoeModel
from edgefed.moe.units import TrainScope

NOTHING = TrainScope(experts="none", router="none")
TRAINABLE, FROZEN = [[0, 5, 6], [3]], [[2], []]


def some_experts(model: MoeModel) -> ExpertPlan:
    """Four experts in the first layer, one in the second."""
    return ExpertPlan.of(model.experts_per_layer, TRAINABLE, FROZEN)


def resident_ids(plan: ExpertPlan, layer: int) -> set[int]:
    return set(plan.resident(layer).tolist())


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


def logits_of(model: MoeModel, toy) -> torch.Tensor:
    with torch.no_grad():
        return model.module(toy.input_ids).logits


def test_skeleton_has_no_weights_until_they_are_loaded(toy):
    model = MoeModel.skeleton(toy.folder)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    assert storage_bytes(model.module.parameters()) == 0
    names = {name for name, _ in model.module.named_parameters()}
    assert names <= set(model.missing())
    assert not any(buffer.is_meta for buffer in model.module.buffers())


def test_all_experts_resident_is_the_original_model(toy):
    model, source = toy.device(toy.units())
    assert model.missing() == []
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), source, TrainScope())
    assert_close(logits_of(model, toy), toy.logits)


def test_slot_order_does_not_matter(toy):
    model, source = toy.device(toy.units())
    last_first = ExpertPlan.of(model.experts_per_layer, [[7, 6], [5, 4]], [range(6), [0, 1, 2, 3, 6, 7]])
    model.apply_plan(last_first, source, TrainScope())
    assert_close(logits_of(model, toy), toy.logits)


def test_skip_is_the_full_model_with_the_absent_experts_zeroed(toy):
    model, source = toy.device(toy.units())
    plan = some_experts(model)
    model.apply_plan(plan, source, TrainScope(), missing="skip")
    full = toy.full()
    for layer in full.layers:
        for expert in set(range(8)) - resident_ids(plan, layer.ordinal):
            for parameter in layer.parameters:
                if parameter.name.startswith("down_proj"):
                    getattr(layer.experts, parameter.name).data[expert] = 0
    expected = logits_of(full, toy)
    assert not torch.allclose(expected, toy.logits, atol=1e-3), "the absent experts must matter here"
    assert_close(logits_of(model, toy), expected)


def run_block(model: MoeModel, ordinal: int, hidden: torch.Tensor) -> torch.Tensor:
    block = model.module.get_submodule(model.layers[ordinal].block_path)
    with torch.no_grad():
        output = block(hidden)
    return output[0] if isinstance(output, tuple) else output


def test_renormalize_does_not_change_tokens_with_resident_experts(toy):
    """Such tokens get the full model's output, the others that of their best residents with the same gate sum."""
    full = toy.full()
    model, source = toy.device(toy.units())
    plan = some_experts(model)
    model.apply_plan(plan, source, TrainScope())
    hidden = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(5))
    seen: dict[str, torch.Tensor] = {}
    layer = full.layers[0]
    hooks = [
        layer.experts.register_forward_pre_hook(lambda m, args: seen.update(indices=args[1], weights=args[2])),
        layer.router.register_forward_hook(lambda m, args, output: seen.update(logits=router_logits_of(output))),
    ]
    expected = run_block(full, 0, hidden)[0]
    for hook in hooks:
        hook.remove()
    ours = run_block(model, 0, hidden)[0]
    here = torch.isin(seen["indices"], torch.tensor(sorted(resident_ids(plan, 0)))).all(dim=1)
    assert here.any()
    assert not here.all()
    assert_close(ours[here], expected[here])

    scores = gate_scores(seen["logits"], layer.gate_kind)
    order = scores.clone()
    if layer.selection_bias is not None:
        order += dict(full.module.named_buffers())[layer.selection_bias]
    absent = sorted(set(range(8)) - resident_ids(plan, 0))
    order[:, absent] = -1.0
    indices = torch.where(here.unsqueeze(1), seen["indices"], order.topk(layer.top_k, dim=1).indices)
    weights = scores.gather(1, indices)
    weights = weights / weights.sum(dim=1, keepdim=True) * seen["weights"].sum(dim=1, keepdim=True)
    weights = torch.where(here.unsqueeze(1), seen["weights"], weights)
    hook = layer.experts.register_forward_pre_hook(lambda m, args: (args[0], indices, weights.to(args[2].dtype)))
    rerouted = run_block(full, 0, hidden)[0]
    hook.remove()
    assert_close(ours, rerouted)


def test_a_layer_without_any_expert_gives_zero(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, [[1], []]), source, TrainScope())
    hidden = torch.randn(1, 5, 32)
    assert run_block(model, 1, hidden).eq(0).all()
    assert run_block(model, 0, hidden).ne(0).any()


def test_absent_experts_have_no_memory(toy):
    model, source = toy.device(toy.units())
    model.apply_plan(some_experts(model), source, TrainScope())
    per_expert = model.layers[0].bytes_per_expert
    memory = expert_memory(model.layers)
    assert memory.weight_bytes == 5 * per_expert
    assert model.memory_bytes()["experts"] == model.expert_memory_bytes() == 5 * per_expert
    # No tensor of the process-wide module tree has a row for each expert, except routers and their biases.
    stacks = [
        name
        for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers())
        if tensor.ndim == 3 and tensor.shape[0] == 8
    ]
    assert stacks == []


def test_slots_are_views_of_one_contiguous_storage(toy):
    model, source = toy.device(toy.units())
    model.apply_plan(some_experts(model), source, TrainScope())
    bank = model.layers[0].experts.edgefed_bank
    for name, storage in bank.storages().items():
        assert storage.shape[0] == 4
        assert storage.is_contiguous()
        for slot in range(4):
            parameter = bank.parameter(name, slot)
            assert parameter.is_leaf
            assert parameter.data_ptr() == storage[slot].data_ptr()
    assert bank.experts == (0, 5, 6, 2)
    assert bank.num_trainable == 3


def test_casting_the_model_keeps_the_views(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(some_experts(model), source, TrainScope())
    model.module.to(torch.float64)
    bank = model.layers[0].experts.edgefed_bank
    storage = bank.storages()["down_proj"]
    assert storage.dtype == torch.float64
    assert bank.parameter("down_proj", 1).data_ptr() == storage[1].data_ptr()
    assert bank.resident.dtype == torch.int64
    logits_of(model, olmoe)


def test_a_new_plan_drops_the_previous_experts(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(some_experts(model), source, TrainScope())
    old = weakref.ref(model.layers[0].experts.edgefed_bank)
    parameters_before = len(list(model.module.parameters()))
    for _ in range(3):
        model.apply_plan(some_experts(model), source, TrainScope())
    gc.collect()
    assert old() is None
    assert len(list(model.module.parameters())) == parameters_before
    assert model.expert_memory_bytes() == 5 * model.layers[0].bytes_per_expert
    model.drop_experts()
    assert model.expert_memory_bytes() == 0
    with pytest.raises(RuntimeError, match="apply a plan, or stream the experts"):
        logits_of(model, olmoe)


@pytest.mark.parametrize("experts", ["full", "lora"])
@pytest.mark.parametrize("storage", [None, "nf4"])
def test_a_plan_is_freed_at_once_and_not_by_the_garbage_collector(olmoe, experts, storage):
    scope = TrainScope(experts=experts, lora_rank=4)
    model, source = olmoe.device(olmoe.units(scope))
    model.apply_plan(some_experts(model), source, scope, storage=storage)
    banks = [weakref.ref(layer.experts.edgefed_bank) for layer in model.layers]
    gc.collect()
    gc.disable()
    try:
        model.module(olmoe.input_ids).logits.sum().backward()
        model.apply_plan(some_experts(model), source, scope, storage=storage)
        assert [bank() for bank in banks] == [None, None]
    finally:
        gc.enable()


def test_a_full_model_that_gets_a_plan_frees_its_stacks(olmoe):
    model = olmoe.full()
    stack = weakref.ref(model.layers[0].experts.gate_up_proj)
    source = olmoe.device(olmoe.units())[1]
    model.apply_plan(some_experts(model), source, TrainScope())
    gc.collect()
    assert stack() is None


class CountingSource:
    """Return fresh copies and count how many units are alive at once."""

    def __init__(self, source):
        self.source = source
        self.read_keys: list[str] = []
        self.alive: set = set()
        self.most_alive = 0

    def read(self, key):
        self.read_keys.append(key)
        tensors = {name: tensor.clone() for name, tensor in self.source.read(key).items()}
        first = next(iter(tensors.values()))
        self.alive.add(reference := weakref.ref(first, lambda dead: self.alive.discard(dead)))
        self.most_alive = max(self.most_alive, len(self.alive))
        assert reference in self.alive
        return tensors


def test_a_plan_reads_only_its_experts(toy):
    model, source = toy.device(toy.units())
    counting = CountingSource(source)
    plan = some_experts(model)
    model.apply_plan(plan, counting, TrainScope())
    assert sorted(counting.read_keys) == sorted(model.layers[layer].expert_key(e) for layer, e in plan.resident_keys())


def test_streaming_is_the_full_model_with_one_expert_in_memory(toy):
    model, source = toy.device(toy.units())
    counting = CountingSource(source)
    with model.streaming(counting):
        logits = model.module(toy.input_ids).logits
    assert_close(logits, toy.logits)
    assert not logits.requires_grad
    # The next expert is read while the loop still names the one before it.
    assert counting.most_alive <= 2
    assert model.expert_memory_bytes() == 0
    assert not counting.alive


def test_streaming_reads_only_what_the_batch_hits(olmoe):
    model, source = olmoe.device(olmoe.units())
    counting = CountingSource(source)
    with model.streaming(counting):
        model.module(olmoe.input_ids[:1, :1])
    assert len(counting.read_keys) == len(set(counting.read_keys)) == 2 * 2  # layers times top-k


def test_streaming_beside_a_plan_and_after_it(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(some_experts(model), source, TrainScope())
    before = logits_of(model, olmoe)
    with model.streaming(source):
        assert_close(model.module(olmoe.input_ids).logits, olmoe.logits)
    assert torch.equal(logits_of(model, olmoe), before)


def test_streaming_on_a_full_model_restores_it(olmoe):
    model = olmoe.full()
    source = olmoe.device(olmoe.units())[1]
    with model.streaming(source):
        assert_close(model.module(olmoe.input_ids).logits, olmoe.logits)
    assert torch.equal(logits_of(model, olmoe), olmoe.logits)


def test_bfloat16_checkpoint(save_toy, tmp_path):
    toy = save_toy("deepseek_v3", tmp_path, torch.bfloat16)
    units = toy.units()
    model, source = toy.device(units)
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), source, TrainScope())
    assert model.dtype == torch.bfloat16
    assert model.expert_memory_bytes() == 16 * model.layers[0].bytes_per_expert
    # transformers always loads this one in float32
    router = units["model.layers.1.mlp.gate"]
    assert router["e_score_correction_bias"].dtype == torch.float32
    assert router["weight"].dtype == torch.bfloat16
    ours = logits_of(model, toy)
    assert ours.dtype == torch.bfloat16
    # A token whose best experts are a rounding apart may be routed differently by two orders of summation in bfloat16.
    same = torch.isclose(ours, logits_of(toy.full(), toy), rtol=0.05, atol=0.05).all(dim=-1)
    assert same.float().mean() >= 0.9
    assert {t.dtype for _, tensors in model.trained_units() for t in tensors.values()} == {
        torch.bfloat16,
        torch.float32,
    }


def test_generates_with_a_cache(toy):
    """Token by token with a cache is the same as without: routing depends on the token alone."""
    model, source = toy.device(toy.units())
    model.apply_plan(some_experts(model), source, TrainScope())
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    prompt = toy.input_ids[:1, :5]
    cached = model.module.generate(prompt, **options)
    assert cached.shape == (1, 9)
    assert torch.equal(cached, model.module.generate(prompt, use_cache=False, **options))


def test_a_plan_that_fails_leaves_no_expert_resident(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    model.apply_plan(some_experts(model), source, TrainScope())
    removed = units.pop("model.layers.1.mlp.experts.3")
    with pytest.raises(CheckpointError):
        model.apply_plan(some_experts(model), source, TrainScope())
    assert model.plan is None
    assert model.expert_memory_bytes() == 0
    units["model.layers.1.mlp.experts.3"] = removed
    model.apply_plan(some_experts(model), source, TrainScope())
    logits_of(model, olmoe)


def test_refusals(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    with pytest.raises(ConfigError, match="renormalize or skip; found 'drop'"):
        model.apply_plan(some_experts(model), source, TrainScope(), missing="drop")
    with pytest.raises(ConfigError, match=r"\(8, 9\) in the plan and \(8, 8\) in the model"):
        model.apply_plan(ExpertPlan.full((8, 9)), source, TrainScope())
    model.apply_plan(some_experts(model), source, TrainScope())
    with pytest.raises(ConfigError, match="cannot stream"), model.streaming(source, TrainScope(router="none")):
        pass
    del units["model.layers.0.mlp.experts.5"]
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.experts.5' not found"):
        model.apply_plan(some_experts(model), source, TrainScope())
    with pytest.raises(ConfigError, match="training mode of experts must be one of full, lora, none; found 'some'"):
        TrainScope(experts="some")
    with pytest.raises(ConfigError, match="found rank 0"):
        TrainScope(lora_rank=0)
