"""Compressed updates against whole ones: bytes up and held-out loss, paired by seed.

    python experiments/compression.py run --data DIR --work DIR --sets dolly --seeds 0 1 2 3 4
    python experiments/compression.py table

Three clients train all experts and routers in full by FedAvg from the packaged model. Codecs have the same clients,
batches and steps; a seed changes who has which records, their order, and which are held out. Every finished run is one
line of results/compression.jsonl with commit and versions; runs that are there are not repeated. Losses are in nats per
token of the global model on held-out records, means over the clients. Bytes are those of the files that are sent; those
down are of all rounds but the first, in which every device downloads the whole model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from equal_memory import interval, read_rows
from recording import provenance
from text_sets import SETS, write_clients

from edgefed.hardware.profiles import effective, find_profile
from edgefed.protocol.frames import COMPRESSIONS
from edgefed.protocol.messages import TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig
from edgefed.simulation.simulate import simulate

RESULTS = Path(__file__).parent / "results" / "compression.jsonl"
CLIENTS, RECORDS = 3, 300
ROUNDS, LOCAL_STEPS = 12, 5
LEARNING_RATE = 3e-3
EVALUATION_TOKENS = 1024
CODECS = tuple(name for name in COMPRESSIONS if name != "auto")


def play(codec: str, name: str, seed: int, data: Path, work: Path) -> dict:
    """Simulate one run; returns its row."""
    work.mkdir(parents=True, exist_ok=True)
    files = list(write_clients(name, data, work / "data", seed, most=RECORDS).items())[:CLIENTS]
    device = effective(find_profile("rtx-4090"), {}, None)  # any with room for the whole model
    fleet = tuple(SimulatedDevice(client, device, LINKS["cable"], str(file)) for client, file in files)
    training = TrainingConfig(
        local_steps=LOCAL_STEPS, batch_size=4, learning_rate=LEARNING_RATE, profile_tokens=1024,
        evaluation_tokens=EVALUATION_TOKENS,
    )  # fmt: skip
    config = SimulationConfig(
        fleet=fleet, methods=(MethodChoice("fedavg"),), rounds=ROUNDS, seed=seed, training=training,
        held_out_share=0.2, evaluation_tokens=EVALUATION_TOKENS, compression=codec,
    )  # fmt: skip
    started = time.process_time()
    found = simulate(config, work / "simulation").runs[0]
    if found.refused or found.stopped:
        raise SystemExit(f"{codec}, {name}, {seed}: {found.refused or found.stopped}")
    return {
        "codec": codec, "set": name, "seed": seed,
        "losses": [found.first.loss, *(each.loss for each in found.rounds)],
        "bytes_up": sum(client.bytes_up for each in found.rounds for client in each.clients.values()),
        "bytes_down": [sum(client.bytes_down for client in each.clients.values()) for each in found.rounds],
        "virtual_seconds": found.rounds[-1].ends,
        "cpu_seconds": round(time.process_time() - started, 1),
        "provenance": provenance(),
    }  # fmt: skip


def table(rows: Iterable[Mapping]) -> str:
    """Bytes and losses of each codec beside those of whole updates, as Markdown."""
    rows = list(rows)
    lines = [
        "| set, seeds | updates | bytes up | fewer | bytes down | fewer | loss | above whole updates | in percent |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted({row["set"] for row in rows}):
        found = {(row["codec"], row["seed"]): row for row in rows if row["set"] == name}
        for codec in CODECS:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder with the public sets, see README.md here")
    parser.add_argument("--work", type=Path, help="folder for the state of the run in progress")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=["dolly"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(read_rows(arguments.json)))
        return
    if not arguments.data or not arguments.work:
        parser.error("--data and --work are needed")
    done = {(row["codec"], row["set"], row["seed"]) for row in read_rows(arguments.json)}
    for seed, name, codec in itertools.product(arguments.seeds, arguments.sets, arguments.codecs):
        if (codec, name, seed) in done:
            continue
        row = play(codec, name, seed, arguments.data, arguments.work / "run")
        with arguments.json.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(arguments.work / "run")
        print(f"{name}, seed {seed}, {codec}: {row['losses'][-1]:.4f}, {row['bytes_up'] / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
