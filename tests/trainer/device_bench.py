"""One device's rounds with a real model and without a network; used by the tests of this folder."""

from __future__ import annotations

import dataclasses
import functools
import json

import msgspec
import pytest

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.costs.memory import MemoryEstimate, training_memory
from edgefed.embedded import tiny_model_directory
from edgefed.methods.registry import make_expert_method
from edgefed.progress import NullProgress
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import FormulaCosts, ProcessMemory

MEMORY_BYTES = 64 << 30
STEPS = 3
TIB = 1 << 40


@dataclasses.dataclass
class Bench:
    """A run on disk, and a fetch that remembers what was asked for."""

    reader: RunReader
    fetched: list
    progress: NullProgress = dataclasses.field(default_factory=NullProgress)

    @functools.cached_property
    def paths(self):
        return self.reader.paths(self.reader.manifest())

    def fetch(self, items):
        items = tuple(items)
        self.fetched += items
        return {item.sha256: self.paths[getattr(item, "unit", item).sha256] for item in items}  # of a slice, the whole

    def expert_keys_fetched(self):
        return {item.key for item in self.fetched if getattr(item, "kind", "") == "expert"}

    def round(self, trainer, path, server_round=1, experts=None):
        manifest = msgspec.structs.replace(self.reader.manifest(), server_round=server_round)
        assignment = Assignment(server_round=server_round, deadline_s=None, seed=7, experts=experts)
        update = trainer.train_round(self.reader.run, manifest, assignment, self.fetch, self.progress, path)
        return manifest, update


@pytest.fixture
def bench(tmp_path):
    readers = []

    def make(method="hfedmoe", options=None, rounds=1, **training):
        training = {"local_steps": STEPS, "batch_size": 2, "sequence_length": 64, "profile_tokens": 1024, **training}
        run = RunConfig(
            run_id="run", model="tiny", method=method, method_options=options or {}, rounds=rounds, seed=3,
            training=TrainingConfig(evaluation_tokens=256, evaluation_share=1.0, **training),
        )  # fmt: skip
        folder = tmp_path / f"run-{len(readers)}"
        neurons = make_expert_method(method, options).requirements.neurons
        policy = RoundPolicy(rounds=rounds, min_clients=1)
        import_model(str(tiny_model_directory()), folder, run, policy, neurons=neurons)
        readers.append(RunReader(folder))
        return Bench(readers[-1], [])

    yield make
    for reader in readers:
        reader.__exit__()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "notes.jsonl"
    lines = [{"text": f"def function_{i}(argument):\n    return argument + {i}\n" * 8} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def trainer_of(
    data, tmp_path, share=1.0, compute=1.0, memory=MEMORY_BYTES, name="a", folder=None, expert_storage="auto",
    stream_experts="auto", private="none", lora_rank=None, **ports
):  # fmt: skip
    """A device. ``memory``: bytes for its process, or a `Memory`."""
    limits = DeviceLimits(
        share, compute, expert_storage=expert_storage, stream_experts=stream_experts, private=private,
        lora_rank=lora_rank,
    )  # fmt: skip
    memory = ProcessMemory(memory) if isinstance(memory, int) else memory
    return LocalTrainer(data, tmp_path / (folder or name), limits, name, memory, held_out_share=0.2, **ports)


class OnlyWith(FormulaCosts):
    """The formulas, without measured steps, and a TiB more for each of ``savings`` that a step has not as told."""

    def __init__(self, **savings):
        super().__init__(measures_steps=False)
        self.savings = savings

    def estimate(self, shape, setup, resident, trainable, correction, *, offloading, slice_shares=()):
        found = super().estimate(
            shape, setup, resident, trainable, correction, offloading=offloading, slice_shares=slice_shares
        )
        more = sum(getattr(setup, name) != value for name, value in self.savings.items()) * TIB
        return MemoryEstimate(
            found.parts | {"more": more}, {phase: size + more for phase, size in found.phases.items()}
        )


class Corrected(FormulaCosts):
    """The formulas with a correction that is known from the beginning."""

    def __init__(self, correction):
        super().__init__(measures_steps=False)
        self.correction = correction

    def estimate(self, shape, setup, resident, trainable, correction, *, offloading, slice_shares=()):
        return training_memory(shape, setup, resident, trainable, self.correction)


class GivenMemory:
    """``now`` bytes for the model."""

    watch = None

    def __init__(self, now):
        self.now = now

    def usable_bytes(self):
        return self.now

    def model_is_empty(self):
        pass
