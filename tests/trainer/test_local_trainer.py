"""One device's rounds with a real model, without a network: what is fetched, held, trained and sent."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from device_bench import STEPS, OnlyWith, trainer_of

from edgefed.errors import BudgetTooSmall, ConfigError, MalformedMessage, TrainingDiverged
from edgefed.hardware.memory import format_bytes
from edgefed.protocol import frames
from edgefed.protocol.ranks import with_rank
from edgefed.trainer.optimizer_state import trainable_names


def names_in(path):
    return {name.rpartition("|")[0] for name in frames.read_header(path)}


def test_a_quarter_of_the_experts_takes_a_quarter_of_memory_and_bytes(bench, data, tmp_path):
    """The bound that the plan promises: at least 60 % less expert memory, at most 35 % of the upload of FedAvg."""
    full, part = tmp_path / "full", tmp_path / "part"
    _, fedavg = bench("fedavg").round(trainer_of(data, tmp_path, name="f"), full)
    _, hfedmoe = bench("hfedmoe").round(trainer_of(data, tmp_path, share=0.25), part)
    assert hfedmoe.metrics["peak_expert_bytes"] <= 0.4 * fedavg.metrics["peak_expert_bytes"]
    assert part.stat().st_size <= 0.35 * full.stat().st_size
    assert len(hfedmoe.experts) == 16
    assert len(fedavg.experts) == 64


def test_expert_memory_is_weights_gradients_and_both_moments(bench, data, tmp_path):
    manifest, update = bench("hfedmoe").round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    expert = next(unit for unit in manifest.units if unit.kind == "expert")
    size = sum(map(frames.tensor_size_bytes, expert.tensors))
    trained = update.metrics["experts_trained"]
    assert 0 < trained <= 16
    peak = update.metrics["peak_expert_bytes"]
    assert 16 * size < peak <= 16 * size * 4 * 1.001  # beside the tensors only step counters of a few bytes


def test_the_learning_rate_follows_the_schedule_of_the_run(bench, data, tmp_path):
    """AdamW moves a weight by about the learning rate, here in the last of ten rounds of a linear decay."""
    moved = {}
    for schedule in ("constant", "linear"):
        table = bench("fedavg", rounds=10, schedule=schedule, learning_rate=1e-3, local_steps=1)
        table.round(trainer_of(data, tmp_path), tmp_path / "update", server_round=10)
        unit = next(unit for unit in table.reader.manifest().units if unit.kind == "router")
        places = [(table.paths[unit.sha256], unit.tensors[0].name)]
        places += [(tmp_path / "update", frames.update_name(unit.key, places[0][1]))]
        before, after = (frames.map_tensor(path, frames.read_header(path)[name]) for path, name in places)
        moved[schedule] = np.abs(after - before).max()
    assert moved["linear"] == pytest.approx(0.05 * moved["constant"], rel=0.05)


def test_absent_experts_are_not_fetched_after_the_profile(bench, data, tmp_path):
    table = bench("hfedmoe", {"exploration": 0.0})
    trainer = trainer_of(data, tmp_path, share=0.25)
    manifest, _ = table.round(trainer, tmp_path / "update")
    assert len(table.expert_keys_fetched()) == 64  # the profile runs all of them once
    held = names_in(tmp_path / "update") & {unit.key for unit in manifest.units if unit.kind == "expert"}
    table.fetched.clear()
    _, update = table.round(trainer, tmp_path / "update", server_round=2)
    assert table.expert_keys_fetched() == held
    assert len(held) == 16
    kept = {unit.key for unit in manifest.units if unit.kind == "expert" and unit.sha256 in update.keep}
    assert kept == held


def test_experts_below_the_threshold_are_not_sent(bench, data, tmp_path):
    """HFedMoE (17): the update has the bytes of the experts that count, and no others."""
    sizes, said = {}, []
    for name, tau in (("all", 0.0), ("some", 1.0)):
        table = bench("hfedmoe", {"exploration": 0.0, "tau": tau})
        table.progress.message = said.append
        manifest, update = table.round(trainer_of(data, tmp_path, name=name, share=0.5), tmp_path / "update")
        sizes[name] = (tmp_path / "update").stat().st_size
        counted = {
            unit.key: sum(map(frames.tensor_size_bytes, unit.tensors))
            for unit in manifest.units
            for report in update.experts
            if (unit.layer, unit.expert) == (report.layer, report.expert)
            and report.steps
            and report.usage >= tau / manifest.experts_per_layer[unit.layer]
        }
        experts = {unit.key for unit in manifest.units if unit.kind == "expert"}
        assert names_in(tmp_path / "update") & experts == set(counted)
    unsent = update.metrics["experts_not_sent"]
    assert 0 < unsent == 32 - len(counted)
    assert len(update.experts) == 32, "they are reported"
    size = next(iter(counted.values()))
    assert update.metrics["bytes_not_sent"] == unsent * size
    assert unsent * size <= sizes["all"] - sizes["some"] < unsent * (size + 1000)
    assert [line for line in said if "not sent" in line] == [
        f"update: {unsent:.0f} of 32 trained experts ({format_bytes(int(unsent * size))}) are not sent: the data uses "
        "them too little to count in hfedmoe"
    ]


def test_a_restarted_device_does_not_profile_again(bench, data, tmp_path):
    table = bench("hfedmoe", {"exploration": 0.0})
    table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    first = names_in(tmp_path / "update")
    table.fetched.clear()
    table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    assert len(table.expert_keys_fetched()) == 16
    assert names_in(tmp_path / "update") == first


def test_other_limits_make_another_plan(bench, data, tmp_path):
    table = bench("hfedmoe")
    table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    _, update = table.round(trainer_of(data, tmp_path, share=0.5), tmp_path / "update")
    assert len(update.experts) == 32


def test_exploration_changes_the_plan_without_a_new_profile(bench, data, tmp_path):
    table = bench("hfedmoe", {"exploration": 1.0})
    trainer = trainer_of(data, tmp_path, share=0.25)
    plans = []
    for server_round in (1, 2):
        table.fetched.clear()
        table.round(trainer, tmp_path / "update", server_round)
        plans.append(names_in(tmp_path / "update"))
    assert len(table.expert_keys_fetched()) == 16  # the second plan only
    # The manifest is still that of round 1, so the draw is the same: the round of the manifest is what counts.
    assert plans[0] == plans[1]


def test_the_update_differs_from_the_global_model_only_where_it_was_trained(bench, data, tmp_path):
    table = bench("hfedmoe")
    manifest, update = table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    stepped = {(report.layer, report.expert) for report in update.experts if report.steps}
    units = {unit.key: unit for unit in manifest.units}
    sent = frames.read_header(tmp_path / "update")
    for name, entry in sent.items():
        key, _, tensor = name.rpartition("|")
        unit = units[key]
        old = frames.read_header(table.paths[unit.sha256])
        before = frames.map_tensor(table.paths[unit.sha256], old[tensor])
        changed = not np.array_equal(before, frames.map_tensor(tmp_path / "update", entry))
        assert changed == (unit.kind == "router" or (unit.layer, unit.expert) in stepped), name
    assert all(1 <= report.steps <= STEPS for report in update.experts if report.steps)


def test_the_compute_budget_bounds_experts_trained_per_step(bench, data, tmp_path):
    _, update = bench("hfedmoe", local_steps=1).round(
        trainer_of(data, tmp_path, share=0.5, compute=0.25), tmp_path / "update"
    )
    by_layer = [sum(1 for r in update.experts if r.layer == layer and r.steps) for layer in range(4)]
    held = [sum(1 for r in update.experts if r.layer == layer) for layer in range(4)]
    assert all(0 < count <= -(-have // 4) for count, have in zip(by_layer, held, strict=True))


@pytest.mark.parametrize("mode", ["lora", "none"])
def test_adapters_or_nothing_of_the_experts_are_sent(bench, data, tmp_path, mode):
    table = bench("hfedmoe", experts=mode, router="lora", attention="lora", lora_rank=2)
    manifest, update = table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    names = names_in(tmp_path / "update")
    kinds = {unit.key: unit.kind for unit in manifest.units}
    assert names
    assert all(name.endswith(":lora") for name in names)
    assert sum(kinds[name] == "expert" for name in names) == (16 if mode == "lora" else 0)
    assert {"router", "dense"} <= {kinds[name] for name in names}
    assert (tmp_path / "update").stat().st_size < 400_000
    assert update.metrics["held_out_loss_after"] != update.metrics["held_out_loss_before"]


LORA = dict(experts="lora", router="lora", attention="lora", local_steps=1)


@pytest.mark.parametrize("why", ["asked", "memory"])
def test_a_device_trains_adapters_of_a_smaller_rank(bench, data, tmp_path, why):
    """As its owner asks, or since its memory does not carry those of the run; the choice is kept."""
    table = bench(**LORA, lora_rank=8, min_lora_rank=2)
    table.progress.message = (said := []).append
    ports = {"lora_rank": 2} if why == "asked" else {"costs": OnlyWith(lora_rank=2)}
    trainer = trainer_of(data, tmp_path, share=0.25, **ports)
    for server_round in (1, 2) if why == "memory" else (1,):
        manifest, update = table.round(trainer, tmp_path / "update", server_round=server_round)
        assert update.lora_rank == update.metrics["lora_rank"] == 2
        expected = {unit.key: unit.tensors for unit in with_rank(manifest.units, 2)}
        for name, entry in frames.read_header(tmp_path / "update").items():
            key, tensor = name.split("|")
            assert next(info for info in expected[key] if info.name == tensor).shape == entry.info.shape
    assert any(line.startswith("plan: ") and "adapters of rank 2 instead of 8" in line for line in said)
    assert any(line.startswith("memory: adapters of rank 2 instead of 8 (saves") for line in said) == (why == "memory")
    assert (tmp_path / "a" / "plan.json").read_text().count('"lora_rank":2') == 1


def test_a_rank_that_the_run_does_not_allow(bench, data, tmp_path):
    for table, rank, says in (
        (bench(**LORA, lora_rank=8, min_lora_rank=4), 2, "is 2, the run has adapters of rank 4 to 8"),
        (bench(**LORA, lora_rank=8), 4, "is 4, the run has adapters of rank 8"),
        (bench(), 8, "`lora_rank=8` has no effect"),
    ):
        with pytest.raises(ConfigError, match=says):
            table.round(trainer_of(data, tmp_path, lora_rank=rank), tmp_path / "update")
    _, update = bench(**LORA, lora_rank=8).round(trainer_of(data, tmp_path, lora_rank=8), tmp_path / "update")
    assert update.lora_rank == 0


def test_local_sends_nothing_and_goes_on_from_its_own_weights(bench, data, tmp_path):
    table = bench("local")
    trainer = trainer_of(data, tmp_path, share=0.5)
    _, first = table.round(trainer, tmp_path / "update")
    assert not names_in(tmp_path / "update")
    table.fetched.clear()
    _, second = table.round(trainer, tmp_path / "update", server_round=2)
    assert not table.fetched
    assert second.metrics["held_out_loss_before"] == pytest.approx(first.metrics["held_out_loss_after"], abs=1e-6)


def test_the_same_device_does_the_same_again(bench, data, tmp_path):
    updates = []
    for attempt in range(2):
        path = tmp_path / f"update-{attempt}"
        bench("hfedmoe").round(trainer_of(data, tmp_path / str(attempt), share=0.25), path)
        updates.append(path.read_bytes())
    assert updates[0] == updates[1]


def test_too_little_memory_is_told_before_anything_is_trained(bench, data, tmp_path):
    table = bench("hfedmoe")
    with pytest.raises(BudgetTooSmall, match="one expert in each of the 4 MoE layers needs .* MiB"):
        table.round(trainer_of(data, tmp_path, memory=100 << 20), tmp_path / "update")
    assert not table.expert_keys_fetched()


def test_a_file_name_from_the_server_cannot_leave_the_state_folder(bench, data, tmp_path):
    table = bench("hfedmoe")
    manifest = table.reader.manifest()
    hostile = msgspec.structs.replace(manifest.files[0], name="../../escaped.json")
    table.reader.manifest = lambda: msgspec.structs.replace(manifest, files=(hostile,))
    with pytest.raises(MalformedMessage, match="expected a bare file name"):
        table.round(trainer_of(data, tmp_path), tmp_path / "update")
    assert not list(tmp_path.rglob("escaped.json"))


def test_fedavg_on_a_part_of_the_experts_is_refused(bench, data, tmp_path):
    with pytest.raises(BudgetTooSmall, match="fedavg trains all 64 experts, this device holds 16"):
        bench("fedavg").round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")


def test_a_loss_that_explodes_is_told_by_name(bench, data, tmp_path):
    table = bench("hfedmoe", learning_rate=1e20, local_steps=6)
    with pytest.raises(TrainingDiverged, match="nan|inf|finite"):
        table.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "update")
    assert not (tmp_path / "update").exists()


def test_training_lowers_the_loss_on_the_device(bench, data, tmp_path):
    _, update = bench("hfedmoe", local_steps=12).round(trainer_of(data, tmp_path, share=0.5), tmp_path / "update")
    assert update.metrics["held_out_loss_after"] < update.metrics["held_out_loss_before"] - 0.2


def test_factors_of_adapters_train_and_are_sent_by_turns(bench, data, tmp_path):
    lora = {"experts": "lora", "router": "lora", "attention": "lora", "lora_rank": 4}
    both = bench("random", **lora)
    both.round(trainer_of(data, tmp_path, share=0.25), tmp_path / "both")
    rounds = bench("random", rounds=2, lora_factors="alternate", **lora)
    trainer = trainer_of(data, tmp_path, share=0.25, folder="alternate")
    sizes = []
    for server_round, trained, rests in ((1, "lora_b", "lora_a"), (2, "lora_a", "lora_b")):
        manifest, _ = rounds.round(trainer, path := tmp_path / trained, server_round)
        header = frames.read_header(path)
        assert {name.rpartition(".")[2] for name in header} == {trained}
        assert {name.partition("|")[0] for name in header} == names_of_units(tmp_path / "both")
        sizes.append(sum(entry.size_bytes for entry in header.values()))
        start = {unit.key: unit for unit in manifest.units}
        for unit, tensors in trainer.model.trained_units():
            begin = rounds.paths[start[unit.key].sha256]
            for name, value in tensors.items():
                before = frames.map_tensor(begin, frames.read_header(begin)[name])
                if name.endswith(rests):
                    np.testing.assert_array_equal(value.numpy(), before)
    whole = sum(entry.size_bytes for entry in frames.read_header(tmp_path / "both").values())
    assert sum(sizes) == whole


def names_of_units(path):
    return {name.partition("|")[0] for name in frames.read_header(path)}


def test_moments_stay_on_the_device_from_round_to_round(bench, data, tmp_path):
    updates = {}
    for keep in (False, True):
        rounds = bench(method="random", options={"redraw": True}, rounds=3, keep_optimizer=keep)
        trainer = trainer_of(data, tmp_path, share=0.1, folder=f"keep-{keep}")
        for attempt, server_round in enumerate((1, 2, 2) if keep else (1, 2)):
            rounds.round(trainer, tmp_path / "update", server_round)
            updates[keep, attempt] = (tmp_path / "update").read_bytes()
    assert updates[True, 0] == updates[False, 0]
    assert updates[True, 1] != updates[False, 1]
    assert updates[True, 2] == updates[True, 1], "a round that is repeated begins with the same moments"
    assert not (tmp_path / "keep-False" / "optimizer").exists()
    files = {path.name: path for path in (tmp_path / "keep-True" / "optimizer").iterdir()}
    assert sorted(files) == ["run.1.safetensors", "run.2.safetensors"]
    names = names_in(files["run.2.safetensors"])
    trainable = set(trainable_names(trainer.model))
    assert names <= trainable, "what the plan has dropped has no moments"
    assert not names_in(files["run.1.safetensors"]) <= trainable
    damaged = files["run.2.safetensors"]
    damaged.write_bytes(damaged.read_bytes()[:-8])
    rounds.round(trainer, tmp_path / "update", 3)
    assert not files["run.1.safetensors"].exists()
    assert (tmp_path / "keep-True" / "optimizer" / "run.3.safetensors").exists()
