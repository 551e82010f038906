"""Exported ONNX models compute in onnxruntime what transformers computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan, MergedGroup
from edgefed.formats.device_part import DevicePart
from edgefed.formats.onnx import MODEL_FILE, export_onnx
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX, MemorySource, TrainScope

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def compare_exactly(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def compare_roughly(found, expected):
    """MatMulNBits rounds its input to 8 bits, and where two experts are nearly equal, another one is then selected."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.02
    assert (errors > 0.05).float().mean() < 0.2


def session(folder):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])


def step(session, ids, mask, past=None):
    """Logits of ``ids`` (B, L) after ``past``, and the past of the next call."""
    names = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    empty = {value.name: torch.zeros(len(ids), value.shape[1], 0, value.shape[3]).numpy() for value in names}
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **(empty if past is None else past)}
    logits, *present = session.run(None, inputs)
    return torch.from_numpy(logits), {value.name: tensor for value, tensor in zip(names, present, strict=True)}


def check(folder, model, compare=compare_exactly):
    """Batches and lengths, one of them padded on the left, the last one also in three pieces with a KV cache."""
    exported = session(folder)
    for batch, length, padding in ((3, 7, 0), (1, 1, 0), (2, 12, 4)):
        ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, :padding] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        found, _ = step(exported, ids, mask)
        compare(found[mask.bool()], expected[mask.bool()])
    pieces, past = [], None
    for start, end in ((0, 6), (6, 7), (7, 12)):
        found, past = step(exported, ids[:, start:end], mask[:, :end], past)
        pieces.append(found)
    compare(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()])


@pytest.mark.full
@pytest.mark.parametrize("experts", ["products", "operator"])
def test_onnxruntime_computes_the_logits_of_transformers(experts, toy, tmp_path):
    folder = export_onnx(MemorySource(toy.units()), toy.folder, tmp_path / "out", experts=experts)
    assert {path.name for path in folder.iterdir()} >= {MODEL_FILE, f"{MODEL_FILE}.data", "config.json"}
    check(folder, AutoModelForCausalLM.from_pretrained(toy.folder))


@pytest.mark.full
@pytest.mark.parametrize(("experts", "compare"), [("products", compare_roughly), ("operator", compare_exactly)])
def test_int8_experts_are_those_of_edgefed(experts, compare, toy, tmp_path):
    folder = export_onnx(MemorySource(toy.units()), toy.folder, tmp_path / "out", dtype="int8", experts=experts)
    model = AutoModelForCausalLM.from_pretrained(toy.folder)
    for layer in discover_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.experts, name).data
            rows = stack.transpose(1, 2) if layer.is_transposed else stack
            near = dequantize_experts(quantize_experts(rows.contiguous(), "int8"))
            assert not torch.equal(near, rows)
            stack.copy_(near.transpose(1, 2) if layer.is_transposed else near)
    check(folder, model, compare)


@pytest.mark.full
def test_products_take_an_activation_that_the_operator_does_not_have(save_toy, tmp_path):
    gelu = save_toy("olmoe", tmp_path / "toy", hidden_act="gelu")
    folder = export_onnx(MemorySource(gelu.units()), gelu.folder, tmp_path / "out")
    check(folder, AutoModelForCausalLM.from_pretrained(gelu.folder))


def test_what_the_operator_does_not_compute_is_refused(save_toy, olmoe, tmp_path):
    gelu = save_toy("olmoe", tmp_path / "toy", hidden_act="gelu")
    with pytest.raises(ConfigError, match="does not compute the activation of 'model.layers.0.mlp.experts'"):
        export_onnx(MemorySource(gelu.units()), gelu.folder, tmp_path / "out", experts="operator")
    for wrong, message in (({"dtype": "q8_0"}, "auto, float32, int8"), ({"experts": "moe"}, "products, operator")):
        with pytest.raises(ConfigError, match=f"must be one of {message}; found"):
            export_onnx(MemorySource({}), olmoe.folder, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def part_of(kind, layers):
    """A plan with absent experts, or with merged ones and adapters, or with slices of experts."""
    sizes = [layer.num_experts for layer in layers]
    if kind == "absent":
        return DevicePart(ExpertPlan.of(sizes, [[4, 1]] * len(sizes), [[0]] * len(sizes)))
    if kind == "none in a layer":
        return DevicePart(ExpertPlan.of(sizes, [[], *[[4, 1]] * (len(sizes) - 1)]), "skip")
    if kind == "merged":
        roles = np.array([2, 1, 3, 3, 3, 0, 0, 3], dtype=np.int8)
        groups = MergedGroup((2, 4), (0.25, 0.75)), MergedGroup((3, 7), (0.5, 0.5))
        return DevicePart(ExpertPlan((roles,) * len(sizes), (groups,) * len(sizes)))
    masks = tuple(np.random.default_rng(0).random((8, layer.num_neurons)) < 0.5 for layer in layers)
    for mask in masks:
        mask[:, 0], mask[1, 4:], mask[3] = True, False, False
    roles = np.array([2, 1, 2, 0, 2, 2, 2, 2], dtype=np.int8)
    return DevicePart(ExpertPlan((roles,) * len(sizes), (), masks), "skip")


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "kind", "experts"),
    [
        ("deepseek_v3", "absent", "products"),
        ("olmoe", "absent", "operator"),
        ("qwen3_moe", "absent", "products"),
        ("olmoe", "none in a layer", "products"),
        ("gpt_oss", "merged", "operator"),
        ("mixtral", "merged", "products"),
        ("gpt_oss", "slices", "products"),
        ("qwen2_moe", "slices", "operator"),
    ],
)
def test_what_a_device_computes_with(family, kind, experts, toys, tmp_path):
    toy = toys(family)
    device = MoeModel.from_checkpoint(toy.folder)
    scope = TrainScope(experts="lora" if kind == "merged" else "full", router="none", lora_rank=2)
    draw = torch.Generator().manual_seed(0)
    units = {
        unit.key: {
            name: torch.randn(tensor.shape, generator=draw) / 4 if "lora" in name else tensor.clone()
            for name, tensor in tensors.items()
        }
        for unit, tensors in device.iter_units(scope)
    }
    part = part_of(kind, device.layers)
    roles = part.plan.roles
    absent = {f"{layer.experts_path}.{e}" for layer in device.layers for e in np.flatnonzero(roles[layer.ordinal] == 0)}
    source = MemorySource({key: unit for key, unit in units.items() if key.removesuffix(LORA_SUFFIX) not in absent})
    device.apply_plan(part.plan, source, scope, part.missing, part.storage)
    folder = export_onnx(source, toy.folder, tmp_path / "out", scope=scope, experts=experts, part=part)
    check(folder, device.module)


def test_a_plan_of_another_model_is_refused(olmoe, tmp_path):
    part = DevicePart(ExpertPlan.of([4, 4], [[0], [1]]))
    with pytest.raises(ConfigError, match=r"the plan is of a model with \(4, 4\) experts per layer; found \(8, 8\)"):
        export_onnx(MemorySource(olmoe.units()), olmoe.folder, tmp_path / "out", part=part)
    assert not (tmp_path / "out").exists()
