"""Local epochs of one client, the losses that they minimise, and evaluation on held-out examples.

The paper's loss is the cross-entropy of the mixture. Two terms can be added (ours, off by default), against overfitting
to a few examples:

    L = CE(y) + beta / 2 (CE(header(P(G(x)))) + CE(header(F(x)))) + lambda mean (F(x) - C^y)^2

beta, ``expert_loss``: each of the two experts is also trained on its own, so that the gate mixes two complete answers.
lambda, ``feature_pull``: features of the own extractor stay near C^y, their mean over the client's own examples of the
class at the beginning of the round. This is the penalty of FedProto (arXiv 2105.00243, eq. 7) without a federation: no
prototype is exchanged. The first round of a client goes without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import ConfigError, DataError, TrainingDiverged
from edgefed.methods.interface import PersonalMethod
from edgefed.personal.mixture import LocalMixture
from edgefed.personal.samples import Batch, IntArray, Samples, batches
from edgefed.training.encoding import IGNORED_LABEL

EVALUATION_BATCH = 256
"""Examples per batch of an evaluation, unless the samples set ``evaluation_batch``."""
Loss: TypeAlias = Callable[[Any, Batch], Tensor]
"""(model, batch) -> the mean loss of the batch."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """Settings of SGD: learning rates of theta, of the own model and of the gate, momentum and weight decay."""

    extractor: float = 0.01
    model: float = 0.01
    gate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0


def make_optimizer(groups: Mapping[str, list[nn.Parameter]], rates: Rates) -> torch.optim.SGD:
    """SGD with a learning rate for each group of `LocalMixture.groups` that has parameters."""
    settings = [{"params": values, "lr": getattr(rates, name)} for name, values in groups.items() if values]
    return torch.optim.SGD(settings, momentum=rates.momentum, weight_decay=rates.weight_decay)


def mixture_loss(mixture: nn.Module, batch: Batch) -> Tensor:
    """The paper's loss: cross-entropy of the mixture, for theta, own model and gate together."""
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
    loss_of: Loss = mixture_loss,
) -> float:
    """Minimise ``loss_of(mixture, batch)`` over all examples, ``epochs`` times; ``on_step`` is called after each step.

    Returns:
        The mean loss per example of the last epoch.

    Raises:
        TrainingDiverged: the loss is not finite.
        DataError: no example, or a single one where batches are normalised.
    """
    if not len(samples):
        raise DataError("the training data is empty", remedy="Pass more data, or hold out less (`held_out`).")
    mixture.train()
    mean = math.nan
    for _ in range(epochs):
        total, count = 0.0, 0
        for batch in batches(samples, batch_size, rng):
            batch = batch.to(device)
            try:
                loss = loss_of(mixture, batch)
            except ValueError as error:  # BatchNorm and SwitchNorm refuse statistics over one example
                if len(batch.labels) > 1:
                    raise
                raise DataError(
                    f"cannot train on a single example: {error}",
                    remedy="Pass more data, or serve with the method option gate_norm=layer if no model needs batches.",
                ) from error
            if not torch.isfinite(loss):
                raise TrainingDiverged(f"the training loss is {float(loss.detach())}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, count = total + float(loss.detach()) * len(batch.labels), count + len(batch.labels)
            on_step()
        mean = total / count
    return mean


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labels that are not ignored, in float32; logits (..., classes), labels (...,)."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results on held-out examples."""

    loss: float
    """Nats per example, for next-token prediction per token; NaN without examples."""
    accuracy: float
    """Share of correct answers, 0 to 1; NaN without examples."""
    gate_weights: npt.NDArray[np.float32]
    """(N, 2): [a_G, a_F] of each example, in order; for next-token prediction the mean over its tokens."""
    labels: IntArray
    """(N,)"""


@torch.no_grad()
def evaluate(mixture: nn.Module, samples: Samples, device: torch.device | str = "cpu") -> Evaluation:
    """Loss, accuracy and gate weights of a `LocalMixture` or a model with the same outputs, left in evaluation mode."""
    mixture.eval()
    total, correct, count, weights = 0.0, 0, 0, [np.zeros((0, 2), np.float32)]
    for batch in evaluation_batches(samples, device):
        logits, gate = mixture(batch)
        known = batch.labels != IGNORED_LABEL
        n = int(known.sum())
        total += float(cross_entropy(logits, batch.labels)) * n
        correct += int(((logits.argmax(-1) == batch.labels) & known).sum())
        count += n
        weights.append(gate.float().reshape(len(gate), -1, 2).mean(1).cpu().numpy())
    if not count:
        return Evaluation(math.nan, math.nan, weights[0], np.zeros(0, np.int64))
    return Evaluation(total / count, correct / count, np.concatenate(weights), np.asarray(samples.labels))


def evaluation_batches(samples: Samples, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """All examples once, in order, on ``device``."""
    size = getattr(samples, "evaluation_batch", EVALUATION_BATCH)
    for start in range(0, len(samples), size):
        batch: Batch = samples.batch(np.arange(start, min(start + size, len(samples))))
        yield batch.to(device)


@torch.no_grad()
def class_means(extractor: nn.Module, samples: Samples, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean features (classes, width) and number of examples (classes,) of each class, float32 on the CPU.

    A class without examples has zeros. ``extractor`` is left in evaluation mode. Raises ValueError without examples.
    """
    extractor.eval()
    counts = torch.zeros(len(samples.classes))
    sums: Tensor | None = None
    for batch in evaluation_batches(samples, device):
        labels = batch.labels.flatten()
        known = labels >= 0
        features = extractor(batch.own).flatten(0, -2)[known].double()
        sums = features.new_zeros(len(counts), features.shape[-1]) if sums is None else sums
        sums.index_add_(0, labels[known], features)
        counts += torch.bincount(labels[known], minlength=len(counts)).cpu()
    if sums is None:
        raise ValueError("class_means needs at least one example")
    return (sums.cpu() / counts.clamp(min=1)[:, None]).float(), counts


def pull(features: Tensor, labels: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """Mean over examples and features of (f(x) - C^y)^2; examples of classes without a mean contribute 0."""
    labels = labels.flatten()
    has = (labels >= 0) & known[labels.clamp(min=0)]
    distance = (features.float().flatten(0, -2)[has] - means[labels[has]]).square().mean(-1)
    return distance.sum() / len(labels)


def check_guided(method: PersonalMethod, classes: tuple[str, ...]) -> None:
    """Raise ConfigError for ``feature_pull`` with text that has no classes."""
    if method.feature_pull and not classes:
        raise ConfigError(
            f"{method.name}: feature_pull is {method.feature_pull}, but next-token prediction has no classes",
            remedy="Serve without the method's option feature_pull, or join with `task=text`.",
        )


def guided_loss(
    method: PersonalMethod, mixture: LocalMixture, samples: Samples, *, begun: bool, device: torch.device | str = "cpu"
) -> Loss:
    """The loss of a client's next round: the paper's, with the terms that ``method`` adds.

    ``begun``: whether the client has trained before; only then are its features pulled. Call `check_guided` first.
    """
    beta, strength = method.expert_loss, method.feature_pull if begun else 0.0
    if not beta and not strength:
        return mixture_loss
    if strength:
        means, counts = class_means(mixture.own.extractor, samples, device)
        pulled = partial(pull, means=means.to(device), known=(counts > 0).to(device))

    def loss_of(mixture: LocalMixture, batch: Batch) -> Tensor:
        shared, own = mixture.expert_features(batch)
        header = mixture.own.header
        loss = cross_entropy(header(mixture.mix(shared, own, mixture.weights(batch))), batch.labels)
        if beta:
            alone = cross_entropy(header(shared), batch.labels) + cross_entropy(header(own), batch.labels)
            loss = loss + beta / 2 * alone
        if strength:
            loss = loss + strength * pulled(own, batch.labels)
        return loss

    return loss_of
