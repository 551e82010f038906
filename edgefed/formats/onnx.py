"""Write a model as ONNX for onnxruntime, its experts as ``com.microsoft::MoE``, or QMoE in 8 bits.

The operator takes router logits, applies a softmax and adds up the outputs of the k largest. For the weights w (K,) of
any router, whatever it normalizes or scales, the logits are log(w / sum w) of the selected experts and a large negative
number for the others, and the output is multiplied by sum w. Gate and up rows are neighbours (``swiglu_fusion=1``).

``int8`` stores experts as edgefed trains with them: codes and the absmax of each row, so QMoE computes with the same
weights. Other matrices stay float32.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from edgefed.errors import ConfigError
from edgefed.formats.checkpoint import export_checkpoint
from edgefed.formats.weights import new_folder
from edgefed.kernels.quantization import quantize_experts
from edgefed.moe.architecture import ExpertLayer, discover_layers, expert_activation
from edgefed.moe.loading import without_progress_bars
from edgefed.moe.units import ExpertSource, TrainScope
from edgefed.moe.weight_files import WEIGHT_SUFFIXES

MODEL_FILE = "model.onnx"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"
TYPES = ("auto", "float32", "int8")
IMPLEMENTATION = "edgefed_onnx"
_PACKAGES = ("onnx", "onnxscript")
_NOT_SELECTED = -1e4
_REMEDY = "Export with `format=hf`."


def export_onnx(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    *,
    dtype: str = "auto",
    scope: TrainScope | None = None,
) -> Path:
    """Write a model, adapters merged, as ``model.onnx`` with its weights beside it in ``to``, and return ``to``.

    Inputs are ``input_ids`` and ``attention_mask`` (B, L) int64, of any B and L; the output is ``logits`` (B, L, V)
    float32. The model has no KV cache. The export holds up to three copies of the model in memory in float32.

    Args:
        units: reads every unit of the model, and its adapters if ``scope`` trains by LoRA.
        files_folder: config.json, tokenizer and all other files that are not weights; they are copied.
        to: the new folder; it must not exist or be empty.
        dtype: "auto" or "float32", or "int8" for the experts.
        scope: how the run trained.

    Raises:
        ConfigError: the target is in use, the dtype is invalid, a package is missing, or the operator does not compute
            what the experts compute.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the files cannot be written.

    """
    check_packages()
    if dtype not in TYPES:
        raise ConfigError(f"dtype of an ONNX model must be one of {', '.join(TYPES)}; found {dtype!r}")
    with new_folder(Path(to), "model") as folder:
        with tempfile.TemporaryDirectory(prefix="edgefed-onnx-") as scratch:
            checkpoint = export_checkpoint(units, files_folder, Path(scratch) / "model", "float32", scope)
            with without_progress_bars():
                model: Any = AutoModelForCausalLM.from_pretrained(
                    checkpoint, trust_remote_code=False, dtype=torch.float32
                )
        model.eval()
        for layer in discover_layers(model):
            _prepare(layer, int8=dtype == "int8")
        ExpertsInterface.register(IMPLEMENTATION, _experts)
        model.set_experts_implementation(IMPLEMENTATION)
        _save(model, folder / MODEL_FILE)
        for file in sorted(Path(files_folder).iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, folder / file.name)
    return Path(to)


def check_packages() -> None:
    """Raise ConfigError if a package that the export needs is missing or too old."""
    try:
        for name in _PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"exporting ONNX needs the package {error.name}", remedy="Run `pip install 'edgefed[onnx]'`."
        ) from error
    if not hasattr(torch.onnx, "ops"):
        raise ConfigError(f"exporting ONNX needs torch 2.8 or newer; found {torch.__version__}")


def _prepare(layer: ExpertLayer, *, int8: bool) -> None:
    """Replace the stacks of a layer by the operator's inputs and attributes."""
    experts: Any = layer.experts
    attributes = _activation(layer)
    rows: dict[str, torch.Tensor] = {"up": experts.gate_up_proj.detach(), "down": experts.down_proj.detach()}
    if layer.is_transposed:
        rows = {name: stack.transpose(1, 2) for name, stack in rows.items()}
    biases = [experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()] if layer.has_bias else []
    if not layer.is_interleaved:
        rows["up"] = _interleave(rows["up"])
        biases = [_interleave(biases[0]), biases[1]] if biases else []
    names: list[str | None] = []
    for position, (name, stack) in enumerate(rows.items()):
        if int8:
            matrix = quantize_experts(stack.contiguous(), "int8")
            absmax = matrix.absmax
            if absmax is None:
                raise AssertionError("int8 has an absmax of each row")
            experts.register_buffer(f"onnx_{name}", (matrix.packed.int() + 128).to(torch.uint8))
            experts.register_buffer(f"onnx_{name}_scales", absmax / 127)
            names += [f"onnx_{name}", f"onnx_{name}_scales"]
        else:
            experts.register_buffer(f"onnx_{name}", stack.contiguous())
            names.append(f"onnx_{name}")
        if biases:
            experts.register_buffer(f"onnx_{name}_bias", biases[position].contiguous())
        names.append(f"onnx_{name}_bias" if biases else None)
    for parameter in layer.parameters:
        experts.register_parameter(parameter.name, nn.Parameter(torch.empty(0)))
    experts.onnx_inputs = names
    experts.onnx_operator = "com.microsoft::QMoE" if int8 else "com.microsoft::MoE"
    experts.onnx_attributes = {
        **attributes, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 0,
        **({"expert_weight_bits": 8} if int8 else {}),
    }  # fmt: skip


def _interleave(stack: torch.Tensor) -> torch.Tensor:
    """Put gate and up rows (E, 2 I, ...) next to each other."""
    return torch.stack(stack.chunk(2, dim=1), dim=2).flatten(1, 2)


def _activation(layer: ExpertLayer) -> dict[str, float]:
    """Attributes of the operator's gating g sigmoid(alpha g) (u + beta), clamped. Raises ConfigError if it differs."""
    experts: Any = layer.experts
    found: dict[str, float] = {"activation_alpha": 1.0, "activation_beta": 0.0}
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):
        found = {"activation_alpha": float(experts.alpha), "activation_beta": 1.0, "swiglu_limit": float(experts.limit)}
    if layer.has_gate and not layer.has_post_expert_norm:
        limit = found.get("swiglu_limit", float("inf"))
        gate, up = torch.linspace(-9, 9, 19), torch.linspace(8, -10, 19)
        joined = torch.stack([gate, up], dim=-1).flatten() if layer.is_interleaved else torch.cat([gate, up])
        with torch.no_grad():
            output = expert_activation(layer.experts)(joined.unsqueeze(0))[0]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        expected = gate * torch.sigmoid(found["activation_alpha"] * gate) * (up + found["activation_beta"])
        if torch.allclose(output, expected, rtol=1e-5, atol=1e-5):
            return found
    raise ConfigError(
        f"cannot export ONNX: the operator MoE does not compute the activation of {layer.experts_path!r}",
        remedy=_REMEDY,
    )


def _experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a layer's experts by the operator; see the top of the file. ``hidden_states``: (T, H)."""
    total = top_k_weights.sum(-1, keepdim=True)
    chosen = (top_k_weights / total).clamp_min(torch.finfo(torch.float32).tiny).log().to(hidden_states.dtype)
    logits = torch.full((hidden_states.shape[0], self.num_experts), _NOT_SELECTED, dtype=hidden_states.dtype)
    inputs = [getattr(self, name) if name else None for name in self.onnx_inputs]
    while inputs[-1] is None:
        inputs.pop()
    output: torch.Tensor = torch.onnx.ops.symbolic(
        self.onnx_operator,
        [hidden_states, logits.scatter(1, top_k_index, chosen), *inputs],
        attrs={**self.onnx_attributes, "k": top_k_index.shape[1]},
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=1,
    )
    return output * total.to(output.dtype)


class _Logits(nn.Module):
    """A causal language model as a function of its two inputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits (B, L, V)."""
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _save(model: Any, path: Path) -> None:
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)  # one tensor is one input
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                _Logits(model), (ids, mask), dynamo=True, input_names=list(INPUTS), output_names=[OUTPUT],
                dynamic_shapes=(sizes, sizes), verbose=False,
            )  # fmt: skip
            program.save(str(path), external_data=True)
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        kind = model.config.model_type
        raise ConfigError(
            f"cannot export ONNX: torch does not convert model type {kind!r}: {str(error).strip().splitlines()[0]}",
            remedy=_REMEDY,
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings and progress, which say nothing of the model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
