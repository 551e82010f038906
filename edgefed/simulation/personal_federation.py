"""A federation of personal models in one process: rounds, averages, evaluation of every client, what a round costs.

It is where methods are compared under equal terms: `run` knows clients and rounds; a `Strategy`, of which `baselines`
has a list, knows what a client holds, how it trains and what travels. Nothing here knows a wire; for FedMoE the
mixture, the local epochs and the weights of the average are those that agents and the aggregator use.

The result depends on the seed alone: on no order of clients and on nothing that was drawn before.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgefed.errors import ConfigError, DataError
from edgefed.methods.interface import PersonalMethod
from edgefed.personal.batches import Samples
from edgefed.personal.local_training import Evaluation, Rates, evaluate, make_optimizer, mixture_loss, train_epochs
from edgefed.personal.networks import PersonalModel


@dataclasses.dataclass(frozen=True)
class Client:
    """``model``: as it is before round 1; strategies train copies. Raises DataError for data that cannot be used."""

    name: str
    train: Samples
    held_out: Samples
    model: PersonalModel

    def __post_init__(self) -> None:
        if len(self.train) < 2 or not len(self.held_out):
            raise DataError(
                f"client {self.name} has {len(self.train)} examples to train on and {len(self.held_out)} held out",
                remedy="Give it more examples: it needs two to train on and one to be judged by.",
            )


@dataclasses.dataclass(frozen=True)
class Upload:
    """What client number ``client`` sends. ``weights``: of single tensors, where it is not ``num_examples``."""

    client: int
    num_examples: int
    tensors: Mapping[str, Tensor]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)


def average(uploads: Sequence[Upload]) -> dict[str, Tensor]:
    """Theta = sum_k (n_k / n) theta_k, tensor by tensor over those who sent it.

    Summed in float64 in the order of the clients, whatever the order of ``uploads``; the dtype stays.
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
    """One 63-bit seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def torch_seed(*numbers: int) -> Iterator[None]:
    """Torch's generator on the CPU starts from these numbers inside and is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(*numbers))
        yield


class Strategy(abc.ABC):
    """One method. A subclass says what a client holds (`build`), what of it is shared (`shared`), and its loss.

    ``models[k]`` is the module of client k: ``model(batch) -> (logits, [a_G, a_F] (B, 2))``. ``state`` is what the
    aggregator holds, by name. Raises ConfigError where the method cannot work with these clients.
    """

    def __init__(
        self, clients: Sequence[Client], method: PersonalMethod, *, seed: int, device: torch.device | str = "cpu"
    ):
        if not clients:
            raise ConfigError("a federation needs at least one client")
        self.clients, self.method, self.seed, self.device = tuple(clients), method, seed, device
        self.state: dict[str, Tensor] = {}
        self.check()
        self.models: list[nn.Module] = []
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

    def check(self) -> None:  # noqa: B027  most methods take any clients
        """Raise ConfigError where the clients' models do not suit the method."""

    @abc.abstractmethod
    def build(self, number: int) -> nn.Module:
        """What client ``number`` trains; torch's generator has a seed of its own here."""

    def groups(self, number: int) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by learning rate: "extractor", "model", "gate"."""
        return {"model": [p for p in self.models[number].parameters() if p.requires_grad]}

    def shared(self, number: int) -> dict[str, Tensor]:
        """The tensors of client ``number`` that travel, by name; equal names have equal shapes. None: standalone."""
        return {}

    loss_of: Callable = staticmethod(mixture_loss)
    """(model, batch) -> the loss of a step."""

    def loss_for(self, number: int) -> Callable:
        """`loss_of` for the local epochs of client ``number`` that are about to begin."""
        return self.loss_of

    def receive(self, number: int) -> int:
        """Overwrite what client ``number`` shares with the aggregator's; returns the parameters it downloads. Momentum
        of a tensor that came from elsewhere is dropped.
        """
        tensors = self.shared(number)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(self.state[name])
                self.optimizers[number].state.pop(tensor, None)
        return sum(tensor.numel() for tensor in tensors.values())

    def train(self, number: int, rng: np.random.Generator) -> float:
        """Client ``number``'s local epochs; the mean loss of the last. Raises TrainingDiverged."""
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
        """The aggregator's half of a round; what nobody sent stays as it is."""
        self.state.update(average(uploads))

    def evaluate(self, number: int) -> Evaluation:
        """Client ``number``'s model, as it stands, on its held-out examples."""
        return evaluate(self.models[number], self.clients[number].held_out, self.device)


@dataclasses.dataclass(frozen=True)
class Settings:
    """``share``: C of the paper, of the clients that take part in a round. Rounds without evaluation have no accuracy;
    the last always has.
    """

    rounds: int
    share: float = 1.0
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.evaluate_every < 1:
            raise ConfigError(f"rounds is {self.rounds}, evaluate_every {self.evaluate_every}: both must be at least 1")
        if not 0 < self.share <= 1:
            raise ConfigError(f"the share of clients in a round is {self.share}, it must be above 0 and at most 1")


def sample_clients(clients: int, share: float, seed: int, server_round: int) -> tuple[int, ...]:
    """Numbers of the clients of a round, ascending: max(1, round(C N)) of them, each as likely."""
    count = max(1, round(share * clients))
    rng = np.random.default_rng([seed, server_round])
    return tuple(sorted(int(number) for number in rng.choice(clients, count, replace=False)))


@dataclasses.dataclass(frozen=True)
class Round:
    """``losses``, ``parameters_up``, ``parameters_down``: by number of the clients that took part. ``accuracy``: of
    every client, None in a round without evaluation.
    """

    server_round: int
    losses: Mapping[int, float]
    parameters_up: Mapping[int, int]
    parameters_down: Mapping[int, int]
    accuracy: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class History:
    """``evaluations``: of every client after the last round, with the model it trained (or last trained). ``received``:
    accuracy of every client once it has what the aggregator made of the last round. ``flops``: of a client's local
    epochs, forward and backward, counted in the first round it took part in (matrix products and convolutions).
    """

    rounds: tuple[Round, ...]
    evaluations: tuple[Evaluation, ...]
    received: tuple[float, ...]
    flops: Mapping[int, int]

    def curve(self) -> list[tuple[int, float]]:
        """(round, mean accuracy over clients) of every evaluation."""
        return [(each.server_round, float(np.mean(each.accuracy))) for each in self.rounds if each.accuracy is not None]

    def final(self) -> tuple[float, ...]:
        """Accuracy of each client after the last round."""
        return tuple(each.accuracy for each in self.evaluations)


def worst_decile(accuracy: Sequence[float]) -> float:
    """Mean accuracy of the worst tenth of the clients, at least one."""
    count = max(1, math.ceil(len(accuracy) / 10))
    return float(np.mean(sorted(accuracy)[:count]))


def rounds_to(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """The first evaluated round whose mean accuracy is at least ``target``; None if there is none."""
    return next((server_round for server_round, mean in curve if mean >= target), None)


def run(strategy: Strategy, settings: Settings, *, on_round: Callable[[Round], None] = lambda _: None) -> History:
    """All rounds of one method.

    Clients are judged by the model that they have after their local epochs: one that was not drawn, by the one it had.
    Raises TrainingDiverged.
    """
    clients = range(len(strategy.clients))
    rounds, flops, evaluations = [], {}, ()
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
