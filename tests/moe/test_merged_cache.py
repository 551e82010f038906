"""Cached merged experts: the same values without reading members; rebuilt when an input changes."""

from __future__ import annotations

import os

import pytest
import torch

from edgefed.errors import CheckpointError
from edgefed.expert_records import ExpertPlan, MergedGroup, Role
from edgefed.moe.merged_cache import MergedCache
from edgefed.moe.merging.alignment import neuron_aligner
from edgefed.moe.units import LORA_SUFFIX, MemorySource, TrainScope

GROUPS = (MergedGroup((2, 3, 4), (0.5, 0.25, 0.25)), MergedGroup((5, 6, 7), (0.2, 0.3, 0.5)))


def merged_plan(groups=GROUPS):
    roles = torch.full((8,), int(Role.MERGED), dtype=torch.int8)
    roles[:2] = int(Role.TRAINABLE)
    return ExpertPlan((roles.numpy(), roles.numpy()), (groups, groups))


class CountingSource(MemorySource):
    def __init__(self, units):
        super().__init__(units)
        self.members = []

    def read(self, key):
        if ".experts." in key and int(key.removesuffix(LORA_SUFFIX).rsplit(".", 1)[1]) >= 2:
            self.members.append(key)
        return super().read(key)


class Device:
    """A model whose merged experts are cached in ``folder``; `apply` returns the members that were read."""

    def __init__(self, toy, folder, scope=None):
        self.scope = scope or TrainScope()
        self.units = toy.units(self.scope)
        self.model, _ = toy.device(self.units)
        self.folder, self.cache = folder, MergedCache(folder)
        self.hashes = {key: f"first {key}" for key in self.units}

    def apply(self, plan=None, **options):
        self.cache.hashes = self.hashes
        self.source = CountingSource(self.units)
        self.model.apply_plan(plan or merged_plan(), self.source, self.scope, merged=self.cache, **options)
        self.cache.trim()
        return self.source.members

    def values(self):
        banks = [self.model.bank(layer) for layer in range(2)]
        return [t.clone() for bank in banks for slot in (2, 3) for t in bank.tensors(slot).values()]

    def files(self):
        return {path.name for path in self.folder.iterdir()}


def same(first, second):
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scope", [TrainScope(), TrainScope(experts="lora")], ids=["full", "lora"])
def test_a_second_round_reads_no_member(olmoe, tmp_path, scope):
    device = Device(olmoe, tmp_path / "merged", scope)
    assert len(device.apply()) == 2 * 6 * (2 if scope.experts == "lora" else 1)
    merged, files = device.values(), device.files()
    assert len(files) == 4
    assert device.apply() == []
    assert same(device.values(), merged)
    assert device.files() == files
    restarted = Device(olmoe, tmp_path / "merged", scope)
    assert restarted.apply() == []
    assert same(restarted.values(), merged)


def test_one_changed_member_merges_only_its_group_again(olmoe, tmp_path):
    device = Device(olmoe, tmp_path / "merged")
    device.apply()
    before = device.values()
    key = device.model.layers[0].expert_key(3)
    device.units[key] = {name: tensor + 1 for name, tensor in device.units[key].items()}
    device.hashes[key] = "second"
    assert set(device.apply()) == {device.model.layers[0].expert_key(expert) for expert in (2, 3, 4)}
    after = device.values()
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True] * (len(changed) // 4) + [False] * (len(changed) // 4 * 3)
    assert len(device.files()) == 4, "files of groups outside the plan are deleted"


def test_an_adapter_weights_and_alignment_are_part_of_the_name(olmoe, tmp_path):
    scope = TrainScope(experts="lora")
    device = Device(olmoe, tmp_path / "merged", scope)
    device.apply()
    device.hashes[device.model.layers[1].expert_key(7) + LORA_SUFFIX] = "second"
    assert len(device.apply()) == 3 * 2
    other = (MergedGroup((2, 3, 4), (0.25, 0.5, 0.25)), GROUPS[1])
    assert len(device.apply(merged_plan(other))) == 2 * 3 * 2
    assert len(device.apply(merged_plan(other), align=neuron_aligner(device.model.layers))) == 2 * 6 * 2
    device.scope = TrainScope(experts="lora", lora_alpha=99.0)
    assert len(device.apply(merged_plan(other))) == 2 * 6 * 2


def test_cached_experts_serve_any_storage(olmoe, tmp_path):
    device = Device(olmoe, tmp_path / "merged")
    device.apply(storage="nf4")
    stacks = {name: stack.packed.clone() for name, stack in device.model.bank(0).stacks().items()}
    assert device.apply(storage="nf4") == []
    found = device.model.bank(0).stacks()
    assert stacks
    assert all(torch.equal(found[name].packed, packed) for name, packed in stacks.items())
    assert device.apply() == []


def test_a_broken_file_is_rebuilt_and_a_leftover_is_deleted(olmoe, tmp_path):
    device = Device(olmoe, tmp_path / "merged")
    device.apply()
    before = device.values()
    broken = sorted(device.folder.iterdir())[0]
    broken.write_bytes(b"half a file")
    (device.folder / "1.tmp").write_bytes(b"of a process that was killed")
    assert len(device.apply()) == 3
    assert same(device.values(), before)
    assert len(device.files()) == 4
    assert "1.tmp" not in device.files()
    assert device.apply() == []


def test_a_full_disk_is_reported_and_the_round_continues(olmoe, tmp_path, monkeypatch, caplog):
    def no_room(source, target):
        raise OSError(28, "No space left on device")

    device = Device(olmoe, tmp_path / "merged")
    monkeypatch.setattr(os, "replace", no_room)
    device.apply()
    assert "cannot cache a merged expert" in caplog.text
    assert "No space left" in caplog.text
    assert not device.files()


def test_an_unreadable_member_is_an_error_and_not_an_empty_expert(olmoe, tmp_path):
    device = Device(olmoe, tmp_path / "merged")
    del device.units[device.model.layers[0].expert_key(3)]
    with pytest.raises(CheckpointError):
        device.apply()
