"""Utilities of experts: gradient norms from training, and estimates from forward passes alone."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgefed.expert_records import ExpertPlan
from edgefed.kernels.quantization import dequantize_experts
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.loss import batch_loss
from edgefed.training.utility import GradientNorms, probe_gradient_norms, utilities

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import batch, make_device  # noqa: E402

FULL = TrainScope(experts="full", router="full")


@pytest.fixture(autouse=True)
def one_thread():
    """Toy matrices are slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def true_squares(model, input_ids, labels):
    model.module.zero_grad()
    batch_loss(model.module, input_ids, labels, chunked=False).backward()
    norms = GradientNorms(model)
    norms.add()
    model.module.zero_grad()
    return norms.mean_squares()


@pytest.fixture
def device(tmp_path):
    def make(scope=FULL, trainable=(0, 1, 2, 3), frozen=None, **changes):
        model = make_device("olmoe", tmp_path / "model", scope, trainable, frozen, **changes)
        model.module.eval()
        return model

    return make


def test_norms_are_those_of_the_expert_gradients_averaged_over_its_batches(device):
    model = device()
    norms, expected = GradientNorms(model), {}
    for seed in (1, 2, 3):
        model.module.zero_grad()
        batch_loss(model.module, *batch(seed=seed), chunked=False).backward()
        norms.add()
        for layer in range(len(model.layers)):
            bank = model.bank(layer)
            for slot, expert in enumerate(bank.experts):
                grads = [p.grad for p in bank.tensors(slot).values() if p.grad is not None]
                if grads:
                    expected.setdefault((layer, expert), []).append(
                        sum(float(g.double().square().sum()) for g in grads)
                    )
    found = norms.mean_squares()
    assert found.keys() == expected.keys()
    assert found
    for key, squares in expected.items():
        assert found[key] == pytest.approx(np.mean(squares), rel=1e-5)


def test_forward_only_estimates_agree_with_true_gradients(device):
    """Each estimate is ||g||^2 times chi-squared(M) / M: the mean over experts has little spread left."""
    model = device(num_hidden_layers=1)  # in a layer above, tokens might go to other experts when one is moved
    ids, labels = batch(rows=4)
    true = true_squares(model, ids, labels)
    experts = list(true)
    outcome = probe_gradient_norms(model, experts, ids, labels, directions=24, seed=5)
    assert outcome.forwards == 1 + 2 * 24 * len(experts)
    ratios = np.array([outcome.mean_squares[key] / true[key] for key in experts])
    assert np.mean(ratios) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 24 / len(experts)))
    again = probe_gradient_norms(model, experts, ids, labels, directions=24, seed=5)
    assert again == outcome, "the directions come from the seed"
    other = probe_gradient_norms(model, experts, ids, labels, directions=24, seed=6)
    assert other.mean_squares != outcome.mean_squares


def test_probes_do_not_change_the_model(device):
    model = device(trainable=(0, 1), frozen=(2, 3))
    model.module.train()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    ids, labels = batch()
    probe_gradient_norms(model, [(0, 2), (1, 3)], ids, labels, directions=2, seed=0)
    assert model.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert all(model.bank(at).perturbation is None for at in (0, 1))
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_adapters_are_probed_if_adapters_are_trainable(device):
    scope = TrainScope(experts="lora", router="none", lora_rank=2)
    model = device(scope, num_hidden_layers=1)
    with torch.no_grad():  # fresh adapters have B = 0 and hence no gradient in A
        for name, parameter in model.module.named_parameters():
            if name.rpartition("_")[0].endswith("lora_b"):
                parameter.uniform_(-0.1, 0.1)
    ids, labels = batch(rows=4)
    true = true_squares(model, ids, labels)
    outcome = probe_gradient_norms(model, list(true), ids, labels, directions=24, seed=1)
    ratios = [outcome.mean_squares[key] / true[key] for key in true]
    assert np.mean(ratios) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 24 / len(ratios)))


def test_an_expert_without_tokens_has_utility_zero_and_no_cost(device):
    model = device()
    ids, labels = batch(rows=2, length=4)
    with torch.no_grad():
        for layer in model.layers:  # the router never chooses expert 3
            layer.router.weight[3] = 0
            layer.router.weight[:3] *= 50
    with model.record_statistics() as statistics, torch.no_grad():
        model.module(input_ids=ids)
        record = statistics.take()
    idle = [(layer, e) for layer, row in enumerate(record.layers) for e in np.flatnonzero(row.tokens_per_expert == 0)]
    if not idle:
        pytest.fail("the test needs an expert without tokens")
    outcome = probe_gradient_norms(model, idle, ids, labels, directions=3, seed=0)
    assert outcome.forwards == 1
    assert set(outcome.mean_squares.values()) == {0.0}


def test_utilities_weigh_norms_by_tokens(device):
    model = device()
    ids, labels = batch()
    with model.record_statistics() as statistics, torch.no_grad():
        model.module(input_ids=ids)
        record = statistics.take()
    tokens = record.layers[0].tokens_per_expert
    rows = utilities({(0, 1): 4.0}, record)
    assert rows[0][1] == 2.0 * tokens[1]
    assert rows[0][0] is None
    assert set(rows[1]) == {None}


def test_a_quantized_expert_is_probed_at_its_quantized_weights(tmp_path):
    model = make_device(
        "olmoe", tmp_path / "model", FULL, (0,), (1, 2, 3), hidden_size=64, intermediate_size=64, num_hidden_layers=1
    )
    units = {}
    for layer in range(len(model.layers)):
        bank = model.bank(layer)
        for slot, expert in enumerate(bank.experts):
            units[model.layers[layer].expert_key(expert)] = {
                n: t.detach().clone() for n, t in bank.tensors(slot).items()
            }
    source = MemorySource(units)
    plan = model.plan
    model.apply_plan(plan, source, FULL, storage="nf4")
    model.module.eval()
    assert model.bank(0).packed(1), "frozen experts are packed"
    ids, labels = batch(rows=4)
    experts = [(0, e) for e in (1, 2, 3)]
    outcome = probe_gradient_norms(model, experts, ids, labels, directions=24, seed=2)
    packed_values = {}
    bank = model.bank(0)
    for slot, expert in enumerate(bank.experts):
        tensors = {n: t.detach() for n, t in bank.tensors(slot).items()}
        tensors.update({n: dequantize_experts(m) for n, m in bank.packed(slot).items()})
        packed_values[model.layers[0].expert_key(expert)] = tensors
    layers = [range(4)]
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, layers), MemorySource(packed_values), FULL)
    model.module.eval()
    true = true_squares(model, ids, labels)
    hit = [key for key in experts if key in true]
    ratios = [outcome.mean_squares[key] / true[key] for key in hit]
    assert np.mean(ratios) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 24 / len(ratios)))
