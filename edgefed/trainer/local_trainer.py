"""The trainer that an agent drives: one warm model, and one round of it from global weights to an update file.

    files, dense, routers -> budget, profile (once) -> plan -> planned experts -> local steps -> update

The model is built once, with every expert absent; a round loads what changed and puts the planned experts in place.
Profiling streams the experts from the downloaded files one at a time, so a device that can hold a tenth of the experts
still sees how its data uses all of them. The budget is measured anew before each round; where memory gets tight or runs
out in the middle of one, the plan shrinks and the round goes on (`edgefed.trainer.memory_guard`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec
import torch

from edgefed.costs.activations import offloaded_bytes
from edgefed.costs.memory import StepSetup
from edgefed.costs.shapes import ModelShape
from edgefed.disk import disk_errors, filesystem, make_folder
from edgefed.errors import ConfigError, DiskFull, MalformedMessage, StorageError
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.budget import MemoryBudget
from edgefed.hardware.memory import available_memory_bytes, format_bytes, process_rss_bytes
from edgefed.hardware.watch import PressureWatch
from edgefed.methods.interface import ExpertMethod
from edgefed.methods.registry import make_method
from edgefed.moe.expert_reading import FrameSource, raw_array
from edgefed.moe.merged_cache import MergedCache
from edgefed.moe.merging.alignment import neuron_aligner
from edgefed.moe.model import MoeModel
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.units import LORA_SUFFIX, ExpertSource
from edgefed.progress import ProgressSink
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, Manifest, RunConfig, UnitInfo
from edgefed.protocol.trainer import Fetch, TrainedUpdate
from edgefed.trainer import reports
from edgefed.trainer.memory_guard import MemoryGuard, PlanShrunk
from edgefed.trainer.planner import DeviceLimits, Planner, PlanRequest
from edgefed.trainer.stale_experts import FrozenCopies, with_newest_trainable
from edgefed.training.calibration import can_measure, correction_from, measure_step
from edgefed.training.chunked_loss import chunking_problem
from edgefed.training.data import Corpus, load_corpus
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.evaluate import evaluate_loss
from edgefed.training.gradient_norms import GradientNorms
from edgefed.training.out_of_memory import (
    device_lost,
    free_memory,
    is_device_lost,
    is_out_of_memory,
    with_smaller_batches,
)
from edgefed.training.profiling import spread_blocks
from edgefed.training.steps import StepsOutcome, run_steps, train_scope
from edgefed.training.tokenizer import load_tokenizer
from edgefed.training.utility import ProbeOutcome

OWN_FOLDER = "own"
"""Where a device that exchanges nothing keeps what it trained, so that a round that shrinks can start again."""


@dataclasses.dataclass
class _Round:
    """What belongs to one round. ``newest``: the units of its manifest; ``units``: as this device takes them, some of
    which may be older. ``own``: files of units whose weights of this device count, not the global ones.
    """

    run: RunConfig
    method: ExpertMethod
    manifest: Manifest
    assignment: Assignment
    fetch: Fetch
    progress: ProgressSink
    newest: Mapping[str, UnitInfo]
    units: Mapping[str, UnitInfo]
    own: Mapping[str, Path]
    doing: str = "planning"


class LocalTrainer:
    """Implements `edgefed.agent.agent.Trainer` with a real model. One per process; not thread-safe."""

    def __init__(
        self,
        data: str,
        folder: Path,
        limits: DeviceLimits,
        name: str,
        *,
        held_out_share: float = 0.1,
        corpus_seed: int = 0,
        device: str = "cpu",
        measure_budget: Callable[[], MemoryBudget] | None = None,
        watch: PressureWatch | None = None,
    ):
        """``data`` is a file or ``silo:NAME`` (see `load_corpus`); ``folder`` is where files and the plan are kept.
        ``name`` and the data seed what is random here, so the same devices in the same run do the same again.
        ``device`` is where the model lives, as torch names it. ``measure_budget`` is asked before each round; without
        it ``limits.memory_bytes`` holds, for the whole process. ``watch`` looks at memory while steps are made.

        Raises DataError when the data cannot be used. The data is read now, so that a bad file is told at once.
        """
        self.corpus: Corpus = load_corpus(data, held_out_share, corpus_seed)
        self.num_examples = len(self.corpus.train)
        self._folder = folder
        self._limits = limits
        self._identity = f"{name}/{self.corpus.sha256}"
        self._planner = Planner(folder, limits, self._identity)
        self._placer = ExpertPlacer(folder)
        self._device = device
        self._measure_budget = measure_budget
        self._watch = watch
        self._model: MoeModel | None = None
        self._loaded: dict[str, str] = {}  # unit key -> sha256 of what the model holds
        self._train_blocks: TokenBlocks | None = None
        self._held_out_blocks: TokenBlocks | None = None
        self._own_bytes_before_model = 0
        self._last: _Round | None = None
        self._chunking_checked = False

    def train_round(
        self,
        run: RunConfig,
        manifest: Manifest,
        assignment: Assignment,
        fetch: Fetch,
        progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:
        """One round: returns what the aggregator is told; the trained tensors are in ``update_path`` when it returns.

        Raises BudgetTooSmall, OutOfMemory, DeviceLost, DataError, ModelError, TrainingDiverged.
        """
        method = make_method(run.method, run.method_options)
        if method.personal:
            fault = f"the run at this server is {run.method!r}: clients train models of their own"
            raise ConfigError(fault, remedy="Join with `task`, labelled `data` and a `model` of your own.")
        newest = units = {unit.key: unit for unit in manifest.units}
        model = self._ensure_model(run, manifest, fetch, progress)
        copies = FrozenCopies(self._folder, run.run_id) if method.refresh_rounds > 1 else None
        if copies:
            units = copies.view(newest, manifest.server_round, method.refresh_rounds, fetch)
        own = {} if model.plan is None or method.exchanges else self._spool(model, units)
        this = _Round(run, method, manifest, assignment, fetch, progress, newest, units, own)
        guard = MemoryGuard(self._planner.shrink, progress, self._device, self._watch)
        outcome, before, after = self._train_within_memory(this, model, guard)
        plan, probed, survey = model.plan, ProbeOutcome({}, 0), None
        if method.assigning:
            probed = self._probe(this, model, plan)
            survey = reports.expert_survey(plan, self._planner.profile, self._planner.train_slots, outcome, probed)
        reports.write_update(model if method.exchanges else None, newest, update_path)
        if copies:
            copies.keep(this.units, newest, manifest.server_round)
        self._last = this
        forwards = {"probe_forwards": float(probed.forwards)} if method.assigning and method.assigning.directions else {}
        return TrainedUpdate(
            experts=reports.expert_reports(method, plan, outcome),
            metrics=reports.round_metrics(plan, outcome, before, after, guard.num_shrinks, **forwards),
            num_examples=len(self._train_blocks),
            num_tokens=outcome.num_tokens,
            keep=reports.kept_blobs(method, plan, manifest.files, this.units.values()),
            survey=survey,
        )

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """Make the profile of the next round from the experts of the last one, where the method wants that."""
        this, self._last = self._last, None
        if this is None or this.method.profiling is None or this.method.profiling.when != "while_waiting":
            return
        this = dataclasses.replace(this, fetch=fetch, progress=progress)
        self._planner.profile_ahead(self._plan_request(this, self._model))

    def _train_within_memory(
        self, this: _Round, model: MoeModel, guard: MemoryGuard
    ) -> tuple[StepsOutcome, float, float]:
        """(outcome, held-out loss before, after) of the plan that got through; ``model.plan`` is that plan.

        After an out-of-memory the plan is a fallback smaller and everything starts from the round's first weights: an
        optimizer step may have changed half of them.
        """
        plan: ExpertPlan | None = None
        before: dict[tuple[ExpertPlan, str | None], float] = {}  # by what is held, and how it is stored
        while True:
            trouble = ""
            try:
                if plan is None:
                    this.doing = "planning"
                    plan = self._plan(this, model)
                held = (plan, self._planner.load.setup.expert_storage)
                if not (this.own and held == (model.plan, model.storage)):  # own experts are never offloaded
                    self._place(this, model, plan)
                self._check_chunked_loss(this, model)
                if held not in before:
                    before[held] = self._held_out_loss(this)
                outcome = self._train(this, model, plan, guard)
                return outcome, before[held], self._held_out_loss(this)
            except PlanShrunk:
                plan = guard.plan
            except Exception as error:
                if is_device_lost(error):
                    raise device_lost(error, self._device) from error
                if not is_out_of_memory(error):
                    raise
                trouble = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            # Outside of the handlers: their traceback held what the failed step had allocated.
            for parameter in model.module.parameters():
                parameter.grad = None
            model.drop_experts()
            free_memory(self._device)
            if trouble:
                guard.ran_out(this.doing, trouble)
                plan = guard.plan or plan

    # --- the model ------------------------------------------------------------------------------------------------

    def _ensure_model(self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink) -> MoeModel:
        if self._model is not None:
            return self._model
        folder = self._folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        paths = fetch(manifest.files)
        for file in manifest.files:
            if Path(file.name).name != file.name:  # a name with a folder in it could write anywhere
                raise MalformedMessage(f"the manifest names a file {file.name[:80]!r}, expected a bare file name")
            shutil.copyfile(paths[file.sha256], folder / file.name)
        progress.phase("prepare")
        model = MoeModel.skeleton(folder, device=self._device)
        tokenizer = load_tokenizer(folder)
        length = run.training.sequence_length

        def report(note: str) -> None:
            progress.message(f"{self.corpus.source} {note}")

        self._train_blocks = encode_examples(self.corpus.train, tokenizer, length, on_message=report)
        if self.corpus.held_out:
            self._held_out_blocks = encode_examples(self.corpus.held_out, tokenizer, length, on_message=report)
        # What this process takes beside the model: the skeleton has no weights yet.
        self._own_bytes_before_model = process_rss_bytes()
        self._model = model
        progress.done()
        return model

    def _load_shared(self, model: MoeModel, units: Iterable[UnitInfo], fetch: Fetch) -> FrameSource:
        """Load dense tensors and routers, what every client holds, as far as they changed.

        Their adapters only become readable in the source returned: the model takes them when a plan is applied.
        """
        shared = [unit for unit in units if unit.kind != "expert" and self._loaded.get(unit.key) != unit.sha256]
        source = FrameSource(shared, fetch(shared))
        for unit in shared:
            if unit.key.endswith(LORA_SUFFIX):
                continue
            model.load_unit(unit.key, source.read(unit.key))
            # What is trained here differs from the global value as soon as the first step is made.
            if not unit.trainable:
                self._loaded[unit.key] = unit.sha256
        return source

    def _spool(self, model: MoeModel, units: Mapping[str, UnitInfo]) -> dict[str, Path]:
        """Write what this device trained, one file per unit. Its only copy beside the one that steps will change."""
        folder = self._folder / OWN_FOLDER
        paths = {}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for number, (spec, values) in enumerate(model.trained_units()):
                paths[spec.key] = folder / f"{number}.safetensors"
                infos = units[spec.key].tensors
                frames.write_frame(
                    paths[spec.key], {info.name: (info.dtype, raw_array(values[info.name])) for info in infos}
                )
        return paths

    # --- a round --------------------------------------------------------------------------------------------------

    def _usable_bytes(self) -> int:
        """What the model may use now. On a CPU the budget is the whole process's, Python and the text included."""
        budget_bytes = self._limits.memory_bytes
        if self._measure_budget is not None:
            budget = self._measure_budget()
            budget_bytes = budget.now_bytes
            if budget_bytes is None:
                raise ConfigError(
                    f"how much memory training may use is unknown: {budget.origin}", remedy="Set `memory`, e.g. 4GiB."
                )
        if budget_bytes is None:
            raise ConfigError("neither a memory limit nor a way to measure memory was given")
        return budget_bytes - (self._own_bytes_before_model if torch.device(self._device).type == "cpu" else 0)

    def _plan(self, this: _Round, model: MoeModel) -> ExpertPlan:
        """The plan under the memory of now; profiles first if need be."""
        return self._planner.make_plan(self._plan_request(this, model))

    def _plan_request(self, this: _Round, model: MoeModel) -> PlanRequest:
        usable_bytes = self._usable_bytes()
        source = FrameSource() if this.own else self._load_shared(model, this.units.values(), this.fetch)
        manifest = msgspec.structs.replace(this.manifest, units=tuple(this.units.values()))
        return PlanRequest(
            this.run, this.method, manifest, model, self._train_blocks, source, usable_bytes, this.fetch,
            this.progress, this.assignment.experts,
        )  # fmt: skip

    def _place(self, this: _Round, model: MoeModel, plan: ExpertPlan) -> None:
        """Put the planned experts on the device, everything with the weights that the round begins with."""
        this.doing = "loading the planned experts"
        setup = self._planner.load.setup
        offload = self._placer.reserve(model, plan, setup, self._planner.shape, this.progress)
        this.units = with_newest_trainable(this.units, this.newest, plan)
        source = self._load_shared(model, this.units.values(), this.fetch)
        held = [unit for unit in this.units.values() if reports.is_held(unit, plan)]
        source.add(held, this.fetch(held))
        for key, path in this.own.items():
            source.add([this.units[key]], {this.units[key].sha256: path})
        hashes = None if this.own else {key: unit.sha256 for key, unit in this.units.items()}
        self._placer.place(model, plan, source, this.run, this.method, setup, offload, hashes)
        for key in this.own:
            if this.units[key].kind != "expert" and not key.endswith(LORA_SUFFIX):
                model.load_unit(key, source.read(key))

    def _check_chunked_loss(self, this: _Round, model: MoeModel) -> None:
        """Before its first use: does it give this model's own loss? Raises PlanShrunk to plan without it if not."""
        if self._chunking_checked or not self._planner.load.setup.chunked_loss:
            return
        this.doing = "comparing the chunked loss with the model's own"
        problem = chunking_problem(model.module, self._train_blocks.input_ids, self._train_blocks.labels)
        self._chunking_checked = True
        if problem:
            this.progress.message(f"memory: the loss of this model cannot be computed in chunks: {problem}")
            self._planner.exclude("chunked_loss", problem)
            raise PlanShrunk

    def _held_out_loss(self, this: _Round) -> float:
        """Loss of the model that this device runs (its resident experts) on its held-out text; NaN without any."""
        if self._held_out_blocks is None:
            return math.nan
        this.doing = "evaluating"
        training, progress = this.run.training, this.progress
        blocks = spread_blocks(self._held_out_blocks, training.evaluation_tokens)
        chunked = self._planner.load.setup.chunked_loss

        def evaluate(batch_size: int) -> float:
            progress.phase("evaluate", blocks.num_tokens, "token")
            return evaluate_loss(self._model.module, blocks, batch_size, chunked=chunked, on_batch=progress.advance)

        loss = with_smaller_batches(
            evaluate,
            training.batch_size,
            lambda size: progress.message(f"memory: out of memory while evaluating; {size} sequences at a time"),
        )
        progress.done()
        return loss

    def _train(self, this: _Round, model: MoeModel, plan: ExpertPlan, guard: MemoryGuard) -> StepsOutcome:
        this.doing = "training"
        training, progress = this.run.training, this.progress
        setup = self._planner.load.setup

        def measure(optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
            measurement = measure_step(model, optimizer, step)
            self._planner.correct(correction_from(measurement, self._planner.shape, setup))

        progress.phase("train", training.local_steps, "step")
        with self._watch or contextlib.nullcontext():
            outcome = run_steps(
                model,
                plan,
                this.method,
                self._train_blocks,
                training,
                compute_share=self._limits.compute_share,
                seed=self._seed(this),
                setup=setup,
                on_step=lambda loss: progress.advance(1),
                norms=GradientNorms(model) if this.method.assigning else None,
                reconsider=guard.reconsider,
                measure=measure if self._planner.correction is None and can_measure(setup) else None,
            )
        progress.done()
        return outcome

    def _probe(self, this: _Round, model: MoeModel, plan: ExpertPlan) -> ProbeOutcome:
        """Gradient norms of the explored experts after training; see `edgefed.training.utility`."""
        progress, load = this.progress, self._planner.load
        assigning = this.method.assigning
        assert assigning is not None
        frozen = sum(len(plan.frozen(layer)) for layer in range(plan.num_layers))
        progress.phase("explore", 1 + 2 * assigning.directions * min(frozen, assigning.max_explored), "pass")
        blocks = self._train_blocks.shortened(load.setup.sequence_length)
        outcome = reports.probe_explored(
            model, plan, blocks, directions=assigning.directions, most=assigning.max_explored,
            batch_size=load.setup.batch_size, seed=self._seed(this), chunked=load.setup.chunked_loss,
            on_forward=lambda: progress.advance(1),
            on_smaller=lambda size: progress.message(
                f"memory: out of memory while exploring; {size} sequences at a time"
            ),
        )  # fmt: skip
        progress.done()
        return outcome

    def _seed(self, this: _Round) -> int:
        """The same for the same device in the same round of the same run, and for nobody else."""
        return zlib.crc32(f"{this.assignment.seed}/{this.assignment.server_round}/{self._identity}".encode())


# Puts the experts of a plan on the device: in its memory, or offloaded; merged ones as they were kept, if they are.

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
        kept, trainable = [plan.num_slots(layer) for layer in layers], [len(plan.trainable(layer)) for layer in layers]
        size, device = offloaded_bytes(shape, setup, kept, trainable), torch.device(model.module.device)
        discrete = device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated
        if discrete and size <= HOST_SHARE * available_memory_bytes():
            progress.message(f"offloading: {format_bytes(size)} of experts, in the host's memory")
            return OffloadSpace(device, None)
        folder = make_folder(self._offload_folder)
        if (kind := filesystem(folder)) in _IN_MEMORY:
            raise StorageError(
                f"experts are to be offloaded to {folder}, which is memory itself ({kind})",
                remedy="Join with a `state` folder that is on a disk.",
            )
        with disk_errors(folder):
            free = shutil.disk_usage(folder).free
        if size > free:
            raise DiskFull(
                f"offloaded experts, their gradients and moments take {format_bytes(size)} in {folder}, "
                f"{format_bytes(free)} are free",
                remedy="Free space on that disk, or join with a `state` folder on another one.",
            )
        progress.message(f"offloading: {format_bytes(size)} of experts, in files")
        return OffloadSpace(device, folder)

    def place(
        self,
        model: MoeModel,
        plan: ExpertPlan,
        source: ExpertSource,
        run: RunConfig,
        method: ExpertMethod,
        setup: StepSetup,
        offload: OffloadSpace | None,
        hashes: Mapping[str, str] | None,
    ) -> None:
        """Apply ``plan``. ``hashes``: of the values that ``source`` has, by unit key; None: merged experts are made
        anew. Raises CheckpointError, ConfigError, StorageError.
        """
        self._merged.hashes = hashes or {}
        model.apply_plan(
            plan, source, train_scope(run.training), missing=run.training.missing, storage=setup.expert_storage,
            align=neuron_aligner(model.layers) if method.merging and method.merging.align else None,
            merged=self._merged if hashes is not None else None, offload=offload,
        )  # fmt: skip
        self._merged.trim()
