"""What a profile costs and how true it is: quantized, over fewer tokens, a round old; layer by layer or all at once.

    python benchmarks/bench_profiling.py --json benchmarks/results/profiling.json

``accuracy``  error of activation frequencies, mean over experts of |f_hat - f| / f, on the packaged model and its silos
``staleness`` the same of a profile from before a round against the model after it (all silos, averaged)
``cost``      seconds, peak of resident memory, reads of each expert, and what the memory model says, beside the local
              steps of a round: the packaged model, and OLMoE's layers with random weights, experts on disk

Peaks need Linux; allocations above 32 KiB are mapped one by one there, so that what is freed is seen to go.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from provenance import provenance
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from edgefed.costs.memory import profiling_memory
from edgefed.costs.shapes import ModelShape
from edgefed.embedded import resolve_model
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.methods.fedavg import FedAvg
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.data import load_corpus
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.profiling import ProfilePass, activation_error, profile_blocks, spread_blocks, top_k_agreement
from edgefed.training.steps import run_steps, step_setup
from edgefed.training.tokenizer import load_tokenizer

SILOS = ("unittest", "email", "topics", "xml")
TRAINING = TrainingConfig()
FEWER_TOKENS = (512, 1024, 2048, 4096, 8192)
OLMOE = dict(
    vocab_size=8192, hidden_size=2048, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=16,
    num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096,
)  # fmt: skip
STEPS_SHARE_TARGET = 0.05
M_MMAP_THRESHOLD = -3
WAYS = {
    "one expert at a time": ProfilePass("expert", None, 8, 1),
    "layer by layer": ProfilePass("layer", None, 8, 0),
    "layer by layer, int8": ProfilePass("layer", "int8", 8, 0),
    "layer by layer, nf4": ProfilePass("layer", "nf4", 8, 0),
    "all": ProfilePass("all", None, 8, 1),
    "all, int8": ProfilePass("all", "int8", 8, 1),
    "all, nf4": ProfilePass("all", "nf4", 8, 1),
}


class FolderSource:
    """Units as files; counts how often each is read."""

    def __init__(self, folder: Path, model: MoeModel):
        self._folder, self._names = folder, {}
        self.reads: Counter[str] = Counter()
        for number, (spec, tensors) in enumerate(model.iter_units()):
            if spec.kind == "expert":
                self._names[spec.key] = f"{number}.safetensors"
                save_file({name: t.contiguous() for name, t in tensors.items()}, folder / self._names[spec.key])

    def read(self, unit_key: str) -> dict[str, torch.Tensor]:
        self.reads[unit_key] += 1
        return load_file(self._folder / self._names[unit_key])


def attention_error(estimate: ActivationProfile, truth: ActivationProfile) -> float:
    """Mean over used experts of |alpha_hat - alpha| / alpha with alpha_e = f_e a_e, mean over layers."""
    errors = []
    for found, real in zip(estimate.layers, truth.layers, strict=True):
        used = real.attention_sum > 0
        found_alpha, real_alpha = found.attention_sum / found.num_tokens, real.attention_sum / real.num_tokens
        errors.append(np.mean(np.abs(found_alpha - real_alpha)[used] / real_alpha[used]))
    return float(np.mean(errors))


def silo_blocks(tokenizer: object, tokens: int) -> dict[str, TokenBlocks]:
    found = {}
    for silo in SILOS:
        corpus = load_corpus(f"silo:{silo}", 0.1, 0)
        found[silo] = spread_blocks(encode_examples(corpus.train, tokenizer, TRAINING.sequence_length), tokens)
    return found


def copied_units(model: MoeModel) -> dict[str, dict[str, torch.Tensor]]:
    return {s.key: {n: t.clone() for n, t in tensors.items()} for s, tensors in model.iter_units(TrainScope())}


def measure_accuracy(model: MoeModel, units: dict, blocks: dict[str, TokenBlocks]) -> list[dict]:
    """Rows by estimate: mean over silos, and the worst."""
    source, found = MemorySource(units), {}
    for silo in blocks.values():
        truth = profile_blocks(model, silo, source, ProfilePass("all"), attention=True)
        estimates = {
            s: profile_blocks(model, silo, source, ProfilePass("all", s), attention=True) for s in ("int8", "nf4")
        }
        for tokens in (count for count in FEWER_TOKENS if count < silo.num_tokens):
            few = spread_blocks(silo, tokens)
            estimates[f"{tokens} tokens"] = profile_blocks(model, few, source, ProfilePass("all"), attention=True)
        for name, estimate in estimates.items():
            row = activation_error(estimate, truth), top_k_agreement(estimate, truth), attention_error(estimate, truth)
            found.setdefault(name, []).append(row)
    return [
        {
            "estimate": name,
            "activation_error": statistics.mean(row[0] for row in rows),
            "worst_activation_error": max(row[0] for row in rows),
            "top_k_agreement": statistics.mean(row[1] for row in rows),
            "alpha_error": statistics.mean(row[2] for row in rows),
        }
        for name, rows in found.items()
    ]


def measure_staleness(model: MoeModel, units: dict, blocks: dict[str, TokenBlocks], rounds: int) -> list[dict]:
    """Plain FedAvg over the silos; each profiles before and after a round. Error against the model after it."""
    plan, scope, rows = ExpertPlan.full(model.experts_per_layer), TrainScope(), []

    def profiles() -> dict[str | None, dict[str, ActivationProfile]]:
        model.drop_experts()
        ways = {storage: ProfilePass("all", storage) for storage in (None, "nf4")}
        source = MemorySource(units)
        return {
            s: {silo: profile_blocks(model, b, source, way) for silo, b in blocks.items()} for s, way in ways.items()
        }

    before = profiles()
    for number in range(1, rounds + 1):
        first = {key: dict(tensors) for key, tensors in units.items()}
        sums: dict[tuple[str, str], torch.Tensor] = {}
        total = sum(len(b) for b in blocks.values())
        for silo in blocks.values():
            load_fixed(model, first)
            model.apply_plan(plan, MemorySource(first), scope)
            run_steps(model, plan, FedAvg(), silo, TRAINING, compute_share=1.0, seed=number)
            for spec, tensors in model.trained_units():
                for name, value in tensors.items():
                    part = value.double() * (len(silo) / total)
                    sums[spec.key, name] = sums.get((spec.key, name), 0) + part
        for (key, name), value in sums.items():
            units[key][name] = value.to(first[key][name].dtype)
        load_fixed(model, units)
        after = profiles()

        def error(estimate: dict[str, ActivationProfile], truth: dict[str, ActivationProfile] = after[None]) -> float:
            return statistics.mean(activation_error(estimate[silo], truth[silo]) for silo in truth)

        fresh, stale = error(after["nf4"]), error(before["nf4"])
        rows.append(
            {
                "round": number,
                "stale": error(before[None]),
                "nf4": fresh,
                "nf4_and_stale": stale,
                "staleness_adds": stale - fresh,
            }
        )
        before = after
    return rows


def load_fixed(model: MoeModel, units: dict) -> None:
    for spec in model.unit_infos():
        if spec.kind != "expert":
            model.load_unit(spec.key, units[spec.key])


def measure_cost(name: str, model: MoeModel, shape: ModelShape, blocks: TokenBlocks, options) -> dict:
    """Rows by way, each the shortest of some runs, and the steps of a round with an eighth of the experts trainable."""
    dense = model.memory_bytes()["dense"]
    with tempfile.TemporaryDirectory(prefix="edgefed-profiling-") as folder:
        source = FolderSource(Path(folder), model)
        model.drop_experts()
        setup = step_setup(model, TRAINING)
        steps_s = round_seconds(model, source, blocks, options.steps)
        rows = []
        for label, way in WAYS.items():
            for attention in (False, True) if label == "layer by layer" else (False,):
                rows.append(
                    {
                        "way": label + (" with attention" if attention else ""),
                        **cost_of(model, shape, setup, blocks, source, way, attention, dense, options.repetitions),
                    }
                )
                rows[-1]["share_of_steps"] = rows[-1]["seconds"] / steps_s
                print(json.dumps({"model": name, **rows[-1]}), flush=True)
    per_token = min(row["seconds"] for row in rows if "with" not in row["way"]) / blocks.num_tokens
    return {
        "model": name,
        "tokens": blocks.num_tokens,
        "local_steps": TRAINING.local_steps,
        "steps_seconds": steps_s,
        "tokens_within_target": int(STEPS_SHARE_TARGET * steps_s / per_token),
        "rows": rows,
    }


def cost_of(model, shape, setup, blocks, source, way, attention, dense, repetitions) -> dict:
    seconds = []
    together = way.concurrent_batches or -(-len(blocks) // way.batch_size)
    each = replace(setup, batch_size=way.batch_size, expert_storage=way.storage)
    predicted = profiling_memory(
        shape, each, shape.num_experts, residency=way.residency, concurrent_batches=together, attention=attention,
        threads=torch.get_num_threads(),
    ).total_bytes  # fmt: skip
    for _ in range(repetitions):
        source.reads.clear()
        started = time.perf_counter()
        profile_blocks(model, blocks, source, way, attention=attention)
        seconds.append(time.perf_counter() - started)
    reads = max(source.reads.values())
    peak = peak_bytes(lambda: profile_blocks(model, blocks, source, way, attention=attention))
    return {
        "seconds": min(seconds),
        "reads_of_an_expert": reads,
        "peak_bytes": None if peak is None else peak + dense,
        "predicted_bytes": predicted,
    }


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Resident memory at its most while ``run`` runs, above what it was; None where Linux's counters are not."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def round_seconds(model: MoeModel, source: FolderSource, blocks: TokenBlocks, steps: int) -> float:
    """Seconds of the local steps of a round, from ``steps`` of them after the first."""
    sizes = model.experts_per_layer
    plan = ExpertPlan.of(sizes, [range(max(1, size // 8)) for size in sizes])
    model.apply_plan(plan, source, TrainScope())
    moments: list[float] = []
    training = msgspec.structs.replace(TRAINING, local_steps=steps + 1)
    run_steps(
        model, plan, FedAvg(), blocks, training, compute_share=1.0, seed=0,
        on_step=lambda loss: moments.append(time.perf_counter()),
    )  # fmt: skip
    model.drop_experts()
    return (moments[-1] - moments[0]) / steps * TRAINING.local_steps


def olmoe(tokens: int) -> tuple[MoeModel, ModelShape, TokenBlocks]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", **OLMOE)
    config.dtype = torch.bfloat16
    module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    length = TRAINING.sequence_length
    ids = torch.randint(3, OLMOE["vocab_size"], (tokens // length, length))
    model = MoeModel(module, discover_layers(module), device=torch.device("cpu"))
    return model, shape_from_config(config, "olmoe"), TokenBlocks(ids, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="measured local steps; those of a round are as long")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parts", default="accuracy,staleness,cost,olmoe", help="comma-separated")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 * 1024)
    result: dict = {**provenance(), "threads": options.threads}
    parts = options.parts.split(",")
    path = resolve_model("tiny")
    blocks = silo_blocks(load_tokenizer(path), options.tokens)
    if {"accuracy", "staleness"} & set(parts):
        model = MoeModel.from_checkpoint(path)
        units = copied_units(model)
        model.drop_experts()
        if "accuracy" in parts:
            result["accuracy"] = measure_accuracy(model, units, blocks)
            print(json.dumps(result["accuracy"], indent=1), flush=True)
        if "staleness" in parts:
            result["staleness"] = measure_staleness(model, units, blocks, options.rounds)
            print(json.dumps(result["staleness"], indent=1), flush=True)
    result["cost"] = []
    if "cost" in parts:
        model = MoeModel.from_checkpoint(path)
        shape = shape_from_config(model.config, "tiny")
        result["cost"].append(measure_cost("tiny", model, shape, blocks["email"], options))
    if "olmoe" in parts:
        model, shape, random_blocks = olmoe(options.tokens)
        result["cost"].append(measure_cost("two layers of OLMoE, bfloat16", model, shape, random_blocks, options))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
