"""One client's local epochs and what its mixture answers on examples it has not seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import DataError, TrainingDiverged
from edgefed.personal.batches import Batch, Samples, batches

IGNORED_LABEL = -100
EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Rates:
    """SGD of the local epochs: learning rates of theta, of the own model and of the gate."""

    extractor: float = 0.01
    model: float = 0.01
    gate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0


def make_optimizer(groups: Mapping[str, list[nn.Parameter]], rates: Rates) -> torch.optim.SGD:
    """SGD with a learning rate per group of `LocalMixture.groups`; a group without parameters is left out."""
    settings = [{"params": values, "lr": getattr(rates, name)} for name, values in groups.items() if values]
    return torch.optim.SGD(settings, momentum=rates.momentum, weight_decay=rates.weight_decay)


def mixture_loss(mixture: nn.Module, batch: Batch) -> Tensor:
    """The paper's loss: end-to-end cross-entropy on theta, own model and gate at once."""
    logits, _ = mixture(batch)
    return cross_entropy(logits, batch.labels)


def train_epochs(
    mixture: nn.Module,
    samples: Samples,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch_size: int,
    rng: np.random.Generator,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = mixture_loss,
) -> float:
    """Minimise ``loss_of(mixture, batch)`` over all examples, ``epochs`` times. Returns the mean loss per example of
    the last epoch. ``on_step`` is called after each step; what it raises passes. Raises TrainingDiverged, or DataError
    when there is no example, or only one where batches are normalised.
    """
    if not len(samples):
        raise DataError("there is no example to train on", remedy="Pass more data, or hold out less (`held_out`).")
    mixture.train()
    mean = math.nan
    for _ in range(epochs):
        total, count = 0.0, 0
        for batch in batches(samples, batch_size, rng):
            batch = batch.to(device)
            try:
                loss = loss_of(mixture, batch)
            except ValueError as error:  # torch's and SwitchNorm's refusal of statistics over one example
                if len(batch.labels) > 1:
                    raise
                raise DataError(
                    f"one example alone cannot be trained on: {error}",
                    remedy="Pass more data, or serve with the method option gate_norm=layer if no model needs batches.",
                ) from error
            if not torch.isfinite(loss):
                raise TrainingDiverged(f"the loss is {float(loss.detach())}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count = total + float(loss.detach()) * len(batch.labels), count + len(batch.labels)
            on_step()
        mean = total / count
    return mean


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over what is to be learned; logits (..., classes) in float32, labels (...,)."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of held-out examples. ``gate_weights`` (N, 2): [a_G, a_F] of each, in the order of the examples; ``labels`` (N,).
    ``loss`` in nats per example. For next-token prediction weights are means over tokens, the loss is per token.
    NaN without examples.
    """

    loss: float
    accuracy: float
    gate_weights: np.ndarray
    labels: np.ndarray


@torch.no_grad()
def evaluate(mixture: nn.Module, samples: Samples, device: torch.device | str = "cpu") -> Evaluation:
    """Loss, accuracy and gate weights of a `LocalMixture`, or of what answers as one does; it is left in evaluation
    mode.
    """
    mixture.eval()
    total, right, count, weights = 0.0, 0, 0, [np.zeros((0, 2), np.float32)]
    for batch in evaluation_batches(samples, device):
        logits, gate = mixture(batch)
        known = batch.labels != IGNORED_LABEL
        n = int(known.sum())
        total += float(cross_entropy(logits, batch.labels)) * n
        right += int(((logits.argmax(-1) == batch.labels) & known).sum())
        count += n
        weights.append(gate.float().reshape(len(gate), -1, 2).mean(1).cpu().numpy())
    if not count:
        return Evaluation(math.nan, math.nan, weights[0], np.zeros(0, np.int64))
    return Evaluation(total / count, right / count, np.concatenate(weights), np.asarray(samples.labels))


def evaluation_batches(samples: Samples, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """All examples once, in order and on the device, as many at a time as evaluation holds."""
    size = getattr(samples, "evaluation_batch", EVALUATION_BATCH)
    for start in range(0, len(samples), size):
        batch: Batch = samples.batch(np.arange(start, min(start + size, len(samples))))
        yield batch.to(device)
