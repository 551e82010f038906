"""Exported ONNX models compute in onnxruntime what transformers computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgefed.errors import ConfigError
from edgefed.formats.onnx import MODEL_FILE, export_onnx
from edgefed.kernels.quantization import dequantize_experts, quantize_experts
from edgefed.moe.architecture import discover_layers
from edgefed.moe.units import MemorySource

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def logits_of(folder, ids, mask):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(folder / MODEL_FILE), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


def check(folder, model):
    """Two batches and lengths, one of them padded on the left."""
    for batch, length, padding in ((3, 7, 0), (1, 1, 0), (2, 12, 4)):
        ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, :padding] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        found = logits_of(folder, ids, mask)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_onnxruntime_computes_the_logits_of_transformers(toy, tmp_path):
    folder = export_onnx(MemorySource(toy.units()), toy.folder, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} >= {MODEL_FILE, f"{MODEL_FILE}.data", "config.json"}
    check(folder, AutoModelForCausalLM.from_pretrained(toy.folder))


@pytest.mark.full
def test_int8_experts_are_those_of_edgefed(toy, tmp_path):
    folder = export_onnx(MemorySource(toy.units()), toy.folder, tmp_path / "out", dtype="int8")
    model = AutoModelForCausalLM.from_pretrained(toy.folder)
    for layer in discover_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.experts, name).data
            rows = stack.transpose(1, 2) if layer.is_transposed else stack
            near = dequantize_experts(quantize_experts(rows.contiguous(), "int8"))
            assert not torch.equal(near, rows)
            stack.copy_(near.transpose(1, 2) if layer.is_transposed else near)
    check(folder, model)


def test_what_the_operator_does_not_compute_is_refused(save_toy, olmoe, tmp_path):
    gelu = save_toy("olmoe", tmp_path / "toy", hidden_act="gelu")
    with pytest.raises(ConfigError, match="does not compute the activation of 'model.layers.0.mlp.experts'"):
        export_onnx(MemorySource(gelu.units()), gelu.folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="must be one of auto, float32, int8; found 'q8_0'"):
        export_onnx(MemorySource({}), olmoe.folder, tmp_path / "out", dtype="q8_0")
    assert not (tmp_path / "out").exists()
