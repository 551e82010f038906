"""The weight files of a checkpoint folder, read and written one tensor at a time.

`WeightFiles` reads safetensors files, or PyTorch files if there are no safetensors files; a weight that bitsandbytes
quantized is read as if it were not (`edgefed.moe.bitsandbytes_weights`). `WeightWriter` writes
safetensors files (https://huggingface.co/docs/safetensors) whose layout is known beforehand.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from edgefed.disk import copy_range, sync_file, write_all
from edgefed.errors import CheckpointError, first_line
from edgefed.moe.bitsandbytes_weights import find_quantized
from edgefed.moe.expert_reading import raw_array
from edgefed.moe.file_tensors import FileSpace, FileTensor, value_of
from edgefed.moe.units import dtype_name

# (single file, index of several files), in the order in which transformers looks for them.
_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".index.json")
"""Ends of the names of files with weights."""
MAX_SHARD_BYTES = 5_000_000_000
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
        self._starts: dict[str, int] = {}
        self._space = FileSpace()
        for path in _weight_files(folder):
            if path.suffix == ".safetensors":
                self._add_safetensors(path)
            else:
                self._add_pytorch(path)
        self._quantized, parts = find_quantized(self._shapes, self._read_bytes)
        self._names = [name for name in self._file_of if name not in parts]

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors; those that only serve to dequantize another one are left out."""
        return self._names

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point tensor that is not quantized; float32 if there is none."""
        dtypes = (self._shapes[name][0] for name in self._names if name not in self._quantized)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def _add_safetensors(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    dtype = file.get_tensor(name).dtype if dtype is None else dtype
                    self._shapes[name] = dtype, tuple(part.get_shape())
                    self._file_of[name] = path
            self._starts |= _tensor_starts(path)
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
        quantized = self._quantized.get(name)
        dtype, shape = self._shapes[name] if quantized is None else (quantized.dtype, quantized.shape)
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Return a tensor, or with ``row`` only this row, as (1, ...). Raises CheckpointError.

        A safetensors file is mapped anew for each call, so that its pages do not stay in this process's memory.
        """
        if name in self._quantized:
            return self._quantized[name].dequantize(self._read_bytes, row)
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

    def locate(self, name: str) -> torch.Tensor:
        """Return a tensor whose values are read when an operation needs them, where its file has that format."""
        dtype, shape = self._shapes[name]
        if name not in self._starts or name in self._quantized:
            return self.read(name)
        return self._space.tensor(self._file_of[name], self._starts[name], dtype, shape)

    def _read_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return the bytes from ``start`` to ``stop`` of a tensor, (stop - start,) uint8. Raises CheckpointError."""
        path = self._file_of[name]
        if path in self._loaded:
            return self._loaded[path][name].contiguous().view(-1).view(torch.uint8)[start:stop]
        return value_of(self._space.tensor(path, self._starts[name] + start, torch.uint8, (stop - start,)))


def _tensor_starts(path: Path) -> dict[str, int]:
    """First byte of each tensor of a safetensors file, which safetensors has checked."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


class WeightWriter:
    """Writes the tensors of a checkpoint in any order. A context; ``tensors`` has their dtypes and shapes by name.

    A file has at most ``max_shard_bytes`` (default `MAX_SHARD_BYTES`), or one tensor. Leaving the context without an
    error syncs the files, and raises CheckpointError if a tensor was not written. Raises OSError.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int | None = None):
        self._expected = dict(tensors)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files = contextlib.ExitStack()
        self._opened: list[BinaryIO] = []
        shards = _shards(tensors, max_shard_bytes or MAX_SHARD_BYTES)
        weight_map: dict[str, str] = {}
        with contextlib.ExitStack() as files:
            for number, names in enumerate(shards, start=1):
                single = len(shards) == 1
                name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
                file = files.enter_context(open(folder / name, "wb", buffering=0))
                self._opened.append(file)
                self._add_file(file, names)
                weight_map |= dict.fromkeys(names, name)
            self._files = files.pop_all()
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _add_file(self, file: BinaryIO, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, offsets = 0, {}
        # Larger elements first: every tensor is then aligned to the size of its elements.
        for name in sorted(names, key=lambda name: (-self._expected[name].element_size(), name)):
            tensor = self._expected[name]
            end = offset + tensor.nbytes
            header[name] = {
                "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [offset, end]
            }  # fmt: skip
            offsets[name], offset = offset, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        write_all(file, len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        for name, start in offsets.items():
            self._places[name] = file, 8 + len(text) + start

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._files:
            if kind is None:
                for file in self._opened:
                    sync_file(file)
        if kind is None and self._places:
            raise CheckpointError(f"{len(self._places)} tensors were not written; the first is {min(self._places)!r}")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor. Raises CheckpointError if its dtype or shape is not the expected one."""
        expected = self._expected[name]
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            raise CheckpointError(
                f"{name!r} must be {expected.dtype} {tuple(expected.shape)}; found {tensor.dtype} {tuple(tensor.shape)}"
            )
        file, offset = self._places.pop(name)
        file.seek(offset)
        if isinstance(tensor, FileTensor):
            for part in tensor.ranges:
                copy_range(part, file)
        elif tensor.numel():
            write_all(file, raw_array(tensor).reshape(-1).view(np.uint8).data)


def _shards(tensors: Mapping[str, torch.Tensor], max_bytes: int) -> list[list[str]]:
    """Distribute the tensors over files in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


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
