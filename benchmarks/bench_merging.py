"""Merging experts: the error of the layers' outputs by strategy, and what clustering and alignment cost.

    python benchmarks/bench_merging.py --json benchmarks/results/merging.json

Error: the packaged model; each silo of the standard library is a client, profiled with attention on its training part,
measured on its held-out part. ``--trainable`` of the experts, the most used of the model, stay as they are; the others
share ``--slots`` merged experts. Differences are between means over clients and layers. Clustering: all layers in one
batch, the same layer by layer, one distance matrix of all layers with masked pairs, and scikit-learn where installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from cpu_limits import interleaved
from merge_error import layer_output_errors
from provenance import provenance
from scipy.optimize import linear_sum_assignment
from transformers.utils import logging as transformers_logging

from edgefed.embedded import tiny_model_directory
from edgefed.embedded.silos import SILOS
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.moe.merging.alignment import neuron_aligner
from edgefed.moe.merging.clustering import cluster_layers, expert_embeddings, sketch_layer
from edgefed.moe.merging.plan import SIZES, MergingOptions, expert_importance, plan_merging
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.data import load_corpus
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import spread_blocks
from edgefed.training.tokenizer import load_tokenizer

PAPER = {"adaptive below one": 0.656, "adaptive below uniform": 0.476, "attention below frequency": 0.192}
"""What Flux reports (arXiv 2508.19078), as shares."""


def strategies() -> dict[str, MergingOptions]:
    """Every combination of the paper's, and our own sizes once, named sizes/importance/K-means."""
    return {
        f"{sizes}/{importance}/{'weighted' if weighted else 'plain'}": MergingOptions(
            sizes=sizes, importance=importance, weigh_clusters=weighted
        )
        for sizes in SIZES
        for importance in ("attention", "frequency")
        for weighted in (False, True)
        if sizes in ("adaptive", "uniform", "one") or (importance == "attention" and not weighted)
    }


def measure_errors(args: argparse.Namespace) -> dict:
    """Mean error of each strategy, trainable share and slot count."""
    folder = tiny_model_directory()
    model, tokenizer = MoeModel.from_checkpoint(folder), load_tokenizer(folder)
    source = MemorySource({spec.key: tensors for spec, tensors in model.iter_units()})
    points = expert_embeddings(model.layers, source)
    aligner = neuron_aligner(model.layers)
    rows: dict[tuple[float, int, str], list[np.ndarray]] = {}
    attended: dict[tuple[float, int, str], list[np.ndarray]] = {}
    likeness: list[float] = []
    for silo in args.silos:
        corpus = load_corpus(f"silo:{silo}", held_out_share=0.2, seed=0)
        train, held_out = (
            spread_blocks(encode_examples(examples, tokenizer, 128), args.tokens)
            for examples in (corpus.train, corpus.held_out)
        )
        record = profile(model, train)
        both = [[expert_importance(layer, kind) for layer in record.layers] for kind in ("attention", "frequency")]
        likeness.append(float(np.corrcoef(*(np.concatenate(alphas) for alphas in both))[0, 1]))
        plans: dict[tuple[float, int, str], ExpertPlan] = {}
        for trainable in args.trainable:
            kept = most_used(record, trainable)
            for slots in args.slots:
                for name, options in strategies().items():
                    plans[trainable, slots, name] = plan_merging(record, kept, points, slots, options)
                    if (options.sizes, options.importance) == ("adaptive", "attention"):
                        plans[trainable, slots, f"{name}/aligned"] = plans[trainable, slots, name]
        aligners = {str(key): aligner for key in plans if key[2].endswith("/aligned")}
        batches = [ids for ids, _ in held_out.batches(8)]
        named = {str(key): plan for key, plan in plans.items()}
        errors = layer_output_errors(model, named, source, batches, aligners=aligners)
        adaptive = {str(key): plans[key] for key in plans if key[2].startswith("adaptive") and str(key) not in aligners}
        weighed = layer_output_errors(model, adaptive, source, batches, by_attention=True)
        for key in plans:
            rows.setdefault(key, []).append(errors[str(key)])
            if str(key) in weighed:
                attended.setdefault(key, []).append(weighed[str(key)])
        print(f"# {silo}", flush=True)
    return {
        "pairs_of_experts_cosine": expert_cosine(model, source),
        "attention_frequency_correlation": round(statistics.mean(likeness), 3),
        "errors": [
            {
                "trainable": trainable,
                "slots": slots,
                "strategy": name,
                "error": round(float(np.mean(values)), 4),
                "spread_over_clients": round(float(np.std(np.mean(values, axis=1))), 4),
                "error_by_attention": round(float(np.mean(attended[trainable, slots, name])), 4)
                if (trainable, slots, name) in attended
                else None,
                "by_layer": np.round(np.mean(values, axis=0), 4).tolist(),
            }
            for (trainable, slots, name), values in rows.items()
        ],
    }


def measure_losses(args: argparse.Namespace) -> list[dict]:
    """Held-out loss of the whole model with merged experts, which counts what errors of early layers do to later ones;
    all sizes, plain K-means, mean over the first ``--loss-clients`` clients.
    """
    folder = tiny_model_directory()
    model, tokenizer = MoeModel.from_checkpoint(folder), load_tokenizer(folder)
    source = MemorySource({spec.key: tensors for spec, tensors in model.iter_units()})
    points = expert_embeddings(model.layers, source)
    dense = TrainScope(experts="none", router="none")
    values: dict[tuple[float, int, str], list[float]] = {}
    for silo in args.silos[: args.loss_clients]:
        corpus = load_corpus(f"silo:{silo}", held_out_share=0.2, seed=0)
        train, held_out = (
            spread_blocks(encode_examples(examples, tokenizer, 128), args.tokens)
            for examples in (corpus.train, corpus.held_out)
        )
        with model.streaming(source, dense):
            record = profile(model, train)
            values.setdefault((1.0, 0, "nothing merged"), []).append(evaluate_loss(model.module, held_out, 8))
        for trainable in args.trainable:
            for slots in args.slots:
                for sizes in SIZES:
                    plan = plan_merging(
                        record,
                        most_used(record, trainable),
                        points,
                        slots,
                        MergingOptions(sizes=sizes, weigh_clusters=False),
                    )
                    model.apply_plan(plan, source, dense)
                    with torch.no_grad():
                        values.setdefault((trainable, slots, sizes), []).append(
                            evaluate_loss(model.module, held_out, 8)
                        )
                    model.drop_experts()
        print(f"# losses of {silo}", flush=True)
    return [
        {"trainable": trainable, "slots": slots, "sizes": sizes, "loss": round(statistics.mean(losses), 4)}
        for (trainable, slots, sizes), losses in values.items()
    ]


@torch.no_grad()
def profile(model: MoeModel, blocks: TokenBlocks) -> ActivationProfile:
    """Profile the model as it is, with attention."""
    with model.record_statistics(attention=True) as recorder:
        for input_ids, _ in blocks.batches(8):
            model.module(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        return recorder.take()


def most_used(record: ActivationProfile, share: float) -> ExpertPlan:
    """Plan the most used ``share`` of all experts as trainable, and no other resident expert."""
    ranked = sorted(
        ((-frequency, layer, expert) for layer, row in enumerate(record.layers) for expert, frequency in
         enumerate(row.frequency.tolist())),
    )  # fmt: skip
    chosen = ranked[: round(share * len(ranked))]
    trainable = [[expert for _, own, expert in chosen if own == layer] for layer in range(len(record.layers))]
    return ExpertPlan.of(record.experts_per_layer, trainable)


def expert_cosine(model: MoeModel, source: MemorySource) -> float:
    """Mean cosine of the weights of two experts of a layer: 0 for experts that have nothing in common."""
    values = []
    for layer in model.layers:
        flat = torch.stack(
            [
                torch.cat([tensor.flatten() for tensor in source.read(layer.expert_key(expert)).values()])
                for expert in range(layer.num_experts)
            ]
        )
        flat = torch.nn.functional.normalize(flat, dim=1)
        products = flat @ flat.T
        values.append((products.sum() - products.trace()).item() / (len(flat) * (len(flat) - 1)))
    return round(statistics.mean(values), 4)


def compare(errors: list[dict]) -> list[dict]:
    """Relative error reduction next to the paper's, for each trainable share, slot count and kind of K-means."""
    table = {(row["trainable"], row["slots"], row["strategy"]): row["error"] for row in errors}
    attended = {(row["trainable"], row["slots"], row["strategy"]): row["error_by_attention"] for row in errors}
    found = []
    for trainable, slots in dict.fromkeys((row["trainable"], row["slots"]) for row in errors):
        for kmeans in ("plain", "weighted"):

            def error(sizes: str, importance: str = "attention", kmeans=kmeans, at=(trainable, slots), end="") -> float:
                return table[(*at, f"{sizes}/{importance}/{kmeans}{end}")]

            found.append(
                {
                    "trainable": trainable,
                    "slots": slots,
                    "kmeans": kmeans,
                    "adaptive": error("adaptive"),
                    "uniform": error("uniform"),
                    "one": error("one"),
                    "adaptive below one": round(1 - error("adaptive") / error("one"), 3),
                    "adaptive below uniform": round(1 - error("adaptive") / error("uniform"), 3),
                    "attention below frequency": round(1 - error("adaptive") / error("adaptive", "frequency"), 3),
                    "attention below frequency, tokens counted by attention": round(
                        1
                        - attended[trainable, slots, f"adaptive/attention/{kmeans}"]
                        / attended[trainable, slots, f"adaptive/frequency/{kmeans}"],
                        3,
                    ),
                    "aligned below not": round(1 - error("adaptive", end="/aligned") / error("adaptive"), 3),
                }
            )
    return found


def measure_clustering(layers: int, experts: int, slots: int, components: int, repetitions: int) -> dict:
    """Milliseconds for one start and for four, per way of clustering."""
    rng = np.random.default_rng(0)
    points = [rng.standard_normal((experts, components)) for _ in range(layers)]
    counts = [slots] * layers
    rows = {}
    for restarts in (1, 4):

        def one_by_one(restarts=restarts) -> list[np.ndarray]:
            return [
                cluster_layers([points[layer]], [slots], restarts=restarts, ordinals=[layer])[0]
                for layer in range(layers)
            ]

        def fused(restarts=restarts) -> list[np.ndarray]:
            return cluster_layers(points, counts, restarts=restarts)

        runs = {"fused": fused, "layer by layer": one_by_one}
        if restarts == 1:
            runs["masked matrix"] = lambda: masked_kmeans(points, counts)
        try:
            from sklearn.cluster import KMeans

            runs["scikit-learn layer by layer"] = lambda restarts=restarts: [
                KMeans(slots, n_init=restarts, random_state=layer).fit(points[layer]) for layer in range(layers)
            ]
        except ImportError:
            pass
        same = all(np.array_equal(a, b) for a, b in zip(fused(), one_by_one(), strict=True))
        times = interleaved(runs, repetitions)
        rows[f"{restarts} starts"] = {
            "milliseconds": {name: round(t * 1e3, 2) for name, t in times.items()},
            "slower_than_fused": {name: round(t / times["fused"], 1) for name, t in times.items()},
            "fused_and_layer_by_layer_give_the_same_clusters": same,
        }
    return {"layers": layers, "experts": experts, "slots": slots, "components": components, **rows}


def masked_kmeans(points: list[np.ndarray], counts: list[int], iterations: int = 20) -> np.ndarray:
    """K-means as the paper draws it: all experts against all centres, with pairs of different layers masked.

    Starts from the first points of each layer, without k-means++, and leaves clusters empty: less work than the others.
    """
    x = np.concatenate(points)
    owner = np.repeat(np.arange(len(points)), [len(p) for p in points])
    centres = np.concatenate([p[:count] for p, count in zip(points, counts, strict=True)])
    centre_owner = np.repeat(np.arange(len(points)), counts)
    masked = owner[:, None] != centre_owner
    labels = None
    for _ in range(iterations):
        distance = (x**2).sum(1)[:, None] - 2 * x @ centres.T + (centres**2).sum(1)
        distance[masked] = np.inf
        nearest = distance.argmin(axis=1)
        if labels is not None and (nearest == labels).all():
            break
        labels = nearest
        member = np.eye(len(centres))[labels]
        mass = member.sum(axis=0)
        centres = np.where(mass[:, None] > 0, member.T @ x / np.maximum(mass, 1)[:, None], centres)
    return labels


def measure_preparation(hidden: int, intermediate: int) -> dict:
    """Seconds to sketch one expert and to align one pair, of DeepSeek-MoE's size."""

    @dataclasses.dataclass(frozen=True)
    class Parameter:
        name: str
        shape: tuple[int, ...]

    @dataclasses.dataclass(frozen=True)
    class Layer:
        parameters: tuple[Parameter, ...]
        num_experts: int

        def expert_key(self, expert: int) -> str:
            return str(expert)

    shapes = {"gate_up_proj": (2 * intermediate, hidden), "down_proj": (hidden, intermediate)}
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    seconds = {}
    for count in (1, 9):
        layer = Layer(tuple(Parameter(name, shape) for name, shape in shapes.items()), count)
        source = MemorySource({str(expert): tensors for expert in range(count)})
        started = time.perf_counter()
        sketch_layer(layer, source)
        seconds[count] = time.perf_counter() - started
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((intermediate, 3 * hidden), dtype=np.float32) for _ in range(2))
    started = time.perf_counter()
    scores = a @ b.T
    products = time.perf_counter() - started
    linear_sum_assignment(scores, maximize=True)
    return {
        "hidden": hidden,
        "intermediate": intermediate,
        "sketch_one_expert_s": round((seconds[9] - seconds[1]) / 8, 4),
        "alignment_products_s": round(products, 3),
        "alignment_assignment_s": round(time.perf_counter() - started - products, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", nargs="+", default=list(SILOS))
    parser.add_argument("--tokens", type=int, default=4096, help="tokens profiled, and held out, per client")
    parser.add_argument("--trainable", type=float, nargs="+", default=[0.0, 0.25])
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--loss-clients", type=int, default=3, help="clients of which the merged model's loss is taken")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="the products are small: more threads only wait")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    clustering = [
        measure_clustering(28, 64, 16, 32, args.repetitions),
        measure_clustering(32, 16, 4, 15, args.repetitions),
    ]
    preparation = measure_preparation(2048, 1408)
    result = measure_errors(args)
    result["losses"] = measure_losses(args)
    comparison = compare(result["errors"])
    for row in comparison:
        print(row)
    print(json.dumps({"clustering": clustering, "preparation": preparation}, indent=1))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            **provenance(), "settings": settings, "paper": PAPER, "comparison": comparison, **result,
            "clustering": clustering, "preparation": preparation,
        }  # fmt: skip
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
