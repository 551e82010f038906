"""One device's rounds of `slices` with the packaged model: memory and bytes are in proportion to width."""

from __future__ import annotations

import numpy as np
import pytest
from device_bench import MEMORY_BYTES, trainer_of

from edgefed.methods.registry import make_expert_method
from edgefed.protocol import frames
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE
from edgefed.protocol.slices import UnitSlice
from edgefed.trainer.ports import FixedMemory, FormulaCosts
from edgefed.trainer.saved_plan import load_plan

ALL_NEURONS = 4 * 16 * 96


def sent_slices(path):
    """{unit key: (table entry, rows)} of an update."""
    entries, found = frames.read_header(path), {}
    for name, entry in entries.items():
        key, _, tensor = name.rpartition("|")
        if tensor == NEURON_TABLE:
            rows = np.array(frames.map_tensor(path, entries[f"{key}|{NEURON_INDEX}"]))
            found[key] = entry.info, rows
    return found


def test_an_eighth_of_the_neurons_takes_an_eighth_of_memory_and_upload(bench, data, tmp_path):
    table, part = bench("slices"), tmp_path / "update"
    trainer = trainer_of(data, tmp_path, share=0.125)
    _, sliced = table.round(trainer, part)
    manifest = table.reader.manifest()
    trainable = [unit for unit in manifest.units if unit.trainable]
    experts_bytes = sum(unit.size_bytes for unit in trainable if unit.kind == "expert")
    rest_bytes = sum(unit.size_bytes for unit in trainable if unit.kind != "expert")
    share = sum(int(mask.sum()) for mask in trainer.plan.neurons) / ALL_NEURONS
    assert 0.12 < share <= 0.125
    # weights, gradients and two moments
    assert 0.5 * share * experts_bytes < sliced.metrics["peak_expert_bytes"] <= 1.01 * share * 4 * experts_bytes
    assert part.stat().st_size <= 1.05 * (share * experts_bytes + rest_bytes)
    experts = {(report.layer, report.expert) for report in sliced.experts}
    assert len(experts) > 16, "more experts than whole ones would fit"
    for key, (info, rows) in sent_slices(part).items():
        unit = next(unit for unit in manifest.units if unit.key == key)
        assert rows.tolist() == trainer.plan.neuron_indices(unit.layer, unit.expert).tolist()
        assert info.shape == (len(rows), 3 * 128)
        assert len(rows) % 8 == 0


def test_the_plan_is_kept_and_later_rounds_download_slices(bench, data, tmp_path):
    table = bench("slices")
    table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    profile, before = load_plan(tmp_path / "a")
    assert profile.layers[0].neuron_energy.shape == (16, 96)
    table.fetched.clear()
    _, update = table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update", server_round=2)
    assert load_plan(tmp_path / "a")[1] == before
    experts = [unit for unit in table.reader.manifest().units if unit.kind == "expert"]
    slices = [item for item in table.fetched if isinstance(item, UnitSlice)]
    assert not {unit.sha256 for unit in experts} & {item.sha256 for item in table.fetched}, "no whole expert"
    assert {item.sha256 for item in slices} <= update.keep
    size = sum(item.size_bytes for item in {item.sha256: item for item in slices}.values())
    assert size < 0.27 * sum(unit.size_bytes for unit in experts)


@pytest.mark.parametrize("training", [{"experts": "lora", "lora_rank": 4}, {"experts": "full"}])
def test_training_changes_what_is_sent_and_nothing_else(bench, data, tmp_path, training):
    table = bench("slices", **training)
    trainer = trainer_of(data, tmp_path, share=0.25)
    manifest, update = table.round(trainer, tmp_path / "update")
    blobs = {unit.key: table.paths[unit.sha256] for unit in manifest.units}
    changed = 0
    for key, (info, rows) in sent_slices(tmp_path / "update").items():
        entry = frames.read_header(tmp_path / "update")[f"{key}|{NEURON_TABLE}"]
        sent = frames.map_tensor(tmp_path / "update", entry)
        old = frames.map_tensor(blobs[key], frames.read_header(blobs[key])[NEURON_TABLE])[rows]
        assert info.shape == old.shape
        changed += not np.array_equal(sent, old)
    assert changed == update.metrics["experts_trained"]
    assert update.metrics["held_out_loss_after"] < update.metrics["held_out_loss_before"] + 0.05


def test_too_little_memory_freezes_or_narrows_slices(bench, data, tmp_path):
    table = bench("slices")
    costs = FormulaCosts(measures_steps=False)
    rich = trainer_of(data, tmp_path, name="rich", memory=FixedMemory(MEMORY_BYTES), costs=costs)
    table.round(rich, tmp_path / "update")
    need = rich.planner.needs_bytes
    poor = trainer_of(data, tmp_path, name="poor", memory=FixedMemory(int(0.7 * need)), costs=costs)
    table.round(poor, tmp_path / "update")
    assert poor.planner.needs_bytes <= 0.7 * need
    trained = [mask[poor.plan.trainable(layer)].sum() for layer, mask in enumerate(poor.plan.neurons)]
    assert all(trained)
    assert sum(trained) < ALL_NEURONS
    assert sum(int(mask.sum()) for mask in poor.plan.neurons) > sum(trained) or poor.plan.num_trainable < 64


def test_only_this_method_stores_neurons():
    assert make_expert_method("slices").requirements.neurons
    assert not make_expert_method("hfedmoe").requirements.neurons


def test_a_profile_of_slices_ends_when_their_choice_is_stable(bench, data, tmp_path):
    table = bench("slices", profile_tokens=8192, profile_agreement=0.8, local_steps=1)
    _, update = table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    assert 2048 <= update.metrics["profile_tokens"] < 8192
    assert 0.8 <= update.metrics["profile_agreement"] < 1
    assert load_plan(tmp_path / "a")[0].num_tokens == update.metrics["profile_tokens"]
