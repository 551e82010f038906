"""FedMoE and what it is compared with, as strategies of one federation (`federation.run`).

    name                 paper              trains                       travels, each client and round
    fedmoe               2402.01350         mixture, gate per example    theta
    fedmoe-shared-only   (ablation, a_G=1)  theta and header             theta
    static               (ablation)         mixture, half and half       theta
    standalone           -                  own model                    nothing
    fedavg               1602.05629         one model for all            the model
    fedproto             2105.00243         own model                    mean features of each class
    lg-fedavg            2001.01523         own model                    its upper layers
    fml                  2006.16765         own model, a small shared    the small model

All of them take the same SGD, epochs and batches from `FedMoE`; the models that travel learn at ``extractor_lr``, a
client's own at ``model_lr``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgefed.errors import ConfigError
from edgefed.methods.interface import PersonalMethod as Hyperparameters
from edgefed.personal.batches import Batch
from edgefed.personal.extractors import make_extractor
from edgefed.personal.gate import FixedGate, Gate
from edgefed.personal.guided_loss import check_guided, class_means, guided_loss, pull
from edgefed.personal.local_training import IGNORED_LABEL, cross_entropy
from edgefed.personal.mixture import LocalMixture
from edgefed.personal.networks import PersonalModel
from edgefed.simulation.personal_federation import Client, Strategy, Upload


class Alone(nn.Module):
    """A client's own model, answering as a mixture with a_F = 1 does."""

    def __init__(self, own: PersonalModel):
        super().__init__()
        self.own = own

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.own(batch.own)
        return logits, _own_only(logits)


class MutualPair(nn.Module):
    """FML's two models of a client: its own, which answers, and the small one that travels ("meme")."""

    def __init__(self, own: PersonalModel, meme: PersonalModel):
        super().__init__()
        self.own = own
        self.meme = meme

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.own(batch.own)
        return logits, _own_only(logits)


def _own_only(logits: Tensor) -> Tensor:
    return torch.tensor([0.0, 1.0], device=logits.device).expand(len(logits), 2)


class Mixtures(Strategy):
    """FedMoE: theta of every client is averaged, its model and gate stay.

    ``shared_weight``: None for the gate that learns; else the fixed a_G of every example (.5: static mixing, 1: the
    shared extractor and the client's header, 0: standalone). ``vocab_size``, ``per_token``: as `make_extractor` has
    them, for text.
    """

    def __init__(
        self, clients: Sequence[Client], method: Hyperparameters, *, seed: int, extractor: str = "cnn5",
        vocab_size: int | None = None, per_token: bool = False, shared_weight: float | None = None,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.make_shared = partial(make_extractor, extractor, seed, vocab_size=vocab_size, per_token=per_token)
        self.shared_weight = shared_weight
        self.begun: set[int] = set()
        super().__init__(clients, method, seed=seed, device=device)

    def check(self) -> None:
        for client in self.clients:
            check_guided(self.method, client.train.classes)

    def loss_for(self, number: int) -> Callable:
        begun = number in self.begun
        self.begun.add(number)
        samples = self.clients[number].train
        return guided_loss(self.method, self.models[number], samples, begun=begun, device=self.device)

    def build(self, number: int) -> LocalMixture:
        shared = self.make_shared()
        if self.shared_weight is None:
            gate: nn.Module = Gate(shared.gate_in, self.method.gate_width, self.method.gate_norm)
        else:
            gate = FixedGate(self.shared_weight)
        return LocalMixture(shared, copy.deepcopy(self.clients[number].model), gate)

    def groups(self, number: int) -> dict[str, list[nn.Parameter]]:
        return self.models[number].groups()

    def shared(self, number: int) -> dict[str, Tensor]:
        return travelling(self.models[number].shared)


class Standalone(Strategy):
    """Every client trains its own model on its own examples; nothing travels."""

    def build(self, number: int) -> Alone:
        return Alone(copy.deepcopy(self.clients[number].model))


class FedAvg(Standalone):
    """McMahan et al., arXiv 1602.05629: w = sum_k (n_k / n) w_k of whole models, which must have equal shapes."""

    def check(self) -> None:
        same_classes("fedavg", self.clients)
        first, *others = ({name: tuple(t.shape) for name, t in c.model.state_dict().items()} for c in self.clients)
        for client, shapes in zip(self.clients[1:], others, strict=True):
            for name in sorted(first.keys() | shapes.keys()):
                if first.get(name) != shapes.get(name):
                    raise ConfigError(
                        f"fedavg averages whole models: {name} of client {self.clients[0].name} is {first.get(name)}, "
                        f"of client {client.name} {shapes.get(name)}",
                        remedy="Give all clients the same model, or choose a method for unlike models.",
                    )

    def build(self, number: int) -> Alone:
        return Alone(copy.deepcopy(self.clients[0].model))

    def shared(self, number: int) -> dict[str, Tensor]:
        return travelling(self.models[number].own)


class LgFedAvg(Standalone):
    """LG-FedAvg (Liang et al., arXiv 2001.01523): local representations, a global top.

    The ``upper`` last linear layers (1: the header, 2: also FC2 of the CNNs) are averaged with weights n_k / n over the
    clients where the layer has the same shape; what is below stays. Departs from the paper: it wants one architecture,
    so layers of equal shape take the place of equal layers, and a client has its own top, not an ensemble of two.
    """

    def __init__(
        self, clients: Sequence[Client], method: Hyperparameters, *, seed: int, upper: int = 1,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if upper < 1:
            raise ConfigError(f"lg-fedavg shares the {upper} last linear layers, it must be at least 1")
        self.upper = upper
        super().__init__(clients, method, seed=seed, device=device)

    def check(self) -> None:
        same_classes("lg-fedavg", self.clients)

    def shared(self, number: int) -> dict[str, Tensor]:
        """ "top 1: weight (10, 500)" and so on: the place from the top and the shape together are the name."""
        linear = [module for module in self.models[number].own.modules() if isinstance(module, nn.Linear)]
        return {
            f"top {place}: {name} {tuple(tensor.shape)}": tensor
            for place, module in enumerate(reversed(linear[-self.upper :]), start=1)
            for name, tensor in travelling(module).items()
        }


class FedProto(Standalone):
    """FedProto (Tan et al., arXiv 2105.00243): clients agree on the mean features of each class.

        C_k^j = mean of f_k(x) over client k's examples of class j                                        (eq. 3)
        C^j   = sum_k (n_kj / n_j) C_k^j                                                                  (eq. 6)
        L     = cross-entropy + lambda * mean over examples and features of (f_k(x) - C^y)^2              (eq. 7)

    Departs from the paper: (6) also divides by the number of clients that hold the class, which shrinks every
    prototype; the authors' code does not, nor do we. As there, the distance is the mean square over features. Answers
    are the header's; ``answer="prototype"`` takes the class of the nearest prototype, as the paper does.
    """

    def __init__(
        self, clients: Sequence[Client], method: Hyperparameters, *, seed: int, weight: float = 1.0,
        answer: str = "header", device: torch.device | str = "cpu",
    ):  # fmt: skip
        if not weight >= 0 or answer not in ("header", "prototype"):
            raise ConfigError(f"fedproto: weight {weight}, answer {answer!r}; at least 0, and header or prototype")
        self.weight, self.answer = weight, answer
        super().__init__(clients, method, seed=seed, device=device)
        self.loss_of = self._loss
        self.table = torch.zeros(len(clients[0].train.classes), clients[0].model.width, device=device)
        self.has = torch.zeros(len(self.table), dtype=torch.bool, device=device)

    def check(self) -> None:
        same_classes("fedproto", self.clients)
        if not self.clients[0].train.classes:
            raise ConfigError("fedproto compares classes, and there are none: it cannot learn to continue text")
        for client in self.clients:
            if client.model.width != self.clients[0].model.width:
                raise ConfigError(
                    f"fedproto compares features: client {self.clients[0].name} has {self.clients[0].model.width}, "
                    f"client {client.name} {client.model.width}",
                    remedy="Give all clients models of one feature width, or choose fedmoe, which projects.",
                )

    def build(self, number: int) -> Alone:
        own = copy.deepcopy(self.clients[number].model)
        return NearestPrototype(own, self) if self.answer == "prototype" else Alone(own)

    def receive(self, number: int) -> int:
        """The prototypes of all classes that any client has sent."""
        return sum(tensor.numel() for tensor in self.state.values())

    def aggregate(self, uploads: Sequence[Upload]) -> None:
        super().aggregate(uploads)
        for name, prototype in self.state.items():
            self.table[int(name)], self.has[int(name)] = prototype, True

    def _loss(self, model: Alone, batch: Batch) -> Tensor:
        features = model.own.extractor(batch.own)
        loss = cross_entropy(model.own.header(features), batch.labels)
        return loss + self.weight * pull(features, batch.labels, self.table, self.has)

    def upload(self, number: int) -> Upload:
        """Mean features of each class over all of the client's training examples, weighted by their number."""
        samples = self.clients[number].train
        means, counts = class_means(self.models[number].own.extractor, samples, self.device)
        held = counts.nonzero().flatten().tolist()
        weights = {str(label): float(counts[label]) for label in held}
        return Upload(number, len(samples), {str(label): means[label] for label in held}, weights)


class NearestPrototype(Alone):
    """Logits are minus the distances to the prototypes; a class without one is never the answer."""

    def __init__(self, own: PersonalModel, strategy: FedProto):
        super().__init__(own)
        self._strategy = (strategy,)  # in a tuple: it is no part of this module

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        table, has = self._strategy[0].table, self._strategy[0].has
        features = self.own.extractor(batch.own)
        if not has.any():
            logits = self.own.header(features)
        else:
            logits = -(features.unsqueeze(-2) - table).square().mean(-1).masked_fill(~has, torch.inf)
        return logits, _own_only(logits)


class Fml(Strategy):
    """Federated Mutual Learning (Shen et al., arXiv 2006.16765): a small shared model teaches and is taught.

        L_own  = alpha * CE(own)  + (1 - alpha) * KL(p_meme || p_own)
        L_meme = beta  * CE(meme) + (1 - beta)  * KL(p_own  || p_meme)

    Each divergence moves only the model that learns. The meme (the shared extractor with a header) is averaged with
    weights n_k / n; the own model answers and stays. ``vocab_size``, ``per_token``: as `make_extractor` has them.
    """

    def __init__(
        self, clients: Sequence[Client], method: Hyperparameters, *, seed: int, extractor: str = "cnn5",
        vocab_size: int | None = None, per_token: bool = False, alpha: float = 0.5, beta: float = 0.5,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if not (0 <= alpha <= 1 and 0 <= beta <= 1):
            raise ConfigError(f"fml: alpha is {alpha}, beta {beta}, both are shares from 0 to 1")
        self.make_shared = partial(make_extractor, extractor, seed, vocab_size=vocab_size, per_token=per_token)
        self.outputs = vocab_size if per_token else len(clients[0].train.classes)
        self.alpha, self.beta = alpha, beta
        super().__init__(clients, method, seed=seed, device=device)
        self.loss_of = self._loss

    def build(self, number: int) -> MutualPair:
        shared = self.make_shared()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # every client begins with the same meme
            header = nn.Linear(shared.width, self.outputs)
        return MutualPair(copy.deepcopy(self.clients[number].model), PersonalModel(shared, header, shared.width))

    def check(self) -> None:
        same_classes("fml", self.clients)

    def groups(self, number: int) -> dict[str, list[nn.Parameter]]:
        pair = self.models[number]
        return {
            "extractor": [p for p in pair.meme.parameters() if p.requires_grad],
            "model": [p for p in pair.own.parameters() if p.requires_grad],
        }

    def shared(self, number: int) -> dict[str, Tensor]:
        return travelling(self.models[number].meme)

    def _loss(self, pair: MutualPair, batch: Batch) -> Tensor:
        own, meme = pair.own(batch.own), pair.meme(batch.shared)
        loss = self.alpha * cross_entropy(own, batch.labels)
        loss = loss + (1 - self.alpha) * divergence(meme.detach(), own, batch.labels)
        loss = loss + self.beta * cross_entropy(meme, batch.labels)
        return loss + (1 - self.beta) * divergence(own.detach(), meme, batch.labels)


def same_classes(method: str, clients: Sequence[Client]) -> None:
    """Raise ConfigError where clients number their classes differently."""
    first = clients[0]
    for client in clients:
        if client.train.classes != first.train.classes:
            raise ConfigError(
                f"{method} shares what is known of classes: client {first.name} has {', '.join(first.train.classes)}, "
                f"client {client.name} {', '.join(client.train.classes)}",
                remedy="Give all clients the same list of classes; a client need not have examples of each.",
            )


def divergence(teacher: Tensor, learner: Tensor, labels: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(learner)) in nats, mean over what is to be learned. Logits (..., classes)."""
    known = labels.flatten() != IGNORED_LABEL
    wanted = teacher.float().flatten(0, -2)[known].log_softmax(-1)
    found = learner.float().flatten(0, -2)[known].log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def travelling(module: nn.Module) -> dict[str, Tensor]:
    """Weights and running statistics by name; counters are not averaged and stay."""
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()}


def _fixed(shared_weight: float) -> Callable[..., Strategy]:
    def make(clients: Sequence[Client], method: Hyperparameters, **options) -> Strategy:
        return Mixtures(clients, method, shared_weight=shared_weight, **options)

    return make


STRATEGIES: Mapping[str, Callable[..., Strategy]] = MappingProxyType(
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
"""Name: strategy(clients, hyper-parameters, seed=, device=, and what it has of its own)."""


def make_strategy(name: str, clients: Sequence[Client], method: Hyperparameters, *, seed: int, **options) -> Strategy:
    """A method by name. Raises ConfigError for an unknown name and for clients that the method cannot serve."""
    if name not in STRATEGIES:
        raise ConfigError(f"there is no strategy {name!r}; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](clients, method, seed=seed, **options)
