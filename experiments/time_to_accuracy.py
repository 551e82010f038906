"""Time to a target quality on a virtual clock: Flux, HFedMoE and the baselines on the same fleet, seeds and data.

    python experiments/time_to_accuracy.py --data DATA --set dolly --json experiments/results/time_to_accuracy.json \
        --figure experiments/results/time_to_accuracy.png

The packaged model of 2.9 M parameters is really trained; time, memory and traffic are those of OLMoE-1B-7B on a fleet
of Jetson Orin Nano, RTX 3060, RTX 4060 Laptop and RTX 4090 (`edgefed.simulation`). The target is a share of the
improvement of `fmd` (the whole model, exact) over all its rounds, with the same seed. All runs have the same steps,
batches and learning rate, and the same number of rounds unless these are short (MORE_ROUNDS); `fmq` and `flux-lora`
train adapters, with the best of the learning rates that were tried (--adapter-rates). `DATA` as in
`federate_text.py`. Finished runs are kept in the work folder (--work) and not repeated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from recording import interval, provenance
from text_sets import SETS, write_clients

from edgefed.hardware.profiles import effective, find_profile
from edgefed.methods.flux import Flux
from edgefed.methods.interface import Coverage
from edgefed.methods.registry import register
from edgefed.protocol.messages import ExpertAssignment, ExpertSurvey, TrainingConfig
from edgefed.simulation.config import LINKS, MethodChoice, SimulatedDevice, SimulationConfig
from edgefed.simulation.simulate import simulate

FLEET = (
    ("jetson-orin-nano-8gb", "fibre"),
    ("rtx-3060-12gb", "cable"),
    ("rtx-4060-laptop-8gb", "cable"),
    ("rtx-4090", "fibre"),
    ("rtx-3060-12gb", "fibre"),
)
"""Profile and network of each client, in turn."""


@register
@dataclasses.dataclass(frozen=True)
class FluxByFrequency(Flux):
    """`Flux` that assigns experts by their frequency, whatever utilities the devices measure."""

    name = "flux_by_frequency"

    def assign_experts(
        self, surveys: Mapping[str, ExpertSurvey], coverage: Coverage, server_round: int, seed: int
    ) -> dict[str, ExpertAssignment]:
        """As `Flux.assign_experts`, without the utilities of ``surveys``."""
        without = {
            client: msgspec.structs.replace(survey, utility=tuple(tuple(None for _ in row) for row in survey.utility))
            for client, survey in surveys.items()
        }
        return super().assign_experts(without, coverage, server_round, seed)


METHODS: Mapping[str, tuple[str, dict, str]] = {
    "slices": ("slices", {}, "full"),
    "slices-paced": ("slices", {}, "full"),
    "fmes-paced": ("fmes", {}, "full"),
    "hfedmoe-paced": ("hfedmoe", {}, "full"),
    "random-paced": ("random", {}, "full"),
    "slices-compressed": ("slices", {}, "full"),
    "fmes-compressed": ("fmes", {}, "full"),
    "fmd-compressed": ("fmd", {}, "full"),
    "flux": ("flux", {"probes": 1}, "full"),
    "flux-quick": ("flux", {"probes": 0, "pace_factor": 0.8}, "full"),
    "flux-quick-frequency": ("flux_by_frequency", {"probes": 0, "pace_factor": 0.8}, "full"),
    "flux-quicker": ("flux", {"probes": 0, "pace_factor": 0.65, "refresh_rounds": 8}, "full"),
    "flux-own-pace": ("flux", {"probes": 1, "pace": "own", "refresh_rounds": 1}, "full"),
    "flux-greedy": ("flux", {"probes": 0, "eps_start": 0.9, "pace": "own", "refresh_rounds": 1}, "full"),
    "flux-lora": ("flux", {"probes": 1}, "lora"),
    "flux-lora-own-pace": ("flux", {"probes": 1, "pace": "own", "refresh_rounds": 1}, "lora"),
    "flux-lora-quick": ("flux", {"probes": 0, "pace_factor": 0.8}, "lora"),
    "hfedmoe": ("hfedmoe", {}, "full"),
    "fmd": ("fmd", {}, "full"),
    "fmq": ("fmq", {}, "lora"),
    "fmes": ("fmes", {}, "full"),
    "fedmoe_submodel": ("fedmoe_submodel", {}, "full"),
    "random": ("random", {}, "full"),
}
"""Label: method, its options, how experts are trained."""

PACE = dict.fromkeys(("slices-paced", "fmes-paced", "hfedmoe-paced", "random-paced"), 0.8)
"""Pace of the run; 0 without. Flux has it in its options. `random-paced` is the pace of `flux-quick` without its
selection, `flux-own-pace` its selection without the pace."""

COMPRESSED = ("slices-compressed", "fmes-compressed", "fmd-compressed")
"""Runs with updates of `topk12` and downloads of `int4`, without a pace; the others send and get whole tensors."""

MORE_ROUNDS = {
    "flux-quick": 14 / 8,
    "flux-quick-frequency": 14 / 8,
    "flux-quicker": 18 / 8,
    **dict.fromkeys((*PACE, *COMPRESSED), 14 / 8),
}
"""Rounds as a multiple of --rounds: where a round is short, as many fit into less time."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One method with one seed. ``files``: each client's records."""

    label: str
    method: str
    options: dict
    experts: str
    seed: int
    learning_rate: float
    files: tuple[str, ...]
    work: str
    settings: dict


def play(run: Run) -> dict:
    """Simulate; what is kept of it."""
    rounds = round(run.settings["rounds"] * MORE_ROUNDS.get(run.label, 1))
    training = TrainingConfig(
        local_steps=run.settings["local_steps"], batch_size=run.settings["batch_size"],
        sequence_length=run.settings["sequence_length"], learning_rate=run.learning_rate,
        profile_tokens=run.settings["profile_tokens"], experts=run.experts,
    )  # fmt: skip
    fleet = []
    for index, file in enumerate(run.files):
        profile, network = FLEET[index % len(FLEET)]
        network = run.settings["network"] or network
        fleet.append(
            SimulatedDevice(f"{index:02d}-{profile}", effective(find_profile(profile), {}, None), LINKS[network], file)
        )
    config = SimulationConfig(
        fleet=tuple(fleet), methods=(MethodChoice(run.method, run.options, run.label),), model="tiny",
        cost_shape="OLMoE-1B-7B", rounds=rounds, seed=run.seed, training=training,
        evaluation_tokens=run.settings["evaluation_tokens"], preinstalled=True,
        pace=PACE.get(run.label, 0.0),
        compression="topk12" if run.label in COMPRESSED else "none",
        download_compression="int4" if run.label in COMPRESSED else "none",
    )  # fmt: skip
    out = Path(run.work) / f"{run.label}-{run.learning_rate:g}-{run.seed}"
    found = simulate(config, out).run(run.label)
    parts: dict[str, float] = {}
    for each in found.rounds:
        for client in each.clients.values():
            for part, seconds in client.seconds.items():
                parts[part] = parts.get(part, 0.0) + seconds
            for part in ("late", "waits"):
                parts[part] = parts.get(part, 0.0) + getattr(client, part)
    return {
        "label": run.label,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "curve": found.curve,
        "accuracy": [each.accuracy for each in (found.first, *found.rounds)],
        "refused": dict(found.refused),
        "stopped": found.stopped,
        "client_seconds_by_part": parts,
        "bytes_up": sum(client.bytes_up for each in found.rounds for client in each.clients.values()),
        "bytes_down": sum(client.bytes_down for each in found.rounds for client in each.clients.values()),
    }


def seconds_to(curve: list, target: float) -> float | None:
    """Virtual seconds to the end of the first round at or below ``target``."""
    return next((seconds for seconds, loss in curve if loss <= target), None)


def crossing(curve: list, target: float) -> float | None:
    """Virtual seconds until ``target``, were the loss to fall evenly within a round: with rounds of an hour the end of
    the first round below it says little of a method that missed it by a hair.
    """
    for (before, high), (after, low) in zip(curve, curve[1:], strict=False):
        if low <= target:
            return before + (after - before) * max(0.0, high - target) / max(high - low, 1e-12)
    return None


def summarise(runs: list[dict], share: float, reference: str = "fmd") -> dict:
    """Per method: final loss, seconds to the target by seed, and how much sooner Flux is there.

    The target is ``share`` of what the run of ``reference`` with the same seed gains.
    """
    by_label: dict[str, list[dict]] = {}
    for run in runs:
        by_label.setdefault(run["label"], []).append(run)
    for label, found in by_label.items():  # adapters: the best of their learning rates, by the final loss
        rates = {run["learning_rate"] for run in found}
        best = min(rates, key=lambda rate: np.mean([r["curve"][-1][1] for r in found if r["learning_rate"] == rate]))
        by_label[label] = [run for run in found if run["learning_rate"] == best]
    gains = {run["seed"]: (run["curve"][0][1], run["curve"][-1][1]) for run in by_label[reference]}
    targets = {seed: first - share * (first - last) for seed, (first, last) in gains.items()}
    rows = {}
    for label, found in by_label.items():
        found = sorted((run for run in found if run["seed"] in targets), key=lambda run: run["seed"])
        times = [seconds_to(run["curve"], targets[run["seed"]]) for run in found]
        crossings = [crossing(run["curve"], targets[run["seed"]]) for run in found]
        rows[label] = {
            "seeds": len(found),
            "learning_rate": found[0]["learning_rate"],
            "final_loss": float(np.mean([run["curve"][-1][1] for run in found])),
            "final_loss_std": float(np.std([run["curve"][-1][1] for run in found])),
            "final_accuracy": float(np.mean([run["accuracy"][-1] for run in found])),
            "hours": float(np.mean([run["curve"][-1][0] for run in found])) / 3600,
            "seconds_to_target": times,
            "seconds_to_crossing": crossings,
            "mean_seconds_to_target": float(np.mean(times)) if None not in times else None,
            "mean_seconds_to_crossing": float(np.mean(crossings)) if None not in crossings else None,
            "refused_devices": len(found[0]["refused"]),
            "gigabytes_up": found[0]["bytes_up"] / 1e9,
            "gigabytes_down": found[0]["bytes_down"] / 1e9,
        }
    reached = {label: row["mean_seconds_to_target"] for label, row in rows.items()}
    sooner = {}  # with whole experts and with adapters apart: what travels differs a hundredfold
    for mode in ("full", "lora"):
        times = {label: t for label, t in reached.items() if t is not None and METHODS[label][2] == mode}
        ours = min((label for label in times if label.startswith("flux")), key=times.get, default=None)
        if ours:
            sooner[ours] = {label: t / times[ours] for label, t in times.items()}
    return {
        "first_loss": float(np.mean([first for first, _ in gains.values()])),
        "target_loss": float(np.mean(list(targets.values()))),
        f"target_share_of_{reference}_gain": share,
        "methods": rows,
        "quickest_flux_is_sooner_by": sooner,
        f"final_loss_against_{reference}": {
            label: row["final_loss"] / rows[reference]["final_loss"] for label, row in rows.items()
        },
    }


def table(summary: dict, ours: str) -> str:
    """Minutes to the target, and how much later than ``ours`` (geometric mean of paired ratios, 95 % interval)."""
    rows = summary["methods"]
    lines = [
        f"| method, seeds | minutes to the target | times `{ours}` | final loss | ends after | uploads |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = rows[ours]["seconds_to_crossing"]
    for label, row in sorted(rows.items(), key=lambda item: item[1]["mean_seconds_to_crossing"] or math.inf):
        times, later = row["seconds_to_crossing"], ""
        if None not in times + base and label != ours and len(times) == len(base):
            mean, half = interval([math.log(own / first) for own, first in zip(times, base, strict=True)])
            later = f"{math.exp(mean):.2f}"
            if math.isfinite(half):
                later += f" ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
        reached = [own for own in times if own is not None]
        minutes = f"{np.mean(reached) / 60:.1f}" if reached else "not reached"
        if 0 < len(reached) < len(times):
            minutes += f" (in {len(reached)} of {len(times)})"
        lines.append(
            f"| `{label}`, {row['seeds']} | {minutes} | {later} | {row['final_loss']:.3f} | {row['hours']:.2f} h | "
            f"{row['gigabytes_up']:.1f} GB |"
        )
    return "\n".join(lines)


def draw(runs: list[dict], summary: dict, title: str, path: Path) -> None:
    """Loss against virtual time, mean over seeds, and where clients' time went."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    labels = sorted(summary["methods"], key=lambda label: summary["methods"][label]["final_loss"])
    colours = dict(zip(labels, plt.cm.tab10.colors, strict=False))
    parts = sorted({part for run in runs for part in run["client_seconds_by_part"]})
    for label in labels:
        rate = summary["methods"][label]["learning_rate"]
        found = [run for run in runs if run["label"] == label and run["learning_rate"] == rate]
        length = min(len(run["curve"]) for run in found)
        curve = np.mean([run["curve"][:length] for run in found], axis=0)
        left.plot(curve[1:, 0] / 60, curve[1:, 1], marker="o", markersize=3, label=label, color=colours[label])
    left.axhline(summary["target_loss"], color="0.4", linestyle=":", label="target")
    left.set(xlabel="virtual minutes", ylabel="held-out loss of the global model", title=title, xscale="log")
    left.legend(fontsize=8)
    bottom = np.zeros(len(labels))
    palette = plt.cm.tab20.colors
    for number, part in enumerate(parts):
        heights = []
        for label in labels:
            rate = summary["methods"][label]["learning_rate"]
            found = [run for run in runs if run["label"] == label and run["learning_rate"] == rate]
            total = sum(sum(run["client_seconds_by_part"].values()) for run in found)
            heights.append(sum(run["client_seconds_by_part"].get(part, 0.0) for run in found) / total)
        right.bar(labels, heights, bottom=bottom, label=part, color=palette[number % len(palette)])
        bottom += heights
    right.set(ylabel="share of all clients' time", title="where the time goes")
    right.set_xticks(range(len(labels)), labels=labels, rotation=30, ha="right")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--set", choices=tuple(SETS), default="dolly", dest="name")
    parser.add_argument(
        "--clients", type=int, default=10,
        help="up to ten, or a multiple of ten: then the data of each of the ten is dealt out",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--profile-tokens", type=int, default=2048)
    parser.add_argument("--evaluation-tokens", type=int, default=2048)
    parser.add_argument("--network", choices=tuple(LINKS), help="of every client; default: fibre and cable mixed")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--adapter-rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--target-share", type=float, default=0.7)
    parser.add_argument("--reference", choices=tuple(METHODS), default="fmd", help="the target is a share of its gain")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    if arguments.reference not in arguments.methods:
        parser.error(f"--reference {arguments.reference} is not among the methods")
    settings = {
        name: getattr(arguments, name)
        for name in (
            "rounds", "local_steps", "batch_size", "sequence_length", "profile_tokens", "evaluation_tokens", "network"
        )
    }  # fmt: skip
    parts = max(1, arguments.clients // 10)
    if arguments.clients < 1 or (arguments.clients > 10 and arguments.clients % 10):
        parser.error(f"--clients {arguments.clients}: 1 to 10, or a multiple of ten, is needed")
    plans = []
    for seed in arguments.seeds:
        folder = arguments.work / f"data-{seed}"
        files = tuple(map(str, write_clients(arguments.name, arguments.data, folder, seed, parts).values()))
        files = files[: arguments.clients]
        for label in arguments.methods:
            method, options, experts = METHODS[label]
            rates = arguments.adapter_rates if experts == "lora" else [arguments.learning_rate]
            work = str(arguments.work / "runs")
            plans += [Run(label, method, options, experts, seed, rate, files, work, settings) for rate in rates]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    runs = []
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(play, plan) for plan in plans]):
            run = future.result()
            runs.append(run)
            seconds, loss = run["curve"][-1]
            print(f"{run['label']:16} seed {run['seed']}: loss {loss:.3f} after {seconds / 3600:.2f} virtual hours")
    runs.sort(key=lambda run: (run["label"], run["seed"], run["learning_rate"]))
    summary = summarise(runs, arguments.target_share, arguments.reference)
    print(json.dumps(summary, indent=1))
    for ours in [label for label in arguments.methods if label.endswith(("-paced", "-quick"))][:1]:
        print(table(summary, ours))
    if arguments.json:
        content = {
            "provenance": provenance(), "set": arguments.name, "clients": arguments.clients, "fleet": FLEET,
            "settings": {**settings, "learning_rate": arguments.learning_rate}, "summary": summary, "runs": runs,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.figure:
        title = f"{arguments.name}, {arguments.clients} clients, mean of {len(arguments.seeds)} seeds"
        draw(runs, summary, title, arguments.figure)


if __name__ == "__main__":
    main()
