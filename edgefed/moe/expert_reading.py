"""Read, check and restore experts and their adapters from an `edgefed.moe.units.ExpertSource`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edgefed.errors import CheckpointError, InvalidUpdate
from edgefed.moe.adapters import leading_adapter, low_rank_product
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.file_tensors import FileSpace, FileTensor
from edgefed.moe.neurons import from_table, slice_tensors, sliced_shape
from edgefed.moe.units import (
    ADAPTER_DTYPE,
    LORA_SUFFIX,
    ExpertSource,
    TrainScope,
    check_tensors,
    copy_into,
    dtype_name,
    named_dtype,
)
from edgefed.protocol.frames import FileArray, read_header
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, UnitInfo
from edgefed.protocol.slices import UnitSlice


class FrameSource:
    """An `ExpertSource` over content-addressed safetensors files. It stores paths and opens a file for each read."""

    def __init__(self, units: Iterable[UnitInfo | UnitSlice] = (), paths: Mapping[str, Path] | None = None):
        self._paths: dict[str, Path] = {}
        self.add(units, paths or {})

    def add(self, units: Iterable[UnitInfo | UnitSlice], paths: Mapping[str, Path]) -> None:
        """Make ``units`` readable; ``paths`` maps their sha256 to local files."""
        for unit in units:
            self._paths[unit.key] = Path(paths[unit.sha256])

    def path(self, unit_key: str) -> Path:
        """Return the file of a unit. Raises CheckpointError if there is none."""
        if unit_key not in self._paths:
            raise CheckpointError(f"{unit_key!r} not found among the {len(self._paths)} parts on this disk")
        return self._paths[unit_key]

    def read(self, unit_key: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a unit, new on the CPU. Raises CheckpointError if it is missing or unreadable."""
        path = self.path(unit_key)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {unit_key!r} from {path}: {error}") from error


class FileSource(FrameSource):
    """A `FrameSource` whose tensors stay in their files until an operation needs their values.

    ``on_read`` is called with the name of a file before it is read.
    """

    def __init__(
        self,
        units: Iterable[UnitInfo | UnitSlice] = (),
        paths: Mapping[str, Path] | None = None,
        on_read: Callable[[str], None] = lambda name: None,
    ):
        super().__init__(units, paths)
        self._space, self._on_read = FileSpace(), on_read

    def read(self, unit_key: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a unit. Raises CheckpointError if it is missing or unreadable."""
        path = self.path(unit_key)
        self._on_read(path.name)
        try:
            entries = read_header(path)
        except (OSError, InvalidUpdate) as error:
            raise CheckpointError(f"cannot read {unit_key!r} from {path}: {error}") from error
        return {
            name: self._space.tensor(path, entry.start, named_dtype(entry.info.dtype), entry.info.shape)
            for name, entry in entries.items()
        }


def raw_tensor(tensor: torch.Tensor) -> tuple[str, npt.NDArray[Any] | FileArray]:
    """Return the dtype name and the array of a tensor as the importer of a run takes it; see `raw_array`."""
    if isinstance(tensor, FileTensor):
        return dtype_name(tensor.dtype), FileArray(tuple(tensor.shape), tensor.ranges)
    return dtype_name(tensor.dtype), raw_array(tensor)


def raw_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of a tensor as the numpy array of a frame: bfloat16 as uint16, bool as uint8."""
    values = tensor.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    return values.view(torch.uint8).numpy() if values.dtype == torch.bool else values.numpy()


def trained_dtypes(unit: UnitInfo, values: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names and dtypes of the tensors in a file of a trained ``unit``; a slice also has the numbers of its neurons."""
    index = {NEURON_INDEX: "I32"} if NEURON_INDEX in values else {}
    return {info.name: info.dtype for info in unit.tensors} | index


def check_expert(layer: ExpertLayer, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless these are the tensors of one expert of ``layer``."""
    check_tensors(key, tensors, {parameter.name: parameter.shape for parameter in layer.parameters})
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name!r} of {key!r} must have a floating-point dtype; found {tensor.dtype}")


def check_expert_adapter(layer: ExpertLayer, key: str, tensors: Mapping[str, torch.Tensor], rank: int) -> None:
    """Raise CheckpointError unless these are the adapter of one expert of ``layer``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in layer.matrices:
        size_in, size_out = layer.input_output_sizes(parameter)
        shapes[f"{parameter.name}.lora_a"], shapes[f"{parameter.name}.lora_b"] = (rank, size_in), (size_out, rank)
    check_tensors(key, tensors, shapes)
    for name, tensor in tensors.items():
        if tensor.dtype != ADAPTER_DTYPE:
            raise CheckpointError(f"adapter {name!r} of {key!r} must be {ADAPTER_DTYPE}; found {tensor.dtype}")


def read_expert(layer: ExpertLayer, expert: int, source: ExpertSource) -> dict[str, torch.Tensor]:
    """Return the checked tensors of one expert by the model's names. Raises CheckpointError."""
    key = layer.expert_key(expert)
    tensors = dict(source.read(key))
    if NEURON_TABLE in tensors:
        tensors = from_table(layer, key, tensors, adapter=False)
    check_expert(layer, key, tensors)
    return tensors


def read_adapter(layer: ExpertLayer, expert: int, source: ExpertSource, rank: int) -> dict[str, torch.Tensor]:
    """Return the checked leading ``rank`` of one expert's adapter by name. Raises CheckpointError."""
    key = layer.expert_key(expert) + LORA_SUFFIX
    tensors = dict(source.read(key))
    if NEURON_TABLE in tensors:
        tensors = from_table(layer, key, tensors, adapter=True)
    else:
        tensors = leading_adapter(tensors, rank)
    check_expert_adapter(layer, key, tensors, rank)
    return tensors


def read_slice(
    layer: ExpertLayer, expert: int, source: ExpertSource, neurons: torch.Tensor, *, rank: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the checked tensors of some ``neurons`` (W,) int64 of an expert, or with ``rank`` of its adapter.

    ``source`` may have the whole unit or only these neurons and some others. Raises CheckpointError.
    """
    key = layer.expert_key(expert) + (LORA_SUFFIX if rank is not None else "")
    tensors = source.read(key)
    if NEURON_INDEX not in tensors:
        whole = read_expert(layer, expert, source) if rank is None else read_adapter(layer, expert, source, rank)
        return slice_tensors(layer, whole, neurons)
    tensors = dict(tensors)
    index = tensors.pop(NEURON_INDEX).long()
    places = torch.searchsorted(index, neurons).clamp_max(max(0, len(index) - 1))
    if not torch.equal(index[places], neurons):
        raise CheckpointError(
            f"the slice of unit {key!r} on this disk has {len(index)} neurons, but not all planned ones"
        )
    found = slice_tensors(layer, from_table(layer, key, tensors, adapter=rank is not None), places)
    if rank is None:
        shapes = {p.name: sliced_shape(layer, p.name, p.shape, len(neurons)) for p in layer.parameters}
        check_tensors(key, found, shapes)
    return found


def read_with_adapter(
    layer: ExpertLayer, expert: int, source: ExpertSource, scope: TrainScope, *, only: str | None = None
) -> dict[str, torch.Tensor]:
    """Return one expert's tensors, with its adapter added if ``scope`` trains experts by LoRA.

    With ``only``, adapters are added to this tensor alone. Raises CheckpointError.
    """
    tensors = read_expert(layer, expert, source)
    if scope.experts == "lora":
        adapter = read_adapter(layer, expert, source, scope.lora_rank)
        for parameter in layer.matrices:
            if only not in (None, parameter.name):
                continue
            update = low_rank_product(
                adapter[f"{parameter.name}.lora_a"], adapter[f"{parameter.name}.lora_b"], scope.lora_scale
            )  # (out, in)
            weight = tensors[parameter.name]
            merged = weight.to(update.dtype) + (update.T if layer.is_transposed else update)
            tensors[parameter.name] = merged.to(weight.dtype)
    return tensors


def restore_layer(layer: ExpertLayer, source: ExpertSource, scope: TrainScope, device: torch.device) -> None:
    """Rebuild the stacked parameters of ``layer`` as transformers has them, with adapters merged.

    Reads one expert at a time. Raises CheckpointError.
    """
    for expert in range(layer.num_experts):
        key = layer.expert_key(expert)
        for name, value in read_with_adapter(layer, expert, source, scope).items():
            if expert == 0:
                stack = torch.empty(layer.num_experts, *value.shape, dtype=value.dtype, device=device)
                layer.experts.register_parameter(name, nn.Parameter(stack, requires_grad=False))
            copy_into(key, name, layer.experts.get_parameter(name).data[expert], value)
