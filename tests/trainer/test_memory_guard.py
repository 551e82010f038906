"""Memory that runs out or gets tight in the middle of a round: the plan shrinks, the owner hears of it, it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from device_bench import Corrected, GivenMemory, OnlyWith

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.costs.memory import training_memory
from edgefed.embedded import tiny_model_directory
from edgefed.errors import BudgetTooSmall, ConfigError, DeviceLost, OutOfMemory
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.facts import MemoryKind
from edgefed.hardware.watch import Pressure
from edgefed.methods.interface import RoundContext
from edgefed.methods.registry import make_expert_method
from edgefed.moe.expert_reading import FrameSource
from edgefed.progress import NullProgress, StopRequested
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, RunConfig, TrainingConfig
from edgefed.runs import RunReader, import_model
from edgefed.trainer import evaluation, memory_guard
from edgefed.trainer import local_trainer as trainer_module
from edgefed.trainer.expert_choice import method_layout
from edgefed.trainer.finished_steps import FINISHED_FOLDER, FinishedSteps
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.memory_guard import MemoryGuard
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import FixedMemory, ProcessMemory
from edgefed.trainer.saved_plan import PLAN_FILE
from edgefed.training import steps as steps_module
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import train_scope
from edgefed.training.user_functions import UserFunctions

TEGRA = (
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/torch/c10/cuda/CUDACachingAllocator.cpp":1131, please report '
    "a bug to PyTorch."
)
CUDA = "CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of 7.79 GiB."
CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
STEPS = 4
MIB = 2**20


class Heard(NullProgress):
    """Keeps what the owner was told, and can ask to stop."""

    def __init__(self):
        self.messages, self.phases, self.stop_in = [], [], None
        self.advanced = Counter()

    def message(self, text):
        self.messages.append(text)

    def phase(self, name, total=None, unit="B"):
        self.phases.append(name)

    def advance(self, n):
        self.advanced[self.phases[-1]] += n
        if self.stop_in is not None and self.phases[-1] == self.stop_in:
            raise StopRequested

    def said(self, *words):
        return [text for text in self.messages if all(word in text for word in words)]


class Rig:
    """A run on disk, a device that takes part in it, and the arguments of its rounds."""

    def __init__(self, folder: Path, method="hfedmoe", options=None, share=0.5, **training):
        training = {"local_steps": STEPS, "batch_size": 4, "sequence_length": 128, "profile_tokens": 512, **training}
        run = RunConfig(
            run_id="run", model="tiny", method=method, method_options=options or {}, rounds=4, seed=3,
            training=TrainingConfig(evaluation_tokens=256, **training),
        )  # fmt: skip
        import_model(str(tiny_model_directory()), folder / "run", run, RoundPolicy(rounds=4, min_clients=1))
        self.folder, self.reader = folder, RunReader(folder / "run")
        self.paths = self.reader.paths(self.reader.manifest())
        self.data = folder / "notes.jsonl"
        lines = [{"text": f"def function_{i}(argument):\n    return argument + {i}\n" * 8} for i in range(40)]
        self.data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.share = share
        self.heard = Heard()
        self.fetched = []

    def trainer(self, memory=64 << 30, name="me", folder=None, watch=None, device="cpu", **ports):
        """``memory``: bytes for the process, or what measures its budget, or a `Memory`."""
        if not hasattr(memory, "usable_bytes"):
            memory = ProcessMemory(memory, device, watch)
        return LocalTrainer(
            str(self.data), self.folder / (folder or name), DeviceLimits(self.share), name, memory,
            held_out_share=0.2, device=device, **ports,
        )  # fmt: skip

    def fetch(self, items):
        items = tuple(items)
        self.fetched += items
        return {item.sha256: self.paths[item.sha256] for item in items}

    def round(self, trainer, server_round=1):
        self.update = self.folder / "update"
        assignment = Assignment(server_round=server_round, deadline_s=None, seed=7)
        return trainer.train_round(
            self.reader.run, self.reader.manifest(), assignment, self.fetch, self.heard, self.update
        )

    def sent_experts(self):
        keys = {name.rpartition("|")[0] for name in frames.read_header(self.update)}
        return keys & {unit.key for unit in self.reader.manifest().units if unit.kind == "expert"}

    def close(self):
        self.reader.__exit__()


def not_sent(update):
    """Trained experts that are not sent, because the method would not count them."""
    return update.metrics.get("experts_not_sent", 0)


@pytest.fixture
def rig(tmp_path):
    made = []

    def make(**options):
        made.append(Rig(tmp_path / f"rig-{len(made)}", **options))
        return made[-1]

    (tmp_path / "rig-0").mkdir()
    (tmp_path / "rig-1").mkdir()
    yield make
    for each in made:
        each.close()


def fail(monkeypatch, owner, name, error, times=1, after=0):
    """Let ``owner.name`` raise ``error`` on ``times`` calls, the first ``after`` excepted. Returns the call count."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if after < len(calls) <= after + times:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replacement)
    return calls


# --- out of memory, wherever it happens -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [TEGRA, CUDA, CPU], ids=["tegra", "cuda", "cpu"])
def test_a_step_that_runs_out_starts_the_round_again_a_rung_lower(rig, monkeypatch, text):
    table = rig()
    fail(monkeypatch, steps_module, "batch_loss", RuntimeError(text), after=2)
    update = table.round(table.trainer())
    assert update.metrics["memory_shrinks"] == 1
    assert table.heard.said("out of memory while training", text[:60], "(saves ", "start again")
    assert update.num_tokens == STEPS * 4 * 128  # all steps, and none of them twice
    assert len(update.experts) == 32  # the first fallbacks keep the plan


def test_what_a_half_done_optimizer_step_changed_is_thrown_away(rig, monkeypatch):
    """The update after a failure is bit for bit that of a device that began with the smaller setup."""
    table = rig()
    load = {}

    def poisoned_step(optimizer):
        for group in optimizer.param_groups:  # half of the parameters are changed, then memory runs out
            for parameter in group["params"][: len(group["params"]) // 2]:
                parameter.data.add_(1.0)
        raise torch.OutOfMemoryError(CUDA)

    def optimizer_that_fails_once(parameters, name, **options):
        optimizer = make_optimizer(parameters, name, **options)
        if not load:
            load["failed"] = True
            optimizer.step = lambda: poisoned_step(optimizer)
        return optimizer

    monkeypatch.setattr(steps_module, "make_optimizer", optimizer_that_fails_once)
    trainer = table.trainer()
    table.round(trainer)
    failed = table.update.read_bytes()
    assert trainer.planner.step_plan.setup.chunked_loss  # the fallback that was taken
    monkeypatch.undo()

    other = rig()
    other.round(other.trainer(costs=OnlyWith(chunked_loss=True)))
    assert other.update.read_bytes() == failed


def test_the_ladder_goes_down_to_its_end_and_then_refuses_by_name(rig, monkeypatch):
    table = rig(share=0.12)
    trainer = table.trainer()

    def always(*args, **kwargs):
        raise RuntimeError(TEGRA)

    monkeypatch.setattr(steps_module, "batch_loss", always)
    with pytest.raises(OutOfMemory, match="ran out while training, and nothing is left to give up") as caught:
        table.round(trainer)
    assert "`batch_size`" in caught.value.remedy
    step_plan = trainer.planner.step_plan
    assert step_plan.resident == step_plan.trainable == 4  # one per layer
    assert step_plan.setup.chunked_loss
    assert step_plan.setup.checkpointing
    assert step_plan.setup.sequence_length == 32
    said = [text for text in table.heard.messages if "out of memory" in text]
    order = [
        "256 tokens at a time", "checkpointing on", "sequences of 64", "sequences of 32",
        "resident experts trainable instead", "experts resident instead",
    ]  # fmt: skip
    places = [next(i for i, text in enumerate(said) if words in text) for words in order]
    assert places == sorted(places)
    assert len(said) < memory_guard.MAX_SHRINKS
    assert not table.update.exists()


def test_fewer_experts_after_out_of_memory_are_what_is_reported_and_sent(rig, monkeypatch):
    """Chunked loss, checkpointing, two lengths, then experts: the sixth failure has frozen some of them."""
    table = rig()
    full = table.round(table.trainer(name="first"))
    trained_in_full = len(table.sent_experts())
    profile = json.loads((table.folder / "first" / PLAN_FILE).read_text())
    fail(monkeypatch, steps_module, "batch_loss", RuntimeError(CUDA), times=5)
    trainer = table.trainer(name="first")  # the same name: the same draw of experts
    update = table.round(trainer)
    step_plan = trainer.planner.step_plan
    assert step_plan.trainable < step_plan.resident == 32
    assert len(table.sent_experts()) == step_plan.trainable - not_sent(update) < trained_in_full
    assert len(update.experts) == step_plan.resident == len(full.experts)
    stepped = {(report.layer, report.expert) for report in update.experts if report.steps}
    assert len(stepped) <= step_plan.trainable
    assert {report.layer for report in update.experts} == {0, 1, 2, 3}
    saved = json.loads((table.folder / "first" / PLAN_FILE).read_text())
    assert sum(np.sum(np.array(row) == 2) for row in saved["plan"]["roles"]) == step_plan.trainable
    assert saved["profile"] == profile["profile"]


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("apply_plan", "loading the planned experts"),
        ("evaluate_loss", "evaluating"),
        ("run_steps", "training"),
    ],
)
def test_out_of_memory_at_each_place_of_a_round(rig, monkeypatch, place, doing):
    table = rig(batch_size=1)  # no smaller batch to evaluate with
    owners = {"apply_plan": trainer_module.MoeModel, "evaluate_loss": evaluation}
    owner = owners.get(place, trainer_module)
    fail(monkeypatch, owner, place, torch.OutOfMemoryError(CUDA))
    update = table.round(table.trainer())
    assert update.metrics["memory_shrinks"] == 1
    assert table.heard.said(f"out of memory while {doing}")
    assert update.metrics["held_out_loss_after"] > 0


def test_evaluation_and_profile_need_only_smaller_batches(rig, monkeypatch):
    table = rig(batch_size=4)
    expected = rig(batch_size=4)
    plain = expected.round(expected.trainer())
    calls = fail(monkeypatch, evaluation, "evaluate_loss", torch.OutOfMemoryError(CUDA))
    from edgefed.trainer import activation_profile as device_profile

    fail(monkeypatch, device_profile, "profile_blocks", torch.OutOfMemoryError(CUDA))
    update = table.round(table.trainer())
    assert update.metrics["memory_shrinks"] == 0
    assert len(calls) == 3
    assert table.heard.said("out of memory while evaluating; 2 sequences")
    assert table.heard.said("out of memory in the profile; 2 sequences")
    for name in ("held_out_loss_before", "held_out_loss_after"):
        assert update.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-5)


def test_after_a_failure_the_load_stays_down_until_the_budget_grows(rig, monkeypatch):
    table = rig(options={"exploration": 0.0})
    budget = {"now": 8 << 30}
    measure = lambda: MemoryBudget(MemoryKind.CPU, budget["now"], None, (), "test")  # noqa: E731
    trainer = table.trainer(measure)
    fail(monkeypatch, steps_module, "batch_loss", RuntimeError(CUDA))
    table.round(trainer)
    down = trainer.planner.step_plan
    table.round(trainer, 2)
    assert trainer.planner.step_plan == down
    budget["now"] = 9 << 30  # more than a tenth
    table.round(trainer, 3)
    assert trainer.planner.step_plan.rank() > down.rank()
    assert table.heard.said("more than before")


def test_other_errors_are_not_taken_for_memory(rig, monkeypatch):
    table = rig()
    fail(monkeypatch, steps_module, "batch_loss", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        table.round(table.trainer())


def test_a_lost_gpu_ends_the_round_with_what_to_do(rig, monkeypatch):
    table = rig()
    fail(monkeypatch, steps_module, "batch_loss", RuntimeError("CUDA error: unspecified launch failure\nmore"))
    with pytest.raises(DeviceLost, match="stopped answering: CUDA error: unspecified launch failure") as caught:
        table.round(table.trainer())
    assert "dmesg" in caught.value.remedy


def test_a_method_without_exchange_gets_its_own_weights_back(rig, monkeypatch):
    """`local` never returns to the global model: what a failing round spoils comes from the device's own copy."""
    table = rig(method="local")
    trainer = table.trainer()
    first = table.round(trainer)

    def spoil(*args, **kwargs):
        with torch.no_grad():
            for parameter in trainer.model.trainable_parameters():
                parameter.add_(1.0)
        raise torch.OutOfMemoryError(CUDA)

    original = steps_module.batch_loss
    answers = [spoil]
    monkeypatch.setattr(
        steps_module, "batch_loss", lambda *a, **k: answers.pop()(*a, **k) if answers else original(*a, **k)
    )
    second = table.round(trainer, 2)
    assert second.metrics["memory_shrinks"] == 1
    assert second.metrics["held_out_loss_before"] == pytest.approx(first.metrics["held_out_loss_after"], rel=1e-5)


def test_ctrl_c_comes_through_while_the_plan_shrinks(rig, monkeypatch):
    table = rig()
    trainer = table.trainer()

    def ask_to_stop(*args, **kwargs):
        table.heard.stop_in = "train"
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(steps_module, "make_optimizer", fail_first(ask_to_stop, make_optimizer))
    with pytest.raises(StopRequested):
        table.round(trainer)
    assert table.heard.said("out of memory while training")


def fail_first(first, then):
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        return (first if len(calls) == 1 else then)(*args, **kwargs)

    return call


# --- pressure ---------------------------------------------------------------------------------------------------------


class FakeWatch:
    """A `PressureWatch` whose answers are written down: one per question, then None."""

    def __init__(self, *answers, lost=""):
        self.answers, self.told_lost = list(answers), lost
        self.relieved = self.started = 0
        self.on_event = None

    def __enter__(self):
        self.started += 1
        return self

    def __exit__(self, *_):
        pass

    def pressure(self):
        return self.answers.pop(0) if self.answers else None

    def look(self):  # after freed memory was returned to the system
        return self.pressure()

    def relieve(self):
        self.relieved += 1

    def lost(self):
        return self.told_lost


TIGHT = Pressure("available", "the machine has 900 MiB of memory left, 1.2 GiB must stay free")


def test_pressure_takes_a_rung_that_keeps_the_plan_and_goes_on_with_the_next_step(rig):
    table = rig()
    trainer = table.trainer(watch=FakeWatch(TIGHT, TIGHT))
    update = table.round(trainer)
    assert update.metrics["memory_shrinks"] == 1
    assert table.heard.said("900 MiB of memory left", "256 tokens at a time")
    assert table.heard.phases.count("train") == 1  # nothing started again
    assert update.num_tokens == STEPS * 4 * 128
    assert trainer.planner.step_plan.setup.chunked_loss


def test_pressure_seen_before_a_rung_can_have_helped_is_not_taken_for_more(rig):
    watch = FakeWatch(TIGHT, TIGHT, TIGHT, None)
    table = rig()
    update = table.round(table.trainer(watch=watch))
    assert update.metrics["memory_shrinks"] == 1
    assert watch.relieved == 3  # freed memory, a fallback, what was seen before it


def test_pressure_that_freed_memory_relieves_changes_nothing(rig):
    table = rig()
    trainer = table.trainer(watch=FakeWatch(TIGHT, None))
    update = table.round(trainer)
    assert update.metrics["memory_shrinks"] == 0
    assert table.heard.said("900 MiB of memory left", "of freed memory to the system")
    assert not trainer.planner.step_plan.setup.chunked_loss


def test_pressure_that_comes_back_after_freed_memory_was_returned_takes_a_fallback(rig):
    table = rig()
    update = table.round(table.trainer(watch=FakeWatch(TIGHT, None, TIGHT)))
    assert update.metrics["memory_shrinks"] == 1
    assert len(table.heard.said("of freed memory to the system")) == 1


def test_pressure_after_calm_steps_returns_freed_memory_first_again(rig):
    calm = [None] * memory_guard.CALM_STEPS
    table = rig(local_steps=len(calm) + 3)
    update = table.round(table.trainer(watch=FakeWatch(TIGHT, None, *calm, TIGHT, None)))
    assert update.metrics["memory_shrinks"] == 0
    assert len(table.heard.said("of freed memory to the system")) == 2


def test_a_fallback_frees_what_is_missing(rig):
    """Where 40 % of the peak is missing, the plan shrinks once, as far as that takes."""
    table = rig(share=1.0)
    trainer = table.trainer()
    table.round(trainer)
    need = trainer.planner.needs_bytes
    missing = int(0.4 * need)
    tight = dataclasses.replace(TIGHT, missing_bytes=missing)
    other = table.trainer(name="other", watch=FakeWatch(tight, tight))
    update = table.round(other)
    assert update.metrics["memory_shrinks"] == 1
    assert other.planner.needs_bytes <= 1.1 * need - missing  # other draws, another measured step


def test_pressure_that_lasts_goes_down_to_fewer_experts_and_keeps_the_finished_steps(rig):
    # Freed memory, then every second one counts: chunks, checkpointing, streaming, 64, then experts, after nine steps.
    watch = FakeWatch(*[TIGHT] * 10)
    table = rig(local_steps=12)
    trainer = table.trainer(watch=watch)
    update = table.round(trainer)
    assert update.metrics["memory_shrinks"] == 5
    step_plan = trainer.planner.step_plan
    assert step_plan.trainable < step_plan.resident == 32
    assert step_plan.setup.streamed_layers
    assert table.heard.phases.count("train") == 3  # again once experts are streamed, and once fewer train
    assert watch.started == 3
    assert table.heard.advanced["train"] == 12  # no step was taken twice
    assert table.heard.phases.count("evaluate") == 2  # what is computed with has not changed
    assert len(table.sent_experts()) == step_plan.trainable - not_sent(update)
    assert update.num_tokens == 4 * (5 * 128 + 7 * 64)
    stepped = {(report.layer, report.expert): report.steps for report in update.experts if report.steps}
    assert len(stepped) <= step_plan.trainable
    assert max(stepped.values()) == 12
    assert not (table.folder / "me" / FINISHED_FOLDER).exists()


def test_an_expert_that_still_trains_goes_on_from_its_finished_steps(rig):
    """Trainable experts have the weights after the finished steps, frozen ones those that the round began with."""
    table = rig(method="fedavg", share=1.0)
    trainer = table.trainer()
    table.round(trainer)
    model, units = trainer.model, {unit.key: unit for unit in table.reader.manifest().units}
    trained = {spec.key: {n: t.clone() for n, t in values.items()} for spec, values in model.trained_units()}
    finished = FinishedSteps.save(model, units, None, table.folder)
    roles = tuple(np.where(np.arange(16) < 4, 2, 1).astype(np.int8) for _ in range(4))
    plan = ExpertPlan(roles)
    source = FrameSource(units.values(), table.paths)
    model.apply_plan(plan, source, train_scope(table.reader.run.training))
    finished.restore(model, units, plan)
    for spec, values in model.trained_units():
        assert all(torch.equal(values[name], trained[spec.key][name]) for name in values), spec.key
    bank = model.layers[0].experts.edgefed_bank
    frozen = bank.tensors(bank.slot(8))
    assert all(torch.equal(frozen[name], value) for name, value in source.read(model.layers[0].expert_key(8)).items())


def test_a_gpu_that_the_watch_sees_lost_ends_the_round(rig):
    table = rig()
    with pytest.raises(DeviceLost, match="GPU is lost in the middle of a round"):
        table.round(table.trainer(watch=FakeWatch(lost="GPU is lost")))


def test_with_nothing_left_it_waits_for_others_and_then_refuses():
    heard = Heard()
    heard.phase("train")
    watch = FakeWatch(TIGHT, TIGHT, TIGHT, TIGHT, None)
    guard = MemoryGuard(lambda missing: None, heard, "cpu", watch, patience_s=10, poll_s=0.01)
    assert guard.reconsider() is None
    assert heard.said("nothing is left to give up; waiting")

    class Always(FakeWatch):
        def pressure(self):
            return TIGHT

    with pytest.raises(OutOfMemory, match="900 MiB of memory left.* with the smallest plan"):
        MemoryGuard(lambda missing: None, heard, "cpu", Always(), patience_s=0.02, poll_s=0.01).reconsider()
    heard.stop_in = "train"
    with pytest.raises(StopRequested):
        MemoryGuard(lambda missing: None, heard, "cpu", Always(), patience_s=10, poll_s=0.01).reconsider()


def test_shrinking_has_an_end_whatever_the_ladder_says(monkeypatch):
    monkeypatch.setattr(memory_guard, "MAX_SHRINKS", 3)
    from edgefed.costs.fallbacks import Fallback
    from edgefed.costs.memory import StepSetup
    from edgefed.costs.step_setup import StepPlan

    fallback = Fallback("chunked loss", StepPlan(StepSetup(1, 32), 4, 4), 1, "again and again", True)
    guard = MemoryGuard(lambda missing: (fallback, None), Heard(), "cpu")
    for _ in range(3):
        guard.ran_out("training", "text")
    with pytest.raises(OutOfMemory, match="nothing is left"):
        guard.ran_out("training", "text")


# --- the budget, measured again before each round ---------------------------------------------------------------------


def budget_of(size_bytes, origin="test"):
    return MemoryBudget(MemoryKind.CPU, size_bytes, None, (), origin)


def test_a_smaller_budget_shrinks_the_next_round_and_growth_waits_for_a_tenth(rig):
    table = rig(options={"exploration": 0.0}, share=1.0)
    memory = GivenMemory(64 << 30)
    trainer = table.trainer(memory)
    planner = trainer.planner
    table.round(trainer)
    assert (planner.step_plan.resident, planner.step_plan.trainable) == (64, 64)
    process, need = planner.correction.process_bytes, planner.needs_bytes

    memory.now = process + int(0.6 * need)
    table.fetched.clear()
    update = table.round(trainer, 2)
    shrunk = planner.step_plan
    assert table.heard.said("less than before", "experts resident")
    assert planner.needs_bytes <= 0.6 * need
    assert update.metrics["memory_shrinks"] == 0  # planned, not suffered
    assert not {item.key for item in table.fetched if getattr(item, "kind", "") == "expert"} - {
        unit.key for unit in table.reader.manifest().units
    }
    memory.now = process + int(0.62 * need)
    table.heard.messages.clear()
    table.round(trainer, 3)
    assert planner.step_plan == shrunk
    assert not table.heard.said("than before")
    memory.now = process + int(1.3 * need)
    table.round(trainer, 4)
    assert planner.step_plan.resident == planner.step_plan.trainable == 64
    assert table.heard.said("more than before")
    assert "profile" not in table.heard.phases[table.heard.phases.index("train") :]  # once is enough


def test_the_plan_of_a_tight_budget_is_of_the_methods_best_experts(rig):
    """Freezing and leaving out follow the method's ranking: what is trained is part of what a smaller share draws."""
    table = rig(options={"exploration": 0.0}, share=1.0)
    trainer = table.trainer(lambda: budget_of(64 << 30))
    table.round(trainer)
    method = make_expert_method("hfedmoe", {"exploration": 0.0})
    layout = method_layout(method, trainer.planner.profile, (16,) * 4, RoundContext())
    small = layout(24, 8)
    trained_alone = layout(8, 8)
    held_alone = layout(24, 24)
    for layer in range(4):
        assert set(small.trainable(layer)) == set(trained_alone.trainable(layer))
        assert len(small.trainable(layer))
        assert set(small.resident(layer)) == set(held_alone.trainable(layer))


def test_nothing_fits_is_told_before_any_expert_is_downloaded(rig):
    table = rig()
    trainer = table.trainer(lambda: budget_of(50 * MIB))
    with pytest.raises(BudgetTooSmall, match="one expert in each of the 4 MoE layers needs .* MiB") as caught:
        table.round(trainer)
    assert "more (`memory`" in caught.value.remedy
    assert not [item for item in table.fetched if getattr(item, "kind", "") == "expert"]


def test_a_budget_that_nobody_knows_is_asked_for(rig):
    table = rig()
    trainer = table.trainer(lambda: budget_of(None, "NVML memory: no permission"))
    with pytest.raises(ConfigError, match="NVML memory: no permission") as caught:
        table.round(trainer)
    assert "`memory`" in caught.value.remedy


def test_one_step_of_a_run_is_measured_and_kept_for_later_plans(rig):
    table = rig()
    trainer = table.trainer()
    table.round(trainer)
    correction = trainer.planner.correction
    assert correction is not None
    assert "measured on cpu" in correction.origin
    saved = json.loads((table.folder / "me" / PLAN_FILE).read_text())
    assert saved["correction"] == msgspec.to_builtins(correction)
    again = table.trainer()  # a restart
    table.round(again)
    assert again.planner.correction == correction


def test_a_step_that_other_kernels_took_says_nothing_and_is_measured_again(rig, monkeypatch):
    monkeypatch.setenv("EDGEFED_KERNELS", "reference")
    table = rig()
    table.round(table.trainer())
    saved = json.loads((table.folder / "me" / PLAN_FILE).read_text())
    assert saved["correction"]["kernels"] == "reference"
    saved["correction"]["kernels"] = "native"
    (table.folder / "me" / PLAN_FILE).write_text(json.dumps(saved))
    again = table.trainer()
    table.round(again)
    assert again.planner.correction.kernels == "reference"
    assert again.planner.correction.origin.startswith("one step of")


def test_a_loss_that_cannot_be_chunked_is_planned_without(rig, monkeypatch):
    """The check comes after the plan, when there are experts to run; then another plan is made, of the same budget."""
    table = rig()
    probe = table.trainer(name="probe")
    table.round(probe)
    planner, plan = probe.planner, probe.plan
    correction = msgspec.structs.replace(planner.correction, process_bytes=0)
    counts = [plan.num_slots(layer) for layer in range(4)], [len(plan.trainable(layer)) for layer in range(4)]
    setup = planner.step_plan.setup
    plain, chunked = (
        training_memory(planner.shape, each, *counts, correction).total_bytes
        for each in (setup, dataclasses.replace(setup, chunked_loss=True))
    )
    monkeypatch.setattr("edgefed.trainer.memory_guard.chunking_problem", lambda *args: "it has terms beside it")
    memory = FixedMemory((plain + chunked) // 2)
    trainer = table.trainer(memory, name="probe", folder="other", costs=Corrected(correction))  # the same draws
    update = table.round(trainer)
    assert table.heard.said("cannot be computed in chunks: it has terms beside it")
    setup = trainer.planner.step_plan.setup
    assert not setup.chunked_loss
    assert setup.checkpointing
    assert len(update.experts) == 32
    assert update.metrics["memory_shrinks"] == 0


def test_a_loss_of_the_user_is_never_planned_in_chunks(rig):
    table = rig()
    functions = UserFunctions(loss=lambda logits, labels: logits.square().mean())
    trainer = table.trainer(costs=OnlyWith(checkpointing=True), functions=functions)
    table.round(trainer)
    setup = trainer.planner.step_plan.setup
    assert setup.checkpointing
    assert not setup.chunked_loss


# --- real limits of the operating system ------------------------------------------------------------------------------

LIMITED = """
    import json, resource, sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    import torch
    torch.set_num_threads(1)
    from test_memory_guard import Rig, not_sent
    from edgefed.trainer.ports import FormulaCosts
    table = Rig(Path({folder!r}), share=1.0, batch_size=16, sequence_length=256, profile_tokens=1024, local_steps=2)
    trainer = table.trainer(costs=FormulaCosts(measures_steps=False))
    say = table.heard.message

    def then_limit(text):
        say(text)
        if text.startswith("plan:") and {room_mib}:
            size = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + {room_mib} * 2**20, resource.RLIM_INFINITY))

    table.heard.message = then_limit
    update = table.round(trainer)
    step_plan = trainer.planner.step_plan
    print(json.dumps(dict(
        shrinks=update.metrics["memory_shrinks"], loss=update.metrics["train_loss"],
        held=trainer.model.plan.num_resident, trained=trainer.model.plan.num_trainable,
        chunked=step_plan.setup.chunked_loss, checkpointing=step_plan.setup.checkpointing,
        length=step_plan.setup.sequence_length, messages=table.heard.messages, sent=len(table.sent_experts()),
        not_sent=not_sent(update), experts=len(update.experts))))
"""


def run_limited(folder: Path, room_mib: int) -> dict:
    folder.mkdir()
    code = textwrap.dedent(LIMITED).format(here=str(Path(__file__).parent), folder=str(folder), room_mib=room_mib)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS bounds memory on Linux")
def test_a_round_under_a_real_limit_shrinks_until_it_fits(tmp_path):
    """The process may map 230 MiB beside what it has before its experts come: the full plan does not fit into that."""
    found = run_limited(tmp_path / "limited", 230)
    assert found["shrinks"] >= 1, found
    assert any("out of memory while" in text for text in found["messages"])
    assert found["loss"] > 0
    assert found["sent"] == found["trained"] - found["not_sent"] > 0
    assert found["experts"] == found["held"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_round_on_a_gpu_with_a_real_limit_shrinks_until_it_fits(rig):
    table = rig(share=1.0, batch_size=64, sequence_length=256)
    trainer = table.trainer(device="cuda:0")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(400 * MIB / total)
    try:
        update = table.round(trainer)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert update.metrics["memory_shrinks"] >= 1
    assert table.heard.said("out of memory while")
