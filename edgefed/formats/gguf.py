"""Write a model as GGUF, the file format of llama.cpp and of the programs built on it.

Names of tensors and keys are those of the ``gguf`` package. What a graph of llama.cpp fixes, such as whether the router
normalizes its weights, is checked against the model, and a model that it would compute differently is refused. The
stacks of experts (E, 2 I, H) are split into gate and up (E, I, H); where llama.cpp rotates neighbouring channels, the
rows of the query and key projections are reordered from the two halves of transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgefed.errors import ConfigError
from edgefed.formats.gguf_metadata import REMEDY, Architecture, check_model, write_parameters
from edgefed.formats.gguf_tokenizer import write_tokenizer
from edgefed.formats.weights import MergedModel, new_folder
from edgefed.moe.units import ExpertSource, TrainScope

MODEL_FILE = "model.gguf"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""Data types of an export -> their names in GGML."""
_BLOCK = 32
"""Values of a block of Q8_0 and Q4_0; a row has whole blocks."""
_CHUNK_VALUES = 1 << 22
"""Values that are converted at a time."""
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
"""general.file_type: llama.cpp's llama_ftype."""


def export_gguf(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    *,
    dtype: str = "auto",
    scope: TrainScope | None = None,
    name: str | None = None,
    copied: tuple[str, ...] = (),
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a model, adapters merged, as ``model.gguf`` in the new folder ``to``, and return ``to``.

    Weights are read one expert at a time and converted in chunks. Norms, biases and routers are float32. Q4_0 stores
    the embedding and the output layer as Q8_0. Matrices whose rows are not whole blocks of 32 values are float16, which
    ``report`` is told.

    Args:
        units: reads every unit of the model, and its adapters if ``scope`` trains by LoRA.
        files_folder: config.json and the tokenizer; without a tokenizer the file has no vocabulary.
        to: the new folder; it must not exist or be empty.
        dtype: one of `TYPES`; "auto": the model's own.
        scope: how the run trained.
        name: name of the model in the file.
        copied: names of files in ``files_folder`` that are copied.
        report: called with a line of text.

    Raises:
        ConfigError: the target is in use, the dtype is invalid, gguf is not installed, or the file cannot hold the
            model or its tokenizer.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the file cannot be written.

    """
    gguf = load_gguf()
    target, files_folder = Path(to), Path(files_folder)
    with new_folder(target, "model") as folder:
        model = MergedModel(files_folder, units, scope)
        config: Any = model.module.config
        architecture = check_model(config, model.layers)
        kind = _kind(dtype, model.main_dtype)
        tensors = list(_tensors(model, architecture))
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
        writer.add_type("model")
        writer.add_name(name or files_folder.name)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_parameters(writer, config, architecture, gguf)
        write_tokenizer(writer, files_folder, rows=config.vocab_size)
        write_tensors(writer, folder / MODEL_FILE, tensors, kind, gguf, report)
        for file in copied:
            shutil.copyfile(files_folder / file, folder / file)
    return target


def load_gguf() -> Any:
    """Import the package gguf. Raises ConfigError."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "exporting GGUF needs the package gguf", remedy="Run `pip install 'edgefed[gguf]'`."
        ) from error


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its name, shape, and values in parts along the first dimension."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[torch.Tensor]]


def _tensors(model: MergedModel, architecture: Architecture) -> Iterator[GgufTensor]:
    """All tensors of the file, in the order in which they are written."""
    gguf = load_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], model.module.config.num_hidden_layers)
    transposed = {f"{layer.experts_path}.": layer.is_transposed for layer in model.layers}
    tied = "lm_head.weight" not in model.empty
    for full, empty in model.empty.items():
        path, own = re.sub(r"_bias$", ".bias", full), ""
        if full.endswith("e_score_correction_bias"):
            path = full.replace("_bias", ".bias")
        elif not path.endswith((".weight", ".bias")):
            path += ".weight"
        stacked = next((flag for prefix, flag in transposed.items() if full.startswith(prefix)), None)
        shape = tuple(empty.shape)

        def find(path: str, full: str = full) -> str:
            found = names.get_name(path, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise ConfigError(f"cannot export GGUF: no name for {full!r} of a {architecture.name}", remedy=REMEDY)
            return str(found)

        if stacked is not None:
            flip = stacked and len(shape) == 3
            if flip:
                shape = (shape[0], shape[2], shape[1])
            if "gate_up_proj" in full:
                for part, own in enumerate(("gate_proj", "up_proj")):
                    half = (shape[0], shape[1] // 2, *shape[2:])
                    read = _halves(model, full, part, flip, architecture.interleaved)
                    yield GgufTensor(find(path.replace("gate_up_proj", own)), half, read)
            else:
                yield GgufTensor(find(path), shape, _stack(model, full, flip))
        elif full.endswith("kv_b_proj.weight"):
            yield from _latent(model, full, find)
        else:
            yield GgufTensor(find(path), shape, _whole(model, full, architecture))
            if full == "model.embed_tokens.weight" and tied:
                yield GgufTensor("output.weight", shape, _whole(model, full, architecture))


def _halves(
    model: MergedModel, full: str, part: int, flip: bool, interleaved: bool
) -> Callable[[], Iterator[torch.Tensor]]:
    def read() -> Iterator[torch.Tensor]:
        for expert in model.parts(full):
            rows = expert.T if flip else expert
            half = rows[part::2] if interleaved else rows.chunk(2)[part]
            yield half.unsqueeze(0)

    return read


def _stack(model: MergedModel, full: str, flip: bool) -> Callable[[], Iterator[torch.Tensor]]:
    return lambda: ((expert.T if flip else expert).unsqueeze(0) for expert in model.parts(full))


def _whole(model: MergedModel, full: str, architecture: Architecture) -> Callable[[], Iterator[torch.Tensor]]:
    heads = architecture.rotated_heads(full, model.module.config)

    def read() -> Iterator[torch.Tensor]:
        tensor = model.read(full)
        if full.endswith("shared_expert_gate.weight"):
            tensor = tensor.flatten()
        yield rotated_rows(tensor, heads)

    return read


def rotated_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows in llama.cpp's order, (heads, 2, D / 2) -> (heads, D / 2, 2); as they are if ``heads`` is 0."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape) if heads else tensor


def _latent(model: MergedModel, full: str, find: Callable[[str], str]) -> Iterator[GgufTensor]:
    """The key and value halves of the projection of latent attention, the key transposed: (heads, latent, D)."""
    config: Any = model.module.config
    heads, key, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    latent = config.kv_lora_rank

    def split(part: int) -> torch.Tensor:
        return model.read(full).reshape(heads, key + value, latent)[:, slice(key) if part == 0 else slice(key, None)]

    yield GgufTensor(
        find(full.replace("kv_b_proj", "k_b_proj")), (heads, latent, key), lambda: iter([split(0).transpose(1, 2)])
    )
    yield GgufTensor(find(full.replace("kv_b_proj", "v_b_proj")), (heads, value, latent), lambda: iter([split(1)]))


def _kind(dtype: str, main: torch.dtype) -> str:
    """GGML's name of a data type of an export."""
    dtype = str(main).removeprefix("torch.") if dtype == "auto" else dtype
    if dtype not in TYPES:
        raise ConfigError(f"dtype of a GGUF file must be one of {', '.join(TYPES)}; found {dtype!r}")
    return TYPES[dtype]


def _stored(tensor: GgufTensor, kind: str) -> str:
    """The type in which a tensor is stored."""
    if len(tensor.shape) == 1 or "_norm." in tensor.name or "ffn_gate_inp" in tensor.name or ".bias" in tensor.name:
        return "F32"
    if kind == "Q4_0" and tensor.name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    return "F16" if kind.startswith("Q") and tensor.shape[-1] % _BLOCK else kind


def write_tensors(
    writer: Any, path: Path, tensors: list[GgufTensor], kind: str, gguf: Any, report: Callable[[str], None]
) -> None:
    """Write a file whose metadata ``writer`` has. ``kind``: GGML's name of a data type; see `export_gguf`."""
    types = {tensor.name: gguf.GGMLQuantizationType[_stored(tensor, kind)] for tensor in tensors}
    odd = [tensor for tensor in tensors if kind.startswith("Q") and types[tensor.name].name == "F16"]
    if odd:
        report(
            f"{len(odd)} of {len(tensors)} tensors are float16 instead of {kind}: their rows are not whole blocks of "
            f"{_BLOCK} values; the first is {odd[0].name!r} with rows of {odd[0].shape[-1]}"
        )
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[types[tensor.name]]
        nbytes = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, types[tensor.name])
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            start = file.tell()
            for part in tensor.parts():
                for values in _chunks(part):
                    file.write(np.ascontiguousarray(gguf.quants.quantize(values, types[tensor.name])).data)
            writer.write_padding(file, file.tell() - start)
    finally:
        writer.close()


def _chunks(tensor: torch.Tensor) -> Iterator[npt.NDArray[np.float32]]:
    """Values in float32, some rows at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    step = max(1, _CHUNK_VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step].float().contiguous().numpy()
