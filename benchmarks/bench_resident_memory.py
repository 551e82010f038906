"""Resident memory of a device that trains under `--memory`, with a model larger than that, over several rounds.

    python shared/examples/real_scale/make_checkpoint.py CHECKPOINT      # random OLMoE-1B-7B, 13 GB
    python benchmarks/bench_resident_memory.py CHECKPOINT --data texts.jsonl --folder WORK \
        --json benchmarks/results/resident_memory.json

Each cell is one process: the trainer of `edgefed join` with its budget and its memory guard, and the files of a run
that was imported once into --folder. The global model stays as it is between rounds. Every 20 ms this process reads the
other one's peak (VmHWM, which the child resets when a phase begins), so only the time between
the last reading and a reset is missed. Each row is written when its cell ends. Cells already in the file are skipped.

--allocator system leaves the C library's allocator as it is, for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from provenance import provenance

TOLERANCE = 1.03
SAMPLE_S = 0.02
STORAGES = {"bf16": "full", "nf4": "nf4"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One configuration."""

    memory: str
    experts: str
    storage: str
    allocator: str = "edgefed"

    @property
    def name(self) -> str:
        return "/".join(dataclasses.astuple(self))


# --- the process that trains ------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    """Train the rounds of one cell; prints one JSON line for each phase and message."""
    from edgefed.hardware.memory import set_up_allocator

    if arguments.allocator == "edgefed":
        set_up_allocator()
    import msgspec

    from edgefed.hardware.memory import parse_bytes, reset_peak_rss
    from edgefed.join import DeviceMemory
    from edgefed.moe.units import LORA_SUFFIX
    from edgefed.progress import NullProgress
    from edgefed.protocol.messages import Assignment
    from edgefed.runs import RunReader
    from edgefed.trainer.local_trainer import LocalTrainer
    from edgefed.trainer.planner import DeviceLimits
    from edgefed.trainer.ports import ProcessMemory

    def say(**facts: object) -> None:
        print(json.dumps({"time": time.monotonic(), **facts}), flush=True)

    class Progress(NullProgress):
        def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
            say(phase=name)
            reset_peak_rss()

        def message(self, text: str) -> None:
            say(message=text)

    memory = DeviceMemory("cpu", parse_bytes(arguments.memory))
    trainer = LocalTrainer(
        str(arguments.data), Path(arguments.state), DeviceLimits(expert_storage=STORAGES[arguments.storage]), "bench",
        ProcessMemory(memory.measure, memory.torch_device, memory.make_watch()), device="cpu",
    )  # fmt: skip
    with RunReader(arguments.folder / "run") as reader:
        manifest, training = reader.manifest(), training_of(arguments)
        if arguments.experts == "full":  # the same files; experts train instead of their adapters
            units = [u for u in manifest.units if not u.key.endswith(LORA_SUFFIX)]
            units = [msgspec.structs.replace(u, trainable=u.kind in ("expert", "router")) for u in units]
            manifest = msgspec.structs.replace(manifest, units=tuple(units))
        run = msgspec.structs.replace(reader.run, training=training, rounds=arguments.rounds)
        paths = reader.paths(reader.manifest())
        for number in range(1, arguments.rounds + 1):
            say(phase="plan", round=number)
            update = trainer.train_round(
                run, msgspec.structs.replace(manifest, server_round=number), Assignment(number, None, 7),
                lambda items: {item.sha256: paths[item.sha256] for item in items}, Progress(),
                Path(arguments.state) / "update",
            )  # fmt: skip
            step_plan, planner = trainer.planner.step_plan, trainer.planner
            say(
                phase="between rounds", round=number, metrics=update.metrics, predicted_bytes=planner.needs_bytes,
                process_bytes=planner.correction.process_bytes if planner.correction else None,
                resident=step_plan.resident, trainable=step_plan.trainable,
                setup=dataclasses.asdict(step_plan.setup),
            )  # fmt: skip
            trainer.between_rounds(lambda items: {item.sha256: paths[item.sha256] for item in items}, Progress())


def training_of(arguments: argparse.Namespace):
    from edgefed.protocol.messages import TrainingConfig

    return TrainingConfig(
        local_steps=arguments.steps, batch_size=arguments.batch_size, sequence_length=arguments.sequence_length,
        experts=arguments.experts, profile_tokens=arguments.profile_tokens,
        evaluation_tokens=arguments.evaluation_tokens,
    )  # fmt: skip


# --- the process that measures ----------------------------------------------------------------------------------------


def measure(cell: Cell, arguments: argparse.Namespace) -> dict:
    """Run a cell in a process of its own; returns its row."""
    state = arguments.folder / "device"
    subprocess.run(["rm", "-rf", str(state)], check=True)
    state.mkdir(parents=True)
    options = ["rounds", "steps", "batch_size", "sequence_length", "profile_tokens", "evaluation_tokens"]
    command = [
        sys.executable, __file__, str(arguments.checkpoint), "--train", "--memory", cell.memory, "--experts",
        cell.experts, "--storage", cell.storage, "--allocator", cell.allocator, "--state", str(state), "--data",
        str(arguments.data), "--folder", str(arguments.folder),
        *itertools.chain.from_iterable((f"--{o.replace('_', '-')}", str(getattr(arguments, o))) for o in options),
    ]  # fmt: skip
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    samples: list[tuple[float, dict[str, int]]] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            found = read_status(child.pid)
            if found.get("VmHWM"):
                samples.append((time.monotonic(), found))
            stop.wait(SAMPLE_S)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    spans: list[dict] = [{"phase": "start", "round": 0, "time": started}]
    rounds: list[dict] = []
    messages: list[str] = []
    number = 0
    assert child.stdout is not None
    for line in child.stdout:
        facts = json.loads(line) if line.startswith("{") else {"message": line.strip()}
        if "message" in facts:
            messages.append(facts["message"])
            print(f"    {time.monotonic() - started:6.0f} s  {facts['message']}", flush=True)
            continue
        number = facts.get("round", number)
        spans.append({"phase": facts["phase"], "round": number, "time": facts["time"]})
        if "metrics" in facts:
            rounds.append({key: facts[key] for key in facts if key not in ("time", "phase")})
            print(f"    {time.monotonic() - started:6.0f} s  round {number}: {facts['metrics']}", flush=True)
    status = child.wait()
    stop.set()
    sampler.join()
    return {
        **dataclasses.asdict(cell),
        "exit_status": status,
        "seconds": round(time.monotonic() - started, 1),
        **summarize(spans, samples, parse(cell.memory)),
        "trained": rounds,
        "messages": messages,
        **{option: getattr(arguments, option) for option in options},
        "provenance": provenance(),
    }


def summarize(spans: list[dict], samples: list[tuple[float, dict[str, int]]], budget: int) -> dict:
    """Peak of each phase and of the whole, in bytes."""
    phases: list[dict] = []
    ends = [span["time"] for span in spans[1:]] + [float("inf")]
    for span, end in zip(spans, ends, strict=True):
        inside = [found for at, found in samples if span["time"] < at <= end]
        if not inside:
            continue
        top = max(inside, key=lambda found: found["VmRSS"])
        phases.append(
            {
                "round": span["round"],
                "phase": span["phase"],
                # The first reading after the phase began may still hold the peak of the one before.
                "peak_bytes": max(found["VmHWM"] for found in (inside[1:] or inside)),
                "seconds": round(min(end, samples[-1][0]) - span["time"], 2),
                "mapped_bytes_at_top": top["RssFile"] + top["RssShmem"],
            }
        )
    peak = max((phase["peak_bytes"] for phase in phases), default=0)
    return {
        "budget_bytes": budget,
        "peak_bytes": peak,
        "peak_of_budget": round(peak / budget, 4),
        "phases": phases,
    }


def parse(text: str) -> int:
    from edgefed.hardware.memory import parse_bytes

    return parse_bytes(text)


def read_status(pid: int) -> dict[str, int]:
    """Vm* and Rss* of /proc/PID/status in bytes; empty when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    names = ("VmHWM", "VmRSS", "Rss")
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(names)}


def import_once(arguments: argparse.Namespace) -> None:
    """Import the checkpoint with adapters; runs without adapters use the same files."""
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.aggregator.store import has_run
    from edgefed.protocol.messages import RunConfig, TrainingConfig
    from edgefed.runs import import_model

    folder = arguments.folder / "run"
    if folder.is_dir() and has_run(folder):
        return
    run = RunConfig(
        run_id="bench", model=str(arguments.checkpoint), method="hfedmoe", method_options={}, rounds=3, seed=3,
        training=TrainingConfig(experts="lora"),
    )  # fmt: skip
    import_model(str(arguments.checkpoint), folder, run, RoundPolicy(rounds=3, min_clients=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the device's text, .jsonl or .txt")
    parser.add_argument("--folder", type=Path, required=True, help="for the imported run and the device's files")
    parser.add_argument("--memory", default="4GiB,6GiB,8GiB,12GiB", help="comma-separated")
    parser.add_argument("--experts", default="full,lora", help="comma-separated")
    parser.add_argument("--storage", default="bf16,nf4", help="comma-separated")
    parser.add_argument("--allocator", default="edgefed", help="edgefed, system; comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--profile-tokens", type=int, default=2048)
    parser.add_argument("--evaluation-tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments)
        return 0
    import_once(arguments)
    rows = json.loads(arguments.json.read_text())["results"] if arguments.json and arguments.json.exists() else []
    known = {Cell(*(row[field.name] for field in dataclasses.fields(Cell))).name for row in rows}
    axes = (getattr(arguments, name).split(",") for name in ("memory", "experts", "storage", "allocator"))
    for cell in itertools.starmap(Cell, itertools.product(*axes)):
        if cell.name in known:
            continue
        print(cell.name, flush=True)
        row = measure(cell, arguments)
        rows.append(row)
        print(
            f"{cell.name}: {row['peak_bytes'] / 2**30:.2f} GiB, {row['peak_of_budget']:.3f} of the budget, "
            f"{row['seconds']:.0f} s, exit status {row['exit_status']}",
            flush=True,
        )
        if arguments.json:  # after each, so that an interrupted run leaves what it measured
            arguments.json.write_text(json.dumps({"results": rows}, indent=1) + "\n")
    ours = [row for row in rows if row["allocator"] == "edgefed"]
    return 0 if all(row["peak_of_budget"] <= TOLERANCE and row["exit_status"] == 0 for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
