"""Merged experts kept on disk from round to round: one whose members and weights are the same is not merged again.

A file is named by what its content follows from: hashes of the members' units, weights, adapters, alignment. How it is
stored in memory is not part of it: files hold merged experts as they come, before any quantisation. Files are bounded
by the plan: `trim` removes those that the last plan did not ask for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgefed.disk import disk_errors, make_folder
from edgefed.errors import StorageError
from edgefed.expert_records import MergedGroup
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.units import LORA_SUFFIX, TrainScope

_log = logging.getLogger(__name__)
_VERSION = 1
"""Part of every name: another way of merging needs another number."""


class MergedCache:
    """The merged experts in ``folder``, which belongs to one process. ``hashes``: unit key -> sha256 of its values."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.hashes: Mapping[str, str] = {}
        self._asked: set[str] = set()

    def get(
        self,
        layer: ExpertLayer,
        group: MergedGroup,
        scope: TrainScope,
        merge: Callable[[], dict[str, torch.Tensor]],
        *,
        aligned: bool,
    ) -> Mapping[str, torch.Tensor]:
        """The group's merged expert: read, or made by ``merge`` and kept. A file that is broken is made anew; a disk
        that takes none is told, and nothing is kept.
        """
        name = self._name(layer, group, scope, aligned)
        self._asked.add(name)
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
            _log.warning("merged experts are not kept for the next round: %s", error)
        return tensors

    def trim(self) -> None:
        """Remove what nobody asked for since the last `trim`. Raises StorageError."""
        with disk_errors(self._folder):
            for path in self._folder.iterdir() if self._folder.exists() else ():
                if path.name not in self._asked:
                    path.unlink(missing_ok=True)
        self._asked = set()

    def _name(self, layer: ExpertLayer, group: MergedGroup, scope: TrainScope, aligned: bool) -> str:
        keys = [layer.expert_key(expert) for expert in group.experts]
        facts: list = [_VERSION, [self.hashes[key] for key in keys], group.weights, aligned]
        if scope.experts == "lora":
            facts += [[self.hashes[key + LORA_SUFFIX] for key in keys], scope.lora_scale]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest() + ".safetensors"


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _log.warning("a merged expert that was kept cannot be read and is made anew: %s", error)
        return None


# One frozen expert made of several: W = sum_i weights[i] W_i over the members of a group, biases alike.
#
#     "W_merged = sum_{e in cluster} (alpha_e / sum alpha) W_e" (Flux, arXiv 2508.19078)
#
# Sums run in at least float32. One member is in memory at a time beside the sum, and with ``align`` the first one.

Tensors = Mapping[str, torch.Tensor]

Align = Callable[[Tensors, Tensors], Tensors]
"""(reference, member) -> the member with its hidden neurons in the reference's order."""


def merge_experts(
    read: Callable[[int], Tensors], group: MergedGroup, align: Align | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the merged expert, by name, in the dtype that its members have.

    ``read(expert)`` gives the tensors of a member, its adapter added where it has one; it is asked once for each that
    has a weight, heaviest first. The heaviest is the reference of ``align``. Raises what ``read`` and ``align`` raise.
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
