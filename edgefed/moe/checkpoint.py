"""Read a Hugging Face checkpoint in pieces, so that the whole model is never in memory.

    checkpoint = Checkpoint(folder)
    checkpoint.tensor("model.embed_tokens.weight")     # one parameter of the transformers model
    checkpoint.expert(layer, 3)                        # the tensors of one expert
    checkpoint.read("model.layers.0.mlp.experts.3")    # a unit by its key: a checkpoint is an `ExpertSource`

transformers stores some weights differently in files and in memory: it renames them, stacks experts, fuses or splits
projections, and dequantizes MXFP4 and FP8 weights. The conversion of each architecture is defined in transformers
(`transformers.conversion_mapping`). This module applies the same operations to one parameter at a time, and for experts
to one row of a stack where the operations allow it. Which parameters a conversion produces, and their shapes, is found
by running it on meta tensors, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from edgefed.errors import CheckpointError, first_line
from edgefed.moe import adapters, units
from edgefed.moe.architecture import ExpertLayer, discover_layers
from edgefed.moe.loading import build_skeleton, find_folder, load_config, read_config_file, take_quantizer
from edgefed.moe.units import TrainScope
from edgefed.moe.weight_files import WEIGHT_SUFFIXES, WeightFiles
from edgefed.protocol.messages import UnitInfo

MAX_FILE_BYTES = 64 * 1024 * 1024
"""Largest file beside the weights that travels with a model."""
# Buffers of old checkpoints that models compute themselves.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$")
# Number of multi-token-prediction layers in configurations; such layers are never loaded.
_PREDICTION_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


@dataclasses.dataclass
class _Conversion:
    """One application of a transform: tensors of the checkpoint become parameters of the model."""

    name: str
    """First parameter that it produces."""
    transform: Any
    sources: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Names in the checkpoint by the pattern that matched them, in natural order."""


class Checkpoint:
    """A checkpoint in a local folder or on the hub.

    ``dtype`` is the dtype of the weights; "auto" uses that of the configuration, or else of the files. With
    ``in_files``, tensors stay in their files until an operation needs their values (`edgefed.moe.file_tensors`).

    Attributes:
        folder: local folder of the files.
        config: configuration of the model, without quantization, corrected where the weights differ from it.
        module: the transformers model on the meta device, with real buffers.
        layers: its MoE layers.
        unused: names in the checkpoint that the model does not use, such as vision or multi-token-prediction weights.
        changes: settings of config.json that do not describe the loaded model, with their corrected values; None
            removes the setting.

    Raises:
        ModelNotFound: there is no checkpoint.
        UnsupportedArchitecture: edgefed cannot use its experts. Checked before any weight file is opened.
        CheckpointError: weights are missing, have other shapes than configured, or are quantized in an unsupported way.

    """

    def __init__(self, source: str | Path, dtype: str | torch.dtype = "auto", *, in_files: bool = False):
        self._in_files = in_files
        self.config: PretrainedConfig = load_config(source)
        self.changes: dict[str, Any] = {}
        if getattr(self.config, "quantization_config", None) is not None:
            self.changes["quantization_config"] = None
        self._quantizer = take_quantizer(self.config)
        discover_layers(build_skeleton(self.config, dtype))
        self.folder = find_folder(source)
        self._files = WeightFiles(self.folder)
        if dtype == "auto" and self.config.dtype is None:
            self.changes["dtype"] = str(self._files.dtype).removeprefix("torch.")
            dtype = self._files.dtype
            self.config.dtype = dtype
        self.module: PreTrainedModel = build_skeleton(self.config, dtype, keep_float32=True)
        self._conversions = self._find_conversions()
        if self._untie():
            self.module = build_skeleton(self.config, dtype, keep_float32=True)
            self._conversions = self._find_conversions()
        self.layers: tuple[ExpertLayer, ...] = discover_layers(self.module)
        self._whole: tuple[str, dict[str, torch.Tensor]] | None = None
        self._rowwise: dict[str, bool] = {}
        self._fixed = units.find_fixed_tensors(self.module, self.layers)
        self._layer_of = {layer.experts_path: layer for layer in self.layers}
        self._producers = self._find_producers()
        self._check_complete()
        self._drop_prediction_layers()

    def _find_conversions(self) -> dict[str, _Conversion]:
        """Assign each tensor of the checkpoint to a conversion, as transformers does when it loads a model."""
        mapping: list[Any] = get_model_conversion_mapping(self.module, hf_quantizer=self._quantizer)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = self.module.state_dict()
        prefix = self.module.base_model_prefix
        conversions: dict[str, _Conversion] = {}
        self.unused: list[str] = []
        for key in sorted(self._files.names, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if name not in state:
                if not _COMPUTED.search(key):
                    self.unused.append(key)
                continue
            if name not in conversions:
                transform = WeightRenaming(key, name) if pattern is None else by_pattern[pattern]
                conversions[name] = _Conversion(name, transform)
            conversions[name].sources.setdefault(key if pattern is None else pattern, []).append(key)
        return conversions

    def _untie(self) -> bool:
        """Untie the output embedding if the checkpoint has a different tensor for it than for the input embedding."""
        tied = False
        names: dict[int, list[str]] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        for group in names.values():
            found = [self._conversions[name] for name in group if name in self._conversions]
            if len(found) > 1:
                first, *others = (self._convert(conversion)[conversion.name] for conversion in found)
                tied |= any(not torch.equal(first, other) for other in others)
        if tied:
            for config in {id(c): c for c in (self.config, self.config.get_text_config())}.values():
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
            self.changes["tie_word_embeddings"] = False
        return tied

    def _find_producers(self) -> dict[str, _Conversion]:
        """Map each parameter to its conversion, by running all conversions on meta tensors."""
        state = self.module.state_dict()
        producers: dict[str, _Conversion] = {}
        for conversion in self._conversions.values():
            try:
                produced = self._convert(conversion, meta=True)
            except CheckpointError:  # an operation that needs values
                producers[conversion.name] = conversion
                continue
            for name, tensor in produced.items():
                if name in state and tensor.shape != state[name].shape:
                    raise CheckpointError(
                        f"{str(self.folder)!r} does not fit its config.json: {name!r} must have shape "
                        f"{tuple(state[name].shape)}; found {tuple(tensor.shape)}"
                    )
                producers[name] = conversion
        return producers

    def _check_complete(self) -> None:
        groups: dict[int, list[str]] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), []).append(name)
        for group in groups.values():  # one tensor serves all names that share it
            found = next((self._producers[name] for name in group if name in self._producers), None)
            if found is not None:
                self._producers.update((name, found) for name in group if name not in self._producers)
        missing = sorted(name for group in groups.values() for name in group if name not in self._producers)
        if missing:
            raise CheckpointError(
                f"{str(self.folder)!r} lacks {len(missing)} tensors of the model; the first is {missing[0]!r}"
            )

    def _drop_prediction_layers(self) -> None:
        if self.unused:
            for config in (self.config, self.config.get_text_config(), self.module.config):
                for setting in _PREDICTION_LAYERS:
                    if getattr(config, setting, None):
                        setattr(config, setting, 0)
                        self.changes[setting] = 0

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embedding."""
        embedding: Any = self.module.get_input_embeddings()
        return int(embedding.num_embeddings)

    def settings(self) -> dict[str, Any]:
        """Return the contents of a config.json for the model: the checkpoint's own settings with `changes` applied."""
        raw = read_config_file(self.folder)
        if raw.get("model_type") == self.module.config.model_type:
            found = dict(raw)
        else:  # the language model of a composite model
            found = json.loads(self.module.config.to_json_string())
        parts = [found, *(part for part in found.values() if isinstance(part, dict))]
        for part in parts:
            for name, value in self.changes.items():
                if value is None:
                    part.pop(name, None)
                elif part is found or name in part:
                    part[name] = value
        if type(self.module).__name__ not in (found.get("architectures") or ()):
            found["architectures"] = [type(self.module).__name__]
        return found

    def other_files(self) -> list[Path]:
        """Return the files of the checkpoint that are neither weights nor config.json, sorted by name.

        Processors of images, audio or video are left out if only the language model of a composite model is loaded.
        Hidden files, subfolders and files above `MAX_FILE_BYTES` are left out too.
        """
        is_part = read_config_file(self.folder).get("model_type") != self.module.config.model_type
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and path.name != "config.json"
            and not path.name.startswith(".")
            and not path.name.endswith(WEIGHT_SUFFIXES)
            and not (is_part and path.name.endswith("processor_config.json"))
            and path.stat().st_size <= MAX_FILE_BYTES
        ]

    def unused_summary(self) -> str:
        """Describe the weights that are not loaded, grouped by module; empty if all are loaded."""
        if not self.unused:
            return ""
        groups: dict[str, int] = {}
        for name in self.unused:
            start = re.match(r"(?:.*?\.)??\d+(?=\.)|(?:model\.)?[^.]+", name)
            groups[start.group() if start else name] = groups.get(start.group() if start else name, 0) + 1
        shown = [f"{group}.* ({count})" for group, count in sorted(groups.items())[:4]]
        rest = f" and {len(groups) - 4} more modules" if len(groups) > 4 else ""
        return (
            f"{len(self.unused)} tensors of the checkpoint do not belong to the language model and are left out, also "
            f"of exported checkpoints: {', '.join(shown)}{rest}"
        )

    def _convert(
        self, conversion: _Conversion, *, row: int | None = None, meta: bool = False
    ) -> dict[str, torch.Tensor]:
        """Run a conversion, for one row of the expert dimension with ``row``. Raises CheckpointError."""
        transform = conversion.transform
        transform.collected_tensors.clear()
        is_module_list = row is not None and any("*" in pattern for pattern in conversion.sources)
        target_dtype = self._target_dtype(conversion)
        for pattern, keys in conversion.sources.items():
            chosen = [keys[row]] if is_module_list and row is not None else keys
            for key in chosen:
                part = None if row is None or is_module_list else row
                transform.add_tensor(conversion.name, key, pattern, self._loader(key, target_dtype, part, meta))
        try:
            with torch.no_grad():
                found = transform.convert(conversion.name, model=self.module, config=self.module.config)
        except CheckpointError:
            raise
        except Exception as error:  # conversions of transformers may raise anything
            raise CheckpointError(
                f"cannot convert {conversion.name!r} of {str(self.folder)!r}: {first_line(error)}"
            ) from error
        finally:
            transform.collected_tensors.clear()
            transform.layer_targets.clear()
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def _loader(self, key: str, dtype: torch.dtype | None, row: int | None, meta: bool) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            if meta:
                tensor = self._files.empty(key)
            elif self._in_files:
                tensor = self._files.locate(key)
                tensor = tensor if row is None else tensor[row : row + 1]
            else:
                tensor = self._files.read(key, row)
            return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

        return load

    def _target_dtype(self, conversion: _Conversion) -> torch.dtype | None:
        """Dtype to which sources are cast; None for the inputs of a dequantization."""
        if any(
            getattr(operation, "hf_quantizer", None) for operation in getattr(conversion.transform, "operations", ())
        ):
            return None
        module, _, name = conversion.name.rpartition(".")
        tensor: torch.Tensor = getattr(self.module.get_submodule(module), name)
        return tensor.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return one parameter or persistent buffer of the transformers model. Raises CheckpointError."""
        conversion = self._producers[name]
        if self._whole is None or self._whole[0] != conversion.name:
            self._whole = None  # free the old one before the new one is read
            self._whole = conversion.name, self._convert(conversion)
        found = self._whole[1]
        return found[name if name in found else conversion.name]

    def release(self) -> None:
        """Free the tensors of the last conversion."""
        self._whole = None

    def expert(self, layer: ExpertLayer, expert: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one expert by name. Raises CheckpointError."""
        tensors = {}
        for parameter in layer.parameters:
            name = f"{layer.experts_path}.{parameter.name}"
            tensors[parameter.name] = self._row(name, expert, layer.num_experts, parameter.shape)
        return tensors

    def _row(self, name: str, expert: int, num_experts: int, shape: tuple[int, ...]) -> torch.Tensor:
        conversion = self._producers[name]
        if self._rowwise.setdefault(name, self._has_rows(conversion, num_experts)):
            try:
                rows = self._convert(conversion, row=expert)
            except CheckpointError:
                rows = {}
            if name in rows and tuple(rows[name].shape) == (1, *shape):
                return rows[name][0]
            self._rowwise[name] = False
        return self.tensor(name)[expert]

    def _has_rows(self, conversion: _Conversion, num_experts: int) -> bool:
        """Whether row e of the result depends only on entry e of module lists, or only on row e of stacks."""
        if any("*" in pattern for pattern in conversion.sources):
            return all(len(keys) == num_experts for keys in conversion.sources.values())
        keys = [key for found in conversion.sources.values() for key in found]
        return all(self._files.empty(key).shape[:1] == (num_experts,) for key in keys)

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a dense, router or expert unit by name. Raises CheckpointError."""
        path, _, expert = unit_key.rpartition(".")
        if path in self._layer_of and expert.isdecimal() and int(expert) < self._layer_of[path].num_experts:
            return self.expert(self._layer_of[path], int(expert))
        if unit_key not in self._fixed:
            raise CheckpointError(f"{unit_key!r} not found in the checkpoint {str(self.folder)!r}")
        fixed = self._fixed[unit_key]
        return {name: self.tensor(place.full_name) for name, place in fixed.places.items()}

    def iter_units(
        self, scope: TrainScope | None = None, seed: int = 0
    ) -> Iterator[tuple[UnitInfo, Mapping[str, torch.Tensor]]]:
        """Yield all units with their tensors, and initial adapters drawn from ``seed``. Raises CheckpointError.

        At most one unit, or the result of one conversion, is in memory at a time.
        """
        for unit, sizes in units.iter_units(self._fixed.values(), self.layers, scope):
            if sizes and scope is not None:
                yield unit, adapters.initial_adapter(unit.key, sizes, scope.lora_rank, seed)
            else:
                yield unit, self.read(unit.key)
        self.release()

    def load(self) -> PreTrainedModel:
        """Load all weights into `module` and return it: a complete model on the CPU. Raises CheckpointError."""
        for fixed in self._fixed.values():
            for place in fixed.places.values():
                place.replace(self.tensor(place.full_name).contiguous())
                place.get().requires_grad_(place.learnable)
        for layer in self.layers:
            for parameter in layer.parameters:
                stack = layer.experts.get_parameter(parameter.name)
                value = self.tensor(f"{layer.experts_path}.{parameter.name}")
                layer.experts.register_parameter(parameter.name, nn.Parameter(value, stack.requires_grad))
        self.release()
        return self.module
