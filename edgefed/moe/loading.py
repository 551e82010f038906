"""Find checkpoints, read their configuration, and build transformers models without weights."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edgefed.embedded import resolve_model
from edgefed.errors import CheckpointError, ModelNotFound, UnsupportedArchitecture, first_line
from edgefed.hub import HUB_REMEDY, check_source

# Weights in formats that are not read here, and subfolders with copies of the weights in other formats.
_NOT_DOWNLOADED = ["*/*", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.pt", "*.pth", "consolidated*"]


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers: its work here is short, and callers report their own progress."""
    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_config(source: str | Path) -> PretrainedConfig:
    """Read the configuration of a model from a local folder or from the hub. Code of a checkpoint is never run.

    Raises ModelNotFound, CheckpointError (broken config.json) or UnsupportedArchitecture (unknown model type).
    """
    check_source(source if isinstance(source, str) else resolve_model(source))
    local = Path(source).is_dir()
    if local:
        read_config_file(Path(source))
    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=False, local_files_only=local)
    except OSError as error:
        raise ModelNotFound(
            f"{str(source)!r} is neither a local folder nor available from the hub: {first_line(error)}",
            remedy=HUB_REMEDY,
        ) from error
    except ValueError as error:
        raise UnsupportedArchitecture(f"transformers cannot use {str(source)!r}: {first_line(error)}") from error
    return cast(PretrainedConfig, config)


def read_config_file(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's config.json as they are. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {first_line(error)}") from error
    return settings


def find_folder(source: str | Path) -> Path:
    """Return the local folder of a checkpoint, after downloading it from the hub if necessary. Raises ModelNotFound."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), ignore_patterns=_download_filter(str(source))))
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"cannot download the weights of {str(source)!r} from the hub: {first_line(error)}", remedy=HUB_REMEDY
        ) from error


def _download_filter(name: str) -> list[str]:
    """Return the patterns of files that are not needed: PyTorch files too, if there are safetensors files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        files = HfApi().list_repo_files(name)
    except (OSError, ValueError, HfHubHTTPError, OfflineModeIsEnabled):  # the download uses the cache, or reports it
        return _NOT_DOWNLOADED
    has_safetensors = any("/" not in file and file.endswith(".safetensors") for file in files)
    return [*_NOT_DOWNLOADED, "*.bin"] if has_safetensors else _NOT_DOWNLOADED


def take_quantizer(config: PretrainedConfig) -> Any:
    """Remove the quantization from a configuration and return transformers' quantizer, set to dequantize; or None.

    None, too, for weights of bitsandbytes: `edgefed.moe.weight_files` dequantizes them, without the package. Raises
    CheckpointError for a quantization that cannot be undone while loading.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer

    values: dict[str, Any] = settings if isinstance(settings, dict) else vars(settings)
    method = values.get("quant_method")
    method = getattr(method, "value", method)
    if method == "bitsandbytes" or (not method and (values.get("load_in_4bit") or values.get("load_in_8bit"))):
        del config.quantization_config
        return None
    try:
        quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.quantization_config.dequantize = True
        supported = "dequantize" in quantizer.get_load_operations()
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"cannot read weights quantized with {method!r}: {first_line(error)}",
            remedy="Install the package that the message names, or use an unquantized version of the model.",
        ) from error
    if not supported:
        raise CheckpointError(
            f"cannot read weights quantized with {method!r}: transformers must be able to dequantize them "
            "while loading, such as mxfp4 and fp8",
            remedy="Use an unquantized version of the model.",
        )
    del config.quantization_config
    return quantizer


def build_skeleton(
    config: PretrainedConfig,
    dtype: str | torch.dtype = "auto",
    *,
    device: str | torch.device = "cpu",
    keep_float32: bool = False,
) -> PreTrainedModel:
    """Build a model with parameters on the meta device and initialized buffers on ``device``.

    The model's constructor computes buffers that no checkpoint has, such as rotary frequencies. With ``keep_float32``,
    tensors that transformers always keeps in float32 have this dtype here as well. Raises UnsupportedArchitecture if
    transformers has no causal language model for the configuration.
    """
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    auto_model: Any = AutoModelForCausalLM
    try:
        with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            model = auto_model.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedArchitecture(
            f"transformers has no causal language model of type {config.model_type!r}: {first_line(error)}"
        ) from error
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)
    if keep_float32:
        patterns = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(dtype)]
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
                tensor.data = tensor.data.float()
    return cast(PreTrainedModel, model.eval())


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter that this thread registers to the meta device. Its memory was never written to."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(cast(Any, to_meta))
    try:
        yield
    finally:
        hook.remove()
