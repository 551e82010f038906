"""Compressed updates against whole ones: bytes up and held-out loss, paired by seed.

    python experiments/compression.py run --data DIR --work DIR --sets dolly --seeds 0 1 2 3 4
    python experiments/compression.py table
    python experiments/compression.py times

Three clients train all experts and routers in full by FedAvg from the packaged model. Codecs have the same clients,
batches and steps; a seed changes who has which records, their order, and which are held out. Every finished run is one
line of results/compression.jsonl with commit and versions; runs that are there are not repeated. Losses are in nats per
token of the global model on held-out records, means over the clients. Bytes are those of the files that are sent; those
down are of all rounds but the first, in which every device downloads the whole model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from recording import add_arguments, interval, play, read_rows, record
from text_sets import SETS, write_clients

from edgefed.hardware.profiles import effective, find_profile
from edgefed.protocol.frames import COMPRESSIONS
from edgefed.protocol.messages import TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig

RESULTS = Path(__file__).parent / "results" / "compression.jsonl"
CLIENTS, RECORDS = 3, 300
ROUNDS, LOCAL_STEPS = 12, 5
LEARNING_RATE = 3e-3
EVALUATION_TOKENS = 1024
CODECS = tuple(name for name in COMPRESSIONS if name != "auto")


@dataclasses.dataclass(frozen=True)
class Run:
    """One codec on one set with one seed. ``codec``: that of updates, or with that of downloads, as "topk6,topk3"."""

    codec: str
    set: str
    seed: int


def measure(run: Run, work: Path, data: Path) -> dict:
    """Simulate one run; returns its losses, bytes and virtual time."""
    files = list(write_clients(run.set, data, work / "data", run.seed, most=RECORDS).items())[:CLIENTS]
    device = effective(find_profile("rtx-4090"), {}, None)  # any with room for the whole model
    fleet = tuple(SimulatedDevice(client, device, LINKS["cable"], str(file)) for client, file in files)
    training = TrainingConfig(
        local_steps=LOCAL_STEPS, batch_size=4, learning_rate=LEARNING_RATE, profile_tokens=1024,
        evaluation_tokens=EVALUATION_TOKENS,
    )  # fmt: skip
    config = SimulationConfig(
        fleet=fleet, methods=(MethodChoice("fedavg"),), rounds=ROUNDS, seed=run.seed, training=training,
        held_out_share=0.2, evaluation_tokens=EVALUATION_TOKENS,
        compression=run.codec.partition(",")[0], download_compression=run.codec.partition(",")[2] or "none",
    )  # fmt: skip
    found = play(config, work / "simulation")
    return {
        "losses": [found.first.loss, *(each.loss for each in found.rounds)],
        "bytes_up": sum(client.bytes_up for each in found.rounds for client in each.clients.values()),
        "bytes_down": [sum(client.bytes_down for client in each.clients.values()) for each in found.rounds],
        "virtual_seconds": found.rounds[-1].ends,
    }


def table(rows: Iterable[Mapping]) -> str:
    """Bytes and losses of each codec beside those of whole updates, as Markdown."""
    rows = list(rows)
    lines = [
        "| set, seeds | updates | bytes up | fewer | bytes down | fewer | loss | above whole updates | in percent |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted({row["set"] for row in rows}):
        found = {(row["codec"], row["seed"]): row for row in rows if row["set"] == name}
        for codec in sorted({codec for codec, _ in found}, key=lambda codec: CODECS.index(codec.partition(",")[0])):
            seeds = sorted(seed for own, seed in found if own == codec and ("none", seed) in found)
            if not seeds:
                continue
            pairs = [(found[codec, seed], found["none", seed]) for seed in seeds]
            mean, half = interval([mine["losses"][-1] - whole["losses"][-1] for mine, whole in pairs])
            loss = statistics.mean(mine["losses"][-1] for mine, _ in pairs)
            percent = statistics.mean(100 * (mine["losses"][-1] / whole["losses"][-1] - 1) for mine, whole in pairs)
            sent = statistics.mean(mine["bytes_up"] for mine, _ in pairs)
            ratio = statistics.mean(whole["bytes_up"] / mine["bytes_up"] for mine, whole in pairs)
            above = "" if codec == "none" else f"{mean:+.4f} ± {half:.4f}" if len(seeds) > 1 else f"{mean:+.4f}"
            lines.append(
                f"| {name}, {len(seeds)} | `{codec}` | {sent / 1e6:.1f} MB | {ratio:.1f}x | {_down(pairs)} | "
                f"{loss:.4f} | {above} | {percent:+.2f} |"
            )
    return "\n".join(lines)


def _down(pairs: list[tuple[Mapping, Mapping]]) -> str:
    """The cells of what is downloaded from the second round on: before that, devices have no version of the model."""
    pairs = [pair for pair in pairs if all("bytes_down" in row for row in pair)]
    if not pairs:
        return " | "
    mine, whole = (statistics.mean(sum(pair[which]["bytes_down"][1:]) for pair in pairs) for which in (0, 1))
    return f"{mine / 1e6:.1f} MB | {whole / mine:.1f}x"


def times(rows: Iterable[Mapping]) -> str:
    """How much sooner each codec has the loss that whole updates have after some rounds, as Markdown.

    Virtual time, the least that the rows prove: the first round is the longest, since devices download the whole model,
    so whole updates end round r of R not before r/R of their time; the codec's time is that of its whole run.
    """
    rows, marks = list(rows), (ROUNDS // 2, 3 * ROUNDS // 4, ROUNDS)
    lines = [
        "| set, seeds | updates | virtual time of the run | "
        + " | ".join(f"loss of round {mark}" for mark in marks)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(marks),
    ]
    for name in sorted({row["set"] for row in rows}):
        found = {(row["codec"], row["seed"]): row for row in rows if row["set"] == name}
        for codec in dict.fromkeys(codec for codec, _ in found if codec != "none"):
            pairs = [(row, found["none", seed]) for (own, seed), row in found.items() if own == codec]
            seconds = statistics.mean(mine["virtual_seconds"] for mine, _ in pairs)
            cells = [_sooner(pairs, mark) for mark in marks]
            lines.append(f"| {name}, {len(pairs)} | `{codec}` | {seconds:.1f} s | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sooner(pairs: list[tuple[Mapping, Mapping]], mark: int) -> str:
    """The least ratio of times over the seeds, to the loss of whole updates after round ``mark``."""
    ratios = []
    for mine, whole in pairs:
        target = whole["losses"][mark]
        if min(mine["losses"]) > target:
            return "not reached"
        first = next(at for at, loss in enumerate(whole["losses"]) if loss <= target)
        ratios.append(first / ROUNDS * whole["virtual_seconds"] / mine["virtual_seconds"])
    return f"{min(ratios):.1f}x sooner"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table", "times"))
    add_arguments(parser, RESULTS)
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=["dolly"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), help="of updates, or UP,DOWN")
    arguments = parser.parse_args()
    if arguments.action in ("table", "times"):
        print((table if arguments.action == "table" else times)(read_rows(arguments.json)))
        return
    if not arguments.data or not arguments.work:
        parser.error("--data and --work are needed")
    order = itertools.product(arguments.seeds, arguments.sets, arguments.codecs)
    plans = [Run(codec, name, seed) for seed, name, codec in order]
    record(plans, partial(measure, data=arguments.data), arguments.json, arguments.work)


if __name__ == "__main__":
    main()
