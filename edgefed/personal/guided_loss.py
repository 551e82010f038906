"""Two additions to FedMoE's loss, against learning a few examples by heart; ours, off by default, and nothing travels.

    L = CE(y) + beta / 2 (CE(header(P(G(x)))) + CE(header(F(x)))) + lambda mean (F(x) - C^y)^2

beta, ``expert_loss``: each of the two experts also learns to answer alone, so that the gate mixes two answers and not
two halves of one. lambda, ``feature_pull``: features of the own extractor stay near C^y, their mean over the
client's own examples of the class when the round began. That is FedProto's penalty (arXiv 2105.00243, eq. 7) without
its federation: no prototype is sent or received. The first round of a client goes without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from edgefed.errors import ConfigError
from edgefed.methods.interface import PersonalMethod
from edgefed.personal.batches import Batch, Samples
from edgefed.personal.local_training import cross_entropy, evaluation_batches, mixture_loss
from edgefed.personal.mixture import LocalMixture


@torch.no_grad()
def class_means(extractor: nn.Module, samples: Samples, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(mean features of each class (classes, width), examples of each class (classes,)) on the CPU, in float32; zeros
    for a class without examples. ``extractor`` is left in evaluation mode.
    """
    extractor.eval()
    counts = torch.zeros(len(samples.classes))
    sums = None
    for batch in evaluation_batches(samples, device):
        labels = batch.labels.flatten()
        known = labels >= 0
        features = extractor(batch.own).flatten(0, -2)[known].double()
        sums = features.new_zeros(len(counts), features.shape[-1]) if sums is None else sums
        sums.index_add_(0, labels[known], features)
        counts += torch.bincount(labels[known], minlength=len(counts)).cpu()
    return (sums.cpu() / counts.clamp(min=1)[:, None]).float(), counts


def pull(features: Tensor, labels: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """Mean over examples and features of (f(x) - C^y)^2; examples of classes without a mean count as 0."""
    labels = labels.flatten()
    has = (labels >= 0) & known[labels.clamp(min=0)]
    distance = (features.float().flatten(0, -2)[has] - means[labels[has]]).square().mean(-1)
    return distance.sum() / len(labels)


def check_guided(method: PersonalMethod, classes: tuple[str, ...]) -> None:
    """Raise ConfigError where there are no classes to pull features to."""
    if method.feature_pull and not classes:
        raise ConfigError(
            f"fedmoe: feature_pull is {method.feature_pull}, and text to be continued has no classes",
            remedy="Serve without the method's option feature_pull, or join with `task=text`.",
        )


def guided_loss(
    method: PersonalMethod, mixture: LocalMixture, samples: Samples, *, begun: bool, device: torch.device | str = "cpu"
) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a client's steps in a round that is about to begin; the paper's where ``method`` adds nothing.

    ``begun``: the client has trained before, so its features say something. `check_guided` has been asked.
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
