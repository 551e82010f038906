"""Exported adapters load in PEFT on the base model and compute what the merged checkpoint computes."""

from __future__ import annotations

import dataclasses
import json
import threading

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import edgefed
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.cli.main import main
from edgefed.embedded import tiny_model_directory
from edgefed.errors import CheckpointError, ConfigError
from edgefed.formats.adapter import CONFIG_FILE, WEIGHTS_FILE, export_adapter
from edgefed.formats.checkpoint import export_checkpoint
from edgefed.moe.units import LORA_SUFFIX, MemorySource, TrainScope
from edgefed.progress import NullProgress
from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.runs import import_model

ALL = TrainScope(experts="lora", router="lora", attention="lora", lora_rank=2)
ROUTER_IN_FULL = TrainScope(experts="lora", router="full", attention="full", lora_rank=3)


def trained(toy, scope):
    """Units of which everything that the scope trains has changed."""
    units = toy.units(scope)
    generator = torch.Generator().manual_seed(2)
    for key, tensors in units.items():
        if key.endswith(LORA_SUFFIX) or (scope.router == "full" and is_in_full(key)):
            for tensor in tensors.values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return units


def is_in_full(key):
    return key.endswith((".mlp.gate", ".mlp.router")) or ("self_attn" in key and key.endswith("_proj.weight"))


def logits_with(model, toy):
    with torch.no_grad():
        return model.eval()(toy.input_ids).logits


def check_logits(toy, tmp_path, scope):
    peft = pytest.importorskip("peft")
    source = MemorySource(trained(toy, scope))
    merged = export_checkpoint(source, toy.folder, tmp_path / "merged", scope=scope)
    adapter = export_adapter(source, toy.folder, tmp_path / "adapter", scope=scope, base=str(toy.folder))
    expected = logits_with(AutoModelForCausalLM.from_pretrained(merged), toy)
    assert not torch.allclose(expected, toy.logits, atol=0.1)
    base = AutoModelForCausalLM.from_pretrained(toy.folder)
    model = peft.PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(logits_with(model, toy), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits_with(model, toy), toy.logits)


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.full
@pytest.mark.parametrize("scope", [ALL, ROUTER_IN_FULL], ids=["lora", "in full"])
def test_same_logits_as_the_merged_checkpoint(toy, tmp_path, scope):
    check_logits(toy, tmp_path, scope)


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_same_logits_of_olmoe(olmoe, tmp_path, scaling):
    scope = dataclasses.replace(ALL, lora_scaling=scaling)
    assert scope.lora_scale == pytest.approx(16.0 / (2 if scaling == "standard" else 2**0.5))
    check_logits(olmoe, tmp_path, scope)


def test_the_columns_of_stacked_experts(olmoe, tmp_path):
    """The layout that PEFT reads, without PEFT."""
    units = trained(olmoe, ALL)
    adapter = export_adapter(MemorySource(units), olmoe.folder, tmp_path / "adapter", scope=ALL, base="a/base")
    tensors = load_file(adapter / WEIGHTS_FILE)
    key = "model.layers.1.mlp.experts"
    own = units[f"{key}.3{LORA_SUFFIX}"]
    a = tensors[f"base_model.model.{key}.base_layer.lora_A.weight"]
    b = tensors[f"base_model.model.{key}.base_layer.lora_B.weight"]
    num_experts = a.shape[0] // 2
    assert torch.equal(a[6:8], own["gate_up_proj.lora_a"])
    assert torch.equal(b[:, 3::num_experts], own["gate_up_proj.lora_b"])
    assert f"base_model.model.{key}.lora_A.weight" in tensors
    config = json.loads((adapter / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("a/base", 2, 16.0)
    assert config["use_rslora"] is False
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    assert config["target_modules"] == [f"self_attn.{name}_proj" for name in "koqv"]


def test_what_an_adapter_cannot_hold_is_refused(olmoe, tmp_path):
    for scope, text in ((TrainScope(), "its experts in full"), (TrainScope("none", "full"), "no part by LoRA")):
        with pytest.raises(ConfigError, match=text):
            export_adapter(MemorySource({}), olmoe.folder, tmp_path / "adapter", scope=scope, base="a/base")
    units = olmoe.units(ALL)
    del units[f"model.layers.1.mlp.gate{LORA_SUFFIX}"]
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.gate"):
        export_adapter(MemorySource(units), olmoe.folder, tmp_path / "adapter", scope=ALL, base="a/base")
    assert list(tmp_path.iterdir()) == []


def make_run(folder, experts):
    training = TrainingConfig(
        local_steps=1, batch_size=2, sequence_length=16, learning_rate=1e-2, experts=experts, lora_rank=2
    )
    run = RunConfig(
        run_id="a-run", model="tiny", method="fedavg", method_options={}, rounds=1, seed=0, training=training
    )
    import_model(str(tiny_model_directory()), folder, run, RoundPolicy(rounds=1, min_clients=1))


class Downloads(NullProgress):
    """Sizes of all downloads, in bytes."""

    def __init__(self):
        self.sizes = []

    def phase(self, name, total=None, unit=""):
        if name == "download":
            self.sizes.append(total)


@pytest.mark.full
def test_the_base_experts_are_not_downloaded(tmp_path):
    server = edgefed.Server(
        model="tiny", method="fedavg", rounds=1, min_clients=1, port=0, state=tmp_path / "run", train_experts="lora"
    )
    urls, ready = [], threading.Event()

    def on_ready(url):
        urls.append(url)
        ready.set()

    threading.Thread(target=server.serve, args=(on_ready,), daemon=True).start()
    assert ready.wait(180)
    downloads = Downloads()
    for format in ("hf", "peft"):
        edgefed.export(urls[0], tmp_path / format, format=format, progress=downloads)
    whole, adapter = downloads.sizes
    assert adapter < whole / 2


def test_the_command_line(capsys, tmp_path):
    make_run(tmp_path / "lora", "lora")
    make_run(tmp_path / "full", "full")

    def export(run):
        with pytest.raises(SystemExit) as end:
            main(["export", "--state", str(tmp_path / run), "--to", "peft", str(tmp_path / f"{run}-adapter")])
        return end.value.code, " ".join(capsys.readouterr().err.split())

    status, err = export("lora")
    assert status == 0, err
    assert "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('tiny')" in err
    folder = tmp_path / "lora-adapter"
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "README.md", "edgefed.json"}
    assert msgspec.json.decode((folder / "edgefed.json").read_bytes())["model"] == "tiny"
    with pytest.raises(ConfigError, match="a PEFT adapter without its base model"), edgefed.load_chat(folder):
        pass
    status, err = export("full")
    assert status != 0
    assert "trained its experts in full" in err
    assert "--to hf" in err
    assert not (tmp_path / "full-adapter").exists()
