"""The weight files of a checkpoint folder: safetensors, or PyTorch files where there is no safetensors file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edgefed.errors import CheckpointError, first_line

# (single file, index of several files), in the order in which transformers looks for them.
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,  # others are found by reading a tensor
}  # fmt: skip


class WeightFiles:
    """Tensors of a checkpoint by name, read one at a time. Raises CheckpointError for missing or broken files."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._loaded: dict[Path, dict[str, torch.Tensor]] = {}
        for path in _weight_files(folder):
            if path.suffix == ".safetensors":
                self._add_safetensors(path)
            else:
                self._add_pytorch(path)

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._file_of.keys()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point tensor; float32 if there is none."""
        return next((dtype for dtype, _ in self._shapes.values() if dtype.is_floating_point), torch.float32)

    def _add_safetensors(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    dtype = file.get_tensor(name).dtype if dtype is None else dtype
                    self._shapes[name] = dtype, tuple(part.get_shape())
                    self._file_of[name] = path
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the weights in {str(path)!r}: {first_line(error)}") from error

    def _add_pytorch(self, path: Path) -> None:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"cannot read the weights in {str(path)!r}: {first_line(error)}") from error
        self._loaded[path] = tensors
        for name, tensor in tensors.items():
            self._shapes[name] = tensor.dtype, tuple(tensor.shape)
            self._file_of[name] = path

    def empty(self, name: str) -> torch.Tensor:
        """Return a meta tensor of the dtype and shape of ``name``."""
        dtype, shape = self._shapes[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Return a tensor, or with ``row`` only this row, as (1, ...). Raises CheckpointError.

        A safetensors file is mapped anew for each call, so that its pages do not stay in this process's memory.
        """
        path = self._file_of[name]
        if path in self._loaded:
            tensor = self._loaded[path][name]
            return tensor if row is None else tensor[row : row + 1]
        try:
            with safe_open(path, framework="pt") as file:
                if row is not None:
                    found: torch.Tensor = file.get_slice(name)[row : row + 1]
                    return found
                whole: torch.Tensor = file.get_tensor(name)
                return whole
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name!r} from {str(path)!r}: {first_line(error)}") from error


def _weight_files(folder: Path) -> list[Path]:
    for single, index in _LAYOUTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                names = sorted(set(weight_map.values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"cannot read {str(folder / index)!r}: {first_line(error)}") from error
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(f"{str(folder)!r} lacks {len(missing)} weight files; the first is {missing[0]!r}")
            return [folder / name for name in names]
    raise CheckpointError(f"{str(folder)!r} has no weights: neither model.safetensors nor pytorch_model.bin")
