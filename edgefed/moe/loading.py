"""Makes transformers models: complete from a checkpoint, or as a skeleton without weights."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edgefed.errors import CheckpointError, ModelNotFound, UnsupportedArchitecture, first_line
from edgefed.moe.architecture import discover_layers

_HUB_REMEDY = (
    "If this machine cannot reach the hub, download the checkpoint elsewhere (`hf download NAME --local-dir FOLDER`), "
    "copy the folder and pass its path; `tiny` needs no download."
)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing on the terminal: what it does here takes a moment, and callers report progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_config(source: str | Path) -> PretrainedConfig:
    """Read a model's configuration from a folder or from the hub.

    Raises ModelNotFound, CheckpointError (config.json is broken) or UnsupportedArchitecture (transformers does not
    know its model type). Code from a checkpoint is never run.
    """
    folder = Path(source)
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise ModelNotFound(f"{str(folder)!r} has no config.json: it is no Hugging Face checkpoint folder")
    if not local and (folder.exists() or _looks_like_path(str(source))):
        raise ModelNotFound(f"no checkpoint folder at {str(source)!r}")
    if local:
        try:
            if not isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict):
                raise ValueError("it is not a JSON object")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {str(folder / 'config.json')!r}: {error}") from error
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False, local_files_only=local)
    except OSError as error:
        raise ModelNotFound(
            f"{str(source)!r} is no folder here, and the hub did not give it: {first_line(error)}", remedy=_HUB_REMEDY
        ) from error
    except ValueError as error:
        raise UnsupportedArchitecture(f"transformers cannot use {str(source)!r}: {first_line(error)}") from error


def load_full(source: str | Path, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Load a complete model on the CPU.

    Refuses an unsupported architecture before it reads any weight. transformers only warns about tensors that are
    missing and fills them with noise; here that is a CheckpointError.
    """
    config = load_config(source)
    skeleton = build_skeleton(config)
    discover_layers(skeleton)
    local = Path(source).is_dir()
    try:
        with without_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(source), dtype=dtype, output_loading_info=True, trust_remote_code=False, local_files_only=local
            )
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the weights of {str(source)!r} cannot be read: {first_line(error)}") from error
    except OSError as error:
        if local:
            raise CheckpointError(f"the weights of {str(source)!r} cannot be read: {first_line(error)}") from error
        raise ModelNotFound(
            f"the hub did not give the weights of {str(source)!r}: {first_line(error)}", remedy=_HUB_REMEDY
        ) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CheckpointError(f"{str(source)!r} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}")
    mismatched = sorted(str(entry) for entry in info.get("mismatched_keys") or ())
    if mismatched:
        raise CheckpointError(f"{str(source)!r} has tensors of another shape than config.json says: {mismatched[0]}")
    # Loading makes every parameter learnable; the constructor knows which are not (Ernie's correction bias).
    learnable = {name: parameter.requires_grad for name, parameter in skeleton.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learnable[name])
    return model.eval()


def build_skeleton(config: PretrainedConfig, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Build a model whose parameters have no memory (meta device) and whose buffers are real and initialised.

    Buffers that no checkpoint holds, such as rotary frequencies, are computed by the model's own constructor.
    Raises UnsupportedArchitecture when transformers has no causal language model of that configuration.
    """
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    try:
        with _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise UnsupportedArchitecture(
            f"transformers builds no causal language model of type {config.model_type!r}: {first_line(error)}"
        ) from error
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that this thread registers loses its memory at once; it was never written to."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or source.endswith("/") or "\\" in source
