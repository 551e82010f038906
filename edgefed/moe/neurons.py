"""Experts neuron by neuron: the layout in which a run stores and exchanges experts that devices hold slices of.

Neuron j of an expert is row j of its gate and up projections and column j of its down projection. An expert is a sum
over its neurons, so any subset of them is an expert of the same kind, only narrower. A unit of an expert has either the
tensors that the model has (``gate_up_proj`` (2I, H), ``down_proj`` (H, I), ...), or in a run with slices

    neurons          (I, C)   row j: gate and up row, down column, biases of neuron j
    down_proj_bias   (H,)     what belongs to no neuron, under its own name

and its adapter likewise: rows of ``lora_b`` of the up projection, columns of ``lora_a`` of the down projection; the two
other factors belong to no neuron. A slice is some rows of the table: in a file, a few ranges of bytes. An upload names
them in a second tensor, `NEURON_INDEX`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgefed.errors import CheckpointError
from edgefed.moe.architecture import ExpertLayer
from edgefed.protocol.messages import NEURON_TABLE

Tensors = Mapping[str, torch.Tensor]


def expert_names(layer: ExpertLayer) -> list[str]:
    """Return the names of an expert's tensors, in the order of a table's columns."""
    return [parameter.name for parameter in layer.parameters]


def adapter_names(layer: ExpertLayer) -> list[str]:
    """Return the names of the tensors of an expert's adapter, in the order of a table's columns."""
    return [f"{parameter.name}.{part}" for parameter in layer.matrices for part in ("lora_a", "lora_b")]


def _neuron_parts(layer: ExpertLayer, name: str) -> tuple[int, int] | None:
    """Return (axis, rows per neuron) of a tensor of an expert or its adapter; None if it has no neurons."""
    up, rows, axis = layer.up_name, 2 if layer.has_gate else 1, int(layer.is_transposed)
    return {
        up: (axis, rows),
        f"{up}_bias": (0, rows),
        "down_proj": (1 - axis, 1),
        f"{up}.lora_b": (0, rows),
        "down_proj.lora_a": (1, 1),
    }.get(name)


def sliced_shape(layer: ExpertLayer, name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Return the shape of a tensor of an expert, or of its adapter, with ``width`` neurons."""
    parts = _neuron_parts(layer, name)
    if parts is None:
        return shape
    axis, rows = parts
    return (*shape[:axis], rows * width, *shape[axis + 1 :])


def slice_tensors(layer: ExpertLayer, tensors: Tensors, neurons: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return an expert, or its adapter, with these ``neurons`` (W,) int64 alone; new tensors where it has neurons."""
    found = {}
    for name, tensor in tensors.items():
        parts = _neuron_parts(layer, name)
        if parts is None:
            found[name] = tensor
            continue
        axis, rows = parts
        width = tensor.shape[axis] // rows
        if rows > 1 and layer.is_interleaved:
            places = torch.stack([rows * neurons + row for row in range(rows)], dim=1).flatten()
        else:
            places = torch.cat([neurons + row * width for row in range(rows)])
        found[name] = tensor.index_select(axis, places)
    return found


def widen(layer: ExpertLayer, name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Return a tensor of an expert with ``width`` neurons; new ones are zero, and add nothing to the output."""
    parts = _neuron_parts(layer, name)
    if parts is None or tensor.shape[parts[0]] == parts[1] * width:
        return tensor
    axis, rows = parts
    moved = tensor.movedim(axis, 0)  # (rows W, ...)
    inner = moved.shape[1:]
    if layer.is_interleaved:
        wide = moved.new_zeros(width, rows, *inner)
        wide[: len(moved) // rows] = moved.reshape(-1, rows, *inner)
    else:
        wide = moved.new_zeros(rows, width, *inner)
        wide[:, : len(moved) // rows] = moved.reshape(rows, -1, *inner)
    return wide.flatten(0, 1).movedim(0, axis)


def to_table(layer: ExpertLayer, key: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return an expert, or its adapter, with its W neurons as one table (W, C); see the top of this file.

    Raises CheckpointError if tensors with neurons have different dtypes.
    """
    columns, rest = [], {}
    for name in expert_names(layer) + adapter_names(layer):
        if name not in tensors:
            continue
        parts = _neuron_parts(layer, name)
        if parts is None:
            rest[name] = tensors[name]
            continue
        axis, rows = parts
        moved = tensors[name].movedim(axis, 0)  # (rows W, ...)
        if rows > 1 and not layer.is_interleaved:
            moved = moved.view(rows, -1, *moved.shape[1:]).transpose(0, 1)  # (W, rows, ...)
        columns.append(moved.reshape(tensors[name].shape[axis] // rows, -1))
    if len({part.dtype for part in columns}) != 1:
        raise CheckpointError(f"the tensors of {key!r} have several dtypes: they cannot be stored by neuron")
    return {NEURON_TABLE: torch.cat(columns, dim=1), **rest}


def from_table(layer: ExpertLayer, key: str, tensors: Tensors, *, adapter: bool) -> dict[str, torch.Tensor]:
    """Return an expert, or its adapter, by the model's names: the inverse of `to_table`.

    The result has views of the table. Raises CheckpointError if the table does not have the columns of an expert.
    """
    found, begin = dict(tensors), 0
    table = found.pop(NEURON_TABLE)
    names = adapter_names(layer) if adapter else expert_names(layer)
    hidden = layer.matrix_sizes("down_proj")[1]
    rank = next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_a")), 0)
    for name in names:
        parts = _neuron_parts(layer, name)
        if parts is None:
            continue
        axis, rows = parts
        inner = () if name.endswith("_bias") else (rank,) if adapter else (hidden,)
        size = rows * (inner[0] if inner else 1)
        if table.ndim != 2 or begin + size > table.shape[1]:
            raise CheckpointError(f"the table of {key!r} of shape {tuple(table.shape)} has too few columns")
        part = table[:, begin : begin + size].reshape(-1, rows, *inner)  # (W, rows, ...)
        begin += size
        if rows > 1 and not layer.is_interleaved:
            part = part.transpose(0, 1)
        found[name] = part.flatten(0, 1).movedim(0, axis)
    if begin != table.shape[1]:
        raise CheckpointError(f"the table of {key!r} must have {begin} columns; found {table.shape[1]}")
    return {name: found[name] for name in (*names, *found) if name in found}
