"""Methods that hold the whole model on devices that cannot: experts offloaded (fmd), or in 4 bits (fmq)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from pathlib import Path

import pytest
from device_bench import OnlyWith, trainer_of

from edgefed.costs.memory import training_memory
from edgefed.costs.step_setup import StepSetup
from edgefed.disk import filesystem
from edgefed.errors import BudgetTooSmall, ConfigError, DiskFull, StorageError
from edgefed.moe.model_shape import shape_from_config
from edgefed.trainer import placement
from edgefed.trainer.ports import FixedMemory, FormulaCosts
from edgefed.trainer.saved_plan import PLAN_FILE

MIB = 2**20
LEAST = dict(chunked_loss=True, checkpointing=True)


@pytest.fixture(autouse=True)
def on_a_disk(tmp_path):
    if filesystem(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("tests write to memory here (tmpfs): nothing can be offloaded to it")


def with_room(data, tmp_path, usable_bytes, name):
    """A device that offers the model so much, by the formulas alone."""
    costs = FormulaCosts(measures_steps=False)
    return trainer_of(data, tmp_path, memory=FixedMemory(usable_bytes), name=name, costs=costs)


def needs(model, training, **how):
    """Bytes of a step with every expert, in sequences as short as they get."""
    kernels = model.training_kernels()
    setup = StepSetup(
        training.batch_size, 32, "float32", experts=training.experts, router=training.router,
        lora_rank=training.lora_rank, kernels=kernels, **how,
    )  # fmt: skip
    return training_memory(shape_from_config(model.config), setup, 999, 999).total_bytes


def budget_between(table, data, tmp_path, smaller, larger):
    """Room for ``smaller`` ways of training everything, too little for ``larger`` ones."""
    first = trainer_of(data, tmp_path, name="first")
    table.round(first, tmp_path / "first-update")
    model, training = first.model, table.reader.run.training
    low, high = needs(model, training, **smaller), needs(model, training, **larger)
    assert low < 0.9 * high
    return (low + high) // 2


def test_a_device_with_too_little_memory_offloads_and_sends_what_fedavg_sends(bench, data, tmp_path):
    table = bench("fmd")
    usable = budget_between(table, data, tmp_path, LEAST | {"offload": True}, LEAST)
    device = with_room(data, tmp_path, usable, "poor")
    manifest, _ = table.round(device, tmp_path / "update")
    step_plan = device.planner.step_plan
    assert step_plan.setup.offload
    assert device.model.offloads
    assert step_plan.resident == step_plan.trainable == 64
    assert device.model.memory_bytes()["experts"] == 0
    folder = tmp_path / "poor" / placement.OFFLOAD_FOLDER
    assert not list(folder.iterdir()), "no file has a name, while all are in use"

    fedavg = bench("fedavg")
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs"):
        fedavg.round(with_room(data, tmp_path, usable, "same"), tmp_path / "none")
    savings = {name: True for name in ("chunked_loss", "checkpointing") if getattr(step_plan.setup, name)}
    rich = trainer_of(data, tmp_path, name="poor", folder="rich", costs=OnlyWith(**savings))  # the same draws
    fedavg.round(rich, tmp_path / "expected")
    assert rich.planner.step_plan.setup == dataclasses.replace(step_plan.setup, offload=False)
    assert (tmp_path / "update").read_bytes() == (tmp_path / "expected").read_bytes()

    again = with_room(data, tmp_path, usable, "poor")  # a restart remembers
    table.round(again, tmp_path / "update-2", server_round=2)
    assert again.planner.step_plan == step_plan
    assert again.model.offloads


def test_what_fits_is_not_offloaded(bench, data, tmp_path):
    table, device = bench("fmd"), trainer_of(data, tmp_path)
    table.round(device, tmp_path / "update")
    assert not device.model.offloads
    assert not (tmp_path / "a" / placement.OFFLOAD_FOLDER).exists()


def test_a_method_that_offloads_keeps_experts_as_they_come(bench, data, tmp_path):
    table, device = bench("fmd", experts="lora"), trainer_of(data, tmp_path, expert_storage="nf4")
    with pytest.raises(
        ConfigError, match="`expert_storage=nf4` needs nf4, but fmd offloads experts in the model's dtype"
    ):
        table.round(device, tmp_path / "update")


def poor_device(bench, data, tmp_path):
    table = bench("fmd")
    usable = budget_between(table, data, tmp_path, LEAST | {"offload": True}, LEAST)
    table.fetched.clear()
    return table, with_room(data, tmp_path, usable, "poor")


def test_a_disk_without_room_is_told_before_anything_is_downloaded(bench, data, tmp_path, monkeypatch):
    table, device = poor_device(bench, data, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(MIB, 0, MIB))
    with pytest.raises(DiskFull, match="offloaded experts, their gradients and moments take .* 1.0 MiB are free"):
        table.round(device, tmp_path / "update")
    assert not table.expert_keys_fetched()


def test_a_folder_in_memory_is_refused(bench, data, tmp_path, monkeypatch):
    table, device = poor_device(bench, data, tmp_path)
    monkeypatch.setattr(placement, "filesystem", lambda folder: "tmpfs")
    with pytest.raises(StorageError, match="its filesystem is in memory") as caught:
        table.round(device, tmp_path / "update")
    assert "`state`" in caught.value.remedy


def test_fmq_trains_adapters_on_4_bits_and_refuses_what_even_they_do_not_fit(bench, data, tmp_path):
    table, device = bench("fmq", experts="lora", lora_rank=2), trainer_of(data, tmp_path)
    _, update = table.round(device, tmp_path / "update")
    assert device.model.storage == "nf4"
    assert device.model.plan.num_trainable == 64
    bank = device.model.bank(0)
    assert {stack.format for stack in bank.stacks().values()} == {"nf4"}
    assert len(bank.packed(0)) == 2
    assert all("lora" in name for name in bank.storages()), "the base does not train"
    assert update.metrics["experts_trained"] > 48
    assert update.metrics["train_loss"] > 0

    model, training = device.model, table.reader.run.training
    lean = needs(model, training, expert_storage="nf4", **LEAST)
    poor = with_room(data, tmp_path, lean // 2, "poor")
    with pytest.raises(BudgetTooSmall, match="all 64 experts needs .* with every saving"):
        table.round(poor, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_fmq_needs_its_mode_of_training(bench, data, tmp_path):
    with pytest.raises(ConfigError, match="fmq trains every expert in full: no frozen expert to quantize"):
        bench("fmq").round(trainer_of(data, tmp_path), tmp_path / "update")


# --- real limits, and real ends ---------------------------------------------------------------------------------------

PROCESS = """
    import json, resource, sys, time
    from pathlib import Path
    sys.path.insert(0, {here!r})
    import torch
    torch.set_num_threads(1)
    from transformers import AutoConfig, AutoModelForCausalLM
    from edgefed.trainer.local_trainer import LocalTrainer
    from edgefed.trainer.planner import DeviceLimits
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.embedded import tiny_model_directory
    from edgefed.errors import EdgefedError
    from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
    from edgefed.runs import RunReader, import_model
    from edgefed.trainer.ports import FixedMemory, FormulaCosts
    from test_memory_guard import Heard

    def status(name):
        return int(next(l for l in open("/proc/self/status") if l.startswith(name + ":")).split()[1]) * 1024

    folder = Path({folder!r})
    model = folder / "model"
    if not model.exists():
        config = AutoConfig.from_pretrained(tiny_model_directory())
        config.update(dict(hidden_size=256, intermediate_size=512, num_experts=16, num_hidden_layers=6))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((tiny_model_directory() / name).read_bytes())
        training = TrainingConfig(local_steps=2, batch_size=2, sequence_length=64, evaluation_tokens=128)
        run = RunConfig(run_id="run", model="big", method={method!r}, method_options={{}}, rounds=4, seed=3,
                        training=training)
        import_model(str(model), folder / "run", run, RoundPolicy(rounds=4, min_clients=1))
    reader = RunReader(folder / "run")
    paths = reader.paths(reader.manifest())
    data = folder / "notes.jsonl"
    data.write_text("".join(json.dumps(dict(text="def function(argument): return argument " * 9)) + chr(10)
                            for _ in range(20)))
    device = LocalTrainer(str(data), folder / "device", DeviceLimits(), "device", FixedMemory({usable_mib} * 2**20),
                          held_out_share=0.2, costs=FormulaCosts(measures_steps=False))
    most = dict(file=0)

    class Limiting(Heard):
        def message(self, text):
            print("SAID", text, flush=True)
            if text.startswith("plan:") and {room_mib}:
                limit = status("VmData") + {room_mib} * 2**20
                resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

        def phase(self, name, total=None, unit="B"):
            super().phase(name, total, unit)
            self.before = status("RssFile")

        def advance(self, n):
            if self.phases[-1] == "train":
                most["file"] = max(most["file"], status("RssFile") - self.before)
                print("STEP", flush=True)
                time.sleep({pause_s})
                self.before = status("RssFile")

    heard = Limiting()
    fetch = lambda items: {{item.sha256: paths[item.sha256] for item in tuple(items)}}
    try:
        update = device.train_round(reader.run, reader.manifest(), Assignment(server_round=1, deadline_s=None, seed=7),
                                    fetch, heard, folder / "update")
    except EdgefedError as error:
        print(json.dumps(dict(error=type(error).__name__, text=str(error))))
    else:
        print(json.dumps(dict(loss=update.metrics["train_loss"], shrinks=update.metrics["memory_shrinks"],
            offloads=device.model.offloads, trainable=device.model.plan.num_trainable, file_bytes=most["file"])))
"""
EXPERT_MIB = 6 * 16 * 3 * 256 * 512 * 4 / MIB
"""Of all weights; in training there are gradients and two moments besides."""


def start(folder: Path, method: str, usable_mib: int, room_mib: int = 0, pause_s: float = 0.0) -> subprocess.Popen:
    code = textwrap.dedent(PROCESS).format(
        here=str(Path(__file__).parent), folder=str(folder), method=method, usable_mib=usable_mib, room_mib=room_mib,
        pause_s=pause_s,
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip


def result_of(process: subprocess.Popen) -> dict:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds anonymous memory on Linux")
def test_a_round_under_a_real_limit_far_below_what_fedavg_needs(tmp_path):
    """The process may take 130 MiB more than at the time of the plan.

    Weights of the experts take 144 MiB. Measured from that time on, fedavg takes 490 MiB more (gradients and moments of
    all experts): it runs out of memory. fmd trains all experts.
    """
    (tmp_path / "fmd").mkdir()
    (tmp_path / "fedavg").mkdir()
    found = result_of(start(tmp_path / "fmd", "fmd", usable_mib=180, room_mib=130))
    assert found["offloads"]
    assert found["trainable"] == 96
    assert found["shrinks"] == 0
    assert found["loss"] > 0
    assert found["file_bytes"] < EXPERT_MIB / 2 * MIB, "what a layer is done with leaves the process"
    refused = result_of(start(tmp_path / "fedavg", "fedavg", usable_mib=4096, room_mib=130))
    assert refused["error"] == "OutOfMemory", refused


def in_use(process: subprocess.Popen) -> list[str]:
    """Mapped files of offloaded experts of a process."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return [line for line in lines if f"/{placement.OFFLOAD_FOLDER}/" in line]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
def test_whatever_ends_a_round_nothing_stays_on_the_disk(tmp_path, way):
    device = start(tmp_path, "fmd", usable_mib=180, pause_s=30.0)
    try:
        deadline = time.monotonic() + 200
        for line in device.stdout:
            assert time.monotonic() < deadline, line
            assert not line.startswith("{"), line
            if line.startswith("STEP"):
                break
        assert in_use(device)
        device.send_signal(way)
        device.wait(timeout=60)
    finally:
        device.kill()
        device.communicate()
    folder = tmp_path / "device" / placement.OFFLOAD_FOLDER
    assert folder.is_dir()
    assert not list(folder.iterdir())
    if way is signal.SIGKILL:
        assert result_of(start(tmp_path, "fmd", usable_mib=180))["offloads"]
        assert not list(folder.iterdir())
        assert json.loads((tmp_path / "device" / PLAN_FILE).read_text())["load"]["setup"]["offload"]
