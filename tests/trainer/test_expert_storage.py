"""A device that keeps experts in 4 or 8 bits, through real rounds: when it does, what it sends, what it remembers."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.costs.memory import training_memory
from edgefed.embedded import tiny_model_directory
from edgefed.errors import ConfigError
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import Requirements
from edgefed.moe.accounting import expert_memory, storage_bytes
from edgefed.moe.model_shape import shape_from_config
from edgefed.progress import NullProgress
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer import placement, planner
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.placement import required_storage
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import FixedMemory, FormulaCosts
from edgefed.trainer.saved_plan import PLAN_FILE
from edgefed.training import steps as steps_module
from edgefed.training.savings import problems
from edgefed.training.steps import step_setup

PLENTY = 64 << 30
CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Heard(NullProgress):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)

    def said(self, *words):
        return [text for text in self.messages if all(word in text for word in words)]


class Rig:
    """A run on disk, and devices that take part in it with as much memory as they are told."""

    def __init__(self, folder, method="hfedmoe", **training):
        training = {"local_steps": 2, "batch_size": 2, "sequence_length": 64, "profile_tokens": 256, **training}
        run = RunConfig(
            run_id="run", model="tiny", method=method, method_options={}, rounds=4, seed=3,
            training=TrainingConfig(evaluation_tokens=256, **training),
        )  # fmt: skip
        import_model(str(tiny_model_directory()), folder / "run", run, RoundPolicy(rounds=4, min_clients=1))
        self.folder, self.reader, self.fetched = folder, RunReader(folder / "run"), []
        self.paths = self.reader.paths(self.reader.manifest())
        self.data = folder / "notes.jsonl"
        lines = [{"text": f"def function_{i}(argument):\n    return argument + {i}\n" * 8} for i in range(40)]
        self.data.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def device(self, name="a", usable_bytes=PLENTY, **limits):
        return LocalTrainer(
            str(self.data), self.folder / name, DeviceLimits(**limits), name, FixedMemory(usable_bytes),
            held_out_share=0.2, costs=FormulaCosts(measures_steps=False),
        )  # fmt: skip

    def round(self, trainer, server_round=1, heard=None):
        path = self.folder / f"update-{server_round}"
        assignment = Assignment(server_round=server_round, deadline_s=None, seed=7)
        update = trainer.train_round(
            self.reader.run, self.reader.manifest(), assignment, self.fetch, heard or Heard(), path
        )
        return update, path

    def fetch(self, items):
        items = tuple(items)
        self.fetched += items
        return {item.sha256: self.paths[item.sha256] for item in items}

    def needs(self, trainer, **changes):
        """Bytes of a step with every expert, by the memory model alone."""
        model = trainer.model
        setup = dataclasses.replace(step_setup(model, self.reader.run.training), **changes)
        return training_memory(shape_from_config(model.config), setup, 999, 999).total_bytes


@pytest.fixture
def rig(tmp_path):
    made = []

    def make(**options):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Rig(folder, **options))
        return made[-1]

    yield make
    for each in made:
        each.reader.__exit__()


LORA = dict(experts="lora", router="lora", lora_rank=2)


def savings(trainer):
    """Those that this machine has of the ones before NF4."""
    found = problems(trainer.model.module, "cpu")
    assert "nf4_experts" not in found
    savings = {"chunked_loss": True, "checkpointing": True}
    return savings | ({} if "adamw_8bit" in found else {"optimizer": "adamw_8bit"})


def tight_budget(table):
    """Too little for all experts in INT8 whatever is saved in a step, enough with them in NF4."""
    measured = table.device("measure")
    table.round(measured)
    before = savings(measured)
    wider = table.needs(measured, **before, expert_storage="int8")
    packed = table.needs(measured, **before, expert_storage="nf4")
    assert packed < wider
    return (wider + packed) // 2


def base_weight_bytes(model):
    """Bytes of experts without their adapters, counted."""
    adapters = [p for name, p in model.module.named_parameters() if "edgefed_bank" in name and "lora" in name]
    return expert_memory(model.layers).weight_bytes - storage_bytes(adapters)


def test_a_device_that_only_fits_in_4_bits_trains_all_experts_and_goes_on_so_after_a_restart(rig):
    table = rig(**LORA)
    usable = tight_budget(table)
    rich, poor, heard = table.device("rich"), table.device("poor", usable), Heard()
    table.round(rich)
    update, path = table.round(poor, heard=heard)
    assert heard.said("frozen experts in NF4 (saves")
    assert heard.said("plan:", "experts in NF4")
    assert (rich.model.storage, poor.model.storage) == (None, "nf4")
    assert poor.planner.step_plan.setup.sequence_length == 64
    assert poor.planner.step_plan.resident == 64
    plan = poor.model.plan
    assert plan.num_trainable == plan.num_resident > 48  # all whose score is worth a download
    plain, packed = (base_weight_bytes(trainer.model) / trainer.model.plan.num_resident for trainer in (rich, poor))
    assert packed == pytest.approx(plain * 4.5 / 32, rel=0.01)  # from float32 to 4 bits, and a scale for each 64
    assert math.isfinite(update.metrics["held_out_loss_before"])
    assert update.metrics["held_out_loss_after"] != update.metrics["held_out_loss_before"]
    assert update.metrics["experts_trained"] > 16

    units = {unit.key: unit for unit in table.reader.manifest().units}
    sent = frames.read_header(path)
    for name, entry in sent.items():
        key, _, tensor = name.rpartition("|")
        assert key.endswith(":lora")
        info = next(info for info in units[key].tensors if info.name == tensor)
        assert entry.info.dtype == info.dtype == "F32"
        assert entry.info.shape == info.shape
    counted = plan.num_trainable - update.metrics.get("experts_not_sent", 0)
    assert sum(units[name.rpartition("|")[0]].kind == "expert" for name in sent) == 4 * counted > 4 * 16

    saved = json.loads((table.folder / "poor" / PLAN_FILE).read_text())
    assert saved["load"]["setup"]["expert_storage"] == "nf4"
    table.fetched.clear()
    again, heard = table.device("poor", usable), Heard()
    table.round(again, 2, heard)
    assert again.model.storage == "nf4"
    assert not heard.said("profile:")
    assert again.model.plan == poor.model.plan
    freed = table.device("poor", usable, expert_storage="full")  # the owner has changed their mind
    table.round(freed, 2)
    assert freed.model.storage is None
    assert freed.planner.step_plan.setup.expert_storage is None


def test_in_full_training_what_is_frozen_is_packed_and_what_learns_is_sent_as_it_is(rig):
    table = rig()
    measured = table.device("measure")
    table.round(measured)
    before = savings(measured)
    shape = shape_from_config(measured.model.config)
    setup = dataclasses.replace(step_setup(measured.model, table.reader.run.training), **before)
    usable = training_memory(shape, setup, 16, 5).total_bytes
    told = table.device("full", usable, expert_storage="full")
    free = table.device("auto", usable)
    table.round(told)
    _, path = table.round(free)
    assert told.model.storage is None
    assert free.model.storage in ("int8", "nf4")
    held, held_plain = free.model.plan, told.model.plan
    assert held.num_resident >= held_plain.num_resident
    assert held.num_trainable > held_plain.num_trainable
    assert 0 < held.num_trainable < held.num_resident
    experts = {u.key: u for u in table.reader.manifest().units if u.kind == "expert"}
    sent = {name.rpartition("|")[0] for name in frames.read_header(path)} & set(experts)
    trainable = {(layer, int(e)) for layer in range(4) for e in held.trainable(layer)}
    assert {(experts[key].layer, experts[key].expert) for key in sent} == trainable
    for name, entry in frames.read_header(path).items():
        key, _, tensor = name.rpartition("|")
        if key in experts:
            info = next(info for info in experts[key].tensors if info.name == tensor)
            assert (entry.info.dtype, entry.info.shape) == (info.dtype, info.shape)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_an_owner_may_ask_for_it_with_memory_to_spare(rig, storage):
    table, heard = rig(**LORA), Heard()
    device = table.device(expert_storage=storage)
    table.round(device, heard=heard)
    assert device.model.storage == storage
    assert heard.said(f"experts in {storage.upper()}")
    assert not heard.said("(saves "), "nothing had to be saved"


def test_memory_that_runs_out_ends_in_packed_experts_before_any_is_given_up(rig, monkeypatch):
    table, heard = rig(**LORA), Heard()
    device = table.device()
    take = steps_module.take_step

    def take_step(model, *args, **kwargs):
        if model.storage is None:
            raise RuntimeError(CPU)
        return take(model, *args, **kwargs)

    monkeypatch.setattr(steps_module, "take_step", take_step)
    update, _ = table.round(device, heard=heard)
    assert device.model.storage == "nf4"
    assert device.planner.step_plan.resident == 64
    assert heard.said(
        "out of memory while training",
        "frozen experts in NF4",
        "the steps since the last change of the plan start again",
    )
    told = heard.said("out of memory while training")
    assert update.metrics["memory_shrinks"] == len(told)
    assert "NF4" in told[-1]
    assert "NF4" not in "".join(told[:-1])
    table.round(device, 2)
    assert device.model.storage == "nf4", "what did not fit once is not tried again at once"


def test_a_device_that_exchanges_nothing_keeps_its_weights_and_their_storage(rig):
    table = rig(method="local", **LORA)
    device = table.device(expert_storage="nf4")
    first, _ = table.round(device)
    table.fetched.clear()
    second, _ = table.round(device, 2)
    assert not table.fetched
    assert device.model.storage == "nf4"
    after, before = first.metrics["held_out_loss_after"], second.metrics["held_out_loss_before"]
    assert before == pytest.approx(after, abs=1e-6)


def test_what_makes_no_sense_is_refused_by_name(rig):
    table = rig(method="fedavg")
    with pytest.raises(ConfigError, match="`expert_storage=nf4` needs nf4, but fedavg trains every expert in full"):
        table.round(table.device(expert_storage="nf4"))
    with pytest.raises(ConfigError, match="invalid expert storage 'fp4'"):
        table.round(table.device("b", expert_storage="fp4"))
    assert not [item for item in table.fetched if getattr(item, "kind", "") == "expert"]


def test_what_a_device_cannot_do_is_refused_or_passed_over(rig, monkeypatch):
    table = rig(**LORA)
    usable = tight_budget(table)
    reason = "quantized experts fail on cpu: no such kernel"
    monkeypatch.setattr(placement, "packing_problem", lambda *args: reason)
    real = problems
    monkeypatch.setattr(planner, "problems", lambda *args: {**real(*args), "nf4_experts": reason})
    with pytest.raises(
        ConfigError, match="`expert_storage=nf4` does not work on this device: quantized experts fail on cpu"
    ):
        table.round(table.device("asked", expert_storage="nf4"))
    device = table.device("auto", usable)
    table.round(device)
    assert device.model.storage is None
    step_plan = device.planner.step_plan
    assert step_plan.setup.sequence_length < 64 or step_plan.resident < 64


def test_a_method_may_ask_for_a_storage_and_an_owner_not_for_another(rig):
    table = rig(**LORA)
    device = table.device()
    table.round(device)
    training, model = table.reader.run.training, device.model

    class Quantized(HFedMoE):
        requirements = Requirements(expert_storage="nf4")

    method = Quantized()
    assert required_storage("auto", method, training, model) == "nf4"
    assert required_storage("nf4", method, training, model) == "nf4"
    for requested in ("full", "int8"):
        with pytest.raises(ConfigError, match=f"keeps experts in nf4, this device has `expert_storage={requested}`"):
            required_storage(requested, method, training, model)
