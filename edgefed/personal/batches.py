"""What a client's data look like to its mixture: examples that come in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Inputs = Tensor | Mapping[str, Tensor]
"""What an extractor is called with: one tensor (B, ...), or tensors by name, as a tokenizer gives them."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """``shared``: inputs of the shared extractor. ``own``: inputs of the client's model, where they differ (another
    tokenizer). ``labels``: int64, (B,) classes, or (B, T) next tokens with -100 where nothing is learned.
    """

    shared: Inputs
    own: Inputs
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(_moved(self.shared, device), _moved(self.own, device), self.labels.to(device))


def _moved(inputs: Inputs, device: torch.device | str) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class Samples(Protocol):
    """Labelled examples of one client, in memory or on its disk."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their labels."""
    labels: np.ndarray
    """(N,) int64 class of each example."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples of these indices, on the CPU."""
        ...

    def subset(self, indices: np.ndarray) -> Samples:
        """Only these examples; the classes stay."""
        ...


def batches(samples: Samples, batch_size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """All examples once, shuffled if ``rng`` is given. A last batch of one joins the batch before it (unless all are of
    one): the statistics of one example normalise it to nothing.
    """
    order = np.arange(len(samples)) if rng is None else rng.permutation(len(samples))
    starts = list(range(0, len(order), batch_size))
    if batch_size > 1 and len(starts) > 1 and len(order) - starts[-1] == 1:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        yield samples.batch(order[start:end])


def num_batches(num_examples: int, batch_size: int) -> int:
    """How many batches `batches` gives."""
    whole, rest = divmod(num_examples, batch_size)
    return max(1, whole) if rest == 1 else whole + (rest > 0)


def hold_out(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """(training, held-out) examples; see `held_out_rows`."""
    train, held = held_out_rows(samples.labels, share, seed)
    return samples.subset(train), samples.subset(held)


def held_out_rows(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (training, held-out) examples, each class divided alike; one of a class at least is trained on."""
    rng = np.random.default_rng(seed)
    train, held = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(int(round(share * len(rows))), len(rows) - 1)
        held.append(rows[:count])
        train.append(rows[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held))


# Labelled images of one client.


class ImageSamples:
    """``images`` (N, H, W, C) uint8, ``labels`` (N,) int64, in memory. A batch is float32 (B, C, H, W) in [-1, 1]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        chosen = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).contiguous()
        pixels = chosen.to(torch.float32).div_(127.5).sub_(1.0)
        return Batch(pixels, pixels, torch.from_numpy(self.labels[indices]))

    def subset(self, indices: np.ndarray) -> ImageSamples:
        return ImageSamples(self.images[indices], self.labels[indices], self.classes)
