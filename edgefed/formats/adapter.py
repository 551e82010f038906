"""Write what a run trained as a PEFT adapter, which ``peft.PeftModel.from_pretrained`` loads on the base model.

PEFT adapts the weight of a linear layer by ``target_modules`` and any other parameter, such as the stacked experts of
transformers, by ``target_parameters``. Of the adapters A_e (R, in) and B_e (out, R) of the experts e = 0 ... E - 1:

    lora_A.weight   (E R, in)    row e R + r is row r of A_e
    lora_B.weight   (out, R E)   column r E + e is column r of B_e

Parameters of one module are wrapped one in the other, the first one innermost, and each inner one has one more
``base_layer`` in its name. Routers and attention weights that were trained in full are ``modules_to_save``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from edgefed.errors import ConfigError
from edgefed.formats.weights import new_folder
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.expert_reading import read_adapter
from edgefed.moe.loading import build_skeleton, load_config
from edgefed.moe.units import (
    ADAPTER_DTYPE,
    LORA_SUFFIX,
    ExpertSource,
    FixedTensors,
    TensorPlace,
    TrainScope,
    check_tensors,
    find_fixed_tensors,
)
from edgefed.moe.weight_files import WeightWriter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ONE_FILE = 1 << 62
"""Bytes of a shard: PEFT reads one file."""


def export_adapter(
    units: ExpertSource,
    files_folder: str | Path,
    to: str | Path,
    *,
    scope: TrainScope,
    base: str,
    copied: tuple[str, ...] = (),
) -> Path:
    """Write what a run trained as a PEFT adapter of its base model, and return ``to``.

    The folder appears complete or not at all. Weights are written one at a time. The tokenizer is left out: PEFT would
    resize the embeddings of the base model to it.

    Args:
        units: reads adapters, and the routers and attention weights that were trained in full.
        files_folder: has the config.json of the base model.
        to: the new folder; it must not exist or be empty.
        scope: how the run trained.
        base: name or folder of the base model, for adapter_config.json.
        copied: names of files in ``files_folder`` that are copied.

    Raises:
        ConfigError: the target is in use, or a PEFT adapter cannot hold what the run trained.
        CheckpointError: a unit is missing or does not fit.
        StorageError, DiskFull: the adapter cannot be written.

    """
    check_scope(scope)
    target, files_folder = Path(to), Path(files_folder)
    with new_folder(target, "adapter") as folder:
        adapter = _Adapter(files_folder, units, scope)
        weights = {name: weight.empty() for name, weight in adapter.weights.items()}
        with WeightWriter(folder, weights, _ONE_FILE) as writer:
            for name, weight in adapter.weights.items():
                writer.write(name, weight.read())
        os.replace(folder / "model.safetensors", folder / WEIGHTS_FILE)
        text = json.dumps(adapter.config(base), indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        for name in copied:
            shutil.copyfile(files_folder / name, folder / name)
    return target


def check_scope(scope: TrainScope, what: str = "a PEFT adapter") -> None:
    """Raise ConfigError if ``what`` cannot hold what a run trains."""
    if scope.experts == "full" or not scope.uses_lora:
        trained = "its experts in full" if scope.experts == "full" else "no part by LoRA"
        raise ConfigError(
            f"cannot export {what}: this run trained {trained}",
            remedy="Export with `format=hf`. A run that was served with `train_experts=lora` has adapters.",
        )


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A tensor of the adapter, computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    def empty(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class _Adapter:
    """Names and tensors of a PEFT adapter. ``weights``: by their names in its file."""

    def __init__(self, folder: Path, units: ExpertSource, scope: TrainScope):
        self.module: nn.Module = build_skeleton(load_config(folder))
        self.weights: dict[str, _Weight] = {}
        self._units, self._scope = units, scope
        self._modules: set[str] = set()
        self._parameters: set[str] = set()
        self._saved: set[str] = set()
        layers = discover_layers(self.module)
        fixed = find_fixed_tensors(self.module, layers)
        for unit in fixed.values():
            mode = unit.mode(scope)
            if mode == "lora":
                self._add_fixed(unit)
            elif mode == "full":
                path = unit.key if unit.unit.kind == "router" else unit.key.rpartition(".")[0]
                self._add_saved(path, fixed)
        if scope.experts == "lora":
            for layer in layers:
                self._add_experts(layer)

    def config(self, base: str) -> dict[str, object]:
        """Return the contents of adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self._scope.lora_rank,
            "lora_alpha": self._scope.lora_alpha,
            "use_rslora": self._scope.lora_scaling == "rank_stabilized",
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self._modules),
            "target_parameters": sorted(self._parameters) or None,
            "modules_to_save": sorted(self._saved) or None,
        }

    def _add_fixed(self, unit: FixedTensors) -> None:
        """Add the adapter of a router or of an attention weight."""
        for name, place in unit.matrices.items():
            _check_single(place)
            path, _, parameter = place.full_name.rpartition(".")
            size_in, size_out = unit.matrix_sizes()[name]

            def read(part: str, unit: FixedTensors = unit, name: str = name) -> torch.Tensor:
                key = unit.key + LORA_SUFFIX
                tensors = self._units.read(key)
                shapes: dict[str, tuple[int, ...]] = {}
                for own, (own_in, own_out) in unit.matrix_sizes().items():
                    shapes[f"{own}.lora_a"] = (self._scope.lora_rank, own_in)
                    shapes[f"{own}.lora_b"] = (own_out, self._scope.lora_rank)
                check_tensors(key, tensors, shapes)
                return tensors[f"{name}.{part}"]

            self._add(path, parameter, 0, (size_in, size_out), 1, read)

    def _add_experts(self, layer: ExpertLayer) -> None:
        for position, parameter in enumerate(layer.matrices):

            def read(part: str, name: str = parameter.name) -> torch.Tensor:
                rank = self._scope.lora_rank
                experts = range(layer.num_experts)
                found = [read_adapter(layer, expert, self._units, rank)[f"{name}.{part}"] for expert in experts]
                return torch.cat(found) if part == "lora_a" else torch.stack(found, -1).flatten(1)

            depth = len(layer.matrices) - 1 - position
            sizes = layer.input_output_sizes(parameter)
            self._add(layer.experts_path, parameter.name, depth, sizes, layer.num_experts, read)

    def _add(
        self, path: str, parameter: str, depth: int, sizes: tuple[int, int], stacked: int,
        read: Callable[[str], torch.Tensor],
    ) -> None:  # fmt: skip
        """Add one adapter. ``depth``: how many wrappers of the module are around it."""
        is_linear = isinstance(self.module.get_submodule(path), nn.Linear)
        if is_linear:
            self._modules.add(_in_layer(path))
        else:
            self._parameters.add(_in_layer(f"{path}.{parameter}"))
        prefix = _PREFIX + path + ".base_layer" * depth
        size_in, size_out = sizes
        rows = self._scope.lora_rank * stacked
        self.weights[f"{prefix}.lora_A.weight"] = _Weight((rows, size_in), ADAPTER_DTYPE, lambda: read("lora_a"))
        self.weights[f"{prefix}.lora_B.weight"] = _Weight((size_out, rows), ADAPTER_DTYPE, lambda: read("lora_b"))

    def _add_saved(self, path: str, fixed: dict[str, FixedTensors]) -> None:
        """Add all tensors of a module."""
        self._saved.add(_in_layer(path))
        for unit in fixed.values():
            for name, place in unit.places.items():
                if place.full_name.startswith(f"{path}."):
                    _check_single(place)
                    tensor = self._units.read(unit.key)[name]

                    def read(unit: FixedTensors = unit, name: str = name) -> torch.Tensor:
                        return self._units.read(unit.key)[name]

                    self.weights[_PREFIX + place.full_name] = _Weight(tuple(tensor.shape), tensor.dtype, read)


def _in_layer(name: str) -> str:
    """Return a name without the path of its decoder layer; PEFT then finds it in every layer."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _check_single(place: TensorPlace) -> None:
    if len(place.owners) > 1:
        raise ConfigError(
            f"cannot export a PEFT adapter: {place.full_name!r} is shared by {len(place.owners)} modules",
            remedy="Export with `format=hf`.",
        )
