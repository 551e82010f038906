"""How well forward passes alone rank experts: estimated against true gradient norms, and what the estimate costs.

    python benchmarks/bench_utility.py --json benchmarks/results/utility.json

The packaged model, all experts resident, one batch of a silo. For each number of directions M and each step s (a share
of an expert's typical weight): Spearman's rank correlation of sqrt(n) with ||g|| over all experts with a token, the
same within layers, the mean ratio n / ||g||^2, and forward passes per expert. Utility = tokens x norm, so its ranks
agree better: that correlation is given too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

from edgefed.embedded import resolve_model
from edgefed.expert_records import ExpertPlan
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training import utility
from edgefed.training.data import load_corpus
from edgefed.training.encoding import encode_examples
from edgefed.training.loss import batch_loss
from edgefed.training.tokenizer import load_tokenizer
from edgefed.training.utility import GradientNorms

DIRECTIONS = (1, 4, 16)
STEPS = (0.05, 0.5, 1.0)
SILOS = ("unittest", "email")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; there are no ties among real norms."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def planned_model(folder: Path) -> MoeModel:
    full = MoeModel.from_checkpoint(folder)
    scope = TrainScope(experts="full", router="full")
    units = {spec.key: {n: t.clone() for n, t in tensors.items()} for spec, tensors in full.iter_units(scope)}
    model = MoeModel.skeleton(folder)
    for spec in model.unit_infos():
        if spec.kind != "expert":
            model.load_unit(spec.key, units[spec.key])
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), MemorySource(units), scope)
    model.module.eval()
    return model


def rows_of(model: MoeModel, silo: str, batch_size: int, length: int) -> list[dict]:
    blocks = encode_examples(load_corpus(f"silo:{silo}", 0.1, 0).train, load_tokenizer(resolve_model("tiny")), length)
    input_ids, labels = next(blocks.batches(batch_size, torch.Generator().manual_seed(0)))
    model.module.zero_grad()
    with model.record_statistics() as statistics:
        batch_loss(model.module, input_ids, labels, chunked=False).backward()
        record = statistics.take()
    norms = GradientNorms(model)
    norms.add()
    model.module.zero_grad()
    true = norms.mean_squares()
    experts = list(true)
    tokens = np.array([record.layers[layer].tokens_per_expert[expert] for layer, expert in experts])
    layers = np.array([layer for layer, _ in experts])
    squares = np.array([true[key] for key in experts])
    found = []
    for step in STEPS:
        for directions in DIRECTIONS:
            if step != STEPS[1] and directions != DIRECTIONS[1]:
                continue
            utility.STEP = step
            started = time.perf_counter()
            outcome = utility.probe_gradient_norms(model, experts, input_ids, labels, directions=directions, seed=1)
            seconds = time.perf_counter() - started
            estimate = np.array([outcome.mean_squares[key] for key in experts])
            within = [spearman(estimate[layers == n], squares[layers == n]) for n in np.unique(layers)]
            found.append(
                {
                    "silo": silo,
                    "experts": len(experts),
                    "directions": directions,
                    "step": step,
                    "spearman": spearman(estimate, squares),
                    "spearman_within_layers": float(np.mean(within)),
                    "spearman_of_utility": spearman(tokens * estimate**0.5, tokens * squares**0.5),
                    "spearman_of_frequency": spearman(tokens, tokens * squares**0.5),
                    "mean_ratio": float(np.mean(estimate / squares)),
                    "forwards_per_expert": (outcome.forwards - 1) / len(experts),
                    "seconds": seconds,
                }
            )
            print(json.dumps(found[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    arguments = parser.parse_args()
    model = planned_model(Path(resolve_model("tiny")))
    rows = [row for silo in SILOS for row in rows_of(model, silo, arguments.batch_size, arguments.sequence_length)]
    if arguments.json:
        content = {"provenance": provenance(), "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
