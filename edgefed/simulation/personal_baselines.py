"""FedMoE and the methods that it is compared with, as strategies of `personal_federation.run`.

    name                 paper              trains                       exchanged per client and round
    fedmoe               2402.01350         mixture, gate per example    theta
    fedmoe-shared-only   (ablation, a_G=1)  theta and header             theta
    static               (ablation)         mixture, equal weights       theta
    standalone           -                  own model                    nothing
    fedavg               1602.05629         one model for all            the model
    fedproto             2105.00243         own model                    mean features of each class
    lg-fedavg            2001.01523         own model                    its upper layers
    fml                  2006.16765         own model, a small shared    the small model

All of them use the same SGD, epochs and batches, from the hyper-parameters of FedMoE. Exchanged models are trained with
``extractor_lr``, the clients' own with ``model_lr``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import ConfigError
from edgefed.methods.interface import PersonalMethod
from edgefed.personal.extractors import make_extractor
from edgefed.personal.local_training import Loss, check_guided, class_means, cross_entropy, guided_loss, pull
from edgefed.personal.mixture import Alone, FixedGate, Gate, LocalMixture, own_only
from edgefed.personal.networks import PersonalModel
from edgefed.personal.samples import Batch
from edgefed.simulation.personal_federation import AnyStrategy, Client, Strategy, Upload
from edgefed.training.encoding import IGNORED_LABEL


class MutualPair(nn.Module):
    """The two models of a client in FML: its own, which answers, and the small exchanged one ("meme")."""

    def __init__(self, own: PersonalModel, meme: PersonalModel):
        super().__init__()
        self.own = own
        self.meme = meme

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits, weights) as of `LocalMixture`."""
        logits = self.own(batch.own)
        return logits, own_only(logits)


class Mixtures(Strategy[LocalMixture]):
    """FedMoE: theta is averaged over the clients; models and gates stay local.

    ``shared_weight`` is None for a trained gate, or the fixed a_G of every example (.5: static mixing, 1: the shared
    extractor with the client's header, 0: standalone). ``vocab_size`` and ``per_token`` are those of `make_extractor`.
    """

    def __init__(
        self, clients: Sequence[Client], method: PersonalMethod, *, seed: int, extractor: str = "cnn5",
        vocab_size: int | None = None, per_token: bool = False, shared_weight: float | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.make_shared = partial(make_extractor, extractor, seed, vocab_size=vocab_size, per_token=per_token)
        self.shared_weight = shared_weight
        self.begun: set[int] = set()
        super().__init__(clients, method, seed=seed, device=device)

    def check(self) -> None:
        """Raise ConfigError for ``feature_pull`` without classes."""
        for client in self.clients:
            check_guided(self.method, client.train.classes)

    def loss_for(self, number: int) -> Loss:
        """The loss of FedMoE with the additions of the method."""
        begun = number in self.begun
        self.begun.add(number)
        samples = self.clients[number].train
        return guided_loss(self.method, self.models[number], samples, begun=begun, device=self.device)

    def build(self, number: int) -> LocalMixture:
        """A mixture with the client's own model."""
        shared = self.make_shared()
        if self.shared_weight is None:
            gate: nn.Module = Gate(shared.gate_in, self.method.gate_width, self.method.gate_norm)
        else:
            gate = FixedGate(self.shared_weight)
        return LocalMixture(shared, copy.deepcopy(self.clients[number].model), gate)

    def groups(self, number: int) -> dict[str, list[nn.Parameter]]:
        """Theta, own model and gate."""
        return self.models[number].groups()

    def shared(self, number: int) -> dict[str, Tensor]:
        """Theta."""
        return exchanged_tensors(self.models[number].shared)


class Standalone(Strategy[Alone]):
    """Every client trains its own model on its own examples; nothing is exchanged."""

    def build(self, number: int) -> Alone:
        """A copy of the client's own model."""
        return Alone(copy.deepcopy(self.clients[number].model))


class FedAvg(Standalone):
    """FedAvg (McMahan et al., arXiv 1602.05629): w = sum_k (n_k / n) w_k of whole models of equal shapes."""

    def check(self) -> None:
        """Raise ConfigError unless all clients have the same classes and model."""
        same_classes("fedavg", self.clients)
        first, *others = ({name: tuple(t.shape) for name, t in c.model.state_dict().items()} for c in self.clients)
        for client, shapes in zip(self.clients[1:], others, strict=True):
            for name in sorted(first.keys() | shapes.keys()):
                if first.get(name) != shapes.get(name):
                    raise ConfigError(
                        f"fedavg needs equal models: {name} is {first.get(name)} on client {self.clients[0].name}, "
                        f"{shapes.get(name)} on client {client.name}",
                        remedy="Use the same model on all clients, or a method for different models.",
                    )

    def build(self, number: int) -> Alone:
        """A copy of the first client's model."""
        return Alone(copy.deepcopy(self.clients[0].model))

    def shared(self, number: int) -> dict[str, Tensor]:
        """The whole model."""
        return exchanged_tensors(self.models[number].own)


class LgFedAvg(Standalone):
    """LG-FedAvg (Liang et al., arXiv 2001.01523): local representations with global upper layers.

    The last ``upper`` linear layers (1: the header, 2: also FC2 of the CNNs) are averaged with weights n_k / n over the
    clients where the layer has the same shape; the others stay local. Departs from the paper, which needs a single
    architecture: layers correspond by shape, and a client has its own upper layers instead of an ensemble of two.
    """

    def __init__(
        self, clients: Sequence[Client], method: PersonalMethod, *, seed: int, upper: int = 1,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if upper < 1:
            raise ConfigError(f"lg-fedavg: upper must be at least 1, found {upper}")
        self.upper = upper
        super().__init__(clients, method, seed=seed, device=device)

    def check(self) -> None:
        """Raise ConfigError unless all clients have the same classes."""
        same_classes("lg-fedavg", self.clients)

    def shared(self, number: int) -> dict[str, Tensor]:
        """Named by position from the top and shape: "top 1: weight (10, 500)"."""
        linear = [module for module in self.models[number].own.modules() if isinstance(module, nn.Linear)]
        return {
            f"top {place}: {name} {tuple(tensor.shape)}": tensor
            for place, module in enumerate(reversed(linear[-self.upper :]), start=1)
            for name, tensor in exchanged_tensors(module).items()
        }


class FedProto(Standalone):
    """FedProto (Tan et al., arXiv 2105.00243): clients share the mean features of each class.

        C_k^j = mean of f_k(x) over client k's examples of class j                                        (eq. 3)
        C^j   = sum_k (n_kj / n_j) C_k^j                                                                  (eq. 6)
        L     = cross-entropy + lambda * mean over examples and features of (f_k(x) - C^y)^2              (eq. 7)

    Departs from the paper: (6) also divides by the number of clients with the class, which shrinks every prototype;
    neither the authors' code nor ours does. As in their code, the distance is the mean square over features. The header
    answers; with ``answer="prototype"`` the class of the nearest prototype is the answer, as in the paper.
    """

    def __init__(
        self, clients: Sequence[Client], method: PersonalMethod, *, seed: int, weight: float = 1.0,
        answer: str = "header", device: torch.device | str = "cpu",
    ):  # fmt: skip
        if not weight >= 0 or answer not in ("header", "prototype"):
            raise ConfigError(
                f"fedproto: weight must be at least 0, answer header or prototype; found {weight}, {answer!r}"
            )
        self.weight, self.answer = weight, answer
        super().__init__(clients, method, seed=seed, device=device)
        self.loss_of = self._loss
        self.table = torch.zeros(len(clients[0].train.classes), clients[0].model.width, device=device)
        self.has = torch.zeros(len(self.table), dtype=torch.bool, device=device)

    def check(self) -> None:
        """Raise ConfigError unless all clients have the same classes and feature width."""
        same_classes("fedproto", self.clients)
        if not self.clients[0].train.classes:
            raise ConfigError("fedproto needs classes, which next-token prediction does not have")
        for client in self.clients:
            if client.model.width != self.clients[0].model.width:
                raise ConfigError(
                    f"fedproto needs equal feature widths: {self.clients[0].model.width} on {self.clients[0].name}, "
                    f"{client.model.width} on {client.name}",
                    remedy="Use models of the same feature width, or fedmoe, which projects features.",
                )

    def build(self, number: int) -> Alone:
        """A copy of the client's own model."""
        own = copy.deepcopy(self.clients[number].model)
        return NearestPrototype(own, self) if self.answer == "prototype" else Alone(own)

    def receive(self, number: int) -> int:
        """Download the prototypes of all classes; returns their number of values."""
        return sum(tensor.numel() for tensor in self.state.values())

    def aggregate(self, uploads: Sequence[Upload]) -> None:
        """Average the prototypes (6)."""
        super().aggregate(uploads)
        for name, prototype in self.state.items():
            self.table[int(name)], self.has[int(name)] = prototype, True

    def _loss(self, model: Alone, batch: Batch) -> Tensor:
        features: Tensor = model.own.extractor(batch.own)
        loss = cross_entropy(model.own.header(features), batch.labels)
        return loss + self.weight * pull(features, batch.labels, self.table, self.has)

    def upload(self, number: int) -> Upload:
        """Mean features of each class over the client's training examples, weighted by their number."""
        samples = self.clients[number].train
        means, counts = class_means(self.models[number].own.extractor, samples, self.device)
        labels = counts.nonzero().flatten().tolist()
        weights = {str(label): float(counts[label]) for label in labels}
        return Upload(number, len(samples), {str(label): means[label] for label in labels}, weights)


class NearestPrototype(Alone):
    """Logits are the negative distances to the prototypes; a class without prototype is never the answer."""

    def __init__(self, own: PersonalModel, strategy: FedProto):
        super().__init__(own)
        self._strategy = (strategy,)  # in a tuple, so that it does not become a submodule

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits, weights) as of `LocalMixture`."""
        table, has = self._strategy[0].table, self._strategy[0].has
        features = self.own.extractor(batch.own)
        if not has.any():
            logits = self.own.header(features)
        else:
            logits = -(features.unsqueeze(-2) - table).square().mean(-1).masked_fill(~has, torch.inf)
        return logits, own_only(logits)


class Fml(Strategy[MutualPair]):
    """Federated Mutual Learning (Shen et al., arXiv 2006.16765): the own and a small shared model teach each other.

        L_own  = alpha * CE(own)  + (1 - alpha) * KL(p_meme || p_own)
        L_meme = beta  * CE(meme) + (1 - beta)  * KL(p_own  || p_meme)

    Each divergence has gradients only for the model that it trains. The meme (the shared extractor with a header) is
    averaged with weights n_k / n; the own model answers and stays local. ``vocab_size`` and ``per_token`` are those of
    `make_extractor`.
    """

    def __init__(
        self, clients: Sequence[Client], method: PersonalMethod, *, seed: int, extractor: str = "cnn5",
        vocab_size: int | None = None, per_token: bool = False, alpha: float = 0.5, beta: float = 0.5,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if not (0 <= alpha <= 1 and 0 <= beta <= 1):
            raise ConfigError(f"fml: alpha and beta must be 0 to 1, found {alpha} and {beta}")
        self.make_shared = partial(make_extractor, extractor, seed, vocab_size=vocab_size, per_token=per_token)
        self.outputs = vocab_size if per_token and vocab_size else len(clients[0].train.classes)
        self.alpha, self.beta = alpha, beta
        super().__init__(clients, method, seed=seed, device=device)
        self.loss_of = self._loss

    def build(self, number: int) -> MutualPair:
        """A copy of the client's own model with the meme."""
        shared = self.make_shared()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # every client starts with the same meme
            header = nn.Linear(shared.width, self.outputs)
        return MutualPair(copy.deepcopy(self.clients[number].model), PersonalModel(shared, header, shared.width))

    def check(self) -> None:
        """Raise ConfigError unless all clients have the same classes."""
        same_classes("fml", self.clients)

    def groups(self, number: int) -> dict[str, list[nn.Parameter]]:
        """Meme and own model."""
        pair = self.models[number]
        return {
            "extractor": [p for p in pair.meme.parameters() if p.requires_grad],
            "model": [p for p in pair.own.parameters() if p.requires_grad],
        }

    def shared(self, number: int) -> dict[str, Tensor]:
        """The meme."""
        return exchanged_tensors(self.models[number].meme)

    def _loss(self, pair: MutualPair, batch: Batch) -> Tensor:
        own, meme = pair.own(batch.own), pair.meme(batch.shared)
        loss = self.alpha * cross_entropy(own, batch.labels)
        loss = loss + (1 - self.alpha) * divergence(meme.detach(), own, batch.labels)
        loss = loss + self.beta * cross_entropy(meme, batch.labels)
        return loss + (1 - self.beta) * divergence(own.detach(), meme, batch.labels)


def same_classes(method: str, clients: Sequence[Client]) -> None:
    """Raise ConfigError unless all clients have the same classes in the same order."""
    first = clients[0]
    for client in clients:
        if client.train.classes != first.train.classes:
            raise ConfigError(
                f"{method} needs equal classes: {', '.join(first.train.classes)} on client {first.name}, "
                f"{', '.join(client.train.classes)} on client {client.name}",
                remedy="Use the same list of classes on all clients; examples of each are not needed.",
            )


def divergence(teacher: Tensor, learner: Tensor, labels: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(learner)) in nats, mean over labels not ignored; logits (..., classes)."""
    known = labels.flatten() != IGNORED_LABEL
    wanted = teacher.float().flatten(0, -2)[known].log_softmax(-1)
    found = learner.float().flatten(0, -2)[known].log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def exchanged_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Weights and running statistics by name; integer counters are not averaged."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()}


def _fixed(shared_weight: float) -> Callable[..., AnyStrategy]:
    def make(clients: Sequence[Client], method: PersonalMethod, **options: Any) -> AnyStrategy:
        return Mixtures(clients, method, shared_weight=shared_weight, **options)

    return make


STRATEGIES: Mapping[str, Callable[..., AnyStrategy]] = MappingProxyType(
    {
        "fedmoe": Mixtures,
        "fedmoe-shared-only": _fixed(1.0),
        "static": _fixed(0.5),
        "standalone": Standalone,
        "fedavg": FedAvg,
        "fedproto": FedProto,
        "lg-fedavg": LgFedAvg,
        "fml": Fml,
    }
)
"""Strategies by name, called with clients, hyper-parameters, ``seed``, ``device`` and options of their own."""


def make_strategy(
    name: str, clients: Sequence[Client], method: PersonalMethod, *, seed: int, **options: Any
) -> AnyStrategy:
    """Make a strategy by name. Raises ConfigError for an unknown name or unsupported clients."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; the strategies are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](clients, method, seed=seed, **options)
