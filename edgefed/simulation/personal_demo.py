"""The demonstration of FedMoE: one aggregator, clients with unlike images and models, and what each gained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from edgefed.errors import ConfigError
from edgefed.methods.fedmoe import IMAGES, FedMoE
from edgefed.personal.local_training import evaluate
from edgefed.personal.mixture import LocalMixture
from edgefed.personal.networks import CNNS
from edgefed.personal.state import newest_state
from edgefed.personal.tasks import OpenTask, load_mixture, make_task
from edgefed.simulation.demo import PICTURE_FILE, TIMEOUT_S, DemoSink, prepare_folder
from edgefed.simulation.personal_baselines import make_strategy
from edgefed.simulation.personal_federation import Client, History, Settings, run
from edgefed.simulation.pictures import Outcome, save_comparison, save_gate_histograms
from edgefed.simulation.processes import LocalClient, LocalFederation, read_ledger

EXTRACTOR = "cnn5"
HELD_OUT_SHARE = 0.4
GATES_FILE = "gates.png"
ALONE = "standalone"
COMPARED = (ALONE, "static", "fedproto", "lg-fedavg", "fml")
MOST_CLIENTS = 20
METHOD_OPTIONS = {
    "batch_size": 16, "extractor_lr": 0.02, "model_lr": 0.02, "gate_lr": 0.002, "momentum": 0.9,
}  # fmt: skip
"""For some hundred images a client, and good for training alone as well; the paper's .01 without momentum is for
thousands."""
ADDITIONS = {"expert_loss": 1.0, "feature_pull": 10.0}
"""What the demo adds to FedMoE (`edgefed.personal.local_training`), and to nothing that it is compared with."""


@dataclasses.dataclass(frozen=True)
class PersonalDemoConfig:
    """``compared``: methods that are run on the same clients in this process, `COMPARED`."""

    out: Path
    rounds: int = 20
    clients: int = 5
    seed: int = 0
    compared: tuple[str, ...] = (ALONE,)

    def check(self) -> None:
        """Raise ConfigError for a number of clients that the demo has no pictures for."""
        if not 1 <= self.clients <= MOST_CLIENTS:
            raise ConfigError(f"`clients` is {self.clients}, the demo of fedmoe takes 1 to {MOST_CLIENTS}")


@dataclasses.dataclass(frozen=True)
class PersonalClientResult:
    """One client. Bytes are over all rounds.

    ``accuracy``: held-out, after each round's local epochs; ``others``: the last one of each compared method;
    ``shared_weight``: mean a_G over its held-out examples.
    """

    name: str
    model: str
    parameters: int
    classes: int
    examples: int
    bytes_up: int
    bytes_down: int
    peak_rss_bytes: int
    accuracy: tuple[float, ...]
    shared_weight: float
    others: dict[str, float]


def run_personal_demo(config: PersonalDemoConfig, sink: DemoSink) -> list[PersonalClientResult]:
    """Run FedMoE over loopback and the compared methods in this process; write pictures under ``config.out``.

    Raises ConfigError for an output folder that is not an earlier demo's, ProcessFailed when a process fails.
    """
    config.check()
    prepare_folder(config.out)
    models = list(CNNS)
    clients = [
        LocalClient(f"glyphs-{index}", f"glyphs:{index}", flags=(
            "--task", IMAGES, "--model", models[index % len(models)], "--held-out", str(HELD_OUT_SHARE),
            "--final-evaluation", "never",
        ))
        for index in range(config.clients)
    ]  # fmt: skip
    options = [word for name, value in (METHOD_OPTIONS | ADDITIONS).items() for word in ("--option", f"{name}={value}")]
    flags = [
        "--method", FedMoE.name, "--extractor", EXTRACTOR, "--rounds", str(config.rounds), "--seed", str(config.seed),
        *options,
    ]  # fmt: skip
    sink.method(FedMoE.name)
    folder = config.out / FedMoE.name
    with LocalFederation(folder, flags, clients) as federation:
        federation.run(sink.status, timeout_s=TIMEOUT_S)
        folders = [federation.client_folder(client.name) for client in clients]
    tasks = [make_task(IMAGES, client.data, client.flags[3], client.name, HELD_OUT_SHARE) for client in clients]
    opened = [task.open(EXTRACTOR, {}, config.seed) for task in tasks]
    compared = {}
    for name in config.compared:
        sink.note(f"{name}: the same clients, models and epochs in this process")
        compared[name] = _baseline(name, config, clients, opened)
    mixtures = [load_mixture(newest_state(each), task, {}) for each, task in zip(folders, tasks, strict=True)]
    results, gates = [], {}
    for number, (client, task, where) in enumerate(zip(clients, tasks, folders, strict=True)):
        ledger = read_ledger(where)
        held_out = opened[number].held_out
        seen = evaluate(mixtures[number], held_out)
        gates[client.name] = (seen.gate_weights[:, 0], seen.labels)
        results.append(
            PersonalClientResult(
                name=client.name,
                model=task.model,
                parameters=_parameters(mixtures[number]),
                classes=len(np.unique(held_out.labels)),
                examples=task.num_examples,
                bytes_up=sum(entry["bytes_up"] for entry in ledger),
                bytes_down=sum(entry["bytes_down"] for entry in ledger),
                peak_rss_bytes=int(max(entry["metrics"]["peak_rss_bytes"] for entry in ledger)),
                accuracy=tuple(entry["metrics"]["held_out_accuracy_after"] for entry in ledger),
                shared_weight=float(seen.gate_weights[:, 0].mean()),
                others={name: history.final()[number] for name, history in compared.items()},
            )
        )
    curve = np.mean([result.accuracy for result in results], axis=0).tolist()
    final = [result.accuracy[-1] for result in results]
    shown: dict[str, list[Outcome]] = {FedMoE.name: [(list(enumerate(curve, start=1)), final)]}
    shown |= {name: [(history.curve(), history.final())] for name, history in compared.items()}
    save_comparison(config.out / PICTURE_FILE, {"embedded digits": shown})
    save_gate_histograms(config.out / GATES_FILE, gates, tasks[0].classes)
    return results


def as_personal_dict(config: PersonalDemoConfig, results: Sequence[PersonalClientResult]) -> dict[str, Any]:
    """Everything the demo found, for JSON."""
    return {
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "options": METHOD_OPTIONS | ADDITIONS,
        "results": [dataclasses.asdict(result) for result in results],
    }


def _baseline(
    name: str, config: PersonalDemoConfig, clients: Sequence[LocalClient], opened: Sequence[OpenTask]
) -> History:
    """The history of a method on the same examples, from the same first weights, for as many epochs."""
    method = FedMoE(**cast(dict[str, Any], METHOD_OPTIONS))
    members = [
        Client(client.name, task.train, task.held_out, task.own) for client, task in zip(clients, opened, strict=True)
    ]
    return run(make_strategy(name, members, method, seed=config.seed), Settings(config.rounds, seed=config.seed))


def _parameters(mixture: LocalMixture) -> int:
    return sum(parameter.numel() for parameter in mixture.own.parameters())
