"""Splitting a model into units, loading them, and restoring the model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgefed import hub
from edgefed.errors import CheckpointError, ModelNotFound
from edgefed.expert_records import ExpertPlan
from edgefed.moe import loading
from edgefed.moe.model import MoeModel
from edgefed.moe.units import TrainScope
from edgefed.protocol.messages import TensorInfo


def test_units_are_the_whole_model_once(toy):
    model = toy.full()
    units = list(model.iter_units())
    assert len({spec.key for spec, _ in units}) == len(units)
    total = sum(tensor.numel() for _, tensors in units for tensor in tensors.values())
    state = model.module.state_dict()
    shared = 96 * 32 if model.config.tie_word_embeddings else 0
    assert total == sum(tensor.numel() for tensor in state.values()) - shared
    for spec, tensors in units:
        assert spec.tensors == tuple(
            TensorInfo(name=name, dtype="F32", shape=tuple(tensor.shape)) for name, tensor in tensors.items()
        )
    kinds = [spec.kind for spec, _ in units]
    assert kinds.count("expert") == 16
    assert kinds.count("router") == 2


def test_unit_infos_are_the_same_for_server_and_client(toy):
    scope = TrainScope(experts="lora", router="full", attention="lora", lora_rank=3)
    full, skeleton = toy.full(), MoeModel.skeleton(toy.folder)
    specs = full.unit_infos(scope)
    assert specs == skeleton.unit_infos(scope)
    assert specs == [spec for spec, _ in full.iter_units(scope)]
    by_key = {spec.key: spec for spec in specs}
    expert = full.layers[0].expert_key(3)
    assert not by_key[expert].trainable
    assert by_key[expert + ":lora"].trainable
    assert by_key[expert + ":lora"].expert == 3
    assert by_key[expert + ":lora"].layer == 0
    assert by_key[full.layers[1].router_path].trainable
    assert by_key[full.layers[1].router_path].layer == 1
    up = full.layers[0].up_name
    shapes = {info.name: info.shape for info in by_key[expert + ":lora"].tensors}
    assert shapes == {
        f"{up}.lora_a": (3, 32), f"{up}.lora_b": (32, 3), "down_proj.lora_a": (3, 16), "down_proj.lora_b": (32, 3)
    }  # fmt: skip


def test_keys_of_units(toys):
    specs = {spec.key: spec for spec in toys("deepseek_v3").full().unit_infos(TrainScope())}
    router = specs["model.layers.1.mlp.gate"]
    assert [info.name for info in router.tensors] == ["weight", "e_score_correction_bias"]
    assert specs["model.layers.1.mlp.shared_experts.up_proj.weight"].kind == "dense"
    assert specs["model.layers.0.mlp.up_proj.weight"].layer == -1
    assert [info.name for info in specs["lm_head.weight"].tensors] == ["value"]
    gpt_oss = {spec.key: spec for spec in toys("gpt_oss").full().unit_infos()}
    assert [info.name for info in gpt_oss["model.layers.0.mlp.router"].tensors] == ["weight", "bias"]
    assert {info.name for info in gpt_oss["model.layers.1.mlp.experts.7"].tensors} == {
        "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"
    }  # fmt: skip


def test_tied_embeddings_are_one_unit_and_stay_tied(toys):
    toy = toys("qwen2_moe")
    keys = {spec.key for spec in toy.full().unit_infos()}
    assert "model.embed_tokens.weight" in keys
    assert "lm_head.weight" not in keys
    model, _ = toy.device(toy.units())
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert model.missing() == []


def test_loading_again_changes_values_in_place(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, [[2], [1]]), source, TrainScope())
    for key in ("model.norm.weight", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.2"):
        parameters = [p for p in model.module.parameters()]
        new = {name: tensor + 1 for name, tensor in units[key].items()}
        model.load_unit(key, new)
        assert [id(p) for p in model.module.parameters()] == [id(p) for p in parameters]
    assert torch.equal(model.module.model.norm.weight, units["model.norm.weight"]["value"] + 1)
    bank = model.layers[0].experts.edgefed_bank
    assert torch.equal(bank.parameter("down_proj", 0), units["model.layers.0.mlp.experts.2"]["down_proj"] + 1)
    assert bank.parameter("down_proj", 0).requires_grad
    assert model.layers[0].router.weight.requires_grad


def test_loaded_values_are_copies(olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    model.apply_plan(ExpertPlan.full(model.experts_per_layer), source, TrainScope())
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    assert all(tensor.ne(0).any() for key in units if ".experts." in key for tensor in units[key].values())
    assert units["model.norm.weight"]["value"].ne(0).all()


def _wrong_units():
    good = torch.zeros(32)
    return {
        "unknown": ("model.nothing", {"value": good}, "no part 'model.nothing'"),
        "expert out of range": ("model.layers.0.mlp.experts.8", {}, "not resident on this device"),
        "absent expert": ("model.layers.0.mlp.experts.1", {}, "not resident on this device"),
        "no adapter here": ("model.layers.0.mlp.gate:lora", {}, "has no adapter"),
        "tensor name": ("model.norm.weight", {"values": good}, "must have the tensors value; found values"),
        "no tensor": ("model.norm.weight", {}, "must have the tensors value; found none"),
        "shape": ("model.norm.weight", {"value": good[:5]}, r"must have shape \(32,\); found \(5,\)"),
        "dtype": ("model.norm.weight", {"value": good.bfloat16()}, "must be torch.float32; found torch.bfloat16"),
    }


@pytest.mark.parametrize("case", _wrong_units())
def test_refuses_units_that_do_not_fit(case, olmoe):
    key, tensors, message = _wrong_units()[case]
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, [[2], [1]]), source, TrainScope())
    with pytest.raises(CheckpointError, match=message):
        model.load_unit(key, tensors)


def test_the_first_load_adopts_a_float_dtype_only_with_auto(olmoe):
    value = {"value": torch.ones(32, dtype=torch.bfloat16)}
    MoeModel.skeleton(olmoe.folder).load_unit("model.norm.weight", value)
    with pytest.raises(CheckpointError, match="must be torch.float32; found torch.bfloat16"):
        MoeModel.skeleton(olmoe.folder, dtype=torch.float32).load_unit("model.norm.weight", value)
    with pytest.raises(CheckpointError, match="found torch.int64"):
        MoeModel.skeleton(olmoe.folder).load_unit("model.norm.weight", {"value": torch.ones(32, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("down_proj"), "must have the tensors down_proj, gate_up_proj; found gate_up_proj"),
        (lambda t: t.update(down_proj=t["down_proj"][:, :3]), r"must have shape \(32, 16\); found \(32, 3\)"),
        (lambda t: t.update(down_proj=t["down_proj"].long()), "must have a floating-point dtype; found torch.int64"),
        (lambda t: t.update(down_proj=t["down_proj"].double()), "must be torch.float32; found torch.float64"),
    ],
    ids=["missing tensor", "shape", "integers", "another dtype than its neighbours"],
)
def test_refuses_experts_that_do_not_fit(change, message, olmoe):
    units = olmoe.units()
    model, source = olmoe.device(units)
    change(units["model.layers.1.mlp.experts.4"])
    with pytest.raises(CheckpointError, match=message):
        model.apply_plan(ExpertPlan.full(model.experts_per_layer), source, TrainScope())


def test_a_model_without_all_experts_has_no_full_set_of_units(olmoe):
    model, source = olmoe.device(olmoe.units())
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, [[2], [1]]), source, TrainScope())
    with pytest.raises(CheckpointError, match="not all in memory"):
        list(model.iter_units())


def test_restored_model_saves_as_an_ordinary_checkpoint(toy, tmp_path):
    units = toy.units()
    model, source = toy.device(units)
    model.apply_plan(ExpertPlan.of(model.experts_per_layer, [[2], [1]]), source, TrainScope())
    model.restore(source)
    model.module.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(toy.input_ids).logits, toy.logits)
        assert torch.equal(model.module(toy.input_ids).logits, toy.logits)


# --- loading checkpoints ---------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_is_an_error(tmp_path, olmoe):
    for missing in (tmp_path / "nowhere", tmp_path, olmoe.folder / "config.json"):
        with pytest.raises(ModelNotFound, match=str(missing)):
            MoeModel.from_checkpoint(missing)
    with pytest.raises(ModelNotFound, match="nowhere"):
        MoeModel.skeleton("./nowhere")
    with pytest.raises(ModelNotFound, match="is neither a local folder nor a hub id"):
        MoeModel.from_checkpoint("no such?name")


def test_an_unreachable_hub_is_an_error_with_a_remedy(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "unreachable", lambda url: "")  # the connection breaks after the check
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(
        ModelNotFound, match="'some/model' is neither a local folder nor available.*couldn't connect"
    ) as caught:
        MoeModel.from_checkpoint("some/model")
    assert "copy the folder" in caught.value.remedy


def copy_of(toy, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in toy.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_broken_config(olmoe, tmp_path):
    folder = copy_of(olmoe, tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        MoeModel.from_checkpoint(folder)


def test_weights_missing_truncated_or_of_another_model(olmoe, tmp_path):
    folder = copy_of(olmoe, tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        MoeModel.from_checkpoint(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        MoeModel.from_checkpoint(folder)


def test_a_missing_tensor_is_an_error(olmoe, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy_of(olmoe, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match="lacks 1 tensors of the model; the first is 'model.layers.1.mlp.gate.weight'"
    ):
        MoeModel.from_checkpoint(folder)
