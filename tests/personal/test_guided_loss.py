"""What FedMoE's loss may have added: each expert's own answer, and features that stay near the mean of their class."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgefed.errors import ConfigError
from edgefed.methods.fedmoe import FedMoE
from edgefed.personal.extractors import make_extractor
from edgefed.personal.local_training import class_means, cross_entropy, guided_loss, mixture_loss
from edgefed.personal.mixture import FixedGate, LocalMixture
from edgefed.personal.networks import PersonalModel
from edgefed.personal.samples import Batch, ImageSamples
from edgefed.simulation.personal_baselines import make_strategy
from edgefed.simulation.personal_federation import Client, Settings, run

CLASSES = ("dark", "bright", "neither")


class Brightness(nn.Module):
    """Features of an image: its mean level in [-1, 1], times a weight, twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean = self.scale * x.mean((1, 2, 3))
        return torch.stack([mean, 2 * mean], 1)


def grey(levels, labels):
    """One-colour images of these byte values: b is b / 127.5 - 1 to a model."""
    pixels = np.repeat(np.asarray(levels, np.uint8), 32 * 32 * 3).reshape(-1, 32, 32, 3)
    return ImageSamples(pixels, np.asarray(labels, np.int64), CLASSES)


SAMPLES = grey([0, 51, 255], [0, 0, 1])  # levels -1, -.6 and 1


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    own = PersonalModel(Brightness(), nn.Linear(2, 3), 2)
    return LocalMixture(make_extractor("cnn5", 0), own, FixedGate(0.25))


def batch_of(samples: ImageSamples = SAMPLES) -> Batch:
    return samples.batch(np.arange(len(samples)))


def test_means_of_classes(mixture):
    means, counts = class_means(mixture.own.extractor, SAMPLES)
    torch.testing.assert_close(means, torch.tensor([[-0.8, -1.6], [1.0, 2.0], [0.0, 0.0]]))
    assert counts.tolist() == [2, 1, 0]
    assert not means.requires_grad


def test_without_options_the_loss_is_the_papers(mixture):
    assert guided_loss(FedMoE(), mixture, SAMPLES, begun=True) is mixture_loss
    assert guided_loss(FedMoE(feature_pull=3.0), mixture, SAMPLES, begun=False) is mixture_loss, "nothing learnt yet"


def test_each_expert_answers_alone(mixture):
    loss = guided_loss(FedMoE(expert_loss=0.5), mixture, SAMPLES, begun=False)(mixture, batch_of())
    batch, header = batch_of(), mixture.own.header
    answers = [header(mixture.projection(mixture.shared(batch.shared))), header(mixture.own.extractor(batch.own))]
    alone = [cross_entropy(answer, batch.labels) for answer in answers]
    wanted = mixture_loss(mixture, batch) + 0.5 * (alone[0] + alone[1]) / 2
    torch.testing.assert_close(loss, wanted)


def test_features_are_pulled_to_the_means_of_when_the_round_began(mixture):
    loss_of = guided_loss(FedMoE(feature_pull=3.0), mixture, SAMPLES, begun=True)
    with torch.no_grad():
        mixture.own.extractor.scale.fill_(2.0)  # features (-2, -4), (-1.2, -2.4), (2, 4); the means stay
    batch = batch_of(grey([0, 51, 255, 255], [0, 0, 1, 2]))  # nothing is known of the last one's class
    distance = (1.2**2 + 2.4**2) / 2 + (0.4**2 + 0.8**2) / 2 + (1.0**2 + 2.0**2) / 2
    wanted = mixture_loss(mixture, batch).item() + 3 * distance / 4
    assert loss_of(mixture, batch).item() == pytest.approx(wanted, rel=1e-5)
    loss_of(mixture, batch).backward()
    pulled = mixture.own.extractor.scale.grad.clone()
    mixture.zero_grad()
    mixture_loss(mixture, batch).backward()
    assert pulled > mixture.own.extractor.scale.grad, "downhill is towards the means"


def clients(classes=CLASSES):
    """Two clients with brighter and darker images, each in a light of its own."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(2):
        labels = np.arange(24) % 2
        light = rng.normal(100 + 50 * labels, 40)[:, None, None, None]  # of each image
        pixels = rng.normal(light, 20, (24, 32, 32, 3)).clip(0, 255)
        samples = ImageSamples(pixels.astype(np.uint8), labels.astype(np.int64), classes)
        torch.manual_seed(index)
        own = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 8), nn.ReLU())
        train, held_out = samples.subset(np.arange(16)), samples.subset(np.arange(16, 24))
        made.append(Client(f"{index}", train, held_out, PersonalModel(own, nn.Linear(8, 3), 8)))
    return made


@torch.no_grad()
def spread(strategy) -> float:
    """Mean square distance of features to the mean of their class."""
    found = []
    for client, model in zip(strategy.clients, strategy.models, strict=True):
        means, _ = class_means(model.own.extractor, client.train)
        features = model.own.extractor(client.train.batch(np.arange(len(client.train))).own)
        found.append(float((features - means[torch.from_numpy(client.train.labels)]).square().mean()))
    return float(np.mean(found))


def test_features_of_a_class_come_together_and_the_first_round_is_the_papers():
    plain = FedMoE(batch_size=8, model_lr=0.05, extractor_lr=0.02)
    guided = dataclasses.replace(plain, feature_pull=3.0)
    with_options, without = (make_strategy("fedmoe", clients(), method, seed=0) for method in (guided, plain))
    losses = [[each.losses for each in run(strategy, Settings(4)).rounds] for strategy in (with_options, without)]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
    assert spread(with_options) < 0.8 * spread(without)


def test_text_to_be_continued_has_no_classes_to_pull_to():
    with pytest.raises(ConfigError, match="feature_pull is 1.0"):
        make_strategy("fedmoe", clients(classes=()), FedMoE(feature_pull=1.0), seed=0)
    for wrong in (-1.0, float("nan"), 1e9):
        for option in ("feature_pull", "expert_loss"):
            with pytest.raises(ConfigError, match=option):
                FedMoE(**{option: wrong})
