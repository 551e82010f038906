"""Write what a run trained by LoRA as a GGUF adapter, which llama.cpp adds to a GGUF file of the base model.

Of each adapted matrix the file has ``<matrix>.lora_a`` (R, in) and ``<matrix>.lora_b`` (out, R), of experts the stacks
(E, R, in) and (E, out, R). The gate and up halves of an expert have the same A and half the rows of B each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from edgefed.errors import ConfigError
from edgefed.formats.adapter import check_scope
from edgefed.formats.gguf import GgufTensor, load_gguf, rotated_rows, write_tensors
from edgefed.formats.gguf_metadata import Architecture, check_model
from edgefed.formats.weights import new_folder
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.expert_reading import read_adapter
from edgefed.moe.file_tensors import value_of
from edgefed.moe.loading import build_skeleton, load_config
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, TrainScope, find_fixed_tensors

ADAPTER_FILE = "adapter.gguf"
_REMEDY = "Export with `format=gguf`, which merges the adapters into the model."


def export_gguf_adapter(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    *,
    scope: TrainScope,
    name: str | None = None,
    copied: tuple[str, ...] = (),
) -> Path:
    """Write what a run trained as ``adapter.gguf`` in the new folder ``to``, and return ``to``. Values are float32.

    Args:
        units: reads the adapters.
        files_folder: has the config.json of the base model.
        to: the new folder; it must not exist or be empty.
        scope: how the run trained.
        name: name of the adapter in the file.
        copied: names of files in ``files_folder`` that are copied.

    Raises:
        ConfigError: the target is in use, gguf is not installed, llama.cpp does not know the model, or the run trained
            a part in full, or one that llama.cpp stores in another form.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the file cannot be written.

    """
    gguf = load_gguf()
    check_adapter_scope(scope)
    target, files_folder = Path(to), Path(files_folder)
    with new_folder(target, "adapter") as folder:
        module: Any = build_skeleton(load_config(files_folder))
        layers = discover_layers(module)
        architecture = check_model(module.config, layers)
        kind = gguf.MODEL_ARCH[architecture.name]
        names = gguf.get_tensor_name_map(kind, module.config.num_hidden_layers)

        def find(path: str) -> str:
            found = names.get_name(path, try_suffixes=(".weight",))
            if found is None or ".kv_b_proj." in path:
                raise ConfigError(f"cannot export a GGUF adapter: llama.cpp does not adapt {path!r}", remedy=_REMEDY)
            return str(found)

        tensors: list[GgufTensor] = []
        for unit in find_fixed_tensors(module, layers).values():
            if unit.mode(scope) == "lora":
                for own, place in unit.matrices.items():
                    heads = architecture.rotated_heads(place.full_name, module.config)
                    sizes = unit.matrix_sizes()[own]
                    tensors += _matrix(units, unit.key, own, find(place.full_name), sizes, scope.lora_rank, heads)
        if scope.experts == "lora":
            for layer in layers:
                tensors += _experts(units, layer, find, scope.lora_rank, architecture)
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[kind])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name or files_folder.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp divides by the rank, whatever the scaling of the run.
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scope.lora_scale * scope.lora_rank)
        write_tensors(writer, folder / ADAPTER_FILE, tensors, "F32", gguf, lambda text: None)
        for file in copied:
            shutil.copyfile(files_folder / file, folder / file)
    return target


def check_adapter_scope(scope: TrainScope) -> None:
    """Raise ConfigError if a GGUF adapter cannot hold what a run trains."""
    check_scope(scope, "a GGUF adapter")
    full = [part for part in ("router", "attention") if getattr(scope, part) == "full"]
    if full:
        raise ConfigError(f"cannot export a GGUF adapter: this run trained its {full[0]} in full", remedy=_REMEDY)


def _matrix(
    units: ExpertSource, key: str, own: str, name: str, sizes: tuple[int, int], rank: int, heads: int
) -> Iterator[GgufTensor]:
    """The adapter of a router or of an attention weight; rows of rotated heads are reordered as in the model."""

    def lora_a() -> Iterator[torch.Tensor]:
        yield value_of(units.read(key + LORA_SUFFIX)[f"{own}.lora_a"])

    def lora_b() -> Iterator[torch.Tensor]:
        yield rotated_rows(value_of(units.read(key + LORA_SUFFIX)[f"{own}.lora_b"]), heads)

    yield GgufTensor(f"{name}.lora_a", (rank, sizes[0]), lora_a)
    yield GgufTensor(f"{name}.lora_b", (sizes[1], rank), lora_b)


def _experts(
    units: ExpertSource, layer: ExpertLayer, find: Callable[[str], str], rank: int, architecture: Architecture
) -> Iterator[GgufTensor]:
    """The adapters of a layer's experts."""
    count = layer.num_experts
    for parameter in layer.matrices:
        size_in, size_out = layer.input_output_sizes(parameter)
        halves = ("gate_proj", "up_proj") if parameter.name == "gate_up_proj" else (parameter.name,)
        for half, own in enumerate(halves):
            name = find(f"{layer.experts_path}.{own}.weight")

            def lora_a(stack: str = parameter.name) -> Iterator[torch.Tensor]:
                for expert in range(count):
                    yield value_of(read_adapter(layer, expert, units, rank)[f"{stack}.lora_a"])

            def lora_b(
                stack: str = parameter.name, half: int = half, parts: int = len(halves)
            ) -> Iterator[torch.Tensor]:
                for expert in range(count):
                    rows = value_of(read_adapter(layer, expert, units, rank)[f"{stack}.lora_b"])
                    yield rows[half::parts] if architecture.interleaved else rows.chunk(parts)[half]

            yield GgufTensor(f"{name}.lora_a", (count, rank, size_in), lora_a)
            yield GgufTensor(f"{name}.lora_b", (count, size_out // len(halves), rank), lora_b)
