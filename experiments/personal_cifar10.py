"""FedMoE and the methods that it is compared with, on CIFAR-10: ten clients with five CNNs and different data.

    python experiments/personal_cifar10.py --data DATA --work WORK --json experiments/results/personal_cifar10.json \
        --figure experiments/results/personal_cifar10.png --gates experiments/results/personal_cifar10_gates.png

Client k has CNN-(k mod 5)+1 of the paper (arXiv 2402.01350, Table 1) and either two classes ("classes") or a
Dirichlet share of all ("dirichlet"). All methods have the same clients, initial weights, rounds, epochs and batches.
60 % of a client's images are held out; with the paper's 20 % a difference of one point would not be significant. This
leaves 160 images for training; `--images 10000 --held-out 0.2 --rounds 18 --local-epochs 1` gives each client 800.
Hyper-parameters were tuned once (`--tune --images 8000 --rounds 16`), on images that the table does not use; their
rows are stored with it. `DATA` is the folder with `cifar10/cifar10_10k_2k.npz`. Finished runs are kept in --work and
not repeated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from recording import provenance

FILE = "cifar10/cifar10_10k_2k.npz"
POOL_SEED = 2024
METHODS: Mapping[str, tuple[str, dict, dict]] = {
    "fedmoe": ("fedmoe", {}, {}),
    "fedmoe-quick-gate": ("fedmoe", {}, {"gate_lr": 0.02}),
    "fedmoe-guided": ("fedmoe", {}, {"expert_loss": 1.0, "feature_pull": 10.0}),
    "standalone": ("standalone", {}, {}),
    "fedproto": ("fedproto", {"weight": 10.0}, {}),
    "fedproto-apart": ("fedproto", {"weight": 10.0, "apart": True}, {}),
    "lg-fedavg": ("lg-fedavg", {}, {}),
    "static": ("static", {}, {}),
    "fml": ("fml", {}, {}),
    "fedmoe-shared-only": ("fedmoe-shared-only", {}, {}),
}
"""Label: strategy, its options, what it changes of the common hyper-parameters. ``apart``: every client is a federation
of its own, so nothing is shared; what is left of a method then is what it does for a client alone."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One method on one split with one seed. ``method``: hyper-parameters, as `FedMoE` names them."""

    label: str
    strategy: str
    options: dict
    method: dict
    split: str
    seed: int
    settings: dict
    work: str

    def path(self) -> Path:
        """Where its result is kept: the name holds everything that it depends on."""
        what = json.dumps(dataclasses.asdict(dataclasses.replace(self, work="")), sort_keys=True)
        digest = hashlib.sha256(what.encode()).hexdigest()[:10]
        return Path(self.work) / f"{self.label}-{self.split}-{self.seed}-{digest}.json"


def pools(path: Path, images: int):
    """(images of the table, images for tuning): the first ``images`` of a fixed shuffle, and the rest with x_test."""
    from edgefed.personal.samples import ImageSamples

    with np.load(path, allow_pickle=False) as content:
        found = {name: content[name] for name in content.files}
    classes = tuple(map(str, found["classes"]))
    order = np.random.default_rng(POOL_SEED).permutation(len(found["y_train"]))
    labels = found["y_train"].astype(np.int64)
    table = ImageSamples(found["x_train"][order[:images]], labels[order[:images]], classes)
    rest = np.concatenate([found["x_train"][order[images:]], found["x_test"]])
    rest_labels = np.concatenate([labels[order[images:]], found["y_test"].astype(np.int64)])
    return table, ImageSamples(rest, rest_labels, classes)


def make_clients(run: Run):
    """Ten clients: data by the split, CNN by number, first weights by seed; the same for every method."""
    import torch

    from edgefed.personal.networks import make_cnn
    from edgefed.personal.partition import partition_by_class, partition_dirichlet
    from edgefed.personal.samples import hold_out
    from edgefed.simulation.personal_federation import Client

    settings = run.settings
    samples = pools(Path(settings["data"]), settings["images"])[1 if settings["tuning"] else 0]
    if run.split == "classes":
        parts = partition_by_class(samples.labels, settings["clients"], settings["classes_per_client"], run.seed)
    else:
        parts = partition_dirichlet(samples.labels, settings["clients"], settings["alpha"], run.seed, 40)
    clients = []
    for number, rows in enumerate(parts):
        train, held_out = hold_out(samples.subset(np.asarray(rows)), settings["held_out"], run.seed)
        torch.manual_seed(1000 * run.seed + number)
        model = make_cnn(f"cnn{number % 5 + 1}", len(samples.classes))
        clients.append(Client(f"{number:02d}", train, held_out, model))
    return clients


def play(run: Run) -> dict:
    """Train and judge; what is kept of it."""
    import torch

    from edgefed.methods.fedmoe import FedMoE
    from edgefed.personal.mixture import FixedGate
    from edgefed.simulation.personal_baselines import make_strategy
    from edgefed.simulation.personal_federation import Settings, worst_decile
    from edgefed.simulation.personal_federation import run as federate

    if run.path().exists():
        return json.loads(run.path().read_text())
    torch.set_num_threads(1)
    began, processor = time.perf_counter(), time.process_time()
    clients, settings, options = make_clients(run), run.settings, dict(run.options)
    groups = [[client] for client in clients] if options.pop("apart", False) else [clients]
    strategies = [make_strategy(run.strategy, each, FedMoE(**run.method), seed=run.seed, **options) for each in groups]
    plan = Settings(settings["rounds"], settings["share"], settings["evaluate_every"], run.seed)
    histories = [federate(strategy, plan) for strategy in strategies]
    last = [history.rounds[-1] for history in histories]
    sent = [0 if len(groups) > 1 else count for each in last for count in each.parameters_up.values()]
    received = [0 if len(groups) > 1 else count for each in last for count in each.parameters_down.values()]
    curves = [history.curve() for history in histories]
    accuracy = [each for history in histories for each in history.final()]
    found = {
        "label": run.label, "split": run.split, "seed": run.seed, "method": run.method, "options": run.options,
        "curve": [(places[0][0], float(np.mean([mean for _, mean in places]))) for places in zip(*curves, strict=True)],
        "accuracy": accuracy, "received": [each for history in histories for each in history.received],
        "mean": float(np.mean(accuracy)), "worst_decile": worst_decile(accuracy),
        "parameters_up": max(sent), "parameters_down": max(received),
        "flops_per_client_and_round": float(np.mean([n for history in histories for n in history.flops.values()])),
        "train_examples": [len(client.train) for client in clients],
        "held_out_examples": [len(client.held_out) for client in clients],
        "train_loss": float(np.mean([loss for each in last for loss in each.losses.values()])),
        "processor_seconds": time.process_time() - processor, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    if run.strategy == "fedmoe":
        found["gates"] = [
            {"shared_weight": [round(float(w), 4) for w in each.gate_weights[:, 0]], "labels": each.labels.tolist()}
            for each in histories[0].evaluations
        ]
        # Does it matter that the gate looks at the example? Each client's mean weight in its place, for all examples.
        for model, gates in zip(strategies[0].models, found["gates"], strict=True):
            model.gate = FixedGate(float(np.mean(gates["shared_weight"])))
        found["received_mean_gate"] = [strategies[0].evaluate(number).accuracy for number in range(len(clients))]
    run.path().write_text(json.dumps(found) + "\n")
    return found


def summarise(runs: list[dict], reference: str = "standalone") -> dict:
    """{split: {"target": ..., "methods": {label: row}}}. The target is what ``reference`` reaches in all rounds, mean
    over seeds; a method that does not reach it in every seed has None.
    """
    from edgefed.simulation.personal_federation import rounds_to

    rows: dict = {}
    for split in sorted({run["split"] for run in runs}):
        of_split = [run for run in runs if run["split"] == split]
        alone = [run["mean"] for run in of_split if run["label"] == reference]
        target = float(np.mean(alone)) if alone else None
        methods = {}
        for label in dict.fromkeys(run["label"] for run in of_split):
            found = [run for run in of_split if run["label"] == label]
            reached = [rounds_to(run["curve"], target) for run in found] if target is not None else [None]
            methods[label] = {
                "seeds": len(found),
                "mean": float(np.mean([run["mean"] for run in found])),
                "mean_std": float(np.std([run["mean"] for run in found])),
                "worst_decile": float(np.mean([run["worst_decile"] for run in found])),
                "received": float(np.mean([np.mean(run["received"]) for run in found])),
                "best_of_curve": float(np.mean([max(mean for _, mean in run["curve"]) for run in found])),
                "rounds_to_target": float(np.mean(reached)) if None not in reached else None,
                "parameters_up": found[0]["parameters_up"],
                "bytes_up_per_client_and_round": 4 * found[0]["parameters_up"],
                "bytes_down_per_client_and_round": 4 * found[0]["parameters_down"],
                "gflops_per_client_and_round": float(np.mean([run["flops_per_client_and_round"] for run in found]))
                / 1e9,
            }
            if "received_mean_gate" in found[0]:
                methods[label]["received_mean_gate"] = float(np.mean([run["received_mean_gate"] for run in found]))
        rows[split] = {"target": target, "methods": methods}
    return rows


def print_table(summary: dict) -> None:
    """One block a split, best first."""
    for split, rows in summary.items():
        print(f"\n{split}: target {rows['target'] if rows['target'] is None else round(100 * rows['target'], 2)} %")
        print(f"{'':20} {'mean':>6} {'+-':>5} {'worst':>6} {'rounds':>7} {'up':>9} {'GFLOP':>7}")
        for label, row in sorted(rows["methods"].items(), key=lambda item: -item[1]["mean"]):
            reached = "-" if row["rounds_to_target"] is None else f"{row['rounds_to_target']:.0f}"
            print(
                f"{label:20} {100 * row['mean']:6.2f} {100 * row['mean_std']:5.2f} {100 * row['worst_decile']:6.2f} "
                f"{reached:>7} {row['parameters_up']:9,} {row['gflops_per_client_and_round']:7.1f}"
            )


def draw(runs: list[dict], classes: tuple[str, ...], figure: Path | None, gates: Path | None) -> None:
    """Curves and clients by split; the gate's weights of the first seed."""
    from edgefed.simulation.pictures import save_comparison, save_gate_histograms

    if figure:
        save_comparison(
            figure,
            {
                split: {
                    label: [(run["curve"], run["accuracy"]) for run in runs if (run["split"], run["label"]) == key]
                    for label in dict.fromkeys(run["label"] for run in runs)
                    if (key := (split, label)) and any((run["split"], run["label"]) == key for run in runs)
                }
                for split in sorted({run["split"] for run in runs})
            },
        )
    chosen = [run for run in runs if run["label"] == "fedmoe" and run["seed"] == min(r["seed"] for r in runs)]
    if gates and chosen:
        of_client = {
            f"{run['split']}, client {number}": (np.asarray(each["shared_weight"]), np.asarray(each["labels"]))
            for run in chosen
            for number, each in enumerate(run["gates"])
            if number < 5
        }
        save_gate_histograms(gates, of_client, classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--splits", nargs="+", choices=("classes", "dirichlet"), default=["classes", "dirichlet"])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--share", type=float, default=1.0, help="of the clients, in a round")
    parser.add_argument("--images", type=int, default=4000, help="of the set, for all clients together")
    parser.add_argument("--held-out", type=float, default=0.6)
    parser.add_argument("--classes-per-client", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet split")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--evaluate-every", type=int, default=3)
    parser.add_argument("--local-epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of the clients' own models")
    parser.add_argument("--extractor-rate", type=float, default=0.06, help="of what travels beside them")
    parser.add_argument("--gate-rate", type=float, default=0.001)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--method", type=json.loads, default={}, help='more of FedMoE\'s, as {"gate_width": 128}')
    parser.add_argument("--options", type=json.loads, default={}, help='by label, as {"fedproto": {"weight": 0.1}}')
    parser.add_argument("--tune", action="store_true", help="on the images that the table never sees")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--gates", type=Path)
    arguments = parser.parse_args()
    path = arguments.data / FILE
    if not path.is_file():
        parser.error(f"{path} is not there: a class-balanced CIFAR-10 subset with x_train, y_train, x_test, y_test")
    settings = {
        name: getattr(arguments, name)
        for name in (
            "clients", "share", "images", "held_out", "classes_per_client", "alpha", "rounds", "evaluate_every"
        )
    } | {"data": str(path), "tuning": arguments.tune}  # fmt: skip
    method = {
        "extractor_lr": arguments.extractor_rate, "model_lr": arguments.rate, "gate_lr": arguments.gate_rate,
        "momentum": arguments.momentum, "local_epochs": arguments.local_epochs, "batch_size": arguments.batch_size,
    }  # fmt: skip
    arguments.work.mkdir(parents=True, exist_ok=True)
    plans = []
    for seed in arguments.seeds:
        for split in arguments.splits:
            for label in arguments.methods:
                strategy, options, changes = METHODS[label]
                own = {**method, **changes, **arguments.method}
                if strategy != "fedmoe":
                    del own["gate_lr"]  # there is no gate that learns
                options = {**options, **arguments.options.get(label, {})}
                plans.append(Run(label, strategy, options, own, split, seed, settings, str(arguments.work)))
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    runs = []
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(play, plan) for plan in plans]):
            run = future.result()
            runs.append(run)
            print(
                f"{run['label']:20} {run['split']:9} seed {run['seed']}: {100 * run['mean']:.2f} % "
                f"worst {100 * run['worst_decile']:.2f}, received {100 * np.mean(run['received']):.2f}, "
                f"loss {run['train_loss']:.3f}, {run['processor_seconds']:.0f} s",
                flush=True,
            )
    order = list(METHODS)
    runs.sort(key=lambda run: (run["split"], order.index(run["label"]), run["seed"]))
    summary = summarise(runs)
    print_table(summary)
    if arguments.json:
        settings["data"] = FILE
        kept = [{name: value for name, value in run.items() if name != "gates"} for run in runs]
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        if arguments.tune:
            content = {**known, "tuning": [*known.get("tuning", []), *({**run, "settings": settings} for run in kept)]}
        else:
            content = {
                **known, "provenance": provenance(), "settings": {**settings, "method": method}, "summary": summary,
                "runs": kept,
            }  # fmt: skip
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    with np.load(path, allow_pickle=False) as content:
        classes = tuple(map(str, content["classes"]))
    draw(runs, classes, arguments.figure, arguments.gates)


if __name__ == "__main__":
    main()
