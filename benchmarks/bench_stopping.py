"""When a profile ends: tokens that it takes, and how far its plan and frequencies are from those of all tokens.

    python benchmarks/bench_stopping.py --data a.jsonl b.jsonl --json benchmarks/results/stopping.json

Every text is profiled in full once, block by block; the sequential test then sees its blocks in a random order for each
seed, as a device would. ``agreement`` and ``error`` are against the full profile, ``estimated_*`` is what the test
believes. ``last_round_agreement`` is of the plan without exploration that ends a run, which is made from the same
profile where a method profiles once. The agreement of slices is in what their neurons add to the outputs of layers
(`edgefed.training.stopping.slice_agreement`); ``same_neurons`` is the share of the neurons that are the same.
``within_target``: share of the seeds with an agreement of at least 95 % and an error of at most 8 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

from edgefed.embedded import resolve_model
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.methods.interface import ExpertMethod, RoundContext
from edgefed.methods.registry import make_method
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource
from edgefed.trainer.expert_choice import method_layout
from edgefed.training.data import load_corpus
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.profiling import NUM_GROUPS, ProfilePass, activation_error, profile_blocks, spread_blocks
from edgefed.training.stopping import MAX_FREQUENCY_ERROR, SequentialTest, plan_agreement, slice_agreement
from edgefed.training.tokenizer import load_tokenizer

METHODS = {"hfedmoe": {}, "hfedmoe without exploration": {"exploration": 0.0}, "flux": {}, "slices": {}}
SHARES = (0.25, 0.5)
FIRST, LAST = RoundContext(1, 0.0), RoundContext(10, 1.0)
AGREEMENT = 0.95


def block_profiles(model: MoeModel, data: str, tokens: int, length: int) -> list[ActivationProfile]:
    """The profile of each block of a text, with attention and energies of neurons."""
    path = resolve_model("tiny")
    encoded = encode_examples(load_corpus(data, 0.1, 0).train, load_tokenizer(path), length)
    blocks = spread_blocks(encoded, tokens)
    source = MemorySource({spec.key: {n: t.clone() for n, t in ts.items()} for spec, ts in model.iter_units()})
    rows = [TokenBlocks(blocks.input_ids[at : at + 1], blocks.labels[at : at + 1]) for at in range(len(blocks))]
    return [profile_blocks(model, row, source, ProfilePass("all"), attention=True, neurons=True) for row in rows]


def measure(parts: list[ActivationProfile], method: ExpertMethod, share: float, seed: int, length: int) -> dict:
    sizes = parts[0].experts_per_layer
    count = max(len(sizes), int(share * sum(sizes)))

    def plan(profile: ActivationProfile, context: RoundContext = FIRST) -> ExpertPlan:
        return method_layout(method, profile, sizes, context, seed=seed, identity="bench")(count, count)

    order = np.random.default_rng(seed).permutation(len(parts))
    shuffled = [parts[at] for at in order]
    test, done = SequentialTest(len(parts), length, plan, AGREEMENT, seed), 0
    stages = 0
    sliced = bool(plan(parts[0]).neurons)

    def seen() -> list[ActivationProfile]:
        """As `profile_blocks` gives them: blocks, or groups of blocks with energies."""
        found = shuffled[:done]
        return [total(found[group::NUM_GROUPS]) for group in range(min(done, NUM_GROUPS))] if sliced else found

    while more := test(seen()):
        done += more
        stages += 1
    found, truth = total(shuffled[:done]), total(parts)

    def agreement(context: RoundContext) -> float:
        mine, theirs = plan(found, context), plan(truth, context)
        return slice_agreement(mine, theirs, truth) if sliced else plan_agreement(mine, theirs)

    row = {
        "tokens": done * length,
        "stages": stages,
        "agreement": agreement(FIRST),
        "estimated_agreement": test.result.agreement,
        "last_round_agreement": agreement(LAST),
        "error": activation_error(found, truth),
        "estimated_error": test.result.frequency_error,
    }
    if sliced:
        pairs = list(zip(plan(found).neurons, plan(truth).neurons, strict=True))
        row["same_neurons"] = sum((a & b).sum() for a, b in pairs) / sum(b.sum() for _, b in pairs)
    return row


def total(parts: Sequence[ActivationProfile]) -> ActivationProfile:
    result = parts[0]
    for part in parts[1:]:
        result += part
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", nargs="+", required=True, help="text files, or silo:NAME")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    model, rows = MoeModel.from_checkpoint(resolve_model("tiny")), []
    for data in options.data:
        parts = block_profiles(model, data, options.tokens, options.length)
        for name in options.methods:
            for share in SHARES:
                method = make_method(name.split()[0], METHODS[name])
                found = [measure(parts, method, share, seed, options.length) for seed in range(options.seeds)]
                rows.append(
                    {
                        "data": Path(data).stem,
                        "method": name,
                        "share": share,
                        "all_tokens": len(parts) * options.length,
                        **{key: statistics.mean(row[key] for row in found) for key in found[0]},
                        "most_tokens": max(row["tokens"] for row in found),
                        "within_target": statistics.mean(
                            row["agreement"] >= AGREEMENT and row["error"] <= MAX_FREQUENCY_ERROR for row in found
                        ),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    mean = {key: statistics.mean(row[key] for row in rows) for key in ("tokens", "agreement", "error", "within_target")}
    print(json.dumps(mean))
    if options.json:
        result = {**provenance(), "seeds": options.seeds, "mean": mean, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
