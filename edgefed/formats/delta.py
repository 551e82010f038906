"""Write only the tensors that a run changed in its base checkpoint, and apply them to the base again, bit by bit.

The folder has the changed tensors (`WEIGHTS_FILE`), all files of the checkpoint that are not weights, and a manifest
(`DELTA_FILE`) with name, dtype, shape and SHA-256 of each tensor of the base and of the result. The result has the
same bytes as an exported checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from edgefed.embedded import resolve_model
from edgefed.errors import CheckpointError, ConfigError, StateCorrupt, first_line
from edgefed.formats import DELTA_FILE
from edgefed.formats.checkpoint import check_checkpoint, converted_tensors, copy_files, write_config
from edgefed.formats.weights import MergedModel, new_folder
from edgefed.hub import check_source
from edgefed.moe.expert_reading import raw_array
from edgefed.moe.file_tensors import value_of
from edgefed.moe.loading import find_folder, read_config_file
from edgefed.moe.units import ExpertSource, TrainScope, dtype_name, named_dtype
from edgefed.moe.weight_files import WeightFiles, WeightWriter

WEIGHTS_FILE = "delta.safetensors"
_ONE_FILE = 1 << 62
_REMEDY = "Copy the folder of the delta again, or export it again."


class DeltaTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor of the result. ``base``: SHA-256 of the base's tensor, None if it has none; ``result``: if changed."""

    name: str
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    base: str | None = None
    result: str | None = None


class DeltaManifest(msgspec.Struct, frozen=True):
    """What `DELTA_FILE` has. ``base``: name of the base model; ``tensors``: in the order of the result."""

    base: str
    tensors: tuple[DeltaTensor, ...]
    version: Literal[1] = 1


def export_delta(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    *,
    base: str,
    base_folder: str | Path | None = None,
    scope: TrainScope | None = None,
) -> Path:
    """Write what differs from the base checkpoint to the new folder ``to``, and return ``to``.

    Weights are read twice, one parameter at a time: to compare them, and to write those that differ.

    Args:
        units: reads every unit of the model, and its adapters if ``scope`` trains by LoRA.
        files_folder: config.json, tokenizer and all other files that are not weights; they are copied.
        to: the new folder; it must not exist or be empty.
        base: name of the base model, for the manifest.
        base_folder: the base checkpoint; None: ``base`` is its folder or its name on the hub.
        scope: how the run trained.

    Raises:
        ConfigError: the target is in use, or the base is quantized.
        ModelNotFound: the base is neither a folder nor available from the hub.
        CheckpointError: the base cannot be read; a unit is missing or does not fit.
        StorageError, DiskFull: the folder cannot be written.

    """
    files_folder = Path(files_folder)
    with new_folder(Path(to), "delta") as folder:
        before = _base_files(base_folder or base)
        state = MergedModel(files_folder, units, scope)
        layout, tensors = converted_tensors(state)
        found = {name: _compared(name, tensor, before) for name, tensor in tensors}
        manifest = DeltaManifest(base, tuple(found[name] for name in layout))
        changed = {entry.name for entry in manifest.tensors if entry.result}
        layout, tensors = converted_tensors(state, changed)
        with WeightWriter(folder, layout, _ONE_FILE) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        os.replace(folder / "model.safetensors", folder / WEIGHTS_FILE)
        copy_files(files_folder, folder)
        write_config(files_folder, folder, state)
        (folder / DELTA_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    return Path(to)


def apply_delta(delta: str | Path, to: str | Path, *, base_folder: str | Path | None = None) -> Path:
    """Write the checkpoint that a delta and its base make to the new folder ``to``, and return ``to``.

    ``base_folder``: the base checkpoint; None: the folder or name that the manifest has. Every tensor is checked.

    Raises:
        ConfigError: the target is in use, or the base is quantized.
        ModelNotFound: the base is neither a folder nor available from the hub.
        CheckpointError: the base is another one.
        StateCorrupt: the delta is damaged.
        StorageError, DiskFull: the folder cannot be written.

    """
    delta = Path(delta)
    manifest = read_manifest(delta)
    with new_folder(Path(to), "checkpoint") as folder:
        base = base_folder or manifest.base
        before = _base_files(base)
        layout = {entry.name: _empty(entry) for entry in manifest.tensors}
        with WeightWriter(folder, layout) as writer, _opened(delta / WEIGHTS_FILE) as changed:
            for entry in manifest.tensors:
                old = before.locate(entry.name) if entry.base and entry.name in before.names else None
                if entry.base and (old is None or _sha256(old) != entry.base):
                    raise CheckpointError(
                        f"{str(base)!r} is not the base of {str(delta)!r}: {entry.name!r} differs",
                        remedy="Name the checkpoint that the run began with, in its original version, by `base`.",
                    )
                writer.write(entry.name, _changed(entry, changed) if old is None or entry.result else old)
        copy_files(delta, folder)
        (folder / DELTA_FILE).unlink()
        check_checkpoint(folder)
    return Path(to)


def read_manifest(delta: Path) -> DeltaManifest:
    """Return the manifest of a delta. Raises StateCorrupt."""
    path = delta / DELTA_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=DeltaManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise StateCorrupt(f"cannot read {str(path)!r}: {first_line(error)}", remedy=_REMEDY) from error


def _base_files(base: str | Path) -> WeightFiles:
    source = resolve_model(str(base))
    check_source(source)
    folder = find_folder(source)
    if "quantization_config" in read_config_file(folder):
        raise ConfigError(
            f"cannot compare with {str(base)!r}: its weights are quantized, those of the run are not",
            remedy="Name the checkpoint that is not quantized by `base`, or export with `format=hf`.",
        )
    return WeightFiles(folder)


def _empty(entry: DeltaTensor) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=named_dtype(entry.dtype), device="meta")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads a tensor of a file of safetensors. Raises StateCorrupt, the function too."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise StateCorrupt(f"cannot read {str(path)!r}: {first_line(error)}", remedy=_REMEDY) from error

        def read(name: str) -> torch.Tensor:
            try:
                tensor: torch.Tensor = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                problem = f"cannot read {name!r} from {str(path)!r}: {first_line(error)}"
                raise StateCorrupt(problem, remedy=_REMEDY) from error
            return tensor

        yield read


def _changed(entry: DeltaTensor, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Read a tensor of the delta and check it. Raises StateCorrupt."""
    tensor = read(entry.name)
    if _sha256(tensor) != entry.result:
        raise StateCorrupt(f"{entry.name!r} of the delta is damaged: its SHA-256 differs", remedy=_REMEDY)
    return tensor


def _compared(name: str, tensor: torch.Tensor, before: WeightFiles) -> DeltaTensor:
    """The entry of a tensor of the result."""
    result = _sha256(tensor)
    entry = DeltaTensor(name, cast(Any, dtype_name(tensor.dtype)), tuple(tensor.shape), result=result)
    if name not in before.names:
        return entry
    old = before.locate(name)
    digest = _sha256(old)
    same = digest == result and old.dtype == tensor.dtype and old.shape == tensor.shape
    return msgspec.structs.replace(entry, base=digest, result=None if same else result)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(raw_array(value_of(tensor)).reshape(-1).view(np.uint8).data).hexdigest()
