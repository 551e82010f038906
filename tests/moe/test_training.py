"""Training on a device changes exactly the parameters that plan and scope select."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from edgefed.expert_records import ExpertPlan
from edgefed.moe.accounting import expert_memory
from edgefed.moe.units import TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.steps import train_scope

TRAINABLE, FROZEN = [[0, 5, 6], [3, 4]], [[2], [7]]


@pytest.fixture
def device(toy):
    """(model, units) of a client with five resident experts of each family, all experts and routers in full."""
    return make_device(toy, TrainScope())


def make_device(toy, scope, trainable=TRAINABLE, frozen=FROZEN):
    units = toy.units(scope)
    model, source = toy.device(units)
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, trainable, frozen), source, scope)
    model.module.train()
    return model, units


def loss_of(model, toy):
    return model.module(input_ids=toy.input_ids, labels=toy.input_ids, use_cache=False).loss


def train(model, toy, steps=3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.trainable_parameters(), lr=0.05, weight_decay=0.1)
    losses, stepped = [], set()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, toy)
        loss.backward()
        stepped |= set(model.experts_with_gradient())
        optimizer.step()
        losses.append(loss.item())
    return losses, stepped, optimizer


def all_values(model):
    """Copy every tensor of the base model that is on the device: {(unit key, tensor name): values}."""
    values, copied = {}, set()
    for full_name, tensor in model.module.state_dict().items():
        if "edgefed_bank" in full_name or tensor.data_ptr() in copied:  # a tied tensor has two names
            continue
        copied.add(tensor.data_ptr())
        owner, _, parametrized = full_name.partition(".parametrizations.")
        if parametrized:  # by an adapter, which is not part of the base model
            name, _, part = parametrized.partition(".")
            if part != "original":
                continue
            full_name = f"{owner}.{name}"
        router = next(
            (layer.router_path for layer in model.layers if full_name.startswith(f"{layer.router_path}.")), None
        )
        key = (full_name, "value") if router is None else (router, full_name.removeprefix(f"{router}."))
        values[key] = tensor.clone()
    for layer in model.layers:
        bank = layer.experts.edgefed_bank
        for slot, expert in enumerate(bank.experts):
            for name, tensor in bank.tensors(slot).items():
                values[layer.expert_key(expert), name] = tensor.detach().clone()
    return values


def test_only_trainable_experts_and_routers_change(toy, device):
    model, _ = device
    before = all_values(model)
    losses, stepped, _ = train(model, toy)
    changed = {key for (key, name), value in all_values(model).items() if not torch.equal(value, before[key, name])}
    assert losses[-1] < losses[0]
    trainable = {(layer, expert) for layer, experts in enumerate(TRAINABLE) for expert in experts}
    assert stepped <= trainable
    assert stepped
    expected = {model.layers[layer].expert_key(expert) for layer, expert in stepped}
    assert changed == expected | {layer.router_path for layer in model.layers}


def test_correction_biases_do_not_train(toys):
    for family in ("deepseek_v3", "ernie4_5_moe"):
        model, units = make_device(toys(family), TrainScope())
        train(model, toys(family))
        for spec, tensors in model.trained_units():
            for name, tensor in tensors.items():
                if "correction_bias" in name:
                    assert torch.equal(tensor, units[spec.key][name])


def test_an_expert_without_tokens_has_no_gradient_and_no_optimizer_state(olmoe):
    """One token hits two experts a layer; the other trainable experts stay without gradient and state."""
    model, _ = make_device(olmoe, TrainScope(), trainable=[range(8), range(8)], frozen=None)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), weight_decay=0.1)
    before = all_values(model)
    model.module(input_ids=olmoe.input_ids[:1, :1]).logits.sum().backward()
    hit = model.experts_with_gradient()
    assert len(hit) == 4
    assert {layer for layer, _ in hit} == {0, 1}
    optimizer.step()
    memory = expert_memory(model.layers, optimizer)
    per_expert = model.layers[0].bytes_per_expert
    assert memory.weight_bytes == 16 * per_expert
    assert memory.gradient_bytes == 4 * per_expert
    steps = 4 * 2 * 4  # AdamW's step counter: experts, tensors, bytes
    assert memory.optimizer_bytes == 4 * 2 * per_expert + steps
    assert memory.total_bytes == model.expert_memory_bytes(optimizer)
    changed = {key for (key, name), value in all_values(model).items() if not torch.equal(value, before[key, name])}
    assert changed == {model.layers[layer].expert_key(e) for layer, e in hit} | {x.router_path for x in model.layers}


def test_gradients_equal_those_of_the_full_model(toy):
    """With all experts resident, transformers' own backward pass gives the same gradients."""
    model, _ = make_device(toy, TrainScope(), trainable=[range(8), range(8)], frozen=None)
    model.module.eval()
    loss_of(model, toy).backward()
    full = toy.full()
    full.module.set_experts_implementation("eager")
    loss_of(full, toy).backward()
    for ours, theirs in zip(model.layers, full.layers, strict=True):
        torch.testing.assert_close(ours.router.weight.grad, theirs.router.weight.grad, rtol=1e-4, atol=1e-7)
        bank = ours.experts.edgefed_bank
        for parameter in ours.parameters:
            expected = getattr(theirs.experts, parameter.name).grad
            for slot, expert in enumerate(bank.experts):
                grad = bank.parameter(parameter.name, slot).grad
                grad = torch.zeros(parameter.shape) if grad is None else grad
                torch.testing.assert_close(grad, expected[expert], rtol=1e-4, atol=1e-7)


def test_renormalized_routing_trains_the_router(toy, device):
    """A token whose experts are all absent still moves the router through the experts that replace them."""
    model, _ = device
    loss_of(model, toy).backward()
    for layer in model.layers:
        weight = next(p for p in layer.router.parameters() if p.ndim == 2)
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_experts_outside_the_schedule_do_not_change(toy, device):
    model, _ = device
    before = all_values(model)
    asked = []

    def schedule(layer, record):
        asked.append((layer, record.num_tokens, record.tokens_per_expert.sum()))
        return [5] if layer == 0 else []

    model.set_schedule(schedule)
    _, stepped, optimizer = train(model, toy, steps=2)
    tokens, top_k = toy.input_ids.numel(), model.layers[0].top_k
    assert asked == [(0, tokens, tokens * top_k), (1, tokens, tokens * top_k)] * 2
    changed = {key for (key, name), value in all_values(model).items() if not torch.equal(value, before[key, name])}
    assert stepped == {(0, 5)}
    assert changed == {model.layers[0].expert_key(5)} | {layer.router_path for layer in model.layers}
    assert expert_memory(model.layers, optimizer).optimizer_bytes < 3 * model.layers[0].bytes_per_expert
    trained = model.trained_tokens()
    assert trained[0, 5] == model.served_tokens()[0, 5] > 0
    assert sum(trained.values()) == trained[0, 5]


def test_schedule_is_not_called_outside_training(olmoe):
    model, _ = make_device(olmoe, TrainScope())
    model.set_schedule(lambda layer, record: pytest.fail("asked"))
    with torch.no_grad():
        model.module(olmoe.input_ids)
    model.module.eval()
    model.module(olmoe.input_ids)
    model.set_schedule(None)
    model.module.train()
    loss_of(model, olmoe).backward()
    assert {layer for layer, _ in model.experts_with_gradient()} == {0, 1}


def test_token_counts(olmoe):
    model, _ = make_device(olmoe, TrainScope(), trainable=[range(8), range(7)], frozen=[[], [7]])
    model.module.eval()
    model.module(olmoe.input_ids)
    assert sum(model.served_tokens().values()) == 2 * 2 * 20
    assert not any(model.trained_tokens().values())
    model.module.train()
    loss_of(model, olmoe).backward()
    served, trained = model.served_tokens(), model.trained_tokens()
    assert trained[1, 7] == 0 < served[1, 7]
    assert all(served[key] == 2 * trained[key] for key in trained if key != (1, 7))
    model.apply_plan(model.plan, olmoe.device(olmoe.units())[1], TrainScope())
    assert not any(model.served_tokens().values())


def test_activation_checkpointing_counts_a_batch_once_and_gives_the_same_gradients(olmoe):
    results = []
    for checkpointing in (False, True):
        model, _ = make_device(olmoe, TrainScope())
        if checkpointing:
            for layer in model.module.model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        asked = []
        model.set_schedule(lambda layer, record, asked=asked: asked.append(layer) or TRAINABLE[layer][:1])
        with model.record_statistics() as recorder:
            loss_of(model, olmoe).backward()
        gradients = [p.grad.clone() for p in model.trainable_parameters() if p.grad is not None]
        results.append(
            (asked, recorder.take().to_dict(), model.served_tokens(), model.experts_with_gradient(), gradients)
        )
    assert results[0][0] == [0, 1]
    for plain, recomputed in zip(results[0][:-1], results[1][:-1], strict=True):
        assert plain == recomputed
    for plain, recomputed in zip(results[0][-1], results[1][-1], strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("attention", ["none", "full"])
def test_scope_decides_what_trains(toy, attention):
    model, _ = make_device(toy, TrainScope(experts="none", router="none", attention=attention))
    trained = {spec.key for spec, _ in model.trained_units()}
    by_name = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert trained == by_name
    assert bool(trained) == (attention == "full")
    assert all(("attn" in key) and key.endswith("weight") and "norm" not in key for key in trained)
    assert {spec.key for spec in model.unit_infos(model.scope) if spec.trainable} == trained


# --- LoRA ------------------------------------------------------------------------------------------------------------

LORA = TrainScope(experts="lora", router="lora", attention="lora", lora_rank=2, lora_alpha=8.0)


def test_fresh_adapters_change_nothing(toy):
    units = toy.units(LORA)
    model, source = toy.device(units)
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), source, LORA)
    with torch.no_grad():
        torch.testing.assert_close(model.module(toy.input_ids).logits, toy.logits, rtol=1e-5, atol=2e-6)


def test_adapters_are_trained_and_base_weights_are_not(toy):
    model, units = make_device(toy, LORA)
    losses, stepped, _ = train(model, toy, steps=4)
    assert losses[-1] < losses[0]
    assert stepped
    for (key, name), value in all_values(model).items():
        assert torch.equal(value, units[key][name]), f"{key} {name} is a base weight"
    trained = dict((spec.key, (spec, tensors)) for spec, tensors in model.trained_units())
    assert all(key.endswith(":lora") and spec.trainable for key, (spec, _) in trained.items())
    kinds = {spec.kind for spec, _ in trained.values()}
    assert kinds == {"expert", "router", "dense"}
    for layer, expert in stepped:
        key = model.layers[layer].expert_key(expert) + ":lora"
        assert any(not torch.equal(value, units[key][name]) for name, value in trained[key][1].items())
    expected = {model.layers[layer].expert_key(e) + ":lora" for layer, experts in enumerate(TRAINABLE) for e in experts}
    assert {key for key, (spec, _) in trained.items() if spec.kind == "expert"} == expected


def test_merged_adapters_are_the_trained_model(toy):
    """Train all adapters, load and merge them: the plain model computes the same as the device."""
    model, units = make_device(toy, LORA, trainable=[range(8), range(8)], frozen=None)
    train(model, toy)
    model.module.eval()
    with torch.no_grad():
        expected = model.module(toy.input_ids).logits
    units.update({spec.key: {n: t.clone() for n, t in tensors.items()} for spec, tensors in model.trained_units()})
    assert not torch.allclose(expected, toy.logits, atol=1e-2)
    device, source = toy.device(units)
    with device.streaming(source, LORA):
        torch.testing.assert_close(device.module(toy.input_ids).logits, expected, rtol=1e-5, atol=2e-6)
    device.apply_plan(ExpertPlan.full(model.experts_per_layer), source, LORA)
    with torch.no_grad():
        torch.testing.assert_close(device.module(toy.input_ids).logits, expected, rtol=1e-5, atol=2e-6)
    device.restore(source, LORA)
    assert not any("parametrizations" in name or "edgefed" in name for name in device.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(device.module(toy.input_ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_adapters_depend_on_seed_and_key_alone(olmoe):
    model = olmoe.full()
    first, again = (dict((s.key, t) for s, t in model.iter_units(LORA, seed=1)) for _ in range(2))
    other = dict((s.key, t) for s, t in model.iter_units(LORA, seed=2))
    keys = [key for key in first if key.endswith(":lora")]
    values = [first[key]["down_proj.lora_a"] for key in keys if ".experts." in key]
    assert len(values) == 16
    assert len({value.sum().item() for value in values}) == 16
    for key in keys:
        for name, value in first[key].items():
            assert torch.equal(value, again[key][name])
            if name.endswith("lora_b"):
                assert value.eq(0).all()
            else:
                assert not torch.equal(value, other[key][name])
                assert value.abs().max() <= value.shape[1] ** -0.5


def test_a_frozen_expert_carries_its_adapter(olmoe):
    """An adapter that other clients trained is used in the forward pass, but not trained."""
    model, units = make_device(olmoe, LORA, trainable=[[], []], frozen=[range(8), range(8)])
    assert model.experts_with_gradient() == []
    before = model.module(olmoe.input_ids).logits.detach()
    key = "model.layers.0.mlp.experts.0:lora"
    for expert in range(8):
        adapter = units[f"model.layers.0.mlp.experts.{expert}:lora"]
        model.load_unit(
            f"model.layers.0.mlp.experts.{expert}:lora", {name: torch.ones_like(t) for name, t in adapter.items()}
        )
    after = model.module(olmoe.input_ids).logits.detach()
    assert not torch.allclose(before, after, atol=1e-2)
    loss_of(model, olmoe).backward()
    assert model.experts_with_gradient() == []
    assert key not in {spec.key for spec, _ in model.trained_units()}


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_the_leading_part_of_an_adapter_adds_the_same_whatever_the_rank(toy, scaling):
    training = TrainingConfig(experts="lora", router="lora", attention="lora", lora_rank=4, lora_scaling=scaling)
    units = toy.units(train_scope(training))
    for key, tensors in units.items():
        for name in [name for name in tensors if name.endswith(".lora_b")]:
            tensors[name].normal_(generator=torch.Generator().manual_seed(len(key)))
            tensors[name][:, 3:] = 0.0
    losses = {}
    for rank in (4, 3, 2):
        model, source = toy.device(units)
        model.apply_plan(
            ExpertPlan.of(model.experts_per_layer, TRAINABLE, FROZEN), source, train_scope(training, rank)
        )  # fmt: skip
        losses[rank] = loss_of(model, toy)
        losses[rank].backward()
        sent = [tensors for _, tensors in model.trained_units()]
        assert {t.shape[0] for each in sent for name, t in each.items() if name.endswith(".lora_a")} == {rank}
    torch.testing.assert_close(losses[3], losses[4], rtol=1e-5, atol=0)
    assert abs(losses[2] - losses[4]) > 1e-3
