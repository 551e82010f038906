"""The virtual clock against real training steps: one measured step calibrates it, the others are predicted.

    python benchmarks/bench_virtual_clock.py --json benchmarks/results/virtual_clock.json

A random model with experts half as large as those of OLMoE-1B-7B (two layers of 16, four per token) trains under
several plans on one thread. The first plan's step, by phase, says which share of the roofline this machine achieves
(`Calibration`); with these three numbers the clock then predicts every other plan's step. Times are the thread's
processor time, the smallest of several interleaved repeats: on an idle machine that is the time on the clock, and on a
busy one it still is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from provenance import provenance
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from edgefed.costs.roofline import Pass, training_step
from edgefed.costs.step_setup import StepSetup
from edgefed.expert_records import ExpertPlan
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.simulation.device_rates import Calibration
from edgefed.training.loss import batch_loss
from edgefed.training.savings import checkpointing, make_optimizer

SIZES = dict(
    vocab_size=4096, hidden_size=1024, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, num_experts=16, num_experts_per_tok=4, max_position_embeddings=1024, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
PHASES = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Experts per layer and how a step is done. ``name`` is what the table calls it."""

    name: str
    held: int
    trainable: int
    batch_size: int = 2
    sequence_length: int = 256
    checkpointing: bool = False
    chunked_loss: bool = False
    experts: str = "full"


PLANS = (
    Plan("half trainable (calibrates)", 16, 8),
    Plan("all trainable", 16, 16),
    Plan("half held, two trainable", 8, 2),
    Plan("few experts, short batch", 4, 4, batch_size=1),
    Plan("checkpointing, chunked loss", 16, 4, checkpointing=True, chunked_loss=True),
    Plan("LoRA on all", 16, 16, experts="lora"),
)


def build(dtype: torch.dtype) -> tuple[AutoConfig, dict]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", **SIZES, dtype=dtype)
    module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = MoeModel(module, discover_layers(module), device=torch.device("cpu"))
    scope = TrainScope("lora", "full", "none", 8)
    units = {
        spec.key: {name: tensor.clone() for name, tensor in tensors.items()}
        for spec, tensors in model.iter_units(scope)
    }
    # Embeddings of unit variance: tokens differ, and routers spread them over the experts as in a trained model.
    units["model.embed_tokens"] = {"weight": torch.randn(SIZES["vocab_size"], SIZES["hidden_size"]).to(dtype)}
    return model, units


class Trainee:
    """A model under one plan, ready to step."""

    def __init__(self, plan: Plan, model: MoeModel, units: dict, dtype: str):
        self.plan = plan
        scope = TrainScope(plan.experts, "full", "none", 8)
        layers = range(len(model.layers))
        source = MemorySource(units)
        experts = ExpertPlan.of(
            model.experts_per_layer,
            [range(plan.trainable) for _ in layers],
            [range(plan.trainable, plan.held) for _ in layers],
        )
        model.apply_plan(experts, source, scope)
        self.model, self.experts = model, experts
        self.setup = StepSetup(
            plan.batch_size, plan.sequence_length, dtype=dtype, experts=plan.experts, checkpointing=plan.checkpointing,
            chunked_loss=plan.chunked_loss, lora_rank=8,
        )  # fmt: skip
        self.parameters = list(model.trainable_parameters())
        self.optimizer = make_optimizer(self.parameters, "adamw", learning_rate=1e-4, weight_decay=0.0)
        self.ids = torch.randint(3, SIZES["vocab_size"], (plan.batch_size, plan.sequence_length))
        self.trainable_pairs = self._trainable_pairs()

    def _trainable_pairs(self) -> list[float]:
        with torch.no_grad(), self.model.record_statistics() as statistics:
            self.model.module(input_ids=self.ids, use_cache=False)
            record = statistics.take()
        found = []
        for layer, counts in enumerate(record.layers):
            held = counts.tokens_per_expert[self.experts.resident(layer)].sum()
            found.append(float(counts.tokens_per_expert[self.experts.trainable(layer)].sum() / max(held, 1)))
        return found

    def step(self) -> dict[str, float]:
        """Processor seconds of each phase of one step."""
        module, marks = self.model.module, [time.process_time()]
        module.train()
        with checkpointing(module, self.setup.checkpointing):
            loss = batch_loss(module, self.ids, self.ids, chunked=self.setup.chunked_loss)
            marks.append(time.process_time())
            loss.backward()
        marks.append(time.process_time())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        marks.append(time.process_time())
        self.optimizer.zero_grad(set_to_none=True)
        return {phase: end - start for phase, start, end in zip(PHASES, marks, marks[1:], strict=False)}


def peaks(dtype: torch.dtype, size: int = 1024) -> tuple[float, float]:
    """(operations/s of a square product, bytes/s of a copy, read and written), by processor time, the best of 20."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def best(work) -> float:
        seconds = []
        for _ in range(20):
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
        return min(seconds)

    return 2 * size**3 / best(lambda: torch.mm(a, b)), 2 * source.numel() / best(lambda: target.copy_(source))


def ideal(work: Pass, flops: float, bandwidth: float) -> dict[str, float]:
    return {phase: sum(op.seconds(flops, bandwidth) for op in getattr(work, phase)) for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    flops, bandwidth = peaks(dtype)
    model, units = build(dtype)
    shape = shape_from_config(model.config, "olmoe")
    measured = {plan.name: dict.fromkeys(PHASES, float("inf")) for plan in PLANS}
    predicted: dict[str, dict[str, float]] = {}
    for repeat in range(args.repeats):
        for plan in PLANS:
            trainee = Trainee(plan, model, units, args.dtype)
            trainee.step()  # moments are made in the first one
            for phase, seconds in trainee.step().items():
                measured[plan.name][phase] = min(measured[plan.name][phase], seconds)
            layers = len(shape.moe_layers)
            work = training_step(
                shape, trainee.setup, [plan.held] * layers, [plan.trainable] * layers, trainee.trainable_pairs
            )
            predicted[plan.name] = ideal(work, flops, bandwidth)
            del trainee
        print(f"# repeat {repeat + 1} of {args.repeats}", file=sys.stderr, flush=True)
    first = PLANS[0].name
    shares = {phase: predicted[first][phase] / measured[first][phase] for phase in PHASES}
    calibration = Calibration(**shares, origin=f"{first}, {args.dtype}")
    rows = []
    for plan in PLANS:
        guess = {phase: predicted[plan.name][phase] / shares[phase] for phase in PHASES}
        total, found = sum(guess.values()), sum(measured[plan.name].values())
        rows.append({
            **dataclasses.asdict(plan), "measured_s": measured[plan.name], "predicted_s": guess,
            "step_measured_s": found, "step_predicted_s": total, "error": total / found - 1,
        })  # fmt: skip
        phases = "  ".join(f"{phase} {guess[phase]:.3f}/{measured[plan.name][phase]:.3f}" for phase in PHASES)
        print(
            f"{plan.name:<30} {total:7.3f} s predicted {found:7.3f} s measured {100 * rows[-1]['error']:+6.1f} %  "
            f"{phases}"
        )
    print(f"peak {flops / 1e9:.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s; shares {shares}")
    if args.json:
        result = {
            "provenance": provenance(), "dtype": args.dtype, "threads": 1, "peak_flops": flops,
            "copy_bytes_per_s": bandwidth, "calibration": dataclasses.asdict(calibration), "sizes": SIZES, "rows": rows,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
