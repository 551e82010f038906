"""Offloaded experts on a CPU: predicted and measured memory, and the time of a step with and without offloading.

    python benchmarks/bench_offloading.py --json benchmarks/results/offloading.json

Models and steps are those of `bench_memory_model.py`, with every expert trained; the first step of the first plan
corrects the memory model. The prediction holds one layer's weights, which are pages of files that the allocator does
not see: they are added to the measured peak, and the ratio without them is there, too. Files lie in --folder; seconds
are of a second step, with the files in the page cache wherever the machine has room for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from bench_memory_model import FAMILIES, HELD_OUT, LORA_RANK, SAVINGS, Plan, build, measure_plan
from provenance import provenance
from transformers.utils import logging as transformers_logging

from edgefed.costs.activations import static_bytes
from edgefed.costs.memory import training_memory
from edgefed.costs.streaming import offloaded_bytes
from edgefed.disk import filesystem
from edgefed.expert_records import ExpertPlan
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.calibration import correction_from

CPU = torch.device("cpu")


def measure_family(family: str, dtype: str, mode: str, folder: Path) -> dict:
    model, shape = build(family, getattr(torch, dtype), "cpu")
    scope = TrainScope(experts=mode, lora_rank=LORA_RANK)
    units = model.iter_units(scope, seed=7)
    source = MemorySource({spec.key: {name: t.clone() for name, t in tensors.items()} for spec, tensors in units})
    every, counts = ExpertPlan.full(model.experts_per_layer), model.experts_per_layer
    rows = []
    correction = None
    for checkpointing, chunked in ((False, False), *SAVINGS):
        plan = Plan(counts, counts, checkpointing=checkpointing, chunked_loss=chunked)
        model.apply_plan(every, source, scope)
        resident = measure_plan(model, plan, shape, dtype, mode, "cpu")
        with tempfile.TemporaryDirectory(dir=folder) as files:
            model.apply_plan(every, source, scope, offload=OffloadSpace(CPU, Path(files)))
            row = measure_plan(model, dataclasses.replace(plan, offload=True), shape, dtype, mode, "cpu")
        model.drop_experts()
        correction = correction or correction_from(row.first, shape, row.setup)
        static = static_bytes(shape, row.setup, counts, counts)
        layer = static["resident experts"] + static["trainable experts"]
        predicted = training_memory(shape, row.setup, counts, counts, correction).total_bytes
        rows.append(
            {
                "checkpointing": checkpointing,
                "chunked_loss": chunked,
                "measured_bytes": row.second.peak_bytes,
                "layer_bytes": layer,
                "offloaded_bytes": offloaded_bytes(shape, row.setup, counts, counts),
                "resident_measured_bytes": resident.second.peak_bytes,
                "formulas": training_memory(shape, row.setup, counts, counts).total_bytes
                / (row.second.peak_bytes + layer),
                "corrected": predicted / (row.second.peak_bytes + layer),
                "corrected_to_allocator": predicted / row.second.peak_bytes,
                "seconds": row.second.seconds,
                "resident_seconds": resident.second.seconds,
            }
        )
    ratios = [row["corrected"] for row in rows]
    print(
        f"{family:12} {dtype:9} {mode:5} corrected {min(ratios):.3f}-{max(ratios):.3f}  peak "
        f"{max(row['measured_bytes'] + row['layer_bytes'] for row in rows) / 1e6:.0f} MB, resident "
        f"{max(row['resident_measured_bytes'] for row in rows) / 1e6:.0f} MB",
        flush=True,
    )
    return {"family": family, "held_out": family in HELD_OUT, "dtype": dtype, "experts": mode, "plans": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--kernels", default="auto,reference", help="what EDGEFED_KERNELS says in each pass")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the files lie")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = []
    for kernels, family, dtype, mode in itertools.product(
        *(getattr(arguments, name).split(",") for name in ("kernels", "families", "dtypes", "modes"))
    ):
        os.environ["EDGEFED_KERNELS"] = kernels
        results.append({"kernels": kernels, **measure_family(family, dtype, mode, arguments.folder)})
        if arguments.json:
            origin = {**provenance(), "filesystem": filesystem(arguments.folder)}
            arguments.json.write_text(json.dumps({"provenance": origin, "results": results}, indent=1) + "\n")
    ratios = [row["corrected"] for result in results for row in result["plans"]]
    print(f"after one measured step: {min(ratios):.3f} to {max(ratios):.3f} of the measured peak")
    return 0 if min(ratios) >= 1 and max(ratios) <= 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
