"""Write a model as ONNX for onnxruntime, with a KV cache; see `edgefed.formats.onnx_experts` for the experts.

Weights other than those of experts are float32.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from edgefed.errors import ConfigError
from edgefed.formats.checkpoint import copy_files
from edgefed.formats.device_part import DeviceModel, DevicePart
from edgefed.formats.onnx_experts import FORMS, fill_in, prepare
from edgefed.formats.weights import MergedModel, new_folder
from edgefed.moe.units import ExpertSource, TrainScope

MODEL_FILE = "model.onnx"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"
TYPES = ("auto", "float32", "int8")
_PACKAGES = ("onnx", "onnxscript")
_REMEDY = "Export with `format=hf`."


def export_onnx(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    *,
    dtype: str = "auto",
    scope: TrainScope | None = None,
    experts: str = "products",
    part: DevicePart | None = None,
) -> Path:
    """Write a model, adapters merged, as ``model.onnx`` with its weights beside it in ``to``, and return ``to``.

    Inputs of any batch B, length L and past length P, which may be 0:

        input_ids                           (B, L) int64
        attention_mask                      (B, P + L) int64
        past_key_values.<layer>.key, value  (B, heads, P, size) float32

    Outputs are ``logits`` (B, L, V) float32 and ``present.<layer>.key`` and ``value``, the past of the next call. A
    model whose layers keep another state than keys and values, such as linear attention, has no past: P = 0. The
    weights of experts are read when they are written, one matrix at a time; all others are in memory in float32.

    Args:
        units: reads every unit of the model, and its adapters if ``scope`` trains by LoRA.
        files_folder: config.json, tokenizer and all other files that are not weights; they are copied.
        to: the new folder; it must not exist or be empty.
        dtype: "auto" or "float32", or "int8" for the experts.
        scope: how the run trained.
        experts: "products" of matrices, or the "operator" MoE; see `edgefed.formats.onnx_experts`.
        part: the part of a device, which is written instead of the whole model; see `edgefed.formats.device_part`.

    Raises:
        ConfigError: the target is in use, the dtype is invalid, a package is missing, or the operator does not compute
            what the experts compute.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the files cannot be written.

    """
    check_packages()
    for what, value, known in (("dtype", dtype, TYPES), ("experts", experts, FORMS)):
        if value not in known:
            raise ConfigError(f"{what} of an ONNX model must be one of {', '.join(known)}; found {value!r}")
    with new_folder(Path(to), "model") as folder:
        files, dtype_of_rest = Path(files_folder), torch.float32
        if part is None:
            state = MergedModel(files, units, scope, dtype_of_rest)
        else:
            state = DeviceModel(files, units, scope, part, dtype_of_rest)
        state.load_fixed()
        model: Any = state.module
        prepare(state, experts)
        model.float()
        program = _trace(model)
        fill_in(program.model, state, int8=dtype == "int8")
        program.save(str(folder / MODEL_FILE), external_data=True)
        copy_files(Path(files_folder), folder)
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


class _Decoder(nn.Module):
    """A causal language model as a function of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, ...]:
        """Return logits (B, L, V), and keys and values of each layer if there is a ``past``."""
        cache = DynamicCache(past) if past else None
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=bool(past)
        )
        if cache is None:
            return (output.logits,)
        layers: Any = cache.layers
        return (output.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def _example_past(model: Any, batch: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer after ``length`` tokens, or [] if the model keeps another state."""
    ids = torch.ones(batch, length, dtype=torch.int64)
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return []
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    if any(not layer.is_initialized for layer in layers):
        return []
    return [(layer.keys, layer.values) for layer in layers]


def _trace(model: Any) -> Any:
    """Return the ONNX program of a model with placeholders for its experts."""
    batch, length, before = 2, 8, 5
    dynamic = torch.export.Dim.DYNAMIC
    try:
        with torch.no_grad(), _quiet():
            past = _example_past(model, batch, before)
            ids = torch.ones(batch, length, dtype=torch.int64)
            mask = torch.ones(batch, length + (before if past else 0), dtype=torch.int64)
            sizes, past_sizes = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
            state = [f"{number}.{kind}" for number in range(len(past)) for kind in ("key", "value")]
            return torch.onnx.export(
                _Decoder(model), (ids, mask, past), dynamo=True, verbose=False,
                input_names=[*INPUTS, *(f"past_key_values.{name}" for name in state)],
                output_names=[OUTPUT, *(f"present.{name}" for name in state)],
                dynamic_shapes=(sizes, sizes, [(past_sizes, past_sizes) for _ in past]),
            )  # fmt: skip
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
