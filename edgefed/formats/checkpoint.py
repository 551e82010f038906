"""Write the global model as an ordinary Hugging Face checkpoint that transformers loads without edgefed.

Weights are written one parameter at a time, so that the whole model is never in memory. All other files of the
checkpoint that the run was made from are copied unchanged.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from edgefed.errors import CheckpointError, ConfigError
from edgefed.formats.weights import MergedModel, new_folder
from edgefed.moe.loading import read_config_file
from edgefed.moe.units import ExpertSource, TrainScope
from edgefed.moe.weight_files import WEIGHT_SUFFIXES, WeightFiles, WeightWriter


def export_checkpoint(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    dtype: str | torch.dtype = "auto",
    scope: TrainScope | None = None,
) -> Path:
    """Write all units as a checkpoint folder and return ``to``.

    The folder appears complete or not at all: it is written next to its place, synced and renamed. Tensors that a
    checkpoint has as the units have them are copied from file to file. The memory peak is otherwise about two
    parameters, where all experts of a layer count as one.

    Args:
        units: reads every unit of the model, and its adapters if ``scope`` trains by LoRA.
        files_folder: config.json, tokenizer and all other files that are not weights; they are copied.
        to: the new folder; it must not exist or be empty.
        dtype: dtype of the weights that have the model's main dtype; "auto" does not change it. Tensors that the model
            has in another dtype, such as correction biases, are not cast.
        scope: how the run trained; adapters are merged into the weights. None: nothing was trained by LoRA.

    Raises:
        ConfigError: the target is in use, or the dtype is invalid.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the checkpoint cannot be written.

    """
    target, files_folder = Path(to), Path(files_folder)
    with new_folder(target, "checkpoint") as folder:
        state = MergedModel(files_folder, units, scope, _wanted_dtype(dtype))
        layout, tensors = converted_tensors(state)
        with WeightWriter(folder, layout) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        copy_files(files_folder, folder)
        write_config(files_folder, folder, state)
        check_checkpoint(folder)
    return target


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless the configuration and the weights of a folder can be read."""
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        found = set(WeightFiles(folder).names)
        index = folder / "model.safetensors.index.json"
        expected = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) if index.is_file() else found
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        raise CheckpointError(f"the written checkpoint cannot be read back: {error}") from error
    if not found or found != expected:
        raise CheckpointError(f"the written checkpoint has {len(found)} of {len(expected)} tensors")


def converted_tensors(
    state: MergedModel, only: Container[str] | None = None
) -> tuple[dict[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]:
    """Convert the parameters to the names and shapes of checkpoints, one group at a time.

    Returns meta tensors by name, and pairs of name and tensor. ``only``: names of tensors; others are not read.
    """
    mapping: Any = get_model_conversion_mapping(state.module, add_legacy=False)
    vars(state.module)["_weight_conversions"] = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    converted = _revert(state, state.empty)
    groups = [[name] for name in state.empty]
    if _shapes(_revert(state, {name: state.empty[name]}) for (name,) in groups) != _shapes([converted]):
        groups = list(_by_decoder_layer(state.empty))  # some parameters of a layer are fused in the checkpoint

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for group in groups:
            if only is None or any(
                name in only for name in _revert(state, {name: state.empty[name] for name in group})
            ):
                for name, tensor in _revert(state, {name: state.read(name) for name in group}).items():
                    if only is None or name in only:
                        yield name, tensor

    return {name: tensor for name, tensor in converted.items() if only is None or name in only}, tensors()


def _revert(state: MergedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = revert_weight_conversion(state.module, dict(tensors))
    return found


def _shapes(found: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for tensors in found for name, tensor in tensors.items()}


def _by_decoder_layer(names: Iterable[str]) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r"(?:.*?\.)??\d+\.", name)
        groups.setdefault(layer.group() if layer else name, []).append(name)
    yield from groups.values()


def _wanted_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if dtype == "auto":
        return None
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigError(f"dtype of a checkpoint must be float32, bfloat16 or float16; found {dtype!r}")
    return wanted


def copy_files(source: Path, target: Path) -> None:
    """Copy all files except weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, target / file.name)


def write_config(source: Path, target: Path, state: MergedModel) -> None:
    """Change config.json where it does not describe the written weights."""
    settings = read_config_file(source)
    changed = dict(settings)
    if state.dtype is not None:
        changed.pop("torch_dtype", None)
        changed["dtype"] = str(state.dtype).removeprefix("torch.")
    if not changed.get("architectures"):
        changed["architectures"] = [type(state.module).__name__]
    if changed != settings:
        (target / "config.json").write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
