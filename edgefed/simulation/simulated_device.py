"""One client of a simulation: the real trainer, on a shared model, with the memory of another device.

Differences to `edgefed.trainer.local_trainer.LocalTrainer` in a device's own process:
    * the model object and the tokenizer are shared by all clients, who train one after the other;
    * the budget is that of a device profile, and the memory model that of the cost shape (`SimulatedPlanner`);
    * nothing is measured, so nothing depends on this machine's load: no calibration step, no pressure guard;
    * the held-out loss on the device is left out: the global model's is measured once for all clients.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgefed.costs.fallbacks import FallbackSearch
from edgefed.costs.memory import Correction, MemoryEstimate, training_memory
from edgefed.costs.step_setup import StepSetup
from edgefed.disk import disk_errors, write_durably
from edgefed.expert_records import ExpertPlan
from edgefed.methods.interface import ExpertMethod
from edgefed.methods.registry import make_expert_method
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import Assignment, FileInfo, Manifest, RunConfig, UnitInfo
from edgefed.protocol.trainer import Fetch, TrainedUpdate
from edgefed.simulation.config import SimulatedDevice
from edgefed.simulation.cost_shape import FILE, CostShape, byte_kind
from edgefed.trainer.activation_profile import choose_profile_pass
from edgefed.trainer.local_trainer import OWN_FOLDER, LocalTrainer
from edgefed.trainer.planner import DeviceLimits, Planner, PlanRequest
from edgefed.training.encoding import encode_examples
from edgefed.training.profiling import ProfilePass, spread_blocks
from edgefed.training.steps import step_setup, train_scope
from edgefed.training.tokenizer import load_tokenizer

POINTS_FILE = "points.npz"
OWN_FILE = "own.json"
"""Which plan and units lie in the folder of a device that exchanges nothing."""


@dataclasses.dataclass
class SharedModel:
    """The one model of a simulation. ``loaded``: unit key -> hash of what it holds, for units that do not train."""

    folder: Path
    model: MoeModel | None = None
    loaded: dict[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: object | None = None

    def ensure(self, files: Iterable[FileInfo], paths: Mapping[str, Path]) -> MoeModel:
        """The model, made from the run's files the first time."""
        if self.model is None:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for file in files:
                    shutil.copyfile(paths[file.sha256], self.folder / Path(file.name).name)
            self.model = MoeModel.skeleton(self.folder)
            self.tokenizer = load_tokenizer(self.folder)
        return self.model


class SimulatedPlanner(Planner):
    """A planner whose memory model is that of a device with the cost shape. Nothing corrects it."""

    correction = Correction(activation_scale=1.0, overhead_bytes=0, origin="not measured: the device is simulated")

    def __init__(self, folder: Path, limits: DeviceLimits, identity: str, charged: CostShape, device: SimulatedDevice):
        super().__init__(folder, limits, identity)
        self._charged, self._kind = charged, device.profile.kind
        self._points_path = folder / POINTS_FILE
        self._estimates: dict[tuple, MemoryEstimate] = {}
        self.profile_pass: ProfilePass | None = None
        """How this device makes a profile, of ``profile_blocks`` blocks of text; known from its first plan on."""
        self.profile_blocks = 0

    def make_plan(self, request: PlanRequest) -> ExpertPlan:
        """As `Planner.make_plan`; a profile holds experts as a device with the cost shape would have to."""
        method, training = request.method, request.run.training
        if method.profiling and self.profile_pass is None:
            setup = self._charged.setup(step_setup(request.model, training), self._kind)
            self.profile_blocks = len(spread_blocks(request.blocks, training.profile_tokens))
            self.profile_pass, _ = choose_profile_pass(
                self._charged.shape, setup, self.profile_blocks, request.usable_bytes,
                attention=method.profiling.attention,
            )  # fmt: skip
            self._limits = dataclasses.replace(self._limits, profile_storage=self.profile_pass.storage or "full")
        self._restore_points()
        plan = super().make_plan(request)
        self._keep_points()
        return plan

    def _restore_points(self) -> None:
        """What experts were like when they were first compared: a process that goes on must not compare them anew."""
        if self._merger.embeddings is None and self._points_path.exists():
            with np.load(self._points_path, allow_pickle=False) as kept:
                self._merger.embeddings = tuple(kept[f"layer_{number}"] for number in range(len(kept.files)))

    def _keep_points(self) -> None:
        if self._merger.embeddings is not None and not self._points_path.exists():
            buffer = io.BytesIO()
            np.savez(buffer, **{f"layer_{number}": points for number, points in enumerate(self._merger.embeddings)})
            write_durably(self._points_path, buffer.getvalue())

    @property
    def needs_bytes(self) -> int:
        """Peak of a step under the current load, by the memory model of the simulated device."""
        return self._search.needs_bytes(self.load)

    def _make_search(self, run: RunConfig, method: ExpertMethod, layout: Callable[[int, int], ExpertPlan]) -> FallbackSearch:
        search = super()._make_search(run, method, layout)
        # What is offloaded is charged by the cost model; the training that really runs here needs no files for it.
        return dataclasses.replace(
            search,
            estimate=lambda setup, kept, trainable: self._estimate(setup, kept, trainable, method.requirements.offloading),
            may_offload=False,
        )

    def _estimate(
        self, setup: StepSetup, kept: Sequence[int], trainable: Sequence[int], offloads: bool
    ) -> MemoryEstimate:
        charged = self._charged
        kept, trainable = charged.counts(kept), charged.counts(trainable)
        if offloads:  # as many as can be there at a time: one is enough
            kept, trainable = (tuple(min(1, count) for count in counts) for counts in (kept, trainable))
        asked = (setup, kept, trainable)
        if asked not in self._estimates:
            self._estimates[asked] = training_memory(charged.shape, charged.setup(setup, self._kind), kept, trainable)
        return self._estimates[asked]


class CountingProgress:
    """Counts what a round does by the phases that it reports: {phase: units done}."""

    def __init__(self, on_message: Callable[[str], None] = lambda text: None):
        self.counts: dict[str, int] = {}
        self._phase, self._message = "", on_message

    def phase(self, name: str, total: int | None = None, unit: str = "B") -> None:
        self._phase = name
        self.counts.setdefault(name, 0)

    def advance(self, n: int) -> None:
        self.counts[self._phase] = self.counts.get(self._phase, 0) + n

    def message(self, text: str) -> None:
        self._message(text)

    def done(self) -> None:
        self._phase = ""


class CountingFetch:
    """`Fetch` from the aggregator's own blobs: nothing is copied, what a device would have downloaded is counted.

    ``held``: hashes on the device.
    """

    def __init__(self, blob: Callable[[str], Path], held: Iterable[str] = ()):
        self._blob, self.held, self.down = blob, set(held), {}

    def __call__(self, items: Iterable[UnitInfo | FileInfo]) -> dict[str, Path]:
        paths = {}
        for item in items:
            paths[item.sha256] = self._blob(item.sha256)
            if item.sha256 not in self.held:
                self.held.add(item.sha256)
                kind = byte_kind(item) if isinstance(item, UnitInfo) else FILE
                self.down[kind] = self.down.get(kind, 0) + item.size_bytes
        return paths

    def take(self) -> dict[str, int]:
        """Bytes by kind since the last call."""
        down, self.down = self.down, {}
        return down


class SimulatedTrainer(LocalTrainer):
    """The trainer of one simulated device; see the top of this file."""

    def __init__(
        self, device: SimulatedDevice, folder: Path, usable_bytes: int, charged: CostShape, shared: SharedModel,
        *, held_out_share: float,
    ):  # fmt: skip
        """Raises DataError when the device's data cannot be used."""
        limits = DeviceLimits(usable_bytes, device.expert_share, device.compute_share)
        super().__init__(device.data, folder, limits, device.name, held_out_share=held_out_share)
        self._planner = SimulatedPlanner(folder, limits, self._identity, charged, device)
        self._shared, self._charged, self._usable = shared, charged, usable_bytes
        self.plan: ExpertPlan | None = None

    @property
    def setup(self) -> StepSetup:
        """How the last round's steps were done."""
        return self._planner.load.setup

    @property
    def profile_reads(self) -> tuple[str | None, int]:
        """(how a profile holds experts, how often each of them is read from disk for it)."""
        way = self._planner.profile_pass
        if way is None:
            return None, 1
        batches = -(-self._planner.profile_blocks // way.batch_size)
        if way.hold == "all":
            return way.storage, 1
        return way.storage, -(-batches // (way.together or batches)) if way.hold == "layer" else batches

    @property
    def step_bytes(self) -> int:
        """What a training step of the current plan needs at its peak, on the simulated device."""
        return self._planner.needs_bytes

    @property
    def folder(self) -> Path:
        return self._folder

    def train_round(
        self, run: RunConfig, manifest: Manifest, assignment: Assignment, fetch: Fetch, progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:  # fmt: skip
        method = make_expert_method(run.method, run.method_options)
        model = self._ensure_model(run, manifest, fetch, progress)
        model.drop_experts()
        units = {unit.key: unit for unit in manifest.units}
        if not method.exchanges and (self._folder / OWN_FILE).exists():
            self._take_own(run, units, model, fetch)
        update = super().train_round(run, manifest, assignment, fetch, progress, update_path)
        self.plan = model.plan
        if not method.exchanges:
            paths = self._spool(model, units)
            kept = {
                "plan": self.plan.to_dict(),
                "storage": model.storage,
                "units": {key: path.name for key, path in paths.items()},
            }
            write_durably(self._folder / OWN_FILE, json.dumps(kept).encode())
        model.drop_experts()
        return update

    def _take_own(self, run: RunConfig, units: Mapping[str, UnitInfo], model: MoeModel, fetch: Fetch) -> None:
        """Put what this device trained alone into the shared model, as it was when its last round ended."""
        kept = json.loads((self._folder / OWN_FILE).read_text())
        own = {key: self._folder / OWN_FOLDER / name for key, name in kept["units"].items()}
        plan = ExpertPlan.from_dict(kept["plan"])
        here = set(plan.resident_keys())
        source = self._load_shared(model, units.values(), fetch)
        held = [unit for unit in units.values() if (unit.layer, unit.expert) in here]
        source.add(held, fetch(held))
        for key, path in own.items():
            source.add([units[key]], {units[key].sha256: path})
        model.apply_plan(plan, source, train_scope(run.training), missing=run.training.missing, storage=kept["storage"])
        for key in own:
            if units[key].kind != "expert" and not key.endswith(LORA_SUFFIX):
                model.load_unit(key, source.read(key))

    # --- what the trainer asks of its device ------------------------------------------------------------------------

    def _ensure_model(self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink) -> MoeModel:
        paths = fetch(manifest.files)
        self._model, self._loaded = self._shared.ensure(manifest.files, paths), self._shared.loaded
        if self._train_blocks is None:
            self._train_blocks = encode_examples(
                self.corpus.train, self._shared.tokenizer, run.training.sequence_length
            )
        return self._model

    def _load_shared(self, model: MoeModel, units: Iterable[UnitInfo], fetch: Fetch) -> FrameSource:
        """As `LocalTrainer` does. What an earlier client has loaded into the shared model, this device still needs."""
        units = tuple(units)
        fetch([unit for unit in units if unit.kind != "expert"])
        return super()._load_shared(model, units, fetch)

    def _usable_bytes(self) -> int:
        return self._usable
