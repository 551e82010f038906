"""Federated methods on real text at equal budgets: one aggregator process, ten clients, three seeds.

    python experiments/federate_text.py --data DIR --set agnews --json experiments/results/federate_agnews.json

The aggregator is a process of its own; the clients are agents of edgefed in this process, one after the other, over
loopback HTTP. With `random` and `hfedmoe` every client holds a share ``--experts`` of the experts; `fedavg` needs all
of them and is the upper bound. All numbers are from held-out records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from recording import provenance
from text_sets import AGNEWS_TOPICS, SETS, write_clients
from transformers.utils import logging as transformers_logging

from edgefed.agent.agent import AgentSettings, open_agent
from edgefed.hardware.memory import format_bytes
from edgefed.runs import export_model
from edgefed.simulation.evaluation import held_out_losses
from edgefed.simulation.processes import read_ledger
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import ProcessMemory
from edgefed.training.data import Example

METHODS = {
    "random": ("random", {}),
    "random-redraw": ("random", {"redraw": "true"}),
    "hfedmoe": ("hfedmoe", {}),
    "fedavg": ("fedavg", {}),
}
"""Name in the table -> method and its options. HFedMoE draws experts anew each round, so random does so too, once."""
MEMORY_BYTES = 64 << 30
HELD_OUT = 0.2


def run_once(args: argparse.Namespace, method: str, seed: int, folder: Path) -> dict:
    """One federation from the packaged model; returns one row."""
    files = write_clients(args.set, args.data, folder / "data", seed)
    kind, own = METHODS[method]
    options = [f"{name}={value}" for name, value in own.items()] + (args.option if method == "hfedmoe" else [])
    share = 1.0 if method == "fedavg" else args.experts
    ready = folder / "address"
    flags = [
        "--model", args.model, "--method", kind, "--rounds", str(args.rounds), "--seed", str(seed), "--min-clients",
        str(len(files)), "--local-steps", str(args.local_steps), "--batch-size", str(args.batch_size),
        "--sequence-length", str(args.sequence_length), "--learning-rate", str(args.learning_rate),
        "--profile-tokens", str(args.profile_tokens), "--evaluation-tokens", str(args.evaluation_tokens // 2),
        "--keep-rounds", "0",
        "--client-timeout", "600", "--state", str(folder / "run"), "--port", "0", "--ready-file", str(ready),
        "--exit-when-finished", *(f for option in options for f in ("--option", option)),
    ]  # fmt: skip
    started = time.monotonic()
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "edgefed", "serve", *flags], stdout=log, stderr=log)
    try:
        while not ready.exists():
            if server.poll() is not None or time.monotonic() - started > 120:
                raise SystemExit((folder / "server.log").read_text())
            time.sleep(0.1)
        trainers = run_clients(args, files, share, json.loads(ready.read_text())["url"], folder)
        server.wait(timeout=60)
    finally:
        if server.poll() is None:
            server.terminate()
            server.wait(timeout=10)
    seconds = time.monotonic() - started
    held_out = {name: trainer.corpus.held_out for name, trainer in trainers.items()}
    losses = held_out_losses(
        folder / "run",
        held_out,
        sequence_length=args.sequence_length,
        max_tokens=args.evaluation_tokens,
        rounds=(1, args.rounds // 2 + 1, args.rounds + 1),
    )
    ledgers = [read_ledger(folder / "clients" / name) for name in files]
    metrics = [[entry["metrics"] for entry in ledger] for ledger in ledgers]
    model = export_model(folder / "run", folder / "model")
    curve = [statistics.mean(values) for values in zip(*losses.values(), strict=True)]
    return {
        "set": args.set,
        "method": method,
        "seed": seed,
        "experts": share,
        "clients": len(files),
        "rounds": args.rounds,
        "global_loss_before": curve[0],
        "global_loss_after": curve[-1],
        "global_loss_middle": curve[1],
        "device_loss_before": statistics.mean(m[0]["held_out_loss_before"] for m in metrics),
        "device_loss_after": statistics.mean(m[-1]["held_out_loss_after"] for m in metrics),
        **score(args.set, model, held_out, args.scored_records),
        "bytes_down": sum(entry["bytes_down"] for ledger in ledgers for entry in ledger),
        "bytes_up": sum(entry["bytes_up"] for ledger in ledgers for entry in ledger),
        "peak_expert_bytes": max(m["peak_expert_bytes"] for rows in metrics for m in rows),
        "seconds": seconds,
    }


def run_clients(
    args: argparse.Namespace, files: dict[str, Path], share: float, url: str, folder: Path
) -> dict[str, LocalTrainer]:
    """Drive all agents in turn until every one has heard that the run is over."""
    trainers = {}
    with contextlib.ExitStack() as stack:
        agents = []
        for name, path in files.items():
            state = folder / "clients" / name
            limits, memory = DeviceLimits(expert_share=share), ProcessMemory(MEMORY_BYTES)
            trainers[name] = LocalTrainer(str(path), state, limits, name, memory, held_out_share=HELD_OUT)
            settings = AgentSettings(name=name, memory_bytes=MEMORY_BYTES, expert_share=share, poll_s=0.2)
            agents.append(stack.enter_context(open_agent(url, state, settings, trainers[name])))
        for _ in range(args.rounds * 200):
            outcomes = [agent.step().kind for agent in agents]
            if all(kind == "finished" for kind in outcomes):
                return trainers
    raise SystemExit("the run did not finish")


def score(name: str, model_folder: Path, held_out: dict[str, Sequence[Example]], records: int) -> dict:
    """Accuracy (AG News, by likelihood of the four topics) or ROUGE-L (Dolly, greedy answers) of the exported model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name not in ("agnews", "dolly"):
        return {}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    values = []
    for examples in held_out.values():
        for example in examples[: records if name == "agnews" else max(1, records // 10)]:
            prompt = "".join(segment.text for segment in example.segments if not segment.learn)
            answer = "".join(segment.text for segment in example.segments if segment.learn)
            if name == "agnews":
                choices = [likelihood(model, tokenizer, prompt, f" {topic}") for topic in AGNEWS_TOPICS]
                best = AGNEWS_TOPICS[max(range(len(choices)), key=choices.__getitem__)]
                values.append(float(best == answer.strip()))
            else:
                values.append(rouge_l(greedy(model, tokenizer, prompt), answer))
    return {"accuracy" if name == "agnews" else "rouge_l": statistics.mean(values), "scored_records": len(values)}


@torch.no_grad()
def likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Log probability of ``answer`` after ``prompt``."""
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"][-200:]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    logits = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(logits[len(head) - 1 + i, token].item() for i, token in enumerate(tail))


@torch.no_grad()
def greedy(model, tokenizer, prompt: str, new_tokens: int = 40) -> str:
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"][-200:]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower case."""
    a, b = candidate.lower().split(), reference.lower().split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b):
            previous, row[j + 1] = row[j + 1], previous + 1 if word == other else max(row[j + 1], row[j])
    common = row[-1]
    return 2 * common / (len(a) + len(b))


def print_table(rows: Sequence[dict]) -> None:
    """Mean and standard deviation over seeds, a line per method."""
    columns = ["global_loss_before", "global_loss_after", "device_loss_before", "device_loss_after"]
    columns += [name for name in ("accuracy", "rouge_l") if name in rows[0]]
    print(
        f"{'method':<14}"
        + "".join(f"{name:>22}" for name in columns)
        + f"{'down':>11}{'up':>11}{'expert mem':>12}{'s':>7}"
    )
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = []
        for name in columns:
            values = [row[name] for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.4f} +- {spread:.4f}")
        down, up, memory, seconds = (
            statistics.mean(row[name] for row in mine)
            for name in ("bytes_down", "bytes_up", "peak_expert_bytes", "seconds")
        )
        print(
            f"{method:<14}" + "".join(f"{cell:>22}" for cell in cells)
            + f"{format_bytes(down):>11}{format_bytes(up):>11}{format_bytes(memory):>12}{seconds:>7.0f}"
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the public sets, see README.md here")
    parser.add_argument("--set", choices=SETS, default="agnews")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--option", action="append", default=[], help="hyper-parameter of hfedmoe, NAME=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--experts", type=float, default=0.25, help="share of the experts that random and hfedmoe hold")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--profile-tokens", type=int, default=4096, help="training tokens profiled per client")
    parser.add_argument("--evaluation-tokens", type=int, default=4096, help="held-out tokens per client")
    parser.add_argument("--scored-records", type=int, default=30, help="held-out records per client for accuracy")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for seed in args.seeds:
        for method in args.methods:
            with tempfile.TemporaryDirectory(prefix="edgefed-bench-") as scratch:
                rows.append(run_once(args, method, seed, Path(scratch)))
            last = rows[-1]
            print(
                f"# {method} seed {seed}: {last['global_loss_before']:.4f} > {last['global_loss_after']:.4f}, "
                f"{last['seconds']:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
            if args.json:
                settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
                del settings["data"], settings["json"]  # folders of this machine
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({**provenance(), "settings": settings, "rows": rows}, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
