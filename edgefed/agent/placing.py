"""Puts the experts of a plan on the device: in its memory, or offloaded; merged ones as they were kept, if they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from edgefed.agent.progress import ProgressSink
from edgefed.disk import disk_errors, filesystem, make_folder
from edgefed.errors import DiskFull, StorageError
from edgefed.experts import ExpertPlan
from edgefed.hardware.memory import available_memory_bytes, format_bytes
from edgefed.methods.interface import Method
from edgefed.moe.alignment import neuron_aligner
from edgefed.moe.memory import StepSetup
from edgefed.moe.merged_cache import MergedCache
from edgefed.moe.model import MoeModel
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.shapes import ModelShape
from edgefed.moe.sources import ExpertSource
from edgefed.moe.stored import offloaded_bytes
from edgefed.protocol.messages import RunConfig
from edgefed.training.steps import train_scope

OFFLOAD_FOLDER, MERGED_FOLDER = "offloaded", "merged"
"""In the device's state folder."""
HOST_SHARE = 0.5
"""Of the host's available memory that offloaded experts of a GPU may take; what needs more goes to files."""
_IN_MEMORY = ("tmpfs", "ramfs")


class ExpertPlacer:
    """Places experts for one device, whose state is in ``folder``."""

    def __init__(self, folder: Path):
        self._offload_folder = folder / OFFLOAD_FOLDER
        self._merged = MergedCache(folder / MERGED_FOLDER)

    def reserve(
        self, model: MoeModel, plan: ExpertPlan, setup: StepSetup, shape: ModelShape, progress: ProgressSink
    ) -> OffloadSpace | None:
        """Room for the experts of ``plan`` where they are offloaded, None where they are not.

        To be asked before they are downloaded. Raises DiskFull, StorageError.
        """
        if not setup.offload:
            return None
        model.drop_experts()  # those of the plan before take the same room
        layers = range(plan.num_layers)
        kept, tuned = [plan.num_slots(layer) for layer in layers], [len(plan.tuned(layer)) for layer in layers]
        size, device = offloaded_bytes(shape, setup, kept, tuned), torch.device(model.module.device)
        discrete = device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated
        if discrete and size <= HOST_SHARE * available_memory_bytes():
            progress.message(f"offloading: {format_bytes(size)} of experts, in the host's memory")
            return OffloadSpace(device, None)
        folder = make_folder(self._offload_folder)
        if (kind := filesystem(folder)) in _IN_MEMORY:
            raise StorageError(
                f"experts are to be offloaded to {folder}, which is memory itself ({kind})",
                remedy="Join with a --state folder that is on a disk.",
            )
        with disk_errors(folder):
            free = shutil.disk_usage(folder).free
        if size > free:
            raise DiskFull(
                f"offloaded experts, their gradients and moments take {format_bytes(size)} in {folder}, "
                f"{format_bytes(free)} are free",
                remedy="Free space on that disk, or join with a --state folder on another one.",
            )
        progress.message(f"offloading: {format_bytes(size)} of experts, in files")
        return OffloadSpace(device, folder)

    def place(
        self,
        model: MoeModel,
        plan: ExpertPlan,
        source: ExpertSource,
        run: RunConfig,
        method: Method,
        setup: StepSetup,
        offload: OffloadSpace | None,
        hashes: Mapping[str, str] | None,
    ) -> None:
        """Apply ``plan``. ``hashes``: of the values that ``source`` has, by unit key; None: merged experts are made
        anew. Raises CheckpointError, ConfigError, StorageError."""
        self._merged.hashes = hashes or {}
        model.apply_plan(
            plan, source, train_scope(run.training), missing=run.training.missing, storage=setup.expert_storage,
            align=neuron_aligner(model.layers) if method.merge_aligned else None,
            merged=self._merged if hashes is not None else None, offload=offload,
        )  # fmt: skip
        self._merged.trim()
