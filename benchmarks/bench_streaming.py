"""Frozen experts in memory and streamed from files: resident memory, time and loss of training with adapters.

    python benchmarks/bench_streaming.py CHECKPOINT --folder WORK --json benchmarks/results/streaming.json

Every run is a process of its own, which trains adapters on all experts of the checkpoint: in memory, streamed with
files in the page cache, in every layer or every other one, and streamed with the files dropped from it before each
step. Resident memory (VmHWM, reset
before the steps) includes mapped pages. Each row is written when its run ends; rows in the file are skipped. Processor
seconds are comparable under load, wall seconds are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from provenance import provenance

WAYS = ("memory", "every other layer streamed", "streamed", "streamed, cold")
STEPS = 3


def train(arguments: argparse.Namespace) -> dict:
    """Train in this process; returns the row."""
    from edgefed.hardware.memory import set_up_allocator

    set_up_allocator()
    import torch

    from edgefed.costs.memory import training_memory
    from edgefed.costs.step_setup import StepSetup
    from edgefed.costs.streaming import streamed_bytes
    from edgefed.expert_records import ExpertPlan
    from edgefed.moe import adapters
    from edgefed.moe.expert_stream import ExpertStream
    from edgefed.moe.model import MoeModel
    from edgefed.moe.model_shape import shape_from_config
    from edgefed.moe.offloading import OffloadSpace
    from edgefed.moe.units import LORA_SUFFIX, TrainScope, iter_base_units
    from edgefed.training.calibration import reset_peak_rss
    from edgefed.training.savings import make_optimizer
    from edgefed.training.steps import take_step

    own = status_bytes("VmRSS")
    model, checkpoint = MoeModel.streamed(arguments.checkpoint)
    scope = TrainScope(experts="lora", router="none", lora_rank=arguments.rank)
    sizes = {unit.key: sizes for unit, sizes in iter_base_units((), model.layers, scope)}

    class Source:
        def read(self, key: str):
            base = key.removesuffix(LORA_SUFFIX)
            if base == key:
                return checkpoint.read(key)
            return adapters.initial_adapter(key, sizes[base], scope.lora_rank, 0)

    num_layers = len(model.experts_per_layer)
    streamed_layers = {"memory": 0, "every other layer streamed": num_layers // 2}.get(arguments.way, num_layers)
    storage = None if arguments.storage == "full" else arguments.storage
    setup = StepSetup(
        1, arguments.tokens, str(model.dtype).removeprefix("torch."), experts="lora", router="none",
        lora_rank=arguments.rank, expert_storage=storage, checkpointing=True, chunked_loss=True,
        streamed_layers=streamed_layers, kernels=model.training_kernels(),
    )  # fmt: skip
    files = arguments.folder / "files"
    stream = None
    if streamed_layers:
        far = [layer for layer in range(num_layers) if setup.streams(layer, num_layers)]
        stream = ExpertStream(OffloadSpace(torch.device("cpu"), files), far)
    started = time.monotonic()
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), Source(), scope, storage=storage, offload=stream)
    loading_s = time.monotonic() - started
    if stream is not None:
        os.sync()  # pages that are not on the disk yet cannot be dropped
    model.module.train()
    parameters = model.trainable_parameters()
    optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    steps = []
    reset_peak_rss()
    for _ in range(STEPS):
        ids = torch.randint(0, vocabulary, (1, arguments.tokens), generator=generator)
        if arguments.way.endswith("cold"):
            drop_mapped_files(files)
        wall, processor = time.monotonic(), time.process_time()
        loss, _ = take_step(model, optimizer, parameters, ids, ids, setup=setup, max_grad_norm=1.0)
        optimizer.zero_grad(set_to_none=True)
        steps.append(
            {
                "loss": loss,
                "seconds": round(time.monotonic() - wall, 2),
                "processor_seconds": round(time.process_time() - processor, 2),
            }
        )
    shape = shape_from_config(model.config, "checkpoint")
    counts = model.experts_per_layer
    return {
        "peak_rss_bytes": status_bytes("VmHWM"),
        "process_bytes": own,
        "predicted_bytes": training_memory(shape, setup, counts, counts).total_bytes,
        "streamed_bytes": streamed_bytes(shape, setup, counts, counts),
        "loading_s": round(loading_s, 1),
        "steps": steps,
        "layers": len(counts),
        "experts": sum(counts),
    }


def drop_mapped_files(folder: Path) -> None:
    """Drop the unlinked files of ``folder`` that this process has mapped from the page cache."""
    for entry in Path("/proc/self/map_files").iterdir():
        if f"{folder}/" in os.readlink(entry):
            descriptor = os.open(entry, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@dataclasses.dataclass(frozen=True)
class Cell:
    storage: str
    way: str
    tokens: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where the files are")
    parser.add_argument("--storages", default="nf4", help="nf4, int8, full; comma-separated")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--storage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(train(arguments)))
        return 0
    rows = json.loads(arguments.json.read_text())["results"] if arguments.json and arguments.json.exists() else []
    known = {Cell(row["storage"], row["way"], row["tokens"]) for row in rows}
    for storage in arguments.storages.split(","):
        for way in WAYS:
            cell = Cell(storage, way, arguments.tokens)
            if cell in known:
                continue
            command = [
                sys.executable, __file__, str(arguments.checkpoint), "--folder", str(arguments.folder), "--way", way,
                "--storage", storage, "--tokens", str(arguments.tokens), "--rank", str(arguments.rank),
            ]  # fmt: skip
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = {**dataclasses.asdict(cell), "rank": arguments.rank, **json.loads(out.splitlines()[-1])}
            rows.append({**row, "provenance": provenance()})
            print(
                f"{storage}, {way}: {row['peak_rss_bytes'] / 2**30:.2f} GiB, steps of "
                f"{', '.join(str(step['seconds']) for step in row['steps'])} s (processor "
                f"{', '.join(str(step['processor_seconds']) for step in row['steps'])} s)",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps({"results": rows}, indent=1) + "\n")
    losses = {(row["storage"], row["tokens"]): [] for row in rows}
    for row in rows:
        losses[row["storage"], row["tokens"]].append([step["loss"] for step in row["steps"]])
    return 0 if all(found == same[0] for same in losses.values() for found in same) else 1


if __name__ == "__main__":
    sys.exit(main())
