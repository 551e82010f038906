"""One simulated client: the real trainer, with the memory of another device and a model that all clients share.

Differences from a device's own process, all of them ports of `edgefed.trainer.ports`:
    memory   what a device profile leaves for training
    costs    the memory model of the cost shape; nothing is measured, so nothing depends on this machine
    model    shared by all clients, who train one after the other
The held-out loss on the device is left out unless it is asked for: the global model's is measured once for all.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from edgefed.costs.memory import MemoryEstimate, training_memory
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import Correction, StepSetup
from edgefed.costs.streaming import StreamRates
from edgefed.disk import write_durably
from edgefed.errors import StateCorrupt
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.hardware.facts import MemoryKind
from edgefed.methods.interface import ExpertMethod
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.merging.plan import ExpertMerger, MergingOptions
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX, ExpertSource
from edgefed.progress import NullProgress, ProgressSink
from edgefed.protocol.changes import encode_blob_change, steps_bytes
from edgefed.protocol.frames import ITEM_BYTES
from edgefed.protocol.messages import FileInfo, Manifest, RunConfig, UnitInfo
from edgefed.protocol.slices import UnitSlice
from edgefed.protocol.trainer import Fetch
from edgefed.simulation.config import SimulatedDevice
from edgefed.simulation.device_rates import FILE, CostShape, byte_kind
from edgefed.trainer.activation_profile import choose_profile_pass
from edgefed.trainer.last_round import OWN_FOLDER
from edgefed.trainer.local_trainer import LocalTrainer
from edgefed.trainer.placement import add_own_units, load_own_units, save_own_units
from edgefed.trainer.planner import DeviceLimits
from edgefed.trainer.ports import FixedMemory, copy_model_files, load_shared_units
from edgefed.training.profiling import ProfilePass
from edgefed.training.steps import train_scope
from edgefed.training.tokenizer import load_tokenizer

EMBEDDINGS_FILE = "points.npz"
OWN_FILE = "own.json"
"""Which plan and units are in the folder of a device that exchanges nothing."""


class SharedModel:
    """The one model of a simulation; its files are kept in ``folder``."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.model: MoeModel | None = None
        self.tokenizer: Any = None
        self.loaded: dict[str, str] = {}
        """Hash of what the model has loaded, by unit key, for units that do not train."""

    def open(self, manifest: Manifest, fetch: Fetch) -> MoeModel:
        """The model, built from the run's files the first time."""
        if self.model is None:
            copy_model_files(manifest, fetch, self._folder)
            self.model = MoeModel.skeleton(self._folder)
            self.tokenizer = load_tokenizer(self._folder)
        return self.model

    def forget(self) -> None:
        """Build another model at the next `open`: the next method may train other adapters."""
        self.model, self.loaded = None, {}


class _OwnUnits(msgspec.Struct):
    """What own.json says: the plan, how experts were stored, and the file name of each unit."""

    plan: dict[str, Any]
    storage: str | None
    units: dict[str, str]


class SharedModelHost:
    """A `ModelHost` for one of the clients that share a model. ``folder`` is its state.

    Between rounds the model has no experts. A client that exchanges nothing finds its own weights again from its files.
    """

    def __init__(self, shared: SharedModel, folder: Path):
        self._shared, self._folder = shared, folder

    @property
    def model(self) -> MoeModel | None:
        """The shared model."""
        return self._shared.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._shared.tokenizer

    def open(
        self, run: RunConfig, method: ExpertMethod, manifest: Manifest, fetch: Fetch, progress: ProgressSink
    ) -> MoeModel:
        """The model without experts, or with this client's own weights if it exchanges nothing."""
        fetch(manifest.files)
        model = self._shared.open(manifest, fetch)
        model.drop_experts()
        path = self._folder / OWN_FILE
        if not method.exchanges and path.exists():
            units = {unit.key: unit for unit in manifest.units}
            self._restore_own(_read_own(path), run, units, model, fetch)
        return model

    def load_shared(self, units: Iterable[UnitInfo], fetch: Fetch) -> FrameSource:
        """See `ModelHost`. A real device would also need what an earlier client has loaded already, so fetch it."""
        assert self._shared.model is not None, "the model has been opened"
        units = tuple(units)
        fetch([unit for unit in units if unit.kind != "expert"])
        return load_shared_units(self._shared.model, self._shared.loaded, units, fetch)

    def close(self, method: ExpertMethod, units: Mapping[str, UnitInfo]) -> None:
        """Free the experts; save this client's weights first if it exchanges nothing."""
        model = self._shared.model
        assert model is not None, "the model has been opened"
        if not method.exchanges:
            assert model.plan is not None, "the round has placed a plan"
            paths = save_own_units(model, units, self._folder)
            own = _OwnUnits(model.plan.to_dict(), model.storage, {key: path.name for key, path in paths.items()})
            write_durably(self._folder / OWN_FILE, msgspec.json.encode(own))
        model.drop_experts()

    def _restore_own(
        self, saved: _OwnUnits, run: RunConfig, units: Mapping[str, UnitInfo], model: MoeModel, fetch: Fetch
    ) -> None:
        own = {key: self._folder / OWN_FOLDER / name for key, name in saved.units.items()}
        plan = ExpertPlan.from_dict(saved.plan)
        here = set(plan.resident_keys())
        source = self.load_shared(units.values(), fetch)
        resident = [unit for unit in units.values() if (unit.layer, unit.expert) in here]
        source.add(resident, fetch(resident))
        add_own_units(source, units, own)
        scope = train_scope(run.training)
        model.apply_plan(plan, source, scope, missing=run.training.missing, storage=saved.storage)
        load_own_units(model, source, units, own)


def _read_own(path: Path) -> _OwnUnits:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_OwnUnits)
    except msgspec.DecodeError as error:
        raise StateCorrupt(
            f"{path} is not a file that edgefed wrote: {error}", remedy="Delete the `out` folder and start again."
        ) from error


class SimulatedCosts:
    """A `StepCosts`: steps cost what they would with the cost shape on a device of ``kind``.

    ``step_seconds``: (setup, plan) -> seconds of a step there.
    """

    measures_steps = False
    offloads = False
    """What a device would offload is charged by the cost model; the training that runs here needs no files for it."""
    stream_rates: Callable[[StepSetup, int, int], StreamRates] | None = None

    def __init__(
        self,
        charged: CostShape,
        kind: MemoryKind,
        step_seconds: Callable[[StepSetup, ExpertPlan], float] = lambda setup, plan: 0.0,
    ):
        self._charged, self._kind, self._step_seconds = charged, kind, step_seconds
        self._estimates: dict[
            tuple[StepSetup, tuple[int, ...], tuple[int, ...], tuple[float, ...]], MemoryEstimate
        ] = {}
        self._profile_pass: ProfilePass | None = None
        self._block_tokens = 1

    def estimate(
        self,
        shape: ModelShape,
        setup: StepSetup,
        resident: Sequence[int],
        trainable: Sequence[int],
        correction: Correction | None,
        *,
        offloading: bool,
        slice_shares: Sequence[float] = (),
    ) -> MemoryEstimate:
        """The peak with the cost shape; ``offloading`` needs room for one expert per layer."""
        charged = self._charged.sliced(slice_shares)
        resident, trainable = charged.counts(resident), charged.counts(trainable)
        if offloading:
            resident, trainable = (tuple(min(1, count) for count in counts) for counts in (resident, trainable))
        asked = (setup, resident, trainable, tuple(slice_shares))
        if asked not in self._estimates:
            charged_setup = charged.setup(setup, self._kind)
            self._estimates[asked] = training_memory(charged.shape, charged_setup, resident, trainable)
        return self._estimates[asked]

    def step_seconds(self, setup: StepSetup, plan: ExpertPlan) -> float:
        """Seconds on the virtual clock."""
        return self._step_seconds(setup, plan)

    def profile_storage(
        self,
        requested: str,
        setup: StepSetup,
        num_blocks: int,
        usable_bytes: int,
        *,
        attention: bool,
    ) -> str:
        """How a device with the cost shape would have to store experts for a profile."""
        self._profile_pass, _ = choose_profile_pass(
            self._charged.shape, self._charged.setup(setup, self._kind), num_blocks, usable_bytes, requested,
            attention=attention,
        )  # fmt: skip
        self._block_tokens = setup.sequence_length
        return self._profile_pass.storage or "full"

    def profile_reads(self, stages: Sequence[int]) -> tuple[str | None, int]:
        """(how the last profile stored experts, how often each of them was read from disk for it).

        ``stages``: tokens in each of its stages.
        """
        last = self._profile_pass
        if last is None:
            return None, 1
        if last.residency == "all":
            return last.storage, 1
        batches = [-(-tokens // (self._block_tokens * last.batch_size)) for tokens in stages]
        if last.residency == "layer":
            return last.storage, max(1, sum(-(-count // (last.concurrent_batches or count)) for count in batches))
        return last.storage, max(1, sum(batches))


class SavedMerger(ExpertMerger):
    """Keeps in ``path`` what experts were like when they were first compared: a resumed simulation must not differ."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def merge(
        self,
        plan: ExpertPlan,
        options: MergingOptions,
        profile: ActivationProfile,
        layers: Sequence[ExpertLayer],
        source: ExpertSource,
        previous: ExpertPlan | None,
        progress: ProgressSink,
    ) -> ExpertPlan:
        """As `ExpertMerger.merge`."""
        if self.embeddings is None and self._path.exists():
            with np.load(self._path, allow_pickle=False) as saved:
                self.embeddings = tuple(saved[f"layer_{number}"] for number in range(len(saved.files)))
        merged = super().merge(plan, options, profile, layers, source, previous, progress)
        if self.embeddings is not None and not self._path.exists():
            buffer = io.BytesIO()
            arrays: dict[str, Any] = {f"layer_{number}": points for number, points in enumerate(self.embeddings)}
            np.savez(buffer, **arrays)
            write_durably(self._path, buffer.getvalue())
        return merged


class CountingProgress(NullProgress):
    """Counts what a round does, by the phases that it reports: {phase: units done}. ``stages``: {phase: totals}."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.stages: dict[str, list[int]] = {}
        self._phase = ""

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        """Count under another name."""
        self._phase = name
        self.counts.setdefault(name, 0)
        self.stages.setdefault(name, []).append(total or 0)

    def advance(self, n: int) -> None:
        """Count ``n`` units."""
        self.counts[self._phase] = self.counts.get(self._phase, 0) + n

    def done(self) -> None:
        """The phase is over."""
        self._phase = ""


class CountingFetch:
    """A `Fetch` from the aggregator's own blobs that copies nothing and counts what a device would have downloaded.

    ``resident``: hashes of what is on the device. ``versions``: hashes of units of the round before, by key; of a unit
    whose version is on the device, the change counts if it is sent (`protocol.changes`). ``width``: bytes of a weight
    in the cost shape; 0: as in the model. Steps take as many bits a value in both, and count so (`uploaded_bytes`).
    """

    def __init__(
        self,
        blob: Callable[[str], Path],
        resident: Iterable[str] = (),
        versions: Mapping[str, str] = MappingProxyType({}),
        width: int = 0,
    ):
        self._blob, self.resident, self._versions, self._width = blob, set(resident), versions, width
        self._down: dict[str, int] = {}

    def __call__(self, items: Iterable[UnitInfo | FileInfo | UnitSlice]) -> dict[str, Path]:
        """The files of ``items``, {sha256: path}; for a slice that of the whole unit."""
        paths = {}
        for item in items:
            unit = item.unit if isinstance(item, UnitSlice) else item
            paths[item.sha256] = self._blob(unit.sha256)
            is_new = self.resident.isdisjoint((item.sha256, unit.sha256))
            self.resident.add(item.sha256)
            if is_new:
                kind = byte_kind(unit) if isinstance(unit, UnitInfo) else FILE
                self._down[kind] = self._down.get(kind, 0) + self._downloaded_bytes(item)
        return paths

    def _downloaded_bytes(self, item: UnitInfo | FileInfo | UnitSlice) -> int:
        base = self._versions.get(item.key) if isinstance(item, UnitInfo) else None
        if not isinstance(item, UnitInfo) or base is None or base not in self.resident:
            return item.size_bytes
        change = encode_blob_change(self._blob(base), self._blob(item.sha256))
        if change is None:
            return item.size_bytes
        own, kind = max(ITEM_BYTES[info.dtype] for info in item.tensors), byte_kind(item)
        scale = own / self._width if self._width and not kind.endswith(LORA_SUFFIX) else 1.0
        steps = steps_bytes(change)
        return min(item.size_bytes, round(steps * scale) + len(change) - steps)

    def take(self) -> dict[str, int]:
        """Bytes by kind since the last call."""
        down, self._down = self._down, {}
        return down


def simulated_trainer(
    device: SimulatedDevice,
    folder: Path,
    usable_bytes: int,
    costs: SimulatedCosts,
    shared: SharedModel,
    held_out_share: float,
    evaluates: bool = False,
) -> LocalTrainer:
    """The trainer of one simulated device, its state in ``folder``. Raises DataError when its data cannot be used."""
    return LocalTrainer(
        device.data,
        folder,
        DeviceLimits(device.expert_share, device.compute_share, private=device.private, lora_rank=device.lora_rank),
        device.name,
        FixedMemory(usable_bytes),
        held_out_share=held_out_share,
        costs=costs,
        models=SharedModelHost(shared, folder),
        merger=SavedMerger(folder / EMBEDDINGS_FILE),
        evaluates=evaluates,
    )
