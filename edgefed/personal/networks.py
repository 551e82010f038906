"""Models of clients: what a personal model is, and the paper's five CNNs (Table 1) by name.

    model       cnn1     cnn2     cnn3     cnn4     cnn5
    filters    16, 32   16, 16   16, 32   16, 32   16, 32      5x5 convolutions, each with ReLU and 2x2 max-pooling
    FC1, FC2  2000,500 2000,500 1000,500  800,500  500,500     each with ReLU
    FC3                       classes                          the header
    params    2621558  1815142  1320558  1060358   670058      32x32 RGB, 10 classes

All of them end in 500 features, so any of them goes with the shared extractor, which is that of cnn5 (665,048
parameters).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from edgefed.personal.batches import Inputs

IMAGE_SHAPE = (3, 32, 32)
"""Channels, height and width of what the paper's CNNs see."""


@dataclasses.dataclass(frozen=True)
class CnnShape:
    """Filters of the two convolutions, widths of the two hidden layers."""

    filters: tuple[int, int]
    hidden: tuple[int, int]


CNNS: Mapping[str, CnnShape] = MappingProxyType(
    {
        "cnn1": CnnShape((16, 32), (2000, 500)),
        "cnn2": CnnShape((16, 16), (2000, 500)),
        "cnn3": CnnShape((16, 32), (1000, 500)),
        "cnn4": CnnShape((16, 32), (800, 500)),
        "cnn5": CnnShape((16, 32), (500, 500)),
    }
)


class PersonalModel(nn.Module):
    """A client's model: ``header(extractor(inputs))``.

    ``extractor``: inputs -> (B, width), or (B, T, width) for one answer per token. ``header``: the same features ->
    logits (..., classes).
    """

    def __init__(self, extractor: nn.Module, header: nn.Module, width: int):
        super().__init__()
        self.extractor = extractor
        self.header = header
        self.width = width

    def forward(self, inputs: Inputs) -> Tensor:
        return self.header(self.extractor(inputs))


def cnn_features(shape: CnnShape, image: tuple[int, int, int] = IMAGE_SHAPE) -> nn.Sequential:
    """The extractor of a CNN: images (B, C, H, W) -> features (B, FC2)."""
    channels, height, width = image
    first, second = shape.filters
    flat = second * _pooled(_pooled(height)) * _pooled(_pooled(width))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, 5), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(first, second, 5), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2), flatten=nn.Flatten(),
            fc1=nn.Linear(flat, shape.hidden[0]), relu3=nn.ReLU(),
            fc2=nn.Linear(shape.hidden[0], shape.hidden[1]), relu4=nn.ReLU(),
        )
    )  # fmt: skip


def make_cnn(name: str, num_classes: int) -> PersonalModel:
    """One of `CNNS` for 32x32 RGB images. Weights come from torch's generator."""
    shape = CNNS[name]
    width = shape.hidden[1]
    return PersonalModel(cnn_features(shape), nn.Linear(width, num_classes), width)


def _pooled(side: int) -> int:
    return (side - 4) // 2
