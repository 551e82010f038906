"""Merge several experts into one frozen expert, and cache merged experts on disk between rounds.

    W = sum_i weights[i] W_i        over the members of a group, biases in the same way

    "W_merged = sum_{e in cluster} (alpha_e / sum alpha) W_e" (Flux, arXiv 2508.19078)

Sums are computed in at least float32. Beside the sum one member is in memory at a time, and with alignment also the
reference member.

The name of a cached file is a hash of everything that determines its content: the members' units, their weights, their
adapters, and the alignment. Files contain merged experts before quantization, so their storage format in memory does
not matter. `MergedCache.trim` removes the files that the last plan did not use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgefed.disk import disk_errors, make_folder
from edgefed.errors import StorageError
from edgefed.expert_records import MergedGroup
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_reading import read_with_adapter
from edgefed.moe.units import LORA_SUFFIX, ExpertSource, TrainScope

Tensors = Mapping[str, torch.Tensor]

Align = Callable[[Tensors, Tensors], Tensors]
"""(reference, member) -> the member with its intermediate neurons in the order of the reference."""

_log = logging.getLogger(__name__)
_VERSION = 1
"""Part of every file name. Increase it whenever the result of merging changes."""


def merge_experts(
    read: Callable[[int], Tensors], group: MergedGroup, align: Align | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of the merged expert by name, in the dtype of its members.

    ``read(expert)`` returns the tensors of a member with its adapter added. It is called once for each member with a
    weight above 0, in descending order of weight; the first member is the reference of ``align``.
    """
    order = sorted(range(len(group.experts)), key=lambda place: (-group.weights[place], place))
    sums: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    reference: Tensors | None = None
    for place in order:
        weight = group.weights[place]
        if not weight:
            continue
        tensors = read(group.experts[place])
        if reference is None:
            dtypes = {name: value.dtype for name, value in tensors.items()}
            sums = {
                name: value.detach().to(torch.promote_types(value.dtype, torch.float32)) * weight
                for name, value in tensors.items()
            }
            reference = tensors if align is not None else {}
        else:
            if align is not None:
                tensors = align(reference, tensors)
            for name, value in tensors.items():
                sums[name].add_(value.detach(), alpha=weight)
        del tensors
    return {name: value.to(dtypes[name]) for name, value in sums.items()}


def merged_tensors(
    layer: ExpertLayer,
    group: MergedGroup,
    source: ExpertSource,
    scope: TrainScope,
    align: Align | None,
    cache: MergedCache | None,
) -> Tensors:
    """Return the merged expert of a group, from the cache if possible."""

    def merge() -> dict[str, torch.Tensor]:
        return merge_experts(lambda expert: read_with_adapter(layer, expert, source, scope), group, align)

    return merge() if cache is None else cache.get(layer, group, scope, merge, aligned=align is not None)


class MergedCache:
    """Cache of merged experts in ``folder``, for one process. ``hashes`` maps unit keys to the sha256 of the values."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.hashes: Mapping[str, str] = {}
        self._requested: set[str] = set()

    def get(
        self,
        layer: ExpertLayer,
        group: MergedGroup,
        scope: TrainScope,
        merge: Callable[[], dict[str, torch.Tensor]],
        *,
        aligned: bool,
    ) -> Mapping[str, torch.Tensor]:
        """Return the merged expert of a group: from its file, or from ``merge``, whose result is written to the file.

        A broken file is replaced. If the file cannot be written, a warning is logged.
        """
        name = self._name(layer, group, scope, aligned)
        self._requested.add(name)
        path = self._folder / name
        found = _read(path)
        if found is not None:
            return found
        tensors = merge()
        try:
            make_folder(self._folder)
            temporary = path.with_suffix(".tmp")
            with disk_errors(path):
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary)
                os.replace(temporary, path)
        except (StorageError, SafetensorError) as error:
            _log.warning("cannot cache a merged expert for the next round: %s", error)
        return tensors

    def trim(self) -> None:
        """Remove the files that were not requested since the last `trim`. Raises StorageError."""
        with disk_errors(self._folder):
            for path in self._folder.iterdir() if self._folder.exists() else ():
                if path.name not in self._requested:
                    path.unlink(missing_ok=True)
        self._requested = set()

    def _name(self, layer: ExpertLayer, group: MergedGroup, scope: TrainScope, aligned: bool) -> str:
        keys = [layer.expert_key(expert) for expert in group.experts]
        facts: list[Any] = [_VERSION, [self.hashes[key] for key in keys], group.weights, aligned]
        if scope.experts == "lora":
            facts += [[self.hashes[key + LORA_SUFFIX] for key in keys], scope.lora_scale, scope.lora_rank]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest() + ".safetensors"


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.warning("cannot read a cached merged expert, merging it again: %s", error)
        return None
