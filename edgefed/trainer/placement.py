"""Place the experts of a plan on the device: which versions, in which storage, in memory or offloaded.

Merged experts are read from a cache where possible. A device of a method without exchange (`ExpertMethod.exchanges`)
has the only copy of the weights that it trained. They are written to files before each round, so that a round that runs
out of memory can start again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec
import torch

from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import StepSetup
from edgefed.costs.streaming import offloaded_bytes, streamed_bytes
from edgefed.disk import MEMORY_FILESYSTEMS, disk_errors, filesystem, make_folder, write_durably
from edgefed.errors import ConfigError, DiskFull, NotFound, StorageError
from edgefed.expert_records import ExpertPlan, Role
from edgefed.hardware.memory import available_memory_bytes, format_bytes
from edgefed.methods.interface import ExpertMethod
from edgefed.moe.expert_reading import FrameSource, raw_array, trained_dtypes
from edgefed.moe.expert_stream import ExpertStream
from edgefed.moe.merged_cache import MergedCache
from edgefed.moe.merging.alignment import neuron_aligner
from edgefed.moe.model import MoeModel
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.slots import EXPERT_STORAGES
from edgefed.moe.units import LORA_SUFFIX, ExpertSource
from edgefed.progress import ProgressSink
from edgefed.protocol import frames
from edgefed.protocol.messages import Manifest, RunConfig, TrainingConfig, UnitInfo
from edgefed.protocol.ranks import rank_problem
from edgefed.trainer.last_round import OWN_FOLDER, save_last_round, save_own_files
from edgefed.training.savings import packing_problem
from edgefed.training.steps import train_scope

OFFLOAD_FOLDER, MERGED_FOLDER = "offloaded", "merged"
"""In the device's state folder."""
COPIES_FILE = "frozen.json"
_log = logging.getLogger("edgefed.agent")
HOST_SHARE = 0.5
"""Share of the host's available memory for offloaded experts of a GPU; what needs more is offloaded to files."""
STORAGE_CHOICES = ("auto", "full", *EXPERT_STORAGES)
"""Storage of frozen experts that an owner can request. "auto": the planner decides; "full": the model's dtype."""


class ExpertPlacer:
    """Places experts for one device, whose state is in ``folder``."""

    def __init__(self, folder: Path):
        self._offload_folder = folder / OFFLOAD_FOLDER
        self._merged = MergedCache(folder / MERGED_FOLDER)

    def reserve(
        self, model: MoeModel, plan: ExpertPlan, setup: StepSetup, shape: ModelShape, progress: ProgressSink
    ) -> OffloadSpace | ExpertStream | None:
        """Reserve room for the experts of ``plan`` if ``setup`` offloads or streams them, else return None.

        ``shape``: with the plan's slices. Call it before the experts are downloaded. Drops the experts of the previous
        plan, which use the same room. Raises DiskFull, StorageError.
        """
        if setup.streamed_layers:
            size_of, verb, what = streamed_bytes, "streaming", "frozen experts"
        elif setup.offload:
            size_of, verb, what = offloaded_bytes, "offloading", "experts"
        else:
            return None
        model.drop_experts()
        size, device = size_of(shape, setup, *plan.counts()), torch.device(model.module.device)
        discrete = device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated
        if discrete and size <= HOST_SHARE * available_memory_bytes():
            progress.message(f"{verb}: {format_bytes(size)} of {what} in host memory")
            return self._space(device, None, setup, plan.num_layers)
        folder = make_folder(self._offload_folder)
        if (kind := filesystem(folder)) in MEMORY_FILESYSTEMS:
            raise StorageError(
                f"cannot store experts in {folder}: its filesystem is in memory ({kind})",
                remedy="Join with a `state` folder that is on a disk.",
            )
        with disk_errors(folder):
            free = shutil.disk_usage(folder).free
        if size > free:
            stored = "streamed experts" if setup.streamed_layers else "offloaded experts, their gradients and moments"
            raise DiskFull(
                f"{stored} take {format_bytes(size)} in {folder}, {format_bytes(free)} are free",
                remedy="Free space on that disk, or join with a `state` folder on another one.",
            )
        progress.message(f"{verb}: {format_bytes(size)} of {what} in files")
        return self._space(device, folder, setup, plan.num_layers)

    @staticmethod
    def _space(
        device: torch.device, folder: Path | None, setup: StepSetup, num_layers: int
    ) -> OffloadSpace | ExpertStream:
        space = OffloadSpace(device, folder)
        if not setup.streamed_layers:
            return space
        return ExpertStream(space, [layer for layer in range(num_layers) if setup.streams(layer, num_layers)])

    def place(
        self,
        model: MoeModel,
        plan: ExpertPlan,
        source: ExpertSource,
        run: RunConfig,
        method: ExpertMethod,
        setup: StepSetup,
        offload: OffloadSpace | ExpertStream | None,
        hashes: Mapping[str, str] | None,
    ) -> None:
        """Apply ``plan`` with experts from ``source``.

        ``hashes`` are those of the units in ``source``, by key; None: merged experts are not cached. Raises
        CheckpointError, ConfigError, StorageError.
        """
        self._merged.hashes = hashes or {}
        model.apply_plan(
            plan, source, train_scope(run.training, setup.lora_rank),
            missing="skip" if plan.neurons else run.training.missing,  # an expert without neurons adds nothing
            storage=setup.expert_storage,
            align=neuron_aligner(model.layers) if method.merging and method.merging.align else None,
            merged=self._merged if hashes is not None else None, offload=offload,
        )  # fmt: skip
        self._merged.trim()


def save_own_units(model: MoeModel, units: Mapping[str, UnitInfo], folder: Path) -> dict[str, Path]:
    """Write every unit that ``model`` trains to a file in ``folder``; returns {unit key: path}. Raises StorageError."""
    state, folder = folder, folder / OWN_FOLDER
    paths = {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, (spec, values) in enumerate(model.trained_units()):
            paths[spec.key] = folder / f"{number}.safetensors"
            dtypes = trained_dtypes(units[spec.key], values)
            frames.write_frame(
                paths[spec.key], {name: (dtype, raw_array(values[name])) for name, dtype in dtypes.items()}
            )
    save_own_files(state, paths)
    return paths


def keep_model(model: MoeModel, method: ExpertMethod, run: RunConfig, manifest: Manifest, folder: Path) -> None:
    """Record what the device has after a round, for exports (`edgefed.trainer.last_round`). Raises StorageError."""
    if not method.exchanges:
        save_own_units(model, {unit.key: unit for unit in manifest.units}, folder)
    save_last_round(folder, run, manifest)


def add_own_units(source: FrameSource, units: Mapping[str, UnitInfo], own: Mapping[str, Path]) -> None:
    """Let ``source`` read the device's own units instead of the global ones."""
    for key, path in own.items():
        source.add([units[key]], {units[key].sha256: path})


def load_own_units(
    model: MoeModel, source: FrameSource, units: Mapping[str, UnitInfo], own: Mapping[str, Path]
) -> None:
    """Load the own units that no plan places: dense tensors and routers."""
    for key in own:
        if units[key].kind != "expert" and not key.endswith(LORA_SUFFIX):
            model.load_unit(key, source.read(key))


def required_storage(requested: str, method: ExpertMethod, training: TrainingConfig, model: MoeModel) -> str | None:
    """How frozen experts must be stored from the start; None where neither owner nor method asks for anything.

    ``requested`` is one of `STORAGE_CHOICES`. Raises ConfigError if it contradicts the method, has no effect, or does
    not work on this device.
    """
    if requested not in STORAGE_CHOICES:
        raise ConfigError(f"invalid expert storage {requested!r}, expected one of {', '.join(STORAGE_CHOICES)}")
    asked = f"`expert_storage={requested}`"
    fixed = method.requirements.expert_storage
    if fixed is not None:
        if requested not in ("auto", fixed):
            raise ConfigError(
                f"the method {method.name} keeps experts in {fixed}, this device has {asked}",
                remedy="Join without `expert_storage`, or run another method.",
            )
        requested, asked = fixed, f"the method {method.name}"
    if requested in ("auto", "full"):
        return None
    if method.requirements.offloading:
        raise ConfigError(
            f"{asked} needs {requested}, but {method.name} offloads experts in the model's dtype",
            remedy="Join without `expert_storage`, or run another method.",
        )
    if method.requirements.all_experts and training.experts == "full":
        raise ConfigError(
            f"{asked} needs {requested}, but {method.name} trains every expert in full: no frozen expert to quantize",
            remedy="Join without `expert_storage`, or serve with `train_experts=lora`.",
        )
    if problem := packing_problem(requested, str(model.device), model.dtype):
        raise ConfigError(
            f"{asked} does not work on this device: {problem}",
            remedy="Join with `expert_storage=full`, or on another device.",
        )
    return requested


def requested_rank(requested: int | None, training: TrainingConfig) -> int:
    """The rank of a device's adapters if memory has room: as ``requested``, or that of the run. Raises ConfigError."""
    if requested is None:
        return training.lora_rank
    if "lora" not in (training.experts, training.router, training.attention):
        raise ConfigError(
            f"`lora_rank={requested}` has no effect: nothing trains by LoRA in this run", remedy="Join without it."
        )
    if problem := rank_problem(requested, training):
        raise ConfigError(f"`lora_rank` {problem}", remedy="Join with another `lora_rank`, or without.")
    return requested


class StaleExperts:
    """Which version of each expert a device has, so that frozen experts are not downloaded whenever they change.

    Trainable experts are downloaded anew in every round. Frozen experts, also within merged experts, change in the
    global model when other clients train them, but only by little: with r = `methods.pace.refresh_rounds`, a device
    uses the version that it has until that is r rounds old. Each round refreshes another r-th of the experts, so that
    downloads are spread evenly.

    The file ``FOLDER/frozen.json`` has the run id and, for each expert unit, its hash, its size and the last round in
    which it was the newest. ``folder`` is the device's state folder.
    """

    def __init__(self, folder: Path, run_id: str):
        self._path, self._run_id = folder / COPIES_FILE, run_id
        self._copies: dict[str, tuple[str, int, int]] = {}
        try:
            with disk_errors(self._path):
                saved = json.loads(self._path.read_bytes()) if self._path.exists() else {}
            if saved.get("run_id") == run_id:
                self._copies = {key: (sha256, size, last) for key, (sha256, size, last) in saved["copies"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            _log.warning("cannot read %s, all experts are downloaded again: %s", self._path, error)

    def view(
        self,
        units: Mapping[str, UnitInfo],
        server_round: int,
        refresh: int,
        fetch: Callable[[Iterable[UnitInfo]], object],
    ) -> dict[str, UnitInfo]:
        """Return ``units`` with frozen experts in the versions that this device has, except those due for a refresh.

        If one of these versions is neither on the device nor at the aggregator, return ``units`` unchanged.
        """
        older = {}
        for key, unit in units.items():
            sha256, size_bytes, last = self._copies.get(key, (unit.sha256, 0, 0))
            due = (unit.layer + unit.expert + server_round) % refresh == 0
            if unit.kind == "expert" and sha256 != unit.sha256 and not due and server_round - last < refresh:
                older[key] = msgspec.structs.replace(unit, sha256=sha256, size_bytes=size_bytes)
        try:
            fetch(older.values())
        except NotFound:
            return dict(units)
        return {**units, **older}

    def keep(self, used: Mapping[str, UnitInfo], units: Mapping[str, UnitInfo], server_round: int) -> None:
        """Write down which versions a round ``used``; ``units`` are the newest. The file is durable on return."""
        copies = {}
        for key, unit in used.items():
            if unit.kind == "expert":
                last = server_round if unit.sha256 == units[key].sha256 else self._copies[key][2]
                copies[key] = (unit.sha256, unit.size_bytes, last)
        self._copies = copies
        write_durably(self._path, json.dumps({"run_id": self._run_id, "copies": copies}).encode())


def with_newest_trainable(
    units: Mapping[str, UnitInfo], newest: Mapping[str, UnitInfo], plan: ExpertPlan
) -> dict[str, UnitInfo]:
    """Return ``units`` with trainable experts and their adapters from ``newest``."""
    return {
        key: newest[key] if unit.kind == "expert" and plan.roles[unit.layer][unit.expert] == Role.TRAINABLE else unit
        for key, unit in units.items()
    }
