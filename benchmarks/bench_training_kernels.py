"""CPU seconds of a training step with the reference and with the kernels that training chooses, in turns.

    python benchmarks/bench_training_kernels.py --json benchmarks/results/training_kernels.json

The packaged model of the demo, and two layers of a random OLMoE of a quarter of its size; one thread. Time of the
process, not of the clock: the two take turns step by step, so a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from provenance import provenance
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from edgefed.embedded import TINY, resolve_model
from edgefed.expert_records import ExpertPlan
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import step_setup, take_step

OLMOE = dict(
    vocab_size=4096, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
    intermediate_size=512, num_experts=32, num_experts_per_tok=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
CASES = (
    # model, dtype, trainable and frozen experts of a layer, batch size, sequence length
    ("demo", torch.float32, 16, 0, 4, 128),
    ("olmoe quarter", torch.bfloat16, 4, 28, 1, 512),
    ("olmoe quarter", torch.bfloat16, 32, 0, 1, 512),
    ("olmoe quarter", torch.float32, 4, 28, 1, 512),
    ("olmoe quarter", torch.float32, 32, 0, 1, 512),
)
WARM_UP = 2


def build(name: str, dtype: torch.dtype) -> MoeModel:
    if name == "demo":
        return MoeModel.from_checkpoint(resolve_model(TINY))
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **OLMOE), dtype=dtype)
    with torch.no_grad():
        module.get_input_embeddings().weight.normal_()  # tokens differ, so that every expert has some
    return MoeModel(module, discover_layers(module), device=torch.device("cpu"))


def measure(name: str, dtype: torch.dtype, trainable: int, frozen: int, batch: int, length: int, steps: int) -> dict:
    model, scope = build(name, dtype), TrainScope()
    source = MemorySource({spec.key: {n: t.clone() for n, t in ts.items()} for spec, ts in model.iter_units(scope)})
    layers = len(model.layers)
    plan = ExpertPlan.of(
        model.experts_per_layer, [range(trainable)] * layers, [range(trainable, trainable + frozen)] * layers
    )  # fmt: skip
    model.apply_plan(plan, source, scope)
    model.module.train()
    parameters = list(model.trainable_parameters())
    optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-4, weight_decay=0.0)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {}
    for step in range(WARM_UP + steps):
        for requested in ("reference", "auto"):
            os.environ["EDGEFED_KERNELS"] = requested
            setup = step_setup(model, TrainingConfig(local_steps=1))
            started = time.process_time()
            take_step(model, optimizer, parameters, ids, ids, setup=setup, max_grad_norm=1.0)
            optimizer.zero_grad(set_to_none=True)
            if step >= WARM_UP:
                seconds.setdefault(setup.kernels, []).append(time.process_time() - started)
    medians = {kernels: statistics.median(taken) for kernels, taken in seconds.items()}
    return {
        "model": name, "dtype": str(dtype).removeprefix("torch."), "trainable": trainable, "frozen": frozen,
        "batch_size": batch, "sequence_length": length, "seconds": seconds, "median_seconds": medians,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    for case in CASES:
        results.append(measure(*case, steps=arguments.steps))
        row = results[-1]
        medians = "  ".join(f"{kernels} {taken:.3f} s" for kernels, taken in row["median_seconds"].items())
        print(
            f"{row['model']:14} {row['dtype']:9} {row['trainable']:3} trainable {row['frozen']:3} frozen  {medians}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
