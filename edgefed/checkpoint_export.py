"""Writes the global model as an ordinary Hugging Face checkpoint that transformers loads without edgefed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from edgefed.errors import CheckpointError, ConfigError, DiskFull, StorageError
from edgefed.moe.loading import without_progress_bars
from edgefed.moe.model import MoeModel
from edgefed.moe.units import ExpertSource, TrainScope

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def export_checkpoint(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    dtype: str | torch.dtype = "auto",
    scope: TrainScope | None = None,
) -> Path:
    """Write all units as a checkpoint folder.

    Args:
        units: reads every unit of the model, and its adapters where ``scope`` says that there are any.
        files_folder: config.json, tokenizer and whatever else lies beside the weights; copied.
        to: the new folder; must not exist, or be empty.
        dtype: of the weights that have the model's main dtype; "auto" keeps it. Tensors that the model keeps in
            another dtype (correction biases) stay as they are.
        scope: how the run trained; adapters are merged into the weights. None: nothing was trained by LoRA.

    The folder appears complete or not at all: it is written beside its place and renamed. Needs the memory of the
    full model. Returns ``to``. Raises ConfigError (target in use), CheckpointError (a unit is missing or does not
    fit), StorageError, DiskFull.

    """
    target, files_folder = Path(to), Path(files_folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"cannot export to {str(target)!r}: it exists and is not an empty folder")
    model = MoeModel.skeleton(files_folder)
    for spec in model.unit_infos():
        if spec.kind != "expert":
            model.load_unit(spec.key, units.read(spec.key))
    model.restore(units, scope)
    if dtype != "auto":
        _cast(model, dtype)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with without_progress_bars():
            model.module.save_pretrained(temporary)
        _copy_files(files_folder, temporary)
        _check(temporary)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:  # safetensors reports a failed write as an error of its own
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        kind = DiskFull if full else StorageError
        raise kind(f"cannot write the checkpoint to {str(target)!r}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _cast(model: MoeModel, dtype: str | torch.dtype) -> None:
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise ConfigError(f"a checkpoint can be float32, bfloat16 or float16; asked for {dtype!r}")
    main = model.dtype
    for parameter in model.module.parameters():
        if parameter.dtype == main:
            parameter.data = parameter.data.to(wanted)
    model.config.dtype = wanted


def _copy_files(source: Path, target: Path) -> None:
    """Copy what lies beside the weights, except what save_pretrained has just written."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _check(folder: Path) -> None:
    """Raise CheckpointError unless config and weights can be read back and belong together."""
    try:
        AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        index = folder / "model.safetensors.index.json"
        expected: set[str] | None = None
        names = ["model.safetensors"]
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            expected, names = set(weight_map), sorted(set(weight_map.values()))
        found: set[str] = set()
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                found |= set(file.keys())
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint that was written cannot be read back: {error}") from error
    if not found or (expected is not None and found != expected):
        raise CheckpointError(f"the checkpoint that was written holds {len(found)} of {len(expected or ())} tensors")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
