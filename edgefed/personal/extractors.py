"""The shared extractors G(theta) that travel: small, the same for every client, known by name.

An extractor is made from its name and a seed alone, on the aggregator and on a client; only its tensors cross the wire.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgefed.methods.fedmoe import IMAGES, extractor_task
from edgefed.personal.batches import Inputs
from edgefed.personal.networks import CNNS, IMAGE_SHAPE, cnn_features

EXTRACTOR_UNIT = "extractor"
"""Key of the one unit that theta is on the wire."""


class SharedExtractor(nn.Module):
    """inputs -> (B, width). ``gate_features``: what the gate sees of an input, flat (B, gate_in)."""

    task: str
    width: int
    gate_in: int

    def gate_features(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError


class CnnExtractor(SharedExtractor):
    """The extractor of one of the paper's CNNs, for 32x32 RGB images; 665,048 parameters for cnn5."""

    task = IMAGES

    def __init__(self, name: str):
        super().__init__()
        shape = CNNS[name]
        self.features = cnn_features(shape)
        self.width = shape.hidden[1]
        channels, height, width = IMAGE_SHAPE
        self.gate_in = channels * height * width

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs)

    def gate_features(self, inputs: Tensor) -> Tensor:
        """The image itself, flat."""
        return inputs.flatten(1)


def make_extractor(name: str, seed: int) -> SharedExtractor:
    """The extractor with the first weights of a run: the same for the same seed. Raises ConfigError."""
    extractor_task(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CnnExtractor(name)
