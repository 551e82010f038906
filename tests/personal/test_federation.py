"""Federations of personal models in one process: what is averaged, what stays, what each baseline does."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from edgefed.errors import ConfigError, DataError
from edgefed.methods.fedmoe import FedMoE
from edgefed.methods.interface import Contribution
from edgefed.personal.local_training import cross_entropy, evaluate, mixture_loss
from edgefed.personal.networks import PersonalModel, make_cnn
from edgefed.personal.samples import ImageSamples
from edgefed.protocol.messages import TensorInfo, UnitInfo
from edgefed.simulation import personal_baselines as baselines
from edgefed.simulation.personal_baselines import divergence, make_strategy
from edgefed.simulation.personal_federation import (
    Client,
    Round,
    Settings,
    Upload,
    average,
    rounds_to,
    run,
    sample_clients,
    worst_decile,
)
from edgefed.simulation.pictures import gate_histograms, save_comparison, save_gate_histograms

METHOD = FedMoE(extractor_lr=0.05, model_lr=0.05, gate_lr=0.05, batch_size=8)
CLASSES = ("dark", "bright", "striped")


def images(seed, count=18, classes=CLASSES):
    """Noisy images of three kinds that a CNN can tell apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 3
    pixels = rng.normal(128, 30, (count, 32, 32, 3))
    pixels[labels == 0] -= 60
    pixels[labels == 1] += 60
    pixels[labels == 2, ::4] += 90
    return ImageSamples(pixels.clip(0, 255).astype(np.uint8), labels, classes)


def small_model(seed, width=6, hidden=4):
    """A model of its own: two linear layers over coarse pixels."""
    torch.manual_seed(seed)
    extractor = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, hidden), nn.ReLU(), nn.Linear(hidden, width))
    return PersonalModel(extractor, nn.Linear(width, 3), width)


def small_clients(count=3, width=6):
    """Unlike models (two kinds of hidden layer), unequal numbers of examples."""
    return [
        Client(f"{k}", images(k, 12 + 3 * k), images(100 + k, 9), small_model(k, width, hidden=4 + k % 2))
        for k in range(count)
    ]


def parameters(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_average_is_weighted_by_examples_and_by_hand():
    uploads = [
        Upload(1, 3, {"w": torch.tensor([2.0, 4.0]), "only": torch.tensor([7.0])}),
        Upload(0, 1, {"w": torch.tensor([6.0, 0.0])}),
    ]
    found = average(uploads)
    assert found["w"].tolist() == [3.0, 3.0]  # (1*6 + 3*2) / 4, (1*0 + 3*4) / 4
    assert found["only"].tolist() == [7.0]
    assert same(found, average(uploads[::-1]))
    assert found["w"].dtype == torch.float32


def test_average_has_the_weights_of_the_aggregator():
    rng = np.random.default_rng(0)
    uploads = [Upload(k, n, {"w": torch.from_numpy(rng.normal(size=5))}) for k, n in enumerate((17, 4, 90))]
    unit = UnitInfo(key="theta", kind="dense", trainable=True, tensors=(TensorInfo("w", "F64", (5,)),))
    merges = METHOD.plan_merge(
        [Contribution(f"{u.client}", u.num_examples, {}, frozenset({"theta"})) for u in uploads], [unit]
    )
    weights = dict(merges["theta"].weights)
    wanted = sum(weights[f"{u.client}"] * u.tensors["w"].numpy() for u in uploads) / sum(weights.values())
    np.testing.assert_allclose(average(uploads)["w"].numpy(), wanted, rtol=1e-12)


def test_weights_of_single_tensors_go_before_those_of_the_client():
    uploads = [
        Upload(0, 100, {"2": torch.tensor([1.0])}, {"2": 1.0}),
        Upload(1, 1, {"2": torch.tensor([4.0])}, {"2": 2.0}),
    ]
    assert average(uploads)["2"].tolist() == [3.0]


def test_clients_of_a_round_are_drawn_evenly_and_by_seed():
    rounds = [sample_clients(10, 0.3, 5, number) for number in range(1, 401)]
    assert all(len(set(each)) == 3 and list(each) == sorted(each) for each in rounds)
    counts = np.bincount(np.concatenate(rounds), minlength=10)
    assert counts.min() > 80
    assert counts.max() < 160
    assert rounds == [sample_clients(10, 0.3, 5, number) for number in range(1, 401)]
    assert rounds != [sample_clients(10, 0.3, 6, number) for number in range(1, 401)]
    assert sample_clients(10, 1.0, 0, 1) == tuple(range(10))
    assert len(sample_clients(10, 0.01, 0, 1)) == 1


@pytest.mark.parametrize("name", ["fedmoe", "standalone", "fedproto", "lg-fedavg", "fml"])
def test_every_method_is_deterministic_and_leaves_the_given_models_alone(name):
    clients = small_clients(2)
    before = [parameters(client.model) for client in clients]
    results = []
    for _ in range(2):
        torch.manual_seed(int(np.random.default_rng().integers(2**31)))  # what was drawn before must not matter
        strategy = make_strategy(name, clients, METHOD, seed=3)
        results.append((run(strategy, Settings(2, seed=3)), [parameters(model) for model in strategy.models]))
    (one, models), (other, others) = results
    assert [each.losses for each in one.rounds] == [each.losses for each in other.rounds]
    assert one.final() == other.final()
    assert one.received == other.received
    assert all(map(same, models, others))
    assert all(same(parameters(client.model), start) for client, start in zip(clients, before, strict=True))


def test_theta_after_a_round_is_the_weighted_mean_and_the_rest_stays():
    clients = small_clients(2)
    strategy = make_strategy("fedmoe", clients, METHOD, seed=0)
    first = {name: tensor.clone() for name, tensor in strategy.state.items()}
    uploads = []
    strategy.aggregate = lambda found: (uploads.extend(found), type(strategy).aggregate(strategy, found))
    history = run(strategy, Settings(1))
    n = [len(client.train) for client in clients]
    assert n == [12, 15]
    for name, tensor in strategy.state.items():
        wanted = (n[0] * uploads[0].tensors[name].double() + n[1] * uploads[1].tensors[name].double()) / sum(n)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(tensor, first[name])
    assert strategy.state.keys() == dict(strategy.models[0].shared.named_parameters()).keys()
    assert history.rounds[0].parameters_up == {0: 665_048, 1: 665_048} == history.rounds[0].parameters_down
    assert all(same(parameters(model.shared), strategy.state) for model in strategy.models)  # received at the end
    assert not same(parameters(strategy.models[0].gate), parameters(strategy.models[1].gate))


def test_fedmoe_of_one_client_is_local_training_of_its_mixture():
    """What the aggregator makes of one client is what it sent: rounds change nothing."""
    client = small_clients(1)
    rounds = make_strategy("fedmoe", client, METHOD, seed=1)
    run(rounds, Settings(3, seed=1))
    alone = make_strategy("fedmoe", client, METHOD, seed=1)
    for server_round in (1, 2, 3):
        alone.train(0, np.random.default_rng([1, server_round, 0]))
    for (name, one), other in zip(
        rounds.models[0].state_dict().items(), alone.models[0].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


def test_own_weight_of_one_is_standalone_bit_for_bit():
    clients = small_clients(2)
    own_only = baselines.Mixtures(clients, METHOD, seed=0, shared_weight=0.0)
    standalone = make_strategy("standalone", clients, METHOD, seed=0)
    # Widths differ (6 and 500): the projection is the client's own, has no gradient, and must not matter either.
    one, other = run(own_only, Settings(2)), run(standalone, Settings(2))
    assert [each.losses for each in one.rounds] == [each.losses for each in other.rounds]
    assert one.final() == other.final()
    for mixed, alone in zip(own_only.models, standalone.models, strict=True):
        assert same(parameters(mixed.own), parameters(alone.own))
    assert other.rounds[0].parameters_up == {0: 0, 1: 0}


def test_shared_weight_of_one_leaves_the_own_extractor_as_it_was():
    clients = small_clients(1, width=500)
    strategy = make_strategy("fedmoe-shared-only", clients, METHOD, seed=0)
    run(strategy, Settings(1))
    assert same(parameters(strategy.models[0].own.extractor), parameters(clients[0].model.extractor))
    assert not same(parameters(strategy.models[0].own.header), parameters(clients[0].model.header))


def test_fedavg_averages_whole_models_and_refuses_unequal_ones():
    clients = [dataclasses.replace(client, model=small_model(0)) for client in small_clients(3)]
    strategy = make_strategy("fedavg", clients, METHOD, seed=0)
    run(strategy, Settings(2))
    first, *others = (parameters(model) for model in strategy.models)
    assert all(same(first, other) for other in others)
    assert strategy.state.keys() == small_model(0).state_dict().keys()
    with pytest.raises(ConfigError, match=r"extractor.2.bias is \(4,\) on client 0, \(5,\) on client 1"):
        make_strategy("fedavg", small_clients(3), METHOD, seed=0)


def test_lg_fedavg_shares_only_its_upper_layers():
    clients = small_clients(3)
    strategy = make_strategy("lg-fedavg", clients, METHOD, seed=0)
    history = run(strategy, Settings(1))
    one, other = (parameters(strategy.models[k]) for k in (0, 2))  # both have the same shapes
    assert torch.equal(one["own.header.weight"], other["own.header.weight"])
    assert torch.equal(one["own.header.bias"], other["own.header.bias"])
    assert not torch.equal(one["own.extractor.4.weight"], other["own.extractor.4.weight"])
    assert history.rounds[0].parameters_up[0] == 6 * 3 + 3


def test_lg_fedavg_averages_a_lower_layer_where_its_shape_is_equal():
    strategy = make_strategy("lg-fedavg", small_clients(3), METHOD, seed=0, upper=2)
    run(strategy, Settings(1))
    second = [model.own.extractor[4].weight for model in strategy.models]  # (6, 4), (6, 5), (6, 4)
    assert torch.equal(second[0], second[2])
    assert {name for name in strategy.state if "weight" in name} == {
        "top 1: weight (3, 6)", "top 2: weight (6, 4)", "top 2: weight (6, 5)",
    }  # fmt: skip


class Fixed(nn.Module):
    """Features of an image: its mean brightness in [-1, 1], twice; a parameter that changes nothing."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, 2 * mean], 1) + 0 * self.scale


def grey(levels, labels):
    """One-colour images of these byte values."""
    pixels = np.repeat(np.asarray(levels, np.uint8), 32 * 32 * 3).reshape(-1, 32, 32, 3)
    return ImageSamples(pixels, np.asarray(labels, np.int64), CLASSES)


def fixed_clients():
    """Prototypes by hand: client 0 has class 0 at 0 and 51 and class 1 at 255, client 1 has class 0 at 153."""
    held_out = grey([0, 255], [0, 1])
    data = [grey([0, 51, 255], [0, 0, 1]), grey([153, 153], [0, 0])]
    return [
        Client(f"{k}", samples, held_out, PersonalModel(Fixed(), nn.Linear(2, 3), 2)) for k, samples in enumerate(data)
    ]


def test_prototypes_are_class_means_averaged_by_count():
    strategy = make_strategy("fedproto", fixed_clients(), METHOD, seed=0)
    uploads = [strategy.upload(k) for k in range(2)]
    # Byte b is b / 127.5 - 1: 0 -> -1, 51 -> -.6, 153 -> .2, 255 -> 1.
    torch.testing.assert_close(uploads[0].tensors["0"], torch.tensor([-0.8, -1.6]))
    torch.testing.assert_close(uploads[0].tensors["1"], torch.tensor([1.0, 2.0]))
    assert uploads[1].tensors.keys() == {"0"}
    assert uploads[0].weights == {"0": 2.0, "1": 1.0}
    strategy.aggregate(uploads)
    torch.testing.assert_close(strategy.state["0"], torch.tensor([-0.3, -0.6]))  # (2 * -.8 + 2 * .2) / 4
    torch.testing.assert_close(strategy.state["1"], torch.tensor([1.0, 2.0]))
    assert strategy.receive(0) == 4


def test_loss_of_fedproto_by_hand():
    strategy = make_strategy("fedproto", fixed_clients(), METHOD, seed=0, weight=3.0)
    model, batch = strategy.models[0], grey([0, 255, 255], [0, 1, 2]).batch(np.arange(3))
    plain = cross_entropy(model(batch)[0], batch.labels)
    assert torch.equal(strategy.loss_of(model, batch), plain)  # nobody has sent a prototype yet
    strategy.aggregate([strategy.upload(k) for k in range(2)])
    # Features (-1, -2) and (1, 2); prototypes (-.3, -.6) and (1, 2); class 2 has none.
    distance = ((0.7**2 + 1.4**2) / 2 + 0 + 0) / 3
    assert strategy.loss_of(model, batch).item() == pytest.approx(plain.item() + 3 * distance, rel=1e-5)


def test_answers_of_fedproto_by_prototype():
    strategy = make_strategy("fedproto", fixed_clients(), METHOD, seed=0, answer="prototype")
    strategy.aggregate([strategy.upload(k) for k in range(2)])
    model = strategy.models[0].eval()
    logits, _ = model(grey([0, 230], [0, 1]).batch(np.arange(2)))
    assert logits.argmax(-1).tolist() == [0, 1]
    assert torch.isneginf(logits[:, 2]).all()


def test_fedproto_refuses_unequal_widths_and_everything_shared_wants_equal_classes():
    with pytest.raises(ConfigError, match="6 on 0, 5 on 1"):
        make_strategy(
            "fedproto", [small_clients(1)[0], dataclasses.replace(small_clients(1, 5)[0], name="1")], METHOD, seed=0
        )
    other = Client("other", images(0, 12, CLASSES[::-1]), images(1, 9, CLASSES[::-1]), small_model(0))
    for name in ("fedavg", "fedproto", "lg-fedavg", "fml"):
        with pytest.raises(ConfigError, match="striped, bright, dark on client other"):
            make_strategy(name, [small_clients(1)[0], other], METHOD, seed=0)
    assert make_strategy("fedmoe", [small_clients(1)[0], other], METHOD, seed=0)


def test_divergence_by_hand():
    teacher = torch.tensor([[math.log(0.75), math.log(0.25)]])
    learner = torch.tensor([[0.0, 0.0]])
    wanted = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(divergence(teacher, learner, torch.tensor([0]))) == pytest.approx(wanted, rel=1e-6)
    assert float(divergence(learner, learner, torch.tensor([0]))) == 0
    padded = torch.cat([teacher, torch.tensor([[9.0, -9.0]])])  # a token without a label says nothing
    assert float(divergence(padded, learner.expand(2, 2), torch.tensor([0, -100]))) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.6), (1.0, 1.0), (0.0, 0.0)])
def test_each_of_the_two_losses_of_fml_moves_its_own_model(alpha, beta):
    strategy = make_strategy("fml", small_clients(1), METHOD, seed=0, alpha=alpha, beta=beta)
    pair, batch = strategy.models[0], images(0, 6).batch(np.arange(6))
    strategy.loss_of(pair, batch).backward()
    found = {name: p.grad.clone() for name, p in pair.named_parameters()}
    pair.zero_grad()
    own, meme = pair.own(batch.own), pair.meme(batch.shared)
    own_loss = alpha * cross_entropy(own, batch.labels) + (1 - alpha) * divergence(meme.detach(), own, batch.labels)
    meme_loss = beta * cross_entropy(meme, batch.labels) + (1 - beta) * divergence(own.detach(), meme, batch.labels)
    own_loss.backward()
    assert all(p.grad is None for p in pair.meme.parameters())
    meme_loss.backward()
    for name, parameter in pair.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_fml_sends_the_small_model_and_begins_with_the_same_one_everywhere():
    clients = [dataclasses.replace(c, model=make_cnn(f"cnn{3 + k}", 3)) for k, c in enumerate(small_clients(2))]
    strategy = make_strategy("fml", clients, METHOD, seed=0)
    assert same(parameters(strategy.models[0].meme), parameters(strategy.models[1].meme))
    history = run(strategy, Settings(1))
    assert history.rounds[0].parameters_up == {0: 665_048 + 501 * 3, 1: 665_048 + 501 * 3}
    assert same(parameters(strategy.models[0].meme), parameters(strategy.models[1].meme))


def test_a_round_without_a_client_leaves_it_as_it_was():
    strategy = make_strategy("static", small_clients(3), METHOD, seed=0)
    before = [parameters(model) for model in strategy.models]
    seen = []

    def look(done: Round):
        changed = [not same(parameters(m), b) for m, b in zip(strategy.models, before, strict=True)]
        seen.append((set(done.losses), {k for k, different in enumerate(changed) if different}, done.accuracy))

    run(strategy, Settings(1, share=0.34, seed=2), on_round=look)
    (took_part, changed, accuracy) = seen[0]
    assert took_part == changed == set(sample_clients(3, 0.34, 2, 1))
    assert len(changed) == 1
    assert len(accuracy) == 3


def test_evaluation_every_so_many_rounds_and_after_the_last():
    history = run(make_strategy("standalone", small_clients(2), METHOD, seed=0), Settings(5, evaluate_every=2))
    assert [server_round for server_round, _ in history.curve()] == [2, 4, 5]
    assert history.curve()[-1][1] == pytest.approx(np.mean(history.final()))


def test_flops_are_those_of_the_products_forward_and_backward():
    clients = small_clients(1)
    history = run(make_strategy("standalone", clients, METHOD, seed=0), Settings(1))
    layers = [(48, 4), (4, 6), (6, 3)]
    forward = sum(2 * a * b for a, b in layers)
    backward = 2 * forward - 2 * 48 * 4  # no gradient of the pixels
    assert history.flops[0] == (forward + backward) * len(clients[0].train)


def test_momentum_of_own_tensors_stays_and_momentum_of_received_tensors_does_not():
    method = dataclasses.replace(METHOD, momentum=0.9)
    strategy = make_strategy("fedmoe", small_clients(2), method, seed=0)
    run(strategy, Settings(1))
    mixture, state = strategy.models[0], strategy.optimizers[0].state
    assert not any(p in state for p in mixture.shared.parameters())
    assert all("momentum_buffer" in state[p] for p in mixture.own.parameters())


def test_clients_learn_together():
    """Two epochs are enough to tell dark from bright and from striped; chance is a third."""
    clients = [Client(f"{k}", images(k, 45), images(50 + k, 30), make_cnn("cnn5", 3)) for k in range(2)]
    strategy = make_strategy("fedmoe", clients, METHOD, seed=0)
    history = run(strategy, Settings(3))
    assert np.mean(history.final()) > 0.6
    found = history.evaluations[0]
    assert found.gate_weights.shape == (30, 2)
    np.testing.assert_allclose(found.gate_weights.sum(1), 1, atol=1e-5)


def test_summaries():
    assert worst_decile([0.9] * 18 + [0.1, 0.2]) == pytest.approx(0.15)
    assert worst_decile([0.4, 0.6]) == 0.4
    curve = [(2, 0.3), (4, 0.6), (6, 0.5)]
    assert rounds_to(curve, 0.5) == 4
    assert rounds_to(curve, 0.7) is None


def test_bad_settings_are_named():
    for wrong in ({"rounds": 0}, {"rounds": 1, "share": 0.0}, {"rounds": 1, "evaluate_every": 0}):
        with pytest.raises(ConfigError):
            Settings(**wrong)
    for name, options in (
        ("lg-fedavg", {"upper": 0}),
        ("fml", {"alpha": 2}),
        ("fedproto", {"weight": -1}),
        ("moon", {}),
    ):
        with pytest.raises(ConfigError):
            make_strategy(name, small_clients(1), METHOD, seed=0, **options)
    with pytest.raises(ConfigError, match="at least one client"):
        make_strategy("fedmoe", [], METHOD, seed=0)
    with pytest.raises(DataError, match="client lonely has 1 training examples and 9 held out"):
        Client("lonely", images(0, 1), images(0, 9), small_model(0))


def test_gate_histograms_are_shares_of_each_class():
    weights, labels = np.array([0.01, 0.02, 0.99, 0.5, 1.0]), np.array([0, 0, 0, 2, 2])
    found = gate_histograms(weights, labels, 3, bins=10)
    np.testing.assert_allclose(found[0, [0, 9]], [2 / 3, 1 / 3])
    np.testing.assert_allclose(found.sum(1), [1, 0, 1])
    assert found[2, 5] == found[2, 9] == 0.5  # the last bin holds 1.0


def test_pictures_are_written(tmp_path):
    outcomes = [([(1, 0.5), (2, 0.6)], (0.5, 0.7)), ([(1, 0.4), (2, 0.7)], (0.6, 0.8))]
    save_comparison(tmp_path / "a.png", {"classes": {"fedmoe": outcomes, "standalone": outcomes[:1]}})
    save_gate_histograms(tmp_path / "b.png", {"0": (np.array([0.2, 0.9]), np.array([0, 1]))}, CLASSES)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_module_that_answers_as_a_mixture_can_be_trained_and_judged():
    clients = small_clients(1)
    model = make_strategy("standalone", clients, METHOD, seed=0).models[0]
    found = evaluate(model, clients[0].held_out)
    assert found.gate_weights.tolist() == [[0.0, 1.0]] * 9
    batch = clients[0].train.batch(np.arange(4))
    assert mixture_loss(model, batch).item() == cross_entropy(model(batch)[0], batch.labels).item()
