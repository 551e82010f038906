"""The private part of a device: trained beside what it shares, never sent, kept across rounds and crashes, exported."""

from __future__ import annotations

import msgspec
import pytest
import torch
from device_bench import trainer_of
from safetensors.torch import load_file

from edgefed.agent.journal import Journal
from edgefed.errors import ConfigError, StateCorrupt
from edgefed.exporting import export_model
from edgefed.formats.card import read_record
from edgefed.progress import NullProgress
from edgefed.protocol import frames
from edgefed.trainer.comparison import ComparingTrainer
from edgefed.training.encoding import encode_examples
from edgefed.training.loss import evaluate_loss
from edgefed.training.profiling import spread_blocks


def private_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "private").iterdir()}


def test_it_is_trained_and_never_sent(bench, data, tmp_path):
    table = bench("random")
    sent = {}
    for kind in ("none", "adapter"):
        trainer = trainer_of(data, tmp_path, share=0.25, folder=kind, private=kind)
        table.round(trainer, tmp_path / kind / "update")
        sent[kind] = frames.read_header(tmp_path / kind / "update").keys()
    assert sent["adapter"] == sent["none"]
    assert not any("attn" in name or "lora" in name for name in sent["adapter"])
    assert not (tmp_path / "none" / "private").exists()
    adapters = load_file(tmp_path / "adapter" / "private" / "1.safetensors")
    assert len(adapters) == 2 * 4 * 4  # A and B of the query, key, value and output layers of four layers
    assert all(value.abs().max() > 0 for value in adapters.values())
    assert trainer.planner.step_plan.setup.attention == "lora", "its memory is part of the plan"


def test_rounds_go_on_from_it_and_a_repeated_round_does_not_train_it_twice(bench, data, tmp_path):
    table = bench("random", rounds=4)

    def play(server_round, folder="a"):
        table.round(trainer_of(data, tmp_path, share=0.1, folder=folder, private="adapter"), tmp_path / "update",
                    server_round=server_round)  # fmt: skip
        return private_files(tmp_path / folder)

    first = play(1)
    second = play(2)
    assert second["1.safetensors"] == first["1.safetensors"]
    assert second["2.safetensors"] != first["1.safetensors"]
    assert play(2) == second, "after a crash before the upload"
    assert play(3).keys() == {"2.safetensors", "3.safetensors"}
    path = tmp_path / "a" / "private" / "3.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(StateCorrupt, match="damaged"):
        play(4)


def test_it_is_evaluated_beside_the_global_model_and_exported(bench, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    table, state = bench("slices"), tmp_path / "a"
    blobs = state / "blobs"

    def fetch(items):
        blobs.mkdir(parents=True, exist_ok=True)
        found = table.fetch(items)
        for sha256, path in found.items():
            (blobs / sha256).write_bytes(path.read_bytes())
        return found

    device = ComparingTrainer(trainer_of(data, tmp_path, share=0.25, private="adapter"), state)
    manifest, update = table.round(device, tmp_path / "update")
    device.between_rounds(table.fetch, NullProgress())
    fetch([*manifest.units, *manifest.files])
    final = msgspec.structs.replace(manifest, server_round=2)
    found = device.compare(table.reader.run, final, table.fetch, NullProgress())
    assert found.own < found.before == found.global_model  # nothing was aggregated here
    assert found.device == update.metrics["held_out_loss_after"]

    with Journal(state) as journal:
        journal.bind("http://127.0.0.1:1", "run")
    folder = export_model(state, tmp_path / "model")
    assert read_record(folder).own_units == 16
    module, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    blocks = spread_blocks(encode_examples(device.trainer.corpus.held_out, tokenizer, 64), 256)
    with torch.no_grad():
        assert evaluate_loss(module, blocks, 2) == pytest.approx(found.own, rel=1e-4)


@pytest.mark.parametrize(("method", "training"), [("local", {}), ("random", {"attention": "lora"})])
def test_a_run_that_leaves_nothing_to_it_is_refused(bench, data, tmp_path, method, training):
    table = bench(method, **training)
    with pytest.raises(ConfigError, match="`private=adapter`"):
        table.round(trainer_of(data, tmp_path, private="adapter"), tmp_path / "update")
