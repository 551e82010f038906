"""How LoRA adapters are averaged, and what a server optimizer adds: held-out loss and bytes, paired by seed.

    python experiments/adapters.py run --data DIR --work DIR
    python experiments/adapters.py table

Three clients train adapters of all experts by FedAvg from the packaged model. Ways have the same clients, batches and
steps; a seed changes who has which records, their order, and which are held out. Each way has the learning rates, of
the clients and of the server's optimizer, that gave it the smallest loss on the seeds in `TUNING`, which the table does
not count. Ways with other ranks than 4 have the rates that are best with rank 4; the adapters' factor is 2 in all. With
"zeros" the server takes 0 for what a client of a smaller rank lacks, as FlexLoRA and HetLoRA do, and not the current
values (`edgefed.protocol.ranks`).

Every finished run is one line of results/adapters.jsonl with commit and versions; runs that are there are not repeated.
Losses are in nats per token of the global model on held-out records, means over the clients.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

from recording import add_arguments, interval, play, read_rows, record
from text_sets import write_clients

from edgefed.aggregator import aggregation
from edgefed.aggregator.ranks import widen_update
from edgefed.hardware.profiles import effective, find_profile
from edgefed.protocol.messages import TrainingConfig, UnitInfo
from edgefed.protocol.server_optimizer import ServerOptimizer
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig

RESULTS = Path(__file__).parent / "results" / "adapters.jsonl"
CLIENTS, RECORDS = 3, 150
ROUNDS, LOCAL_STEPS = 8, 4
EVALUATION_TOKENS = 1024
TUNING = (100,)
CLIENT_RATES = (3e-3, 1e-2, 3e-2)
SERVER_RATES: Mapping[str, tuple[float, ...]] = {"none": (1.0,), "momentum": (0.3, 0.7), "adam": (0.001, 0.003)}
TUNED = (
    ("factors", "none"), ("product", "none"), ("alternate", "none"), ("factors", "momentum"), ("factors", "adam"),
)  # fmt: skip
EQUAL, UNEQUAL, ZEROS = "4", "2 4 8", "2 4 8 zeros"
WAYS = (
    *((*tuned, EQUAL) for tuned in TUNED),
    ("product", "none", UNEQUAL), ("product", "none", "2"), ("factors", "none", ZEROS), ("factors", "none", UNEQUAL),
)  # fmt: skip
"""(what is averaged, server optimizer, ranks of the clients); the first one is compared with."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One way with its rates and a seed. ``server_rate`` counts with an optimizer only.

    ``ranks``: of each client, or one for all; with "zeros" as the last word, what they lack counts as 0.
    """

    average: str
    optimizer: str
    client_rate: float
    server_rate: float
    seed: int
    ranks: str = EQUAL


def measure(run: Run, work: Path, data: Path) -> dict:
    """Simulate one run; returns its losses and bytes."""
    files = list(write_clients("dolly", data, work / "data", run.seed, most=RECORDS).items())[:CLIENTS]
    device = effective(find_profile("rtx-4090"), {}, None)  # any with room for the whole model
    zeros, ranks = run.ranks.endswith("zeros"), [int(rank) for rank in run.ranks.removesuffix("zeros").split()]
    fleet = tuple(
        SimulatedDevice(client, device, LINKS["cable"], str(file), lora_rank=rank)
        for (client, file), rank in zip(files, ranks if len(ranks) > 1 else ranks * CLIENTS, strict=True)
    )  # fmt: skip
    training = TrainingConfig(
        local_steps=LOCAL_STEPS, batch_size=4, learning_rate=run.client_rate, profile_tokens=1024, experts="lora",
        router="none", lora_rank=max(ranks), lora_alpha=2.0 * max(ranks), evaluation_tokens=EVALUATION_TOKENS,
        evaluate_every=ROUNDS // 2, min_lora_rank=min(ranks) if len(ranks) > 1 else 0,
    )  # fmt: skip
    optimizer = None
    if run.optimizer != "none":
        optimizer = ServerOptimizer(kind=run.optimizer, learning_rate=run.server_rate)
    config = SimulationConfig(
        fleet=fleet, methods=(MethodChoice("fedavg"),), rounds=ROUNDS, seed=run.seed, training=training,
        held_out_share=0.2, evaluation_tokens=EVALUATION_TOKENS, adapter_average=run.average,
        server_optimizer=optimizer,
    )  # fmt: skip
    with mock.patch.object(aggregation, "widen_update", with_zeros) if zeros else contextlib.nullcontext():
        found = play(config, work / "simulation")
    return {
        "losses": [loss for _, loss in found.curve],
        "bytes_up": sum(client.bytes_up for each in found.rounds for client in each.clients.values()),
        "loss": found.rounds[-1].loss,
    }


def with_zeros(path: Path, target: Path, rank: int, base: Sequence[UnitInfo], *others: object) -> None:
    """`widen_update` with 0 for what a client lacks, as of units that it leaves out."""
    blobs, checked, _ = others
    widen_update(path, target, rank, base, blobs, checked, {unit.key for unit in base})


def plans(rows: list[dict], seeds: Iterable[int]) -> Iterator[Run]:
    """The runs for tuning, then those of ``seeds`` at the rates that were best in ``rows``, which grows meanwhile."""
    for average, optimizer in TUNED:
        for client in CLIENT_RATES if optimizer == "none" else (best(rows, "factors", "none")[0],):
            for server in SERVER_RATES[optimizer]:
                yield from (Run(average, optimizer, client, server, seed) for seed in TUNING)
    for way in WAYS:
        for seed in seeds:
            yield Run(*way[:2], *best(rows, *way[:2]), seed, way[2])


def best(rows: Iterable[Mapping], average: str, optimizer: str) -> tuple[float, float]:
    """(client rate, server rate) with the smallest mean loss on the seeds for tuning."""
    losses: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        if (
            (row["average"], row["optimizer"]) == (average, optimizer)
            and row["seed"] in TUNING
            and ranks_of(row) == EQUAL
        ):
            losses.setdefault((row["client_rate"], row["server_rate"]), []).append(row["loss"])
    return min(losses, key=lambda rates: statistics.mean(losses[rates]))


def ranks_of(row: Mapping) -> str:
    """Ranks of the clients of a row; the first rows do not name them."""
    return str(row.get("ranks", EQUAL))


def table(rows: list[dict]) -> str:
    """Bytes and losses of each way beside those of averaged factors without an optimizer, as Markdown."""
    lines = [
        "| average | server optimizer | ranks | rates | seeds | bytes up | loss | above the first row |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way in WAYS:
        client, server = best(rows, *way[:2])
        pairs = [(row, whole) for row in _of(rows, way) for whole in _of(rows, WAYS[0]) if row["seed"] == whole["seed"]]
        if not pairs:
            continue
        mean, half = interval([mine["loss"] - whole["loss"] for mine, whole in pairs])
        rates = f"{client:g}" + (f", {server:g}" if way[1] != "none" else "")
        above = "" if way == WAYS[0] else f"{mean:+.4f} ± {half:.4f}"
        sent = statistics.mean(mine["bytes_up"] for mine, _ in pairs)
        loss = statistics.mean(mine["loss"] for mine, _ in pairs)
        numbers = f"{len(pairs)} | {sent / 1e6:.2f} MB | {loss:.4f} | {above}"
        lines.append(f"| `{way[0]}` | `{way[1]}` | {way[2]} | {rates} | {numbers} |")
    return "\n".join(lines)


def _of(rows: Iterable[Mapping], way: tuple[str, str, str]) -> list[Mapping]:
    """The rows of a way at its best rates, without those for tuning."""
    rows = list(rows)
    wanted = (*way[:2], *best(rows, *way[:2]))
    keys = ("average", "optimizer", "client_rate", "server_rate")
    return [
        row for row in rows
        if tuple(row[key] for key in keys) == wanted and ranks_of(row) == way[2] and row["seed"] not in TUNING
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    add_arguments(parser, RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    rows = read_rows(arguments.json)
    if arguments.action == "table":
        print(table(rows))
        return
    if not arguments.data or not arguments.work:
        parser.error("--data and --work are needed")
    for plan in plans(rows, arguments.seeds):
        record([plan], partial(measure, data=arguments.data), arguments.json, arguments.work)
        rows[:] = read_rows(arguments.json)


if __name__ == "__main__":
    main()
