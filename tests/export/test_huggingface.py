"""Exported checkpoints load in plain transformers and compute what the run computed."""

from __future__ import annotations

import errno
import json
import shutil
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgefed.errors import CheckpointError, ConfigError, DiskFull, StateCorrupt, StorageError
from edgefed.formats.checkpoint import check_checkpoint, export_checkpoint
from edgefed.formats.delta import apply_delta, export_delta
from edgefed.moe import weight_files
from edgefed.moe.expert_reading import FileSource, raw_tensor
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.protocol.frames import write_frame
from edgefed.protocol.messages import UnitInfo


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def logits_of(model, toy):
    with torch.no_grad():
        return model(toy.input_ids).logits


@pytest.fixture
def files(toy, tmp_path):
    """What an aggregator keeps beside the weights: configuration and tokenizer, no weights."""
    return files_of(toy, tmp_path)


def files_of(toy, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "config.json").write_bytes((toy.folder / "config.json").read_bytes())
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("an old one, not to be copied")
    return folder


def test_same_logits_without_edgefed(toy, files, tmp_path):
    to = export_checkpoint(MemorySource(toy.units()), files, tmp_path / "out")
    assert torch.equal(logits_of(load(to), toy), toy.logits)
    assert (to / "tokenizer.json").read_text() == "{}"
    assert json.loads((to / "config.json").read_text())["model_type"] == toy.family
    assert set(load_file(to / "model.safetensors")) == set(load_file(toy.folder / "model.safetensors"))


def test_adapters_are_merged(toy, files, tmp_path):
    scope = TrainScope(experts="lora", router="lora", attention="lora", lora_rank=2)
    units = toy.units(scope)
    generator = torch.Generator().manual_seed(2)
    for key, tensors in units.items():
        if key.endswith(":lora"):
            for tensor in tensors.values():
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    model, source = toy.device(units)
    with model.streaming(source, scope):
        expected = model.module(toy.input_ids).logits
    assert not torch.allclose(expected, toy.logits, atol=1e-2)
    to = export_checkpoint(source, files, tmp_path / "out", scope=scope)
    torch.testing.assert_close(logits_of(load(to), toy), expected, rtol=1e-4, atol=1e-5)


def on_disk(units, folder):
    folder.mkdir()
    infos, paths = [], {}
    for number, (key, tensors) in enumerate(units.items()):
        path = folder / str(number)
        sha256, _ = write_frame(path, {name: raw_tensor(tensor) for name, tensor in tensors.items()})
        infos.append(UnitInfo(key=key, kind="dense", trainable=False, sha256=sha256))
        paths[sha256] = path
    return FileSource(infos, paths)


def test_units_on_disk_become_the_same_files(toy, files, tmp_path):
    """Of transposed stacks (gpt_oss) as of tensors that are copied from file to file."""
    units = toy.units()
    first = export_checkpoint(MemorySource(units), files, tmp_path / "a")
    second = export_checkpoint(on_disk(units, tmp_path / "units"), files, tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_adapters_on_disk_are_merged(olmoe, tmp_path):
    scope = TrainScope(experts="lora", router="lora", attention="lora", lora_rank=2)
    units, files = olmoe.units(scope), files_of(olmoe, tmp_path)
    for key, tensors in units.items():
        if key.endswith(":lora"):
            for tensor in tensors.values():
                tensor.fill_(0.1)
    first = export_checkpoint(MemorySource(units), files, tmp_path / "a", scope=scope)
    second = export_checkpoint(on_disk(units, tmp_path / "units"), files, tmp_path / "b", scope=scope)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_export_of_an_export_is_the_same_model(olmoe, tmp_path):
    files = files_of(olmoe, tmp_path)
    first = export_checkpoint(MemorySource(olmoe.units()), files, tmp_path / "a")
    units = {spec.key: tensors for spec, tensors in MoeModel.from_checkpoint(first).iter_units()}
    second = export_checkpoint(MemorySource(units), files, tmp_path / "b")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_dtype_is_cast_except_where_the_model_keeps_its_own(save_toy, tmp_path):
    toy = save_toy("deepseek_v3", tmp_path / "checkpoint", torch.bfloat16)
    units = toy.units()
    assert units["model.layers.1.mlp.gate"]["e_score_correction_bias"].dtype == torch.float32
    same = load_file(export_checkpoint(MemorySource(units), toy.folder, tmp_path / "same") / "model.safetensors")
    cast = load_file(
        export_checkpoint(MemorySource(units), toy.folder, tmp_path / "f16", "float16") / "model.safetensors"
    )
    for name in same:
        stays_float32 = name.endswith("e_score_correction_bias")
        assert same[name].dtype == (torch.float32 if stays_float32 else torch.bfloat16)
        assert cast[name].dtype == (torch.float32 if stays_float32 else torch.float16)
    assert load(tmp_path / "f16", dtype="auto").dtype == torch.float16
    with pytest.raises(ConfigError, match="found 'int8'"):
        export_checkpoint(MemorySource(units), toy.folder, tmp_path / "int8", "int8")


def test_refuses_a_target_in_use(olmoe, tmp_path):
    files = files_of(olmoe, tmp_path)
    target = tmp_path / "out"
    target.mkdir()
    (target / "keep").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_checkpoint(MemorySource({}), files, target)
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_checkpoint(MemorySource({}), files, target / "keep")
    assert [file.name for file in target.iterdir()] == ["keep"]
    (target / "keep").unlink()
    export_checkpoint(MemorySource(olmoe.units()), files, target)
    assert (target / "config.json").is_file()


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.gate", "model.layers.0.mlp.experts.7"])
def test_a_missing_unit_leaves_nothing_behind(missing, olmoe, tmp_path):
    files = files_of(olmoe, tmp_path)
    units = olmoe.units()
    del units[missing]
    with pytest.raises(CheckpointError, match=missing):
        export_checkpoint(MemorySource(units), files, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.ENOSPC, "no"), DiskFull),
        (OSError(errno.EACCES, "no"), StorageError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFull),
    ],
)
def test_a_failing_disk_leaves_nothing_behind(failure, error, olmoe, tmp_path, monkeypatch):

    def fail(source, target):
        raise failure

    files = files_of(olmoe, tmp_path)
    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(error, match="cannot write the checkpoint to"):
        export_checkpoint(MemorySource(olmoe.units()), files, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]


def test_a_truncated_file_is_detected(olmoe, tmp_path):
    to = export_checkpoint(MemorySource(olmoe.units()), files_of(olmoe, tmp_path), tmp_path / "out")
    check_checkpoint(to)
    data = (to / "model.safetensors").read_bytes()
    (to / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="cannot be read back"):
        check_checkpoint(to)


def test_large_models_are_written_in_several_files(olmoe, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 20_000)
    to = export_checkpoint(MemorySource(olmoe.units()), files_of(olmoe, tmp_path), tmp_path / "out")
    assert len(list(to.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits_of(load(to), olmoe), olmoe.logits)


def test_others_may_read_the_folder(olmoe, tmp_path):
    """The temporary folder is private; what becomes of it follows the umask like any other folder."""
    to = export_checkpoint(MemorySource(olmoe.units()), files_of(olmoe, tmp_path), tmp_path / "deep" / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(to.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_delta_has_what_changed_and_gives_the_checkpoint_again(olmoe, tmp_path):
    units = olmoe.units()
    units["model.layers.1.mlp.experts.3"]["down_proj"] += 1
    units["model.layers.0.mlp.gate"]["weight"][0, 0] += 1
    expected = export_checkpoint(MemorySource(units), olmoe.folder, tmp_path / "whole")
    delta = export_delta(MemorySource(units), olmoe.folder, tmp_path / "delta", base=str(olmoe.folder))
    assert set(load_file(delta / "delta.safetensors")) == {
        "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.0.mlp.gate.weight",
    }  # fmt: skip
    again = apply_delta(delta, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert {path.name for path in again.iterdir()} == {path.name for path in expected.iterdir()}
    with pytest.raises(CheckpointError, match=r"is not the base of .*: 'model.layers.0.mlp.gate.weight'"):
        apply_delta(delta, tmp_path / "wrong", base_folder=again)
    weights = delta / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(StateCorrupt, match="is damaged: its SHA-256 differs"):
        apply_delta(delta, tmp_path / "wrong")
    (delta / "delta.json").write_text('{"base": "x", "tensors": [{"name": "a", "dtype": "F32", "shape": [-1]}]}')
    with pytest.raises(StateCorrupt, match="cannot read .*delta.json"):
        apply_delta(delta, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_delta_of_an_unchanged_model_has_no_tensors(olmoe, tmp_path):
    delta = export_delta(MemorySource(olmoe.units()), olmoe.folder, tmp_path / "delta", base=str(olmoe.folder))
    assert load_file(delta / "delta.safetensors") == {}
    again = apply_delta(delta, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (olmoe.folder / "model.safetensors").read_bytes()
