"""Differential privacy: sensitivity, noise on every trained unit, and what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import toy_run
from toy_run import Toy, new_units, run_config

from edgefed.aggregator.creation import create_run
from edgefed.aggregator.privacy import GaussianNoise, check_privacy, spent
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.errors import ConfigError
from edgefed.protocol.privacy import PrivacyConfig

CLIENTS = ("a", "b", "c", "d")


def private_run(folder, noise=1e-12, clip=1e6, rounds=2, **options):
    import msgspec

    privacy = PrivacyConfig(noise=noise, clip=clip, delta=1e-5)
    config = msgspec.structs.replace(run_config(rounds, **options), privacy=privacy)
    policy = RoundPolicy(rounds=rounds, min_clients=len(CLIENTS))
    create_run(folder, config, policy, new_units(np.random.default_rng(0)))
    return folder


def flat(values) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in values.items() if array.dtype != np.uint16}


def fold(folder, shares=(1.0,) * 4, scale=1.0):
    """One round of an open run. Returns the values before it, those that each client sent, and those after it."""
    toy = Toy(folder)
    try:
        toy.join(*CLIENTS)
        before, sent = flat(toy.values()), {}
        for seed, (client_id, share) in enumerate(zip(CLIENTS, shares, strict=True)):
            units = [unit for unit in toy.manifest().units if unit.trainable]
            tensors = toy_run.trained(units[: round(len(units) * share)], seed)
            for name, (dtype, array) in tensors.items():
                tensors[name] = (dtype, (before[name] + scale * array.astype(np.float64)).astype(array.dtype))
            sent[client_id] = {name: array.astype(np.float64) for name, (_, array) in tensors.items()}
            toy.send(toy_run.make_update(toy.manifest(), client_id, tensors, num_examples=10 ** (seed + 1)))
        toy.run.fold_pending()
        return before, sent, flat(toy.values()), toy.run.status()
    finally:
        toy.close()


def mean_change(before, sent, clip=math.inf):
    """(1/n) sum min(1, S / |Delta_c|) Delta_c, as the module's docstring has it."""
    total = {name: np.zeros_like(array) for name, array in before.items()}
    for tensors in sent.values():
        deltas = {name: array - before[name] for name, array in tensors.items()}
        norm = math.sqrt(sum(float(np.sum(delta**2)) for delta in deltas.values()))
        for name, delta in deltas.items():
            total[name] += min(1.0, clip / norm) * delta / len(sent)
    return total


def test_all_clients_weigh_the_same_and_absent_units_count_as_unchanged(tmp_path):
    before, sent, after, _ = fold(private_run(tmp_path / "state"), shares=(1.0, 1.0, 0.5, 0.3))
    for name, change in mean_change(before, sent).items():
        np.testing.assert_allclose(after[name] - before[name], change, atol=3e-3)


def test_one_client_changes_the_sum_by_at_most_the_clip(tmp_path):
    clip = 0.5
    before, sent, after, _ = fold(private_run(tmp_path / "state", clip=clip), scale=100.0)
    moved = math.sqrt(sum(float(np.sum((after[n] - before[n]) ** 2)) for n in before))
    assert moved <= clip * 1.01
    expected = mean_change(before, sent, clip)
    name = "layer0.expert0|up"
    np.testing.assert_allclose(after[name] - before[name], expected[name], atol=1e-5)


def test_every_trained_unit_gets_the_same_noise_also_one_that_nobody_sent(tmp_path):
    noise, clip = 50.0, 1e-3
    before, sent, after, status = fold(private_run(tmp_path / "state", noise, clip), shares=(0.3,) * 4, scale=1e-6)
    unsent = [name for name in before if all(name not in tensors for tensors in sent.values())]
    assert unsent
    for names in (unsent, [name for name in before if name not in unsent]):
        drawn = np.concatenate([(after[n] - before[n]).ravel() for n in names if before[n].size > 20])
        assert scipy.stats.kstest(drawn, "norm", (0, noise * clip / len(CLIENTS))).pvalue > 1e-3
    assert status.history[0].privacy == spent(PrivacyConfig(noise=noise, clip=clip, delta=1e-5), 1)


def test_noise_is_normal_and_never_the_same():
    drawn = GaussianNoise(3.0).draw(200_001)
    assert drawn.shape == (200_001,)
    assert scipy.stats.kstest(drawn / 3.0, "norm").pvalue > 1e-3
    assert not np.array_equal(GaussianNoise(3.0).draw(8), GaussianNoise(3.0).draw(8))


@pytest.mark.parametrize(("noise", "rounds"), [(1.1, 100), (0.5, 1), (2.0, 10), (8.0, 4)])
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(noise, rounds):
    """Theorem 8 of arXiv 1805.06530, for k rounds as one with noise / sqrt(k)."""
    epsilon, sigma = spent(PrivacyConfig(noise=noise, clip=1.0, delta=1e-5), rounds).epsilon, noise / math.sqrt(rounds)
    cdf = scipy.stats.norm.cdf
    delta = cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * cdf(-0.5 / sigma - epsilon * sigma)
    assert delta == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(("noise", "rounds"), [(1.1, 100), (0.5, 1), (2.0, 10)])
def test_epsilon_agrees_with_composition_by_privacy_loss_distributions(noise, rounds):
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
    found = spent(PrivacyConfig(noise=noise, clip=1.0, delta=1e-5), rounds).epsilon
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-4)


def test_the_cost_is_of_the_client_with_most_updates_and_survives_a_restart(tmp_path):
    folder = private_run(tmp_path / "state", noise=2.0, clip=1.0)
    for done in (1, 2):
        _, _, _, status = fold(folder)
        privacy = status.history[-1].privacy
        assert (privacy.rounds, privacy.epsilon) == (
            done, spent(PrivacyConfig(noise=2.0, clip=1.0, delta=1e-5), done).epsilon
        )  # fmt: skip
        assert "epsilon" in str(privacy)


def test_invalid_settings_are_named(tmp_path):
    for wrong in ({"noise": 0.0}, {"clip": math.inf}, {"delta": 1.0}):
        config = PrivacyConfig(**{"noise": 1.0, "clip": 1.0, "delta": 1e-5, **wrong})
        with pytest.raises(ConfigError, match=f"dp_{next(iter(wrong))}"):
            check_privacy(config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dp_noise": 1.0}, "needs `dp_clip`"),
        ({"dp_clip": 1.0}, "no effect without"),
        ({"dp_noise": 1.0, "dp_clip": 1.0, "clip": 3.0}, "cannot be combined"),
        ({"dp_noise": 1.0, "dp_clip": 1.0, "robust": "median"}, "cannot be combined"),
        ({"dp_noise": 1.0, "dp_clip": 1.0, "method": "fedmoe"}, "no effect with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_the_import(tmp_path, settings, says):
    from edgefed.api.server import Server

    with pytest.raises(ConfigError, match=says):
        Server(state=tmp_path / "run", port=0, **settings).serve()
