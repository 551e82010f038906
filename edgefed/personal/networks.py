"""Models of clients: what a personal model is, the paper's five CNNs (Table 1), and two small models of text.

    model       cnn1     cnn2     cnn3     cnn4     cnn5
    filters    16, 32   16, 16   16, 32   16, 32   16, 32      5x5 convolutions, each with ReLU and 2x2 max-pooling
    FC1, FC2  2000,500 2000,500 1000,500  800,500  500,500     each with ReLU
    FC3                       classes                          the header
    params    2621558  1815142  1320558  1060358   670058      32x32 RGB, 10 classes

    text-gru   packaged tokenizer; Embedding(2048, 128), one GRU of 256                   width 256, 558,592 parameters
    text-cnn   bytes; Embedding(259, 64), convolutions over 3, 5 and 7 of them with 100
               filters each, ReLU, maximum over the text (Kim, arXiv 1408.5882)           width 300, 112,876 parameters

All CNNs end in 500 features, the width of the shared extractor, which is that of cnn5 (665,048 parameters). The models
of text take {"input_ids", "attention_mask"}, (B, T) each with padding last; their parameters exclude the header.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from edgefed.personal.samples import Inputs

IMAGE_SHAPE = (3, 32, 32)
"""Channels, height and width of the inputs of the paper's CNNs."""
TEXT_GRU, TEXT_CNN = "text-gru", "text-cnn"
TEXT_NETWORKS = (TEXT_GRU, TEXT_CNN)


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

    The extractor maps inputs to features (B, width), or (B, T, width) with one output per token. The header maps
    features to logits (..., classes).
    """

    def __init__(self, extractor: nn.Module, header: nn.Module, width: int):
        super().__init__()
        self.extractor = extractor
        self.header = header
        self.width = width

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits (B, classes) or (B, T, classes)."""
        logits: Tensor = self.header(self.extractor(inputs))
        return logits


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
    """One of `CNNS` for 32x32 RGB images, with weights from torch's generator."""
    shape = CNNS[name]
    width = shape.hidden[1]
    return PersonalModel(cnn_features(shape), nn.Linear(width, num_classes), width)


def _pooled(side: int) -> int:
    return (side - 4) // 2


class GruExtractor(nn.Module):
    """The mean of a GRU's states, (B, 256), or with ``per_token`` the states, (B, T, 256)."""

    width = 256

    def __init__(self, vocab_size: int, per_token: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 128)
        self.gru = nn.GRU(128, self.width, batch_first=True)
        self.per_token = per_token

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of a text, or of each of its tokens."""
        states: Tensor = self.gru(self.embedding(inputs["input_ids"]))[0]
        return states if self.per_token else masked_mean(states, inputs["attention_mask"])


class ByteCnnExtractor(nn.Module):
    """The maximum of each filter over the text, (B, 300)."""

    width = 300

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 64)
        self.convolutions = nn.ModuleList(nn.Conv1d(64, 100, size, padding=size // 2) for size in (3, 5, 7))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of a text."""
        mask = inputs["attention_mask"].unsqueeze(1)  # (B, 1, T)
        vectors = self.embedding(inputs["input_ids"]).transpose(1, 2) * mask
        # ReLU outputs are at least 0, so the zeros at padding never exceed the maximum over the text.
        answers = [torch.relu(convolution(vectors)) * mask for convolution in self.convolutions]
        return torch.cat([answer.amax(2) for answer in answers], dim=1)


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens: (B, T, width) with a mask (B, T), at least one 1 per row -> (B, width)."""
    real = mask.to(vectors.dtype).unsqueeze(-1)
    return (vectors * real).sum(1) / real.sum(1)


def running_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens up to and including each token, (B, T, width)."""
    real = mask.to(vectors.dtype).unsqueeze(-1)
    return (vectors * real).cumsum(1) / real.cumsum(1)
