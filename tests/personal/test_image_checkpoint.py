"""Folders of transformers image classifiers as clients' models."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    MobileNetV2Config,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    ViTConfig,
)

from edgefed.errors import CheckpointError, ModelError, ModelNotFound, UnsupportedArchitecture
from edgefed.personal.models import load_model

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "patch_size": 8}
CONFIGS = {
    "vit": (ViTConfig(image_size=32, **VIT), 16),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"), 12),
    "convnext": (ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]), 20),
    "dinov2": (Dinov2Config(image_size=32, mlp_ratio=1, **{k: v for k, v in VIT.items() if k[0] != "i"}), 32),  # 2 x 16
    "swin": (SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4), 16),
    "mobilenet_v2": (MobileNetV2Config(image_size=32, depth_multiplier=0.25), 1280),
}


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def saved(config, folder: Path, num_labels: int = 4, return_dict: bool = True) -> torch.nn.Module:
    config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(config).eval()
    model.config.return_dict = return_dict
    model.save_pretrained(folder)
    model.config.return_dict = True
    return model


def load(folder: Path, num_classes: int = 4, seed: int = 0):
    return load_model(str(folder), task="images", num_classes=num_classes, seed=seed, sample=images())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_answers_as_it_did_and_learns_in_both_parts(name, tmp_path):
    config, width = CONFIGS[name]
    whole = saved(config, tmp_path)
    model = load(tmp_path)
    assert model.width == width
    torch.testing.assert_close(model.eval()(images()), whole(images()).logits)
    model.train()(images()).sum().backward()
    for part in (model.extractor, model.header):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_classes_of_its_own_get_a_header_of_their_own_which_is_said(tmp_path, caplog):
    saved(CONFIGS["resnet"][0], tmp_path)
    with caplog.at_level(logging.WARNING):
        model, again, other = load(tmp_path, 7), load(tmp_path, 7), load(tmp_path, 7, seed=1)
    assert "new header for 7 classes; the checkpoint has one for 4 classes" in caplog.text
    assert model(images()).shape == (3, 7)
    assert torch.equal(model.header.weight, again.header.weight)
    assert not torch.equal(model.header.weight, other.header.weight)


def test_a_backbone_without_a_header_gets_one(tmp_path, caplog):
    backbone = ResNetModel(CONFIGS["resnet"][0]).eval()
    backbone.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path)
    assert "new header for 4 classes; the checkpoint has none" in caplog.text
    features = backbone(images()).pooler_output.flatten(1)
    torch.testing.assert_close(model.eval().extractor(images()), features)


def test_images_are_enlarged_for_a_model_that_needs_it_and_only_for_that(tmp_path, caplog):
    whole = saved(ViTConfig(image_size=48, **VIT), tmp_path / "vit")
    saved(CONFIGS["convnext"][0], tmp_path / "convnext")  # made for 224x224, takes any
    swin = saved(SwinConfig(image_size=56, embed_dim=8, depths=[1, 1], num_heads=[1, 2]), tmp_path / "swin")
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "convnext")
        assert "enlarged" not in caplog.text
        model = load(tmp_path / "vit").eval()
    assert "images are resized from 32x32 to the 48x48 that the model needs" in caplog.text
    larger = torch.nn.functional.interpolate(images(), (48, 48), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(model(images()), whole(larger).logits)
    model = load(tmp_path / "swin").eval()
    larger = torch.nn.functional.interpolate(images(), (56, 56), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(model(images()), swin(larger).logits)


def test_pixels_are_normalised_as_the_checkpoint_was_trained(tmp_path):
    whole = saved(CONFIGS["vit"][0], tmp_path)
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    settings = {"do_normalize": True, "image_mean": mean.tolist(), "image_std": deviation.tolist()}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = ((images() + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    torch.testing.assert_close(load(tmp_path).eval()(images()), whole(pixels).logits)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    torch.testing.assert_close(load(tmp_path).eval()(images()), whole((images() + 1) / 2).logits)
    for broken in (
        "{",
        "[]",
        json.dumps({"image_mean": [0.5], "image_std": [0.5]}),
        json.dumps({"image_std": [0] * 3}),
    ):
        (tmp_path / "preprocessor_config.json").write_text(broken)
        with pytest.raises(CheckpointError, match="preprocessor_config.json"):
            load(tmp_path)


def test_a_checkpoint_that_says_to_return_tuples_is_taken_all_the_same(tmp_path):
    saved(CONFIGS["vit"][0], tmp_path, return_dict=False)
    assert load(tmp_path).width == 16


def test_a_model_in_half_precision_learns_in_single(tmp_path):
    saved(CONFIGS["vit"][0], tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.float32}


def test_folders_that_hold_something_else_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="config.json"):
        load(tmp_path / "empty")
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "text")
    with pytest.raises(UnsupportedArchitecture, match="is a bert, not an image classifier"):
        load(tmp_path / "text")
    saved(ViTConfig(image_size=32, num_channels=1, **VIT), tmp_path / "grey")
    with pytest.raises(ModelError, match="rejects 4 images of 3x32x32"):
        load(tmp_path / "grey")
    DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=32, **VIT)).save_pretrained(tmp_path / "deit")
    with pytest.raises(ModelError, match="no split point") as error:  # its answer is the mean of two headers'
        load(tmp_path / "deit", 2)
    assert "package.module:function" in error.value.remedy


def test_missing_and_misshapen_weights_are_refused(tmp_path):
    saved(CONFIGS["vit"][0], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "vit.layernorm.weight"
    assert name in weights
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1, the first is '{name}'"):
        load(tmp_path)
    save_file({**weights, name: torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not have the shapes|cannot read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path)
