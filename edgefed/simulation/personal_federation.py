"""A federation of personal models in one process: rounds, averages, evaluation of every client, and costs of a round.

Methods are compared here under equal conditions. `run` executes the rounds; a `Strategy` (`personal_baselines` lists
them) defines what a client holds, how it trains and what is exchanged. There is no network; for FedMoE the mixture, the
local epochs and the weights of the average are those of agents and aggregator.

The result depends on the seed alone, neither on the order of clients nor on earlier random numbers.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgefed.errors import ConfigError, DataError
from edgefed.methods.interface import PersonalMethod
from edgefed.personal.local_training import (
    Evaluation,
    Loss,
    Rates,
    evaluate,
    make_optimizer,
    mixture_loss,
    train_epochs,
)
from edgefed.personal.networks import PersonalModel
from edgefed.personal.samples import Samples


@dataclasses.dataclass(frozen=True)
class Client:
    """A client with its initial model, of which strategies train copies. Raises DataError for too few examples."""

    name: str
    train: Samples
    held_out: Samples
    model: PersonalModel

    def __post_init__(self) -> None:
        if len(self.train) < 2 or not len(self.held_out):
            raise DataError(
                f"client {self.name} has {len(self.train)} training examples and {len(self.held_out)} held out",
                remedy="Add examples: at least two are needed for training and one for evaluation.",
            )


@dataclasses.dataclass(frozen=True)
class Upload:
    """What client number ``client`` sends."""

    client: int
    num_examples: int
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Weights of single tensors; the default is ``num_examples``."""


def average(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """Theta = sum_k (n_k / n) theta_k for each tensor, over the clients that sent it.

    Summed in float64 in the order of the clients, not of ``uploads``; the dtype is preserved.
    """
    totals: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}
    for upload in sorted(uploads, key=lambda upload: upload.client):
        for name, tensor in upload.tensors.items():
            weight = float(upload.weights.get(name, upload.num_examples))
            part = tensor.detach().to(torch.float64) * weight
            totals[name] = totals[name] + part if name in totals else part
            weights[name] = weights.get(name, 0.0) + weight
            dtypes.setdefault(name, tensor.dtype)
    return {name: (total / weights[name]).to(dtypes[name]) for name, total in totals.items()}


def mixed_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def torch_seed(*numbers: int) -> Iterator[None]:
    """Seed torch's CPU generator with these numbers inside the context, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(*numbers))
        yield


Model = TypeVar("Model", bound=nn.Module)


class Strategy(abc.ABC, Generic[Model]):
    """One method. A subclass defines what a client holds (`build`), what it exchanges (`shared`), and its loss.

    ``models[k]`` is the module of client k: ``model(batch) -> (logits, [a_G, a_F] (B, 2))``. ``state`` has the tensors
    of the aggregator by name. Raises ConfigError for clients that the method does not support.
    """

    def __init__(
        self, clients: Sequence[Client], method: PersonalMethod, *, seed: int, device: torch.device | str = "cpu"
    ):
        if not clients:
            raise ConfigError("a federation needs at least one client")
        self.clients, self.method, self.seed, self.device = tuple(clients), method, seed, device
        self.state: dict[str, Tensor] = {}
        self.check()
        self.models: list[Model] = []
        for number in range(len(clients)):
            with torch_seed(seed, number):
                self.models.append(self.build(number).to(device))
        rates = Rates(
            extractor=method.extractor_lr, model=method.model_lr, gate=method.gate_lr,
            momentum=method.momentum, weight_decay=method.weight_decay,
        )  # fmt: skip
        self.optimizers = [make_optimizer(self.groups(number), rates) for number in range(len(clients))]
        for number in range(len(clients)):
            for name, tensor in self.shared(number).items():
                self.state.setdefault(name, tensor.detach().clone())

    def check(self) -> None:  # noqa: B027 - most methods support any clients
        """Raise ConfigError for clients that the method does not support."""

    @abc.abstractmethod
    def build(self, number: int) -> Model:
        """Make the module that client ``number`` trains; torch's generator is seeded for it."""

    def groups(self, number: int) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by learning rate: "extractor", "model", "gate"."""
        return {"model": [p for p in self.models[number].parameters() if p.requires_grad]}

    def shared(self, number: int) -> dict[str, Tensor]:
        """The exchanged tensors of client ``number`` by name; equal names have equal shapes. The default is none."""
        return {}

    loss_of: Loss = staticmethod(mixture_loss)

    def loss_for(self, number: int) -> Loss:
        """The loss of the next local epochs of client ``number``."""
        return self.loss_of

    def receive(self, number: int) -> int:
        """Overwrite the exchanged tensors of client ``number``; returns the number of downloaded parameters.

        The momentum of these tensors is dropped.
        """
        tensors = self.shared(number)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.state[name])
                self.optimizers[number].state.pop(tensor, None)
        return sum(tensor.numel() for tensor in tensors.values())

    def train(self, number: int, rng: np.random.Generator) -> float:
        """Run the local epochs of client ``number``; returns the mean loss of the last. Raises TrainingDiverged."""
        return train_epochs(
            self.models[number], self.clients[number].train, self.optimizers[number],
            epochs=self.method.local_epochs, batch_size=self.method.batch_size, rng=rng, device=self.device,
            loss_of=self.loss_for(number),
        )  # fmt: skip

    def upload(self, number: int) -> Upload:
        """What client ``number`` sends after its local epochs."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.shared(number).items()}
        return Upload(number, len(self.clients[number].train), tensors)

    def aggregate(self, uploads: Sequence[Upload]) -> None:
        """Update the state of the aggregator; tensors that no client sent are unchanged."""
        self.state.update(average(uploads))

    def evaluate(self, number: int) -> Evaluation:
        """Evaluate the current model of client ``number`` on its held-out examples."""
        return evaluate(self.models[number], self.clients[number].held_out, self.device)


AnyStrategy: TypeAlias = Strategy[Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a federation."""

    rounds: int
    share: float = 1.0
    """C of the paper: the share of clients in a round."""
    evaluate_every: int = 1
    """Rounds between evaluations; the last round is always evaluated."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.evaluate_every < 1:
            raise ConfigError(
                f"rounds and evaluate_every must be at least 1, found {self.rounds} and {self.evaluate_every}"
            )
        if not 0 < self.share <= 1:
            raise ConfigError(f"the share of clients in a round must be above 0 and at most 1, found {self.share}")


def sample_clients(clients: int, share: float, seed: int, server_round: int) -> tuple[int, ...]:
    """Numbers of the clients of a round, ascending: max(1, round(C N)) clients drawn uniformly."""
    count = max(1, round(share * clients))
    rng = np.random.default_rng([seed, server_round])
    return tuple(sorted(int(number) for number in rng.choice(clients, count, replace=False)))


@dataclasses.dataclass(frozen=True)
class Round:
    """Results of a round. Mappings are by the numbers of its clients."""

    server_round: int
    losses: Mapping[int, float]
    parameters_up: Mapping[int, int]
    parameters_down: Mapping[int, int]
    accuracy: tuple[float, ...] | None
    """Of every client; None in a round without evaluation."""


@dataclasses.dataclass(frozen=True)
class History:
    """Results of a federation."""

    rounds: tuple[Round, ...]
    evaluations: tuple[Evaluation, ...]
    """Of every client after the last round, with the model that it last trained."""
    received: tuple[float, ...]
    """Accuracy of every client after it received the aggregate of the last round."""
    flops: Mapping[int, int]
    """Of a client's local epochs, forward and backward, counted in its first round (matrix products, convolutions)."""

    def curve(self) -> list[tuple[int, float]]:
        """(round, mean accuracy over clients) of each evaluation."""
        return [(each.server_round, float(np.mean(each.accuracy))) for each in self.rounds if each.accuracy is not None]

    def final(self) -> tuple[float, ...]:
        """Accuracy of each client after the last round."""
        return tuple(each.accuracy for each in self.evaluations)


def worst_decile(accuracy: Sequence[float]) -> float:
    """Mean accuracy of the worst tenth of the clients, at least of one."""
    count = max(1, math.ceil(len(accuracy) / 10))
    return float(np.mean(sorted(accuracy)[:count]))


def rounds_to(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """The first evaluated round with a mean accuracy of at least ``target``, or None."""
    return next((server_round for server_round, mean in curve if mean >= target), None)


def run(strategy: AnyStrategy, settings: Settings, *, on_round: Callable[[Round], None] = lambda _: None) -> History:
    """Run all rounds of a strategy.

    Clients are evaluated with their model after the local epochs; clients that were not drawn, with their latest one.
    Raises TrainingDiverged.
    """
    clients = range(len(strategy.clients))
    rounds: list[Round] = []
    flops: dict[int, int] = {}
    evaluations: tuple[Evaluation, ...] = ()
    for server_round in range(1, settings.rounds + 1):
        losses, up, down, uploads = {}, {}, {}, []
        for number in sample_clients(len(clients), settings.share, settings.seed, server_round):
            down[number] = strategy.receive(number)
            rng = np.random.default_rng([settings.seed, server_round, number])
            with torch_seed(settings.seed, server_round, number):
                if number in flops:
                    losses[number] = strategy.train(number, rng)
                    upload = strategy.upload(number)
                else:
                    with FlopCounterMode(display=False) as counter:
                        losses[number] = strategy.train(number, rng)
                        upload = strategy.upload(number)
                    flops[number] = int(counter.get_total_flops())
            up[number] = sum(tensor.numel() for tensor in upload.tensors.values())
            uploads.append(upload)
        accuracy = None
        if server_round % settings.evaluate_every == 0 or server_round == settings.rounds:
            evaluations = tuple(strategy.evaluate(number) for number in clients)
            accuracy = tuple(each.accuracy for each in evaluations)
        strategy.aggregate(uploads)
        rounds.append(Round(server_round, losses, up, down, accuracy))
        on_round(rounds[-1])
    for number in clients:
        strategy.receive(number)
    received = tuple(strategy.evaluate(number).accuracy for number in clients)
    return History(tuple(rounds), evaluations, received, flops)
