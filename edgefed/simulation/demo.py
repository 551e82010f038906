"""The demonstration: one aggregator, unequal agents on the embedded silos, and what came of it."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.methods.registry import make_expert_method
from edgefed.protocol.comparison import Comparison, overall_verdict
from edgefed.protocol.messages import Status, TrainingConfig
from edgefed.simulation.processes import LocalClient, LocalFederation, read_ledger
from edgefed.trainer.saved_plan import load_plan
from edgefed.training.data import load_corpus

SHARES = (1.0, 0.5, 0.25, 0.12)
"""Budgets of the demo's clients, in turn: share of the experts that each may hold."""
CLIENT_SILOS = ("asyncio", "email", "unittest", "topics", "xml", "http", "multiprocessing", "logging", "importlib")
RESULT_FILE = "demo.json"
PICTURE_FILE = "demo.png"
TIMEOUT_S = 1800.0
EVALUATION_TOKENS = TrainingConfig().evaluation_tokens
"""Tokens of a client's held-out text in an evaluation, here as on the device."""
EVALUATION_BATCH = 32
"""Sequences evaluated at a time. With fewer, a product of an expert of the small model takes less time than a call."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What to demonstrate. ``methods``: the first is the one shown in detail, the others are compared with it."""

    out: Path
    methods: tuple[str, ...] = ("slices",)
    rounds: int = 4
    clients: int = 4
    local_steps: int = 12
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 1e-3
    seed: int = 0
    private: str = "none"
    """"adapter": the clients of the first method have a private part."""

    def check(self) -> None:
        """Raise ConfigError when there are more clients than silos, or fewer than one."""
        if not 1 <= self.clients <= len(CLIENT_SILOS):
            raise ConfigError(f"`clients` is {self.clients}, the embedded text makes 1 to {len(CLIENT_SILOS)}")


class DemoSink(Protocol):
    """Where the demo's progress goes."""

    def method(self, name: str) -> None:
        """A run of this method begins."""

    def status(self, status: Status) -> None:
        """The state of the run, at every poll."""

    def evaluated(self, models: int, of: int) -> None:
        """So many of the global models of the run are evaluated."""

    def note(self, text: str) -> None:
        """One line for the user."""


@dataclasses.dataclass(frozen=True)
class ClientResult:
    """One client of one run. Bytes are over all rounds; ``held`` and ``trained`` are experts per MoE layer.

    ``neuron_shares``: share of the neurons of each MoE layer on the device; empty where it holds whole experts.
    ``global_losses``: held-out loss of the full global model before round 1 and after each round. ``device_before``,
    ``device_after``: of the experts that the device holds, before its first and after its last local step. ``alone``:
    after as many local steps without the federation, ``own``: of the final global model with the device's private part.
    """

    name: str
    silo: str
    expert_share: float
    held: tuple[int, ...]
    trained: tuple[int, ...]
    bytes_down: int
    bytes_up: int
    peak_expert_bytes: int
    peak_rss_bytes: int
    global_losses: tuple[float, ...]
    device_before: float
    device_after: float
    alone: float | None = None
    own: float | None = None
    neuron_shares: tuple[float, ...] = ()

    @property
    def comparison(self) -> Comparison:
        """The same losses as a device reports them."""
        losses = (self.global_losses[0], self.global_losses[-1], self.device_after)
        before, after, device = (None if math.isnan(loss) else loss for loss in losses)
        return Comparison(server_round=len(self.global_losses), before=before, global_model=after, own=self.own,
                          device=device, alone=self.alone, num_tokens=EVALUATION_TOKENS)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One run of the demo."""

    method: str
    seconds: float
    server_peak_rss_bytes: int
    clients: tuple[ClientResult, ...]

    @property
    def mean_global_losses(self) -> list[float]:
        """Mean over clients of the global model's held-out loss, before round 1 and after each round."""
        return [_mean(values) for values in zip(*(client.global_losses for client in self.clients), strict=True)]


def run_demo(config: DemoConfig, sink: DemoSink) -> list[MethodResult]:
    """Run every method on the same clients and seed; write picture, checkpoint and results under ``config.out``.

    Raises ConfigError for an output folder that is not an earlier demo's, ProcessFailed when a process fails.
    """
    from edgefed.exporting import export_model

    config.check()
    prepare_folder(config.out)
    silos = CLIENT_SILOS[: config.clients]
    results = []
    for method in config.methods:
        sink.method(method)
        made = make_expert_method(method)
        # Methods without a notion of a budget are shown as they are meant, with every expert on every device.
        whole = made.requirements.all_experts
        shares = [1.0 if whole else SHARES[index % len(SHARES)] for index in range(config.clients)]
        # What the first method brought is told against training alone; the others are compared with it.
        alone = method == config.methods[0] and made.exchanges
        flags = ("--compare-alone", "--private", config.private) if alone else ("--final-evaluation", "never")
        clients = [LocalClient(silo, f"silo:{silo}", share, flags) for silo, share in zip(silos, shares, strict=True)]
        results.append(_run_method(config, method, clients, sink))
    first = config.out / config.methods[0]
    sink.note("exporting the final model")
    export_model(first / "run", config.out / "model")
    draw(config, results, {silo: load_plan(first / "clients" / silo) for silo in silos})
    return results


def prepare_folder(out: Path) -> None:
    """Make ``out``, or empty it when it holds an earlier demo. Raises ConfigError when it holds anything else."""
    if out.exists() and any(out.iterdir()):
        if not (out / RESULT_FILE).exists():
            raise ConfigError(f"{out} is not empty and holds no earlier demo", remedy="Choose another `out` folder.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT_FILE).write_text("{}\n")  # marks the folder as ours from the beginning


def _run_method(config: DemoConfig, method: str, clients: Sequence[LocalClient], sink: DemoSink) -> MethodResult:
    flags = [
        "--model", "tiny", "--method", method, "--rounds", str(config.rounds), "--seed", str(config.seed),
        "--local-steps", str(config.local_steps), "--batch-size", str(config.batch_size),
        "--sequence-length", str(config.sequence_length), "--learning-rate", str(config.learning_rate),
        "--keep-rounds", "0", "--evaluation-share", "1",  # the table compares losses on the same tokens
    ]  # fmt: skip
    if (experts := make_expert_method(method).requirements.train_experts) is not None:
        flags += ["--train-experts", experts]
    with LocalFederation(config.out / method, flags, clients) as federation:
        federation.start()
        from edgefed.simulation.evaluation import held_out_losses  # loads torch while the server does

        status = federation.run(sink.status, timeout_s=TIMEOUT_S)
    sink.note(f"{method}: evaluating {config.rounds + 1} global models, one after another")
    held_out = {client.name: load_corpus(client.data, 0.1, 0).held_out for client in clients}
    losses = held_out_losses(
        federation.run_folder, held_out, sequence_length=config.sequence_length, batch_size=EVALUATION_BATCH,
        max_tokens=EVALUATION_TOKENS,
        on_model=lambda models: sink.evaluated(models, config.rounds + 1),
    )  # fmt: skip
    return MethodResult(
        method=method,
        seconds=sum(done.seconds for done in status.history),
        server_peak_rss_bytes=status.memory_peak_bytes,
        clients=tuple(_client_result(federation, client, losses[client.name]) for client in clients),
    )


def _client_result(federation: LocalFederation, client: LocalClient, losses: Sequence[float]) -> ClientResult:
    from edgefed.trainer.comparison import load_comparison

    folder = federation.client_folder(client.name)
    ledger = [entry for entry in read_ledger(folder) if entry["outcome"] == "accepted"]
    metrics = [entry["metrics"] for entry in ledger]
    (_, plan), found = load_plan(folder), load_comparison(folder)
    return ClientResult(
        name=client.name,
        silo=client.data,
        expert_share=client.expert_share,
        held=tuple(plan.num_slots(layer) for layer in range(plan.num_layers)),
        trained=tuple(len(plan.trainable(layer)) for layer in range(plan.num_layers)),
        **{name: sum(entry[name] for entry in ledger) for name in ("bytes_down", "bytes_up")},
        **{name: int(max(each[name] for each in metrics)) for name in ("peak_expert_bytes", "peak_rss_bytes")},
        global_losses=tuple(losses),
        device_before=metrics[0].get("held_out_loss_before", math.nan),
        device_after=metrics[-1].get("held_out_loss_after", math.nan),
        alone=found.alone if found else None,
        own=found.own if found else None,
        neuron_shares=tuple(float(mask.mean()) for mask in plan.neurons),
    )


def draw(
    config: DemoConfig,
    results: Sequence[MethodResult],
    profiles: Mapping[str, tuple[ActivationProfile | None, ExpertPlan]],
) -> None:
    """Write the picture: curves per method and per client of the first method, heat maps with the plans."""
    from edgefed.plots import save_federation_picture

    first = results[0]
    setting = f"{config.clients} devices on Python text, {config.rounds} rounds of {config.local_steps} steps"
    shown = {
        f"{client.name}, {100 * client.expert_share:.0f} % of the experts": (record, plan)
        for client in first.clients
        if (record := profiles[client.name][0]) is not None and (plan := profiles[client.name][1])
    }
    save_federation_picture(
        config.out / PICTURE_FILE,
        f"{first.method}: {setting}",
        {result.method: result.mean_global_losses for result in results},
        {client.name: client.global_losses for client in first.clients},
        shown,
        alone={client.name: client.alone for client in first.clients if client.alone is not None},
    )


def as_dict(config: DemoConfig, results: Sequence[MethodResult], sample: str) -> dict[str, Any]:
    """Everything the demo found, for JSON."""
    return {
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "sample": sample,
        "results": [
            {**dataclasses.asdict(result), "mean_global_losses": result.mean_global_losses} for result in results
        ],
        "comparison": {client.name: msgspec.to_builtins(client.comparison) for client in results[0].clients},
        "verdict": overall_verdict(client.comparison for client in results[0].clients),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
