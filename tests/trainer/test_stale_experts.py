"""Experts that a device does not train, taken as it has them: which ones, for how long, and what is then downloaded."""

from __future__ import annotations

import hashlib
import json

import msgspec
import numpy as np
import pytest
from device_bench import trainer_of

from edgefed.errors import NotFound
from edgefed.expert_records import ExpertPlan, Role
from edgefed.progress import NullProgress
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, ExpertAssignment, UnitInfo
from edgefed.trainer.placement import COPIES_FILE, StaleExperts, with_newest_trainable
from edgefed.trainer.saved_plan import PLAN_FILE

LAYERS, EXPERTS = 2, 8


def units_of(server_round: int, *, kind: str = "expert") -> dict[str, UnitInfo]:
    """Every unit is new in every round."""
    found = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            key = f"{layer}.{expert}"
            sha256 = hashlib.sha256(f"{key} {server_round}".encode()).hexdigest()
            found[key] = UnitInfo(
                key=key, kind=kind, layer=layer, expert=expert, trainable=True, sha256=sha256,
                size_bytes=100 + server_round,
            )  # fmt: skip
    return found


def nothing(units):
    list(units)


def version(units, key, rounds=range(1, 20)):
    return next(n for n in rounds if units_of(n)[key].sha256 == units[key].sha256)


def test_each_expert_has_its_turn_and_none_gets_too_old(tmp_path):
    copies, ages = StaleExperts(tmp_path, "run"), []
    for server_round in range(1, 10):
        newest = units_of(server_round)
        used = copies.view(newest, server_round, 4, nothing)
        copies.keep(used, newest, server_round)
        copies = StaleExperts(tmp_path, "run")  # nothing depends on the process
        ages.append([server_round - version(used, key) for key in newest])
        assert all(unit.size_bytes == 100 + version(used, key) for key, unit in used.items())
    assert ages[0] == [0] * 16, "what is new to a device it takes as it is"
    assert {max(row) for row in ages[3:]} == {3}
    assert {row.count(0) for row in ages[1:]} == {4}, "a quarter each round"


def test_after_an_absence_nothing_is_older_than_allowed(tmp_path):
    copies = StaleExperts(tmp_path, "run")
    copies.keep(units_of(1), units_of(1), 1)
    assert copies.view(units_of(4), 4, 4, nothing) != units_of(4)
    assert copies.view(units_of(5), 5, 4, nothing) == units_of(5)


def test_an_expert_that_did_not_change_does_not_age(tmp_path):
    copies, first = StaleExperts(tmp_path, "run"), units_of(1)
    for server_round in (1, 2, 3, 4, 5):
        assert copies.view(first, server_round, 2, nothing) == first
        copies.keep(first, first, server_round)
    newest = units_of(6)
    used = copies.view(newest, 6, 2, nothing)
    assert [used[key] == newest[key] for key in ("0.0", "0.1")] == [True, False]


def test_what_is_not_an_expert_is_always_the_newest(tmp_path):
    copies, dense = StaleExperts(tmp_path, "run"), units_of(1, kind="dense")
    copies.keep(dense, dense, 1)
    newest = units_of(2, kind="dense")
    assert copies.view(newest, 2, 4, nothing) == newest


def test_copies_of_another_run_and_broken_ones_are_not_used(tmp_path, caplog):
    StaleExperts(tmp_path, "run").keep(units_of(1), units_of(1), 1)
    assert StaleExperts(tmp_path, "another").view(units_of(2), 2, 4, nothing) == units_of(2)
    assert not caplog.records
    for broken in ("{", "[]", '{"run_id": "run"}', '{"run_id": "run", "copies": {"0.0": [1]}}'):
        (tmp_path / COPIES_FILE).write_text(broken)
        assert StaleExperts(tmp_path, "run").view(units_of(2), 2, 4, nothing) == units_of(2)
    assert len(caplog.records) == 4
    assert "downloaded again" in caplog.text


def test_a_copy_that_is_nowhere_is_not_waited_for(tmp_path):
    copies = StaleExperts(tmp_path, "run")
    copies.keep(units_of(1), units_of(1), 1)

    def gone(units):
        raise NotFound(f"{len(list(units))} blobs")

    assert copies.view(units_of(2), 2, 4, gone) == units_of(2)


def test_what_learns_is_the_newest():
    plan = ExpertPlan.of((EXPERTS,) * LAYERS, [[3], [5]])
    used = with_newest_trainable(units_of(1), units_of(2), plan)
    trainable = {f"{layer}.{expert}" for layer in range(LAYERS) for expert in plan.trainable(layer)}
    assert len(trainable) == 2
    assert {key for key in used if version(used, key) == 2} == trainable


def values(path) -> dict[str, np.ndarray]:
    """The tensors of a frame, in float32."""
    header = frames.read_header(path)
    return {name: frames.widen(frames.map_tensor(path, entry), entry.info.dtype) for name, entry in header.items()}


@pytest.fixture
def elsewhere(tmp_path):
    """Others have trained: a manifest in which a weight of each expert's tensors differs, and where the files are."""

    def make(manifest, paths):
        units, files = [], {}
        for unit in manifest.units:
            if unit.kind == "expert":
                tensors, path = {}, tmp_path / f"{unit.layer}-{unit.expert}-{manifest.server_round}"
                for info in unit.tensors:
                    value = values(paths[unit.sha256])[info.name].copy()
                    value.flat[0] += 0.25
                    tensors[info.name] = (info.dtype, frames.narrow(value, info.dtype))
                sha256, size_bytes = frames.write_frame(path, tensors)
                files[sha256] = path
                unit = msgspec.structs.replace(unit, sha256=sha256, size_bytes=size_bytes)
            units.append(unit)
        return msgspec.structs.replace(manifest, units=tuple(units)), files

    return make


def test_a_device_downloads_what_it_trains_and_a_share_of_the_rest(bench, data, tmp_path, elsewhere):
    table = bench("flux", {"probes": 0, "pace": "own", "refresh_rounds": 4}, rounds=9)
    trainer = trainer_of(data, tmp_path, share=0.5)
    manifest, update = table.round(trainer, tmp_path / "update")
    everything = table.reader.paths(manifest)
    here = set(everything) & update.keep
    wanted = ExpertAssignment(tune=tuple((layer, e) for layer in range(4) for e in (3, 9)), explore=((0, 5),))

    def fetch(items):
        items = tuple(items)
        here.update(item.sha256 for item in items)
        return {item.sha256: everything[item.sha256] for item in items}

    def next_round(server_round):
        nonlocal manifest, here
        manifest, files = elsewhere(msgspec.structs.replace(manifest, server_round=server_round), everything)
        everything.update(files)
        before = set(here)
        assignment = Assignment(server_round=server_round, deadline_s=None, seed=7, experts=wanted)
        update = trainer.train_round(table.reader.run, manifest, assignment, fetch, NullProgress(), tmp_path / "update")
        here &= update.keep
        trainer.between_rounds(fetch, NullProgress())
        new = [unit for unit in manifest.units if unit.sha256 in here - before]
        return {(unit.layer, unit.expert) for unit in new}

    trainable = set(wanted.tune)
    for server_round in (2, 3):
        turn = {(layer, e) for layer in range(4) for e in range(16) if (layer + e + server_round) % 4 == 0}
        assert len(turn) == 16
        assert next_round(server_round) == turn | trainable, "not one expert more, for the profile or for merging"
    plan = ExpertPlan.from_dict(json.loads((tmp_path / "a" / PLAN_FILE).read_text())["plan"])
    assert all((roles != Role.ABSENT).all() for roles in plan.roles), "all others are merged, which needs them all"
    (unit,) = (unit for unit in manifest.units if (unit.kind, unit.layer, unit.expert) == ("expert", 0, 3))
    begun, sent = values(everything[unit.sha256]), values(tmp_path / "update")
    for info in unit.tensors:
        learnt = sent[frames.update_name(unit.key, info.name)]
        np.testing.assert_allclose(learnt, begun[info.name], atol=0.02, err_msg="it learns from the newest")
    assert len(next_round(7)) == 64, "after an absence of four rounds everything is new"
