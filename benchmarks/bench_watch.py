"""What the runtime guard costs: training steps with and without `PressureWatch`, interleaved.

    python benchmarks/bench_watch.py [--json results/watch.json] [--pairs 80]

Steps alternate between "the watch's thread samples every 0.5 s" and "no watch", in groups whose order is drawn anew, so
that drift of the machine hits both alike. A step includes the question that the training loop asks behind it. The
difference of medians is small beside the noise of a step, so the cost is also computed from its parts: seconds that a
sample takes (median) times two a second, as if every microsecond of the thread were taken from the step, and the time
of one question.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance
from transformers import AutoConfig, AutoModelForCausalLM

from edgefed.embedded import tiny_model_directory
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.probe import probe_device
from edgefed.hardware.sampling import MemorySensors
from edgefed.hardware.watch import INTERVAL_S, PressureWatch, WatchLimits
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import step_setup, take_step

LARGER = dict(  # about 0.2 GB in float32: steps of some hundred milliseconds on two cores
    vocab_size=8192, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, num_experts=16, num_experts_per_tok=4,
)  # fmt: skip


def median_and_mad(values: list[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    return middle, 1.4826 * statistics.median(abs(value - middle) for value in values)


def load_model(folder: Path | str) -> MoeModel:
    full = MoeModel.from_checkpoint(folder)
    units = {spec.key: {n: t.clone() for n, t in tensors.items()} for spec, tensors in full.iter_units()}
    model = MoeModel.skeleton(folder)
    for spec in model.unit_infos():
        if spec.kind != "expert":
            model.load_unit(spec.key, units[spec.key])
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), MemorySource(units), TrainScope())
    model.module.train()
    return model


def measure(model: MoeModel, training: TrainingConfig, pairs: int) -> dict:
    device = model.module.device
    facts = probe_device("cpu" if device.type == "cpu" else str(device))
    kind = MemoryKind.CPU if device.type == "cpu" else facts.kind
    watch = PressureWatch(MemorySensors(facts), WatchLimits.of(kind, facts.host.memory_total_bytes.value, None, None))
    parameters = list(model.trainable_parameters())
    optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (training.batch_size, training.sequence_length), generator=generator)

    def step(watched: bool) -> float:
        started = time.perf_counter()
        take_step(model, optimizer, parameters, ids, ids, setup=step_setup(model, training), max_grad_norm=1.0)
        optimizer.zero_grad(set_to_none=True)
        if watched:
            watch.pressure()
        return time.perf_counter() - started

    for _ in range(5):
        step(False)
    group = max(1, round(2 * INTERVAL_S / statistics.median(step(False) for _ in range(3))))  # two samples a group
    times: dict[bool, list[float]] = {True: [], False: []}
    rng = random.Random(0)
    while len(times[True]) < pairs:
        for watched in rng.sample([True, False], 2):
            if watched:
                watch.start()
            times[watched] += [step(watched) for _ in range(group)]
            if watched:
                watch.close()
    samples = []
    for _ in range(200):
        before = watch.seconds_sampling
        watch.look()
        samples.append(watch.seconds_sampling - before)
    started = time.perf_counter()
    for _ in range(100_000):
        watch.pressure()
    question_s = (time.perf_counter() - started) / 100_000
    (with_s, with_mad), (without_s, without_mad) = median_and_mad(times[True]), median_and_mad(times[False])
    sample_s, sample_mad = median_and_mad(samples)
    share = sample_s / INTERVAL_S + question_s / without_s
    return {
        "tokens_per_step": ids.numel(),
        "load_average": os.getloadavg()[0],
        "steps_each": len(times[True]),
        "step_with_s": with_s,
        "step_with_mad_s": with_mad,
        "step_without_s": without_s,
        "step_without_mad_s": without_mad,
        "difference_percent": 100 * (with_s - without_s) / without_s,
        "sample_s": sample_s,
        "sample_mad_s": sample_mad,
        "question_s": question_s,
        "cost_percent": 100 * share,
        "samples": {"with_s": times[True], "without_s": times[False]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=80, help="steps of each kind, at least")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **LARGER)).save_pretrained(folder)
        cases = (
            ("tiny", tiny_model_directory(), TrainingConfig(batch_size=2, sequence_length=64)),
            ("tiny", tiny_model_directory(), TrainingConfig(batch_size=8, sequence_length=128)),
            ("olmoe, 0.2 GB", folder, TrainingConfig(batch_size=1, sequence_length=128)),
        )
        for name, source, training in cases:
            row = {"model": name, **measure(load_model(source), training, arguments.pairs)}
            rows.append(row)
            print(
                f"{name:14} {row['tokens_per_step']:5} tokens  with {1e3 * row['step_with_s']:7.2f} ± "
                f"{1e3 * row['step_with_mad_s']:.2f} ms  without {1e3 * row['step_without_s']:7.2f} ± "
                f"{1e3 * row['step_without_mad_s']:.2f} ms  ({row['difference_percent']:+.2f} %)  sample "
                f"{1e6 * row['sample_s']:.0f} us, question {1e9 * row['question_s']:.0f} ns: "
                f"{row['cost_percent']:.3f} %"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
