"""The local mixture: the paper's shapes, what the gate does, what it reduces to, and how its parts learn."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgefed.errors import DataError, TrainingDiverged
from edgefed.personal.extractors import SharedExtractor, make_extractor
from edgefed.personal.local_training import Rates, evaluate, make_optimizer, train_epochs
from edgefed.personal.mixture import FixedGate, Gate, LocalMixture, SwitchNorm
from edgefed.personal.networks import CNNS, PersonalModel, make_cnn
from edgefed.personal.samples import ImageSamples, batches, hold_out, num_batches

CLASSES = 3


class SmallShared(SharedExtractor):
    """Stands in for the CNN: the same contract on 8x8 images."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU())
        self.width, self.gate_in = width, 192

    def forward(self, inputs):
        return self.layers(inputs)

    def gate_features(self, inputs):
        return inputs.flatten(1)


def small_model(width: int = 6) -> PersonalModel:
    return PersonalModel(
        nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Tanh()), nn.Linear(width, CLASSES), width
    )


def make_mixture(gate: nn.Module | None = None, width: int = 6, seed: int = 0) -> LocalMixture:
    torch.manual_seed(seed)
    return LocalMixture(SmallShared(), small_model(width), gate or Gate(192, 8))


def images(count: int, seed: int = 0, side: int = 8) -> ImageSamples:
    """Each class has a brightness of its own, so there is something to learn."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    noise = rng.integers(0, 100, (count, side, side, 3))
    return ImageSamples((noise + 70 * labels[:, None, None, None]).astype(np.uint8), labels, ("a", "b", "c"))


def a_batch(count: int = 5, seed: int = 0):
    return images(count, seed).batch(np.arange(count))


def train(mixture: nn.Module, groups, rates: Rates | None = None, epochs: int = 1, samples=None) -> float:
    samples = images(14) if samples is None else samples
    rng = np.random.default_rng(3)
    return train_epochs(
        mixture, samples, make_optimizer(groups, rates or Rates()), epochs=epochs, batch_size=4, rng=rng
    )


def test_the_papers_models_have_the_papers_sizes():
    counts = {name: sum(p.numel() for p in make_cnn(name, 10).parameters()) for name in CNNS}
    assert counts == {"cnn1": 2621558, "cnn2": 1815142, "cnn3": 1320558, "cnn4": 1060358, "cnn5": 670058}
    extractor = make_extractor("cnn5", seed=0)
    assert sum(p.numel() for p in extractor.parameters()) == 665048
    assert extractor(torch.zeros(2, 3, 32, 32)).shape == (2, 500)
    assert extractor.width == 500
    assert extractor.gate_in == 3072


def test_an_extractor_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = make_extractor("cnn5", seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = make_extractor("cnn5", seed=7).state_dict(), make_extractor("cnn5", seed=8).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["features.fc1.weight"], other["features.fc1.weight"])


@pytest.mark.parametrize("kind", ["switch", "layer"])
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_an_example_sum_to_one(kind, training):
    torch.manual_seed(0)
    gate = Gate(192, 8, kind).train(training)
    x = torch.randn(16, 192)
    assert (gate(x) == 0.5).all(), "a gate that has learned nothing takes no side"
    with torch.no_grad():
        (gate.out_norm if kind == "switch" else gate.out).weight.normal_()
    weights = gate(x)
    assert weights.shape == (16, 2)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    assert weights[:, 0].std() > 0  # it depends on the example


def test_the_gates_layers_stand_in_the_papers_order():
    gate = Gate(5, 3)
    assert [type(part).__name__ for part in gate.children()] == [
        "SwitchNorm", "Linear", "BatchNorm1d", "Linear", "BatchNorm1d",
    ]  # fmt: skip
    torch.nn.init.ones_(gate.out_norm.weight)
    x = torch.randn(4, 5)
    y = gate.hidden_norm(gate.hidden(gate.norm(x)))
    wanted = torch.softmax(gate.out_norm(gate.out(1 / (1 + torch.exp(-y)))), dim=1)
    torch.testing.assert_close(gate(x), wanted)


def test_switch_norm_against_a_computation_by_hand():
    torch.manual_seed(0)
    norm = SwitchNorm(3).double()
    with torch.no_grad():
        norm.mean_mix.copy_(torch.tensor([0.3, -0.2], dtype=torch.double))
        norm.var_mix.copy_(torch.tensor([-1.0, 0.4], dtype=torch.double))
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.5, 0.25]))
    x = np.array([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]])
    of_mean, of_var = np.exp([0.3, -0.2]), np.exp([-1.0, 0.4])
    of_mean, of_var = of_mean / of_mean.sum(), of_var / of_var.sum()

    def by_hand(batch_mean, batch_var):
        mean = of_mean[0] * x.mean(1, keepdims=True) + of_mean[1] * batch_mean
        var = of_var[0] * x.var(1, keepdims=True) + of_var[1] * batch_var
        return (x - mean) / np.sqrt(var + 1e-5) * [1.0, 2.0, -1.0] + [0.0, 0.5, 0.25]

    np.testing.assert_allclose(norm(torch.tensor(x)).detach(), by_hand(x.mean(0), x.var(0)), rtol=1e-12)
    # One step of momentum .1 from mean 0 and variance 1; the running variance is the unbiased one, as in BatchNorm.
    running_mean, running_var = 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(norm.running_mean, running_mean, rtol=1e-12)
    np.testing.assert_allclose(norm.eval()(torch.tensor(x)).detach(), by_hand(running_mean, running_var), rtol=1e-12)
    inputs = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(copy.deepcopy(norm).train(), inputs)


def test_a_batch_of_one_trains_with_the_layer_gate_and_is_refused_with_the_other():
    mixture = make_mixture(Gate(192, 8, "layer"))
    assert np.isfinite(train(mixture, mixture.groups(), samples=images(1)))
    gradients = [p.grad for p in mixture.gate.parameters()]
    assert all(g is not None for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)
    mixture = make_mixture(Gate(192, 8, "switch"))
    with pytest.raises(DataError, match="a single example") as error:
        train(mixture, mixture.groups(), samples=images(1))
    assert "gate_norm=layer" in error.value.remedy
    with pytest.raises(DataError, match="training data is empty"):
        train(mixture, mixture.groups(), samples=images(3).subset(np.zeros(0, int)))


def test_a_shared_weight_of_one_is_the_small_model_with_the_clients_header():
    mixture, batch = make_mixture(FixedGate(1.0)), a_batch()
    logits, weights = mixture(batch)
    assert torch.equal(logits, mixture.own.header(mixture.shared(batch.shared)))
    assert torch.equal(weights, torch.tensor([[1.0, 0.0]]).expand(5, 2))


def test_a_shared_weight_of_zero_is_training_alone_exactly():
    mixture = make_mixture(FixedGate(0.0))
    alone, theta = copy.deepcopy(mixture.own), copy.deepcopy(mixture.shared.state_dict())
    batch = a_batch()
    assert torch.equal(mixture(batch)[0], alone(batch.own))
    train(mixture, mixture.groups(), Rates(model=0.5, momentum=0.9), epochs=3)

    def loss_of(model, batch):
        return nn.functional.cross_entropy(model(batch.own), batch.labels)

    optimizer = make_optimizer({"model": list(alone.parameters())}, Rates(model=0.5, momentum=0.9))
    rng = np.random.default_rng(3)
    train_epochs(alone, images(14), optimizer, epochs=3, batch_size=4, rng=rng, loss_of=loss_of)
    for name, tensor in mixture.own.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name
    assert all(torch.equal(tensor, theta[name]) for name, tensor in mixture.shared.state_dict().items())


@pytest.mark.parametrize("width", [6, 9])
def test_theta_model_and_gate_all_learn_and_each_at_its_own_rate(width):
    mixture = make_mixture(width=width)
    assert isinstance(mixture.projection, nn.Identity if width == 6 else nn.Linear)
    before = {name: p.detach().clone() for name, p in mixture.named_parameters()}
    rates = Rates(extractor=0.1, model=0.01, gate=0.001)
    groups = mixture.groups()
    assert sum(map(len, groups.values())) == len(before)
    samples = images(6)
    train_epochs(mixture, samples, make_optimizer(groups, rates), epochs=1, batch_size=6, rng=np.random.default_rng(0))
    learned = {"shared": 0.1, "own": 0.01, "projection": 0.01, "gate": 0.001}
    for name, parameter in mixture.named_parameters():
        wanted = before[name] - learned[name.split(".")[0]] * parameter.grad
        torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-7)
    for part in ("shared", "own.extractor", "own.header", "gate", *(["projection"] if width != 6 else [])):
        assert any(p.grad.abs().sum() > 0 for n, p in mixture.named_parameters() if n.startswith(part)), part


def test_answers_are_the_mean_of_both_extractors_weighted_by_the_gate():
    mixture, batch = make_mixture(width=9).eval(), a_batch()
    logits, weights = mixture(batch)
    shared, own = mixture.projection(mixture.shared(batch.shared)), mixture.own.extractor(batch.own)
    for row in range(5):
        mixed = weights[row, 0] * shared[row] + weights[row, 1] * own[row]
        torch.testing.assert_close(logits[row], mixture.own.header(mixed))


def test_one_weight_per_example_also_where_there_is_an_answer_per_token():
    class Tokens(SmallShared):
        def forward(self, inputs):
            return super().forward(inputs).unsqueeze(1).expand(-1, 4, -1)

    torch.manual_seed(0)
    own = PersonalModel(Tokens(9), nn.Linear(9, CLASSES), 9)
    mixture, batch = LocalMixture(Tokens(6), own, FixedGate(0.25)), a_batch()
    logits, weights = mixture(batch)
    assert logits.shape == (5, 4, CLASSES)
    assert weights.shape == (5, 2)
    mixed = 0.25 * mixture.projection(mixture.shared(batch.shared)) + 0.75 * own.extractor(batch.own)
    torch.testing.assert_close(logits, own.header(mixed))


def test_frozen_parameters_stay_as_they_are():
    mixture = make_mixture()
    frozen = mixture.own.extractor[1].weight.requires_grad_(False)
    before = frozen.clone()
    train(mixture, mixture.groups(), Rates(0.1, 0.1, 0.1, momentum=0.9, weight_decay=0.1))
    assert torch.equal(frozen, before)
    assert frozen.grad is None


def test_a_mixture_is_what_its_state_says():
    mixture, other = make_mixture(width=9), make_mixture(width=9, seed=1)
    train(mixture, mixture.groups(), Rates(0.1, 0.1, 0.1))
    batch = a_batch(7, seed=4)
    assert not torch.equal(other.eval()(batch)[0], mixture.eval()(batch)[0])
    other.load_state_dict(mixture.state_dict())
    for got, wanted in zip(other.eval()(batch), mixture.eval()(batch), strict=True):
        assert torch.equal(got, wanted)


def test_it_learns_and_is_evaluated_on_every_example_in_its_order():
    mixture = make_mixture()
    samples = images(40)
    before = evaluate(mixture, samples)
    last = train(mixture, mixture.groups(), Rates(0.1, 0.1, 0.1), epochs=15, samples=samples)
    after = evaluate(mixture, samples)
    assert not mixture.training
    assert after.loss < before.loss / 2
    assert last < before.loss
    assert after.accuracy > 0.9
    assert after.gate_weights.shape == (40, 2)
    assert np.array_equal(after.labels, samples.labels)
    every = samples.batch(np.arange(40))
    with torch.no_grad():
        logits, weights = mixture(every)
    np.testing.assert_allclose(after.gate_weights, weights, atol=1e-6)
    assert after.loss == pytest.approx(float(nn.functional.cross_entropy(logits, every.labels)), rel=1e-5)
    assert after.accuracy == float((logits.argmax(1) == every.labels).float().mean())


def test_a_non_finite_loss_ends_training():
    mixture = make_mixture()
    with torch.no_grad():
        mixture.own.header.weight.fill_(torch.inf)
    with pytest.raises(TrainingDiverged):
        train(mixture, mixture.groups())


@given(count=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.none() | st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_batches_take_every_example_once_and_never_end_in_one(count, batch_size, seed):
    samples = images(count, side=1)
    samples.images[:, 0, 0, 0] = np.arange(count)  # which example it is
    rng = None if seed is None else np.random.default_rng(seed)
    found = list(batches(samples, batch_size, rng))
    sizes = [len(batch.labels) for batch in found]
    assert len(found) == num_batches(count, batch_size)
    assert batch_size == 1 or count == 1 or min(sizes) > 1
    assert max(sizes) <= batch_size + (batch_size > 1)
    numbers = torch.cat([batch.shared[:, 0, 0, 0] for batch in found]).add(1).mul(127.5).round()
    assert sorted(numbers.tolist()) == list(range(count))
    assert rng is not None or numbers.tolist() == list(range(count))


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), share=st.floats(0, 0.99), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_holding_out_leaves_an_example_of_each_class_and_takes_a_share_of_each(counts, share, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    samples = ImageSamples(numbers, labels, tuple("abcd"[: len(counts)]))
    training, held_out = hold_out(samples, share, seed)
    assert sorted([*training.images.flat, *held_out.images.flat]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert (held_out.labels == label).sum() == min(round(share * count), count - 1)
        assert (training.labels == label).sum() >= 1
    again, _ = hold_out(samples, share, seed)
    assert np.array_equal(again.images, training.images)
