"""Which experts should a device hold? A sweep of HFedMoE's selection on the embedded text, before any training.

    python experiments/sweep_hfedmoe.py --json experiments/results/sweep_hfedmoe.json

For each budget and setting: held-out loss of the packaged model with only the selected experts resident, minus the
loss of the full model; mean over silos. The profile is made on a silo's training text, the loss on its held-out text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from recording import provenance

from edgefed.embedded import resolve_model
from edgefed.expert_records import ExpertPlan
from edgefed.methods.baselines import RandomExperts
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import DeviceBudget
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.data import load_corpus
from edgefed.training.encoding import encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import profile_blocks, spread_blocks
from edgefed.training.tokenizer import load_tokenizer

SILOS = ("unittest", "email", "topics", "xml")
LAMBDAS, BETAS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 1.0, 2.0)
RANDOM_DRAWS = 3


def settings() -> dict[str, HFedMoE]:
    """Every combination with scaled layers, and the defaults with the paper's plain ranking; no draw in either."""
    grid = {
        f"lambda={a} beta={b}": HFedMoE(lambda_=a, beta=b, exploration=0) for a, b in itertools.product(LAMBDAS, BETAS)
    }
    return {**grid, "defaults, layer_scale=False": HFedMoE(layer_scale=False, exploration=0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.12])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    source = resolve_model(args.model)
    model, tokenizer = MoeModel.from_checkpoint(source), load_tokenizer(source)
    units = MemorySource({s.key: {n: t.clone() for n, t in u.items()} for s, u in model.iter_units(TrainScope())})
    losses: dict[tuple[str, float], list[float]] = {}
    for silo in SILOS:
        corpus = load_corpus(f"silo:{silo}", 0.1, 0)
        train = spread_blocks(encode_examples(corpus.train, tokenizer, 128), args.tokens)
        held_out = spread_blocks(encode_examples(corpus.held_out, tokenizer, 128), args.tokens // 2)
        record = profile_blocks(model, train, units)
        sizes = record.experts_per_layer

        def loss(plan: ExpertPlan, held_out=held_out) -> float:
            model.apply_plan(plan, units, TrainScope())
            return evaluate_loss(model.module, held_out, 8)

        full = loss(ExpertPlan.full(sizes))
        for share in args.shares:
            budget = DeviceBudget(max(len(sizes), int(share * sum(sizes))))
            draws = [np.random.default_rng(seed) for seed in range(RANDOM_DRAWS)]
            random = [loss(RandomExperts().plan_experts(None, sizes, budget, rng)) for rng in draws]
            losses.setdefault(("random", share), []).append(statistics.mean(random) - full)
            for name, method in settings().items():
                plan = method.plan_experts(record, sizes, budget, np.random.default_rng(0))
                losses.setdefault((name, share), []).append(loss(plan) - full)
    rows = [
        {"selection": name, "experts": share, "loss_increase": statistics.mean(values), "by_silo": values}
        for (name, share), values in losses.items()
    ]
    print(f"{'selection':<28}" + "".join(f"{share:>9.0%}" for share in args.shares))
    for name in dict.fromkeys(row["selection"] for row in rows):
        cells = [row["loss_increase"] for row in rows if row["selection"] == name]
        print(f"{name:<28}" + "".join(f"{value:>9.3f}" for value in cells))
    if args.json:
        args.json.write_text(json.dumps({**provenance(), "silos": SILOS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
