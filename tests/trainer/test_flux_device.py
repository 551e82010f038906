"""Flux on one device with a real model: roles, merged experts, utilities, and the profile made while it waits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from device_bench import trainer_of

from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, Role
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.merging.plan import num_merge_slots, with_placeholder_groups, without_groups
from edgefed.progress import NullProgress
from edgefed.protocol import frames
from edgefed.protocol.messages import ExpertAssignment
from edgefed.trainer.placement import MERGED_FOLDER, ExpertPlacer
from edgefed.trainer.saved_plan import PLAN_FILE

OPTIONS = {"probes": 1, "eps_start": 0.5, "pace": "own"}


def saved(folder, name="a"):
    return json.loads((folder / name / PLAN_FILE).read_text())


class Sayings(NullProgress):
    def __init__(self):
        self.phases = []

    def phase(self, name, total=None, unit="B"):
        self.phases.append(name)


def test_a_round_trains_explores_merges_and_reports(bench, data, tmp_path):
    table, trainer = bench("flux", OPTIONS, rounds=3), trainer_of(data, tmp_path, share=0.5)
    manifest, update = table.round(trainer, tmp_path / "update")
    plan = ExpertPlan.from_dict(saved(tmp_path)["plan"])
    assert plan.num_resident == 32, "half of 64 experts fit"
    merged = sum(len(plan.groups(layer)) for layer in range(4))
    assert merged == 16
    assert plan.num_trainable == 8
    assert all((roles != Role.ABSENT).all() for roles in plan.roles), "whoever is not here as itself is merged"
    explored = {(layer, int(e)) for layer in range(4) for e in plan.frozen(layer)}
    assert len(explored) == 8

    trainable_keys = {
        u.key for u in manifest.units if u.kind == "expert" and plan.roles[u.layer][u.expert] == Role.TRAINABLE
    }
    sent = {name.rpartition("|")[0] for name in frames.read_header(tmp_path / "update")}
    assert {key for key in sent if ".experts." in key} == trainable_keys, "merged and explored experts stay here"

    survey = update.survey
    assert survey.tune_slots == 16
    known = {(layer, e) for layer, row in enumerate(survey.utility) for e, u in enumerate(row) if u is not None}
    trained = {(r.layer, r.expert) for r in update.experts if r.steps}
    assert trained | explored <= known, "utilities of what was trained and explored, of no other expert"
    assert known <= trained | explored | {(r.layer, r.expert) for r in update.experts}
    assert update.metrics["probe_forwards"] <= 1 + 2 * len(explored)
    profile = ActivationProfile.from_dict(saved(tmp_path)["profile"])
    np.testing.assert_allclose(survey.frequency[0], profile.layers[0].frequency)
    assert profile.layers[0].attention_sum is not None, "groups weigh by the attention that tokens receive"


def test_the_aggregators_assignment_is_followed(bench, data, tmp_path):
    table, trainer = bench("flux", OPTIONS, rounds=3), trainer_of(data, tmp_path, share=0.5)
    table.round(trainer, tmp_path / "update")
    tune = tuple((layer, e) for layer in range(4) for e in (3, 9))
    wanted = ExpertAssignment(tune=tune, explore=tuple((layer, 5) for layer in range(4)))
    _, update = table.round(trainer, tmp_path / "update", server_round=2, experts=wanted)
    plan = ExpertPlan.from_dict(saved(tmp_path)["plan"])
    assert [plan.trainable(layer).tolist() for layer in range(4)] == [[3, 9]] * 4
    assert [plan.frozen(layer).tolist() for layer in range(4)] == [[5]] * 4
    assert {(r.layer, r.expert) for r in update.experts if r.steps} <= set(tune)
    nowhere = ExpertAssignment(tune=((0, 16),), explore=())
    with pytest.raises(ConfigError, match="expert 16 of layer 0 does not exist"):
        table.round(trainer, tmp_path / "update", server_round=3, experts=nowhere)


def test_the_next_profile_is_made_while_waiting_and_not_in_the_round(bench, data, tmp_path):
    table, trainer = bench("flux", OPTIONS, rounds=3), trainer_of(data, tmp_path, share=0.5)
    table.round(trainer, tmp_path / "update")
    assert saved(tmp_path)["profile_round"] == 1
    waiting, training = Sayings(), Sayings()
    trainer.between_rounds(table.fetch, waiting)
    assert "profile" in waiting.phases
    profile = saved(tmp_path)["profile"]
    table.round(trainer, tmp_path / "update", server_round=2)
    assert saved(tmp_path)["profile"] == profile, "the profile of round 1 serves round 2"
    trainer.between_rounds(table.fetch, training)
    assert saved(tmp_path)["profile_round"] == 2

    away = trainer_of(data, tmp_path, share=0.5)  # a restart that misses rounds
    table.round(away, tmp_path / "update", server_round=5)
    assert saved(tmp_path)["profile_round"] == 5, "a profile older than one round is made anew"


def test_a_restart_makes_the_same_update(bench, data, tmp_path):
    updates = []
    for name in ("once", "again"):
        table, trainer = bench("flux", OPTIONS, rounds=3), trainer_of(data, tmp_path / name, share=0.5)
        table.round(trainer, tmp_path / name / "update")
        trainer.between_rounds(table.fetch, NullProgress())
        if name == "again":
            trainer = trainer_of(data, tmp_path / name, share=0.5)
        table.round(trainer, tmp_path / name / "update", server_round=2)
        updates.append((tmp_path / name / "update").read_bytes())
    assert updates[0] == updates[1]


def test_a_device_with_room_for_all_merges_nothing(bench, data, tmp_path):
    _, update = bench("flux", OPTIONS).round(trainer_of(data, tmp_path), tmp_path / "update")
    plan = ExpertPlan.from_dict(saved(tmp_path)["plan"])
    assert plan == ExpertPlan.full((16,) * 4)
    assert update.survey.tune_slots == 64
    assert update.metrics["probe_forwards"] == 0


def test_neuron_alignment_and_frequency_weights_are_options(bench, data, tmp_path):
    options = {**OPTIONS, "probes": 0, "align": True, "merge_weights": "frequency", "merge_sizes": "one"}
    table = bench("flux", options, local_steps=1)
    _, update = table.round(trainer_of(data, tmp_path, share=0.5), tmp_path / "update")
    plan = ExpertPlan.from_dict(saved(tmp_path)["plan"])
    assert [len(plan.groups(layer)) for layer in range(4)] == [1] * 4
    assert ActivationProfile.from_dict(saved(tmp_path)["profile"]).layers[0].attention_sum is None
    assert update.metrics["held_out_loss_after"] < update.metrics["held_out_loss_before"] + 0.5


def test_stand_in_groups_have_the_right_number(bench, data, tmp_path):
    bench("flux", OPTIONS).round(trainer_of(data, tmp_path, share=0.5), tmp_path / "update")
    record = ActivationProfile.from_dict(saved(tmp_path)["profile"])
    plan = ExpertPlan.of((16,) * 4, [range(4)] * 4)
    assert num_merge_slots(plan, 16) == 0
    assert num_merge_slots(plan, 19) == 0
    assert num_merge_slots(plan, 20) == 4
    assert num_merge_slots(ExpertPlan.full((16,) * 4), 80) == 0
    filled = with_placeholder_groups(plan, 24, record, "adaptive")
    assert filled.num_resident == 24
    assert without_groups(filled) == plan
    assert with_placeholder_groups(plan, 18, record, "adaptive") == plan


def test_merged_experts_are_kept_from_round_to_round_and_across_a_restart(bench, data, tmp_path, monkeypatch):
    """A round reads a member of a group to place it only if the group changed; similarities are another matter."""
    table, trainer = bench("flux", OPTIONS, rounds=4), trainer_of(data, tmp_path, share=0.5)
    reads, placing = [], []
    read, place = FrameSource.read, ExpertPlacer.place
    monkeypatch.setattr(
        FrameSource, "read", lambda self, key: (placing and reads.append(key.removesuffix(":lora")), read(self, key))[1]
    )

    def watched(self, *args):
        placing.append(1)
        place(self, *args)
        placing.clear()

    monkeypatch.setattr(ExpertPlacer, "place", watched)

    def members_read(device, server_round, assigned):
        reads.clear()
        manifest, _ = table.round(device, tmp_path / "update", server_round=server_round, experts=assigned)
        plan = ExpertPlan.from_dict(saved(tmp_path)["plan"])
        merged = {u.key for u in manifest.units if u.kind == "expert" and plan.roles[u.layer][u.expert] == Role.MERGED}
        files = {path.name for path in (tmp_path / "a" / MERGED_FOLDER).iterdir()}
        assert len(files) == sum(len(plan.groups(layer)) for layer in range(4)) == 16
        return len(merged & set(reads)), len(merged), files

    wanted = ExpertAssignment(
        tune=tuple((layer, e) for layer in range(4) for e in (3, 9)),
        explore=tuple((layer, e) for layer in range(4) for e in (4, 5)),
    )
    read_first, merged, files = members_read(trainer, 1, wanted)
    assert 40 < read_first <= merged == 48, "what weighs nothing is not read"
    assert members_read(trainer, 2, wanted) == (0, merged, files)
    assert members_read(trainer_of(data, tmp_path, share=0.5), 3, wanted) == (0, merged, files)
    other = ExpertAssignment(tune=wanted.tune, explore=((0, 7), *wanted.explore[1:]))
    again, _, after = members_read(trainer, 4, other)
    assert 0 < again < merged / 2, "only a changed layer is merged again"
    assert len(files & after) > 8
