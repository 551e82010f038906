"""Methods at equal memory for experts: paired differences to `slices`, globally and on the devices.

    python experiments/equal_memory.py tune --data DIR --work DIR
    python experiments/equal_memory.py compare --data DIR --work DIR --sets dolly agnews --seeds 0 1 2 3 4
    python experiments/equal_memory.py compare --data DIR --work DIR --tuned-steps
    python experiments/equal_memory.py compare --data DIR --work DIR --methods hfedmoe-beta-0 hfedmoe-tau-0
    python experiments/equal_memory.py table

Three clients hold 50, 25 and 12 % of the experts' bytes. Every method has the same clients, batches, number
of local steps and budgets; a seed changes who has which records, their order, and which are held out. The learning rate
is chosen for every method from the same grid, on a set that no table has (`tune`, one seed), with 10 local steps per
round; with `--tuned-steps` the local steps per round are chosen too. The number of steps is the same in the whole grid.
A variant of a method has the settings of that method.

Every finished run is one line of results/equal_memory.jsonl with commit and versions; runs that are there are not
repeated. Losses are in nats per token on held-out records: `global` of the full model, `device` of what a device holds
after its last step, both means over the clients.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from recording import add_arguments, interval, play, read_rows, record
from text_sets import SETS, write_clients

from edgefed.hardware.profiles import effective, find_profile
from edgefed.protocol.messages import TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig

RESULTS = Path(__file__).parent / "results" / "equal_memory.jsonl"
OURS = "slices"
METHODS: Mapping[str, dict] = {
    OURS: {},
    "hfedmoe": {},
    "fmes": {},
    "fedmoe_submodel": {},
    "flux": {"probes": 1, "pace": "own", "refresh_rounds": 1, "eps_start": 0.9},
    "random": {},
}
"""Method and options. Flux without a limit by the network, and with the largest share of trained experts."""
VARIANTS: Mapping[str, tuple[str, dict]] = {
    "hfedmoe-beta-0": ("hfedmoe", {"beta": 0.0}),
    "hfedmoe-tau-0": ("hfedmoe", {"tau": 0.0}),
    "hfedmoe-exploration-0": ("hfedmoe", {"exploration": 0.0}),
    "slices-exploration-0.1": (OURS, {"exploration": 0.1}),
    "slices-exploration-0.3": (OURS, {"exploration": 0.3}),
    "slices-energy": (OURS, {"allocation": "energy"}),
}
"""Label: method and options. What each part of a method is worth."""
TUNING_SET, TUNING_SEED = "tasks", 100
SHARES = (0.5, 0.25, 0.12)
RECORDS = 400
"""Most records of a client, held-out ones included."""
STEPS = 40
"""Local steps of a client in the whole run."""
RATES = (1e-3, 3e-3, 1e-2)
LOCAL_STEPS = (5, 10, 20, 40)
DEFAULT_STEPS = 10
"""Local steps per round of the comparison in which only the learning rate is chosen."""
BATCH_SIZE, SEQUENCE_LENGTH = 4, 128
PROFILE_TOKENS, EVALUATION_TOKENS = 1024, 2048
WHOLE = "agnews-all"
"""AG News judged by all held-out records: 2,048 tokens, prompts included, have 6 to 20 answers of one word a client."""
ORDER = (*SETS, WHOLE)
PROFILE = "rtx-4090"
"""Any device with room for the whole model: memory is limited by the share."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One method on one set with one seed."""

    method: str
    set: str
    seed: int
    learning_rate: float
    local_steps: int


def measure(run: Run, work: Path, data: Path) -> dict:
    """Simulate one run; returns its losses, memory and bytes."""
    method, options = VARIANTS.get(run.method) or (run.method, METHODS[run.method])
    name, tokens = ("agnews", 8 * EVALUATION_TOKENS) if run.set == WHOLE else (run.set, EVALUATION_TOKENS)
    files = write_clients(name, data, work / "data", run.seed, most=RECORDS)
    device, link = effective(find_profile(PROFILE), {}, None), LINKS["fibre"]
    fleet = tuple(
        SimulatedDevice(name, device, link, str(file), expert_share=share)
        for (name, file), share in zip(files.items(), SHARES, strict=False)
    )
    training = TrainingConfig(
        local_steps=run.local_steps, batch_size=BATCH_SIZE, sequence_length=SEQUENCE_LENGTH,
        learning_rate=run.learning_rate, profile_tokens=PROFILE_TOKENS, evaluation_tokens=tokens,
        evaluation_share=1.0, evaluate_every=STEPS // run.local_steps,
    )  # fmt: skip
    config = SimulationConfig(
        fleet=fleet, methods=(MethodChoice(method, options, run.method),), rounds=STEPS // run.local_steps,
        seed=run.seed, training=training, held_out_share=0.2, evaluation_tokens=tokens, evaluate_devices=True,
    )  # fmt: skip
    found = play(config, work / "simulation")
    clients = [[each.clients[member.name] for each in found.rounds] for member in fleet]
    return {
        "global": found.rounds[-1].loss,
        "global_before": found.first.loss,
        "device": statistics.mean(rounds[-1].device_losses[1] for rounds in clients),
        "device_before": statistics.mean(rounds[0].device_losses[0] for rounds in clients),
        "global_by_client": [found.rounds[-1].losses[member.name] for member in fleet],
        "global_before_by_client": [found.first.losses[member.name] for member in fleet],
        "device_by_client": [rounds[-1].device_losses[1] for rounds in clients],
        "expert_bytes_by_client": [max(each.expert_bytes for each in rounds) for rounds in clients],
        "bytes_up": sum(each.bytes_up for rounds in clients for each in rounds),
        "bytes_down": sum(each.bytes_down for rounds in clients for each in rounds),
    }


def chosen_settings(rows: Iterable[Mapping], steps: Collection[int] = LOCAL_STEPS) -> dict[str, tuple[float, int]]:
    """{method: (learning rate, local steps)} with the least mean of global and device loss on the tuning set.

    Only settings with one of these ``steps`` that every method has tried count. Variants have those of their method.
    """
    tuned = [row for row in rows if row["set"] == TUNING_SET and row["local_steps"] in steps]
    tried = [{_settings(row) for row in tuned if row["method"] == name} for name in METHODS]
    shared = set.intersection(*tried)
    if not shared:
        raise SystemExit("no setting has been tried with every method yet: run `tune`")
    found: dict[str, tuple[float, tuple[float, int]]] = {}
    for row in tuned:
        if _settings(row) in shared:
            score = ((row["global"] + row["device"]) / 2, _settings(row))
            found[row["method"]] = min(score, found.get(row["method"], (math.inf, (0.0, 0))))
    chosen = {method: settings for method, (_, settings) in found.items()}
    return chosen | {label: chosen[method] for label, (method, _) in VARIANTS.items()}


def _settings(row: Mapping) -> tuple[float, int]:
    return row["learning_rate"], row["local_steps"]


def comparison(
    rows: Iterable[Mapping], methods: Sequence[str] = tuple(METHODS), steps: Collection[int] = (DEFAULT_STEPS,)
) -> list[dict]:
    """One entry per set and method: mean losses and memory, and paired differences to the first over the seeds of all.

    Only rows with the settings that are chosen among ``steps`` count. A positive difference means that the first of
    ``methods`` has the lower loss.
    """
    rows = list(rows)
    chosen = chosen_settings(rows, steps)
    rows = [row for row in rows if row["set"] != TUNING_SET and _settings(row) == chosen[row["method"]]]
    entries = []
    for name in sorted({row["set"] for row in rows}, key=ORDER.index):
        by_method = {method: {row["seed"]: row for row in rows if (row["set"], row["method"]) == (name, method)}
                     for method in methods}  # fmt: skip
        if not all(by_method.values()):
            continue
        seeds = sorted(set.intersection(*(set(mine) for mine in by_method.values())))
        for method, mine in by_method.items():
            entry: dict = {"set": name, "method": method, "seeds": len(seeds), "settings": chosen[method]}
            for what in ("global", "device"):
                entry[what] = statistics.mean(mine[seed][what] for seed in seeds)
                entry[f"{what}_difference"] = interval(
                    [mine[seed][what] - by_method[methods[0]][seed][what] for seed in seeds]
                )
            for what, key in (("expert_bytes", "expert_bytes_by_client"), ("bytes_down", "bytes_down")):
                entry[what] = statistics.mean(float(np.mean(mine[seed][key])) for seed in seeds)
            entries.append(entry)
    return entries


def table(
    rows: Iterable[Mapping], methods: Sequence[str] = tuple(METHODS), steps: Collection[int] = (DEFAULT_STEPS,)
) -> str:
    """`comparison` as Markdown, with the settings where ``steps`` are several and the download where all are one's."""
    tuned, parts = len(steps) > 1, any(method in VARIANTS for method in methods)

    def difference(entry: Mapping, what: str) -> str:
        mean, half = entry[f"{what}_difference"]
        if entry["method"] == methods[0]:
            return ""
        if math.isinf(half):
            return f"{mean:+.3f} (one seed)"
        return f"{mean:+.3f} ± {half:.3f}{' (0 inside)' if abs(mean) <= half else ''}"

    above = f"above `{methods[0]}`"
    last = "rate, local steps" if tuned else "downloads" if parts else "expert memory"
    lines = [
        f"| set, seeds | method | global loss | {above} | loss on the devices | {above} | {last} |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in comparison(rows, methods, steps):
        memory = entry["bytes_down" if parts else "expert_bytes"] / 2**20
        rate, local_steps = entry["settings"]
        ending = f"{rate:g}, {local_steps}" if tuned else f"{memory:.1f} MiB"
        lines.append(
            f"| {entry['set']}, {entry['seeds']} | `{entry['method']}` | {entry['global']:.3f} | "
            f"{difference(entry, 'global')} | {entry['device']:.3f} | {difference(entry, 'device')} | {ending} |"
        )
    return "\n".join(lines)


def tables(rows: Iterable[Mapping]) -> dict[str, str]:
    """Each table by what it shows; those without a row are absent."""
    rows = list(rows)
    labels = [label for label in VARIANTS if any(row["method"] == label for row in rows)]
    judged = [method for method in METHODS if any((row["set"], row["method"]) == (WHOLE, method) for row in rows)]
    found = {"methods": table([row for row in rows if row["set"] != WHOLE])}
    if OURS in judged:
        found[WHOLE] = table([row for row in rows if row["set"] in (TUNING_SET, WHOLE)], judged)
    if len({row["local_steps"] for row in rows}) > 1:
        found["methods with tuned local steps"] = table(rows, steps=LOCAL_STEPS)
    for base, beside in (("hfedmoe", ["fmes"]), (OURS, [])):
        parts = [label for label in labels if VARIANTS[label][0] == base]
        if parts:
            found[f"parts of {base}"] = table(rows, (base, *parts, *beside))
    return {what: text for what, text in found.items() if text.count("\n") > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("tune", "compare", "table"))
    add_arguments(parser, RESULTS)
    parser.add_argument("--sets", nargs="+", choices=[name for name in ORDER if name != TUNING_SET], default=["dolly"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *VARIANTS), default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="grid of `tune`")
    parser.add_argument("--local-steps", type=int, nargs="+", default=LOCAL_STEPS, help="grid of `tune`")
    parser.add_argument("--tuned-steps", action="store_true", help="compare with the local steps that `tune` chose")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print("\n\n".join(f"{what}\n\n{text}" for what, text in tables(read_rows(arguments.json)).items()))
        return
    if not arguments.data or not arguments.work:
        parser.error("--data and --work are needed")
    if arguments.action == "tune":
        grid = itertools.product(arguments.local_steps, arguments.rates, arguments.methods)
        plans = [Run(method, TUNING_SET, TUNING_SEED, rate, steps) for steps, rate, method in grid]
    else:
        steps = LOCAL_STEPS if arguments.tuned_steps else (DEFAULT_STEPS,)
        settings = chosen_settings(read_rows(arguments.json), steps)
        order = itertools.product(arguments.seeds, arguments.sets, arguments.methods)
        plans = [Run(method, name, seed, *settings[method]) for seed, name, method in order]
    record(plans, partial(measure, data=arguments.data), arguments.json, arguments.work)


if __name__ == "__main__":
    main()
