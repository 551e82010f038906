"""Offloaded experts compute the same as resident ones, bit for bit, and exist only in their files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from edgefed.costs.memory import StepSetup
from edgefed.errors import DiskFull, StorageError
from edgefed.expert_records import ExpertPlan
from edgefed.moe import offloading
from edgefed.moe.accounting import expert_memory
from edgefed.moe.model import MoeModel
from edgefed.moe.offloading import OffloadSpace, offloaded
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import take_step

CPU = torch.device("cpu")
TRAINABLE, FROZEN = [[0, 5, 6], [3, 4]], [[2], [7]]


def trained(toy, scope, space, kernels="reference", schedule=None, steps=3, max_norm=0.5, checkpointing=False):
    """(model, optimizer, losses) after some steps on the plan above."""
    units = toy.units(scope)
    model, source = toy.device(units)
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, TRAINABLE, FROZEN), source, scope, offload=space)
    model.module.train()
    model.set_schedule(schedule)
    parameters = model.trainable_parameters()
    optimizer = make_optimizer(parameters, "adamw", learning_rate=0.05, weight_decay=0.1)
    setup = StepSetup(2, 10, "float32", experts=scope.experts, checkpointing=checkpointing, kernels=kernels)
    losses = []
    for _ in range(steps):
        loss, _ = take_step(
            model, optimizer, parameters, toy.input_ids, toy.input_ids, setup=setup, max_grad_norm=max_norm
        )
        losses.append(loss)
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer, losses


def values(model):
    return {(spec.key, name): value.clone() for spec, unit in model.trained_units() for name, value in unit.items()}


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("place", ["files", "files, copied", "host memory, copied"])
def test_training_is_bit_for_bit_that_of_resident_experts(toys, tmp_path, monkeypatch, place, mode, kernels):
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    toy, scope = toys("olmoe"), TrainScope(experts=mode)
    space = OffloadSpace(CPU, tmp_path if "files" in place else None, copies="copied" in place)
    expected, _, losses = trained(toy, scope, None)
    found, optimizer, own_losses = trained(toy, scope, space)
    assert own_losses == losses
    assert losses[-1] < losses[0]
    first, second = values(expected), values(found)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert found.trained_tokens() == expected.trained_tokens()
    if "files" in place:
        experts = [p for p in found.trainable_parameters() if offloaded(p) is not None]
        assert experts
        assert all(p.untyped_storage().filename for p in experts)
        moments = [
            optimizer.state[p][name] for p in experts if p in optimizer.state for name in ("exp_avg", "exp_avg_sq")
        ]
        assert moments
        assert all(moment.untyped_storage().filename for moment in moments)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mixtral"])
def test_biases_transposed_matrices_and_checkpointing(toys, tmp_path, family):
    """GPT-OSS has biases and transposed matrices; checkpointing runs a layer again in its backward pass."""
    toy = toys(family)
    expected, _, _ = trained(toy, TrainScope(), None, checkpointing=True)
    found, _, _ = trained(toy, TrainScope(), OffloadSpace(CPU, tmp_path), checkpointing=True)
    first, second = values(expected), values(found)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_expert_outside_the_schedule_keeps_its_weights_and_has_no_moments(toys, tmp_path):
    toy, schedule = toys("olmoe"), lambda layer, record: [TRAINABLE[layer][0]]
    expected, _, _ = trained(toy, TrainScope(), None, schedule=schedule)
    found, optimizer, _ = trained(toy, TrainScope(), OffloadSpace(CPU, tmp_path), schedule=schedule)
    first, second = values(expected), values(found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    with_state = {id(p) for p in optimizer.state}
    for layer, bank in enumerate(found.bank(layer) for layer in range(2)):
        own = {
            bank.experts[slot]
            for slot in range(bank.num_trainable)
            if id(bank.tensors(slot)["down_proj"]) in with_state
        }
        assert own <= {TRAINABLE[layer][0]}


def test_offloaded_tensors_count_as_no_memory_and_leave_no_file(toys, tmp_path):
    model, optimizer, _ = trained(toys("olmoe"), TrainScope(), OffloadSpace(CPU, tmp_path))
    assert model.offloads
    assert expert_memory(model.layers, optimizer).total_bytes == 0
    assert model.memory_bytes()["experts"] == 0 < model.memory_bytes()["dense"]
    assert not list(tmp_path.iterdir())  # the files have no name, though they are in use
    model.drop_experts()
    assert not model.offloads


def test_released_tensors_keep_their_values_and_casts_skip_them(tmp_path):
    space = OffloadSpace(CPU, tmp_path)
    tensor = space.empty((300, 1000), torch.bfloat16)
    tensor.copy_(torch.arange(300_000).view(300, 1000) % 251)
    before = tensor.clone()
    offloading.release((tensor, tensor[17], torch.ones(3)))
    assert torch.equal(tensor, before)
    assert space.empty((0, 4), torch.float32).shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_tensors_leave_the_process(tmp_path):
    def resident_file_bytes():
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem"))) * 1024

    size = 64 << 20
    tensor = OffloadSpace(CPU, tmp_path).empty((size,), torch.uint8)
    before = resident_file_bytes()
    tensor.fill_(7)
    assert resident_file_bytes() - before > size * 0.9
    offloading.release((tensor,))
    assert resident_file_bytes() - before < size * 0.1
    assert int(tensor[-1]) == 7


def test_leftovers_of_a_system_that_cannot_unlink_are_removed(tmp_path):
    (tmp_path / "experts-old").write_bytes(b"x")
    (tmp_path / "else").write_bytes(b"x")
    OffloadSpace(CPU, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["else"]


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    def no_room(handle, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room, raising=False)
    with pytest.raises(DiskFull, match="No space left"):
        OffloadSpace(CPU, tmp_path).empty((4,), torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        OffloadSpace(CPU, tmp_path / "file" / "offloaded")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("place", ["files", "host memory"])
def test_on_a_gpu_only_one_layer_is_copied_at_a_time(toys, tmp_path, place):
    toy, scope, device = toys("olmoe"), TrainScope(), torch.device("cuda")
    units = toy.units(scope)

    def losses(space):
        model = MoeModel.skeleton(toy.folder, device=device)
        for spec in model.unit_infos():
            if spec.kind != "expert":
                model.load_unit(spec.key, units[spec.key])
        plan = ExpertPlan.of(model.experts_per_layer, TRAINABLE, FROZEN)
        model.apply_plan(plan, MemorySource(units), scope, offload=space)
        model.module.train()
        parameters = model.trainable_parameters()
        optimizer = make_optimizer(parameters, "adamw", learning_rate=0.05, weight_decay=0.1)
        setup = StepSetup(2, 10, "float32", checkpointing=True, device="cuda")
        found = []
        for _ in range(3):
            loss, _ = take_step(
                model, optimizer, parameters, toy.input_ids, toy.input_ids, setup=setup, max_grad_norm=0.5
            )
            found.append(loss)
            optimizer.zero_grad(set_to_none=True)
        experts = [p for p in parameters if offloaded(p) is not None]
        return found, {p.device.type for p in experts}, {optimizer.state[p]["exp_avg"].device.type for p in experts}

    expected, _, _ = losses(None)
    found, weights, moments = losses(OffloadSpace(device, tmp_path if place == "files" else None))
    assert found == pytest.approx(expected, rel=1e-4)
    assert weights == moments == {"cpu"}
