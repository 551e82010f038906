"""What a device does in a round: which experts it holds and trains, and how a step saves memory, under its budget.

    profile (once) -> wanted experts -> `edgefed.costs.fallbacks.fit` with the memory model -> the method's plan

The load (how a step is done, and how many experts) is kept across rounds and restarts, with the profile and with what
a measured step said about the memory model. It shrinks whenever the budget has become too small for it. It grows only
when a higher load would fit into ten per cent less than there is: a budget that is measured anew before each round
wavers, and every change of the plan costs a download.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from edgefed.costs.fallbacks import Fallback, FallbackSearch, StepPlan, describe, fit, next_fallback
from edgefed.costs.memory import training_memory
from edgefed.costs.shapes import ModelShape, shape_from_config
from edgefed.costs.step_setup import Correction
from edgefed.disk import disk_errors, write_durably
from edgefed.errors import BudgetTooSmall, ConfigError, StateCorrupt
from edgefed.expert_records import ActivationProfile, ExpertPlan, Role
from edgefed.hardware.memory import format_bytes
from edgefed.methods.interface import DeviceBudget, ExpertMethod, Profiling, RoundContext
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.merging.plan import ExpertMerger, with_placeholder_groups
from edgefed.moe.model import MoeModel
from edgefed.moe.packed import EXPERT_STORAGES
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import ExpertAssignment, Manifest, RunConfig, TrainingConfig
from edgefed.protocol.trainer import Fetch
from edgefed.trainer.activation_profile import make_profile
from edgefed.training.encoding import TokenBlocks
from edgefed.training.quantising import packing_problem
from edgefed.training.savings import problems
from edgefed.training.steps import step_setup

GROWTH = 1.10
"""A load may grow when it would fit into the budget divided by this; see the top of this file."""

_OFFLOADING_PROBLEMS = {
    "adamw_8bit": "moments of offloaded experts stay as they are",
    "nf4_experts": "a method that offloads experts keeps them as they come",
}


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """What the owner allows. ``memory_bytes`` is for the whole process, None: what is measured before each round;
    ``expert_share`` caps the experts held, ``compute_share`` those that learn from one batch. ``profile_storage``: how
    a profile holds experts (`edgefed.trainer.activation_profile`), ``expert_storage``: how training does
    (`edgefed.trainer.planner`).
    """

    memory_bytes: int | None = None
    expert_share: float = 1.0
    compute_share: float = 1.0
    profile_storage: str = "auto"
    expert_storage: str = "auto"


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What a plan is made from. ``blocks`` is the device's training text, ``source`` has what is loaded of the round's
    units, ``fetch`` brings more. ``usable_bytes``: what the model may use now. ``assignment``: what the aggregator
    wants.
    """

    run: RunConfig
    method: ExpertMethod
    manifest: Manifest
    model: MoeModel
    blocks: TokenBlocks
    source: FrameSource
    usable_bytes: int
    fetch: Fetch
    progress: ProgressSink
    assignment: ExpertAssignment | None = None

    def add_all_experts(self) -> None:
        """Make every expert of the round readable in ``source``; downloads what is not there."""
        experts = [unit for unit in self.manifest.units if unit.kind == "expert"]
        self.source.add(experts, self.fetch(experts))


class Planner:
    """Makes and keeps one device's plan. ``identity`` names the device and its data; it seeds what is random."""

    def __init__(self, folder: Path, limits: DeviceLimits, identity: str):
        self._path = folder / PLAN_FILE
        self._limits = limits
        self._identity = identity
        self._saved = SavedPlan()
        self._fingerprint: list = []
        self._search: FallbackSearch | None = None
        self._shape: ModelShape | None = None
        self._problems: dict[str, str] | None = None
        self._usable_bytes = 0
        self._merger = ExpertMerger()
        self._merge: Callable[[ExpertPlan], ExpertPlan] = lambda plan: plan
        self.train_slots = 0
        """Experts that memory would let learn in this round, spread evenly, were they all to learn that are held."""
        self.load: StepPlan | None = None
        """What the current plan does; None before the first plan."""

    @property
    def correction(self) -> Correction | None:
        """What a measured step of this run said about the memory model."""
        return self._saved.correction

    def make_plan(self, request: PlanRequest) -> ExpertPlan:
        """The plan of this round; `load` then says how its steps are done.

        A profile is made once, or each round if the method asks for it; all experts are downloaded for it, or to be
        merged, and for no other reason. Raises BudgetTooSmall and ConfigError before anything is downloaded.
        """
        run, method, model, progress = request.run, request.method, request.model, request.progress
        self._restore(run)
        saved = self._saved
        storage = required_storage(self._limits.expert_storage, method, run.training, model)
        setup = step_setup(model, run.training, expert_storage=storage)
        if saved.correction and saved.correction.kernels != setup.kernels:
            saved.correction = None  # it says nothing of these kernels; the next step is measured
        usable_bytes = self._usable_of(request)
        sizes = request.manifest.experts_per_layer
        self._shape = self._shape or shape_from_config(model.config, run.model)
        if self._problems is None:
            self._problems = problems(model.module, model.module.device)
            if self._limits.expert_storage == "full":
                self._problems["nf4_experts"] = "this device has `expert_storage=full`"
        # The small term keeps 0.29 of 100 experts at 29; a layer without any expert would pass no gradient.
        count = max(len(sizes), math.floor(self._limits.expert_share * sum(sizes) + 1e-9))
        wanted = StepPlan(setup, count, count)
        self._search = self._make_search(run, method, functools.partial(_spread_evenly, sizes))
        most, _ = fit(self._search, wanted, usable_bytes)  # refuse before anything is downloaded
        self.train_slots = most.trained
        if method.profiling and self._profile_is_due(method.profiling, request.manifest.server_round):
            self._profile(request)
        self._search = self._make_search(run, method, self._layout(request))
        before = self._resumed(wanted)
        self.load = self._settle(before, wanted, usable_bytes, progress)
        if saved.plan is not None and not method.plans_every_round and before == self.load:
            plan = ExpertPlan.from_dict(saved.plan)
        else:
            plan = self._search.layout(self.load.held, self.load.trained)
        if merging := method.merging:
            request.add_all_experts()
            before_merging = ExpertPlan.from_dict(saved.plan) if saved.plan else None
            self._merge = lambda plan: self._merger.merge(
                plan, merging, saved.profile, model.layers, request.source, before_merging, progress
            )
            plan = self._merge(plan)
        self._usable_bytes = usable_bytes
        self._keep(plan)
        real = dataclasses.replace(
            self.load, held=plan.num_resident, trained=plan.num_trainable
        )  # no use for all of them
        progress.message(f"plan: {describe(real, sum(sizes))}")
        return plan

    def shrink(self) -> tuple[Fallback, ExpertPlan] | None:
        """Go down by one fallback, whatever the memory model says of the load; None when nothing is left to give up.

        The load stays down in later rounds until the budget has grown by a tenth.
        """
        assert self._search is not None and self.load is not None, "there is a plan to shrink"
        fallback = next_fallback(self._search, self.load)
        if fallback is None:
            return None
        self.load = fallback.load
        self._saved.failed_bytes = self._usable_bytes
        plan = self._merge(self._search.layout(self.load.held, self.load.trained))
        self._keep(plan)
        return fallback, plan

    def profile_ahead(self, request: PlanRequest) -> None:
        """Make the profile of the round after ``request.manifest``'s now; see `Profiling.when`."""
        self._profile(request)
        self._write()

    def exclude(self, saving: str, reason: str) -> None:
        """``saving`` turned out not to work with this model. The next `make_plan` does without."""
        assert self._problems is not None
        self._problems[saving] = reason

    def correct(self, correction: Correction) -> None:
        """Keep what a measured step says: plans from the next round on are made with it."""
        self._saved.correction = correction
        self._write()

    @property
    def shape(self) -> ModelShape:
        assert self._shape is not None, "there is a plan"
        return self._shape

    @property
    def profile(self) -> ActivationProfile:
        """The newest profile."""
        assert self._saved.profile is not None, "there was a profile"
        return self._saved.profile

    def _profile_is_due(self, profiling: Profiling, server_round: int) -> bool:
        if self._saved.profile is None or profiling.when == "each_round":
            return True
        # One made while waiting is of the round before. An older one was left by a device that was away.
        return profiling.when == "while_waiting" and self._saved.profile_round < server_round - 1

    def _profile(self, request: PlanRequest) -> None:
        method, model = request.method, request.model
        request.add_all_experts()
        if method.exchanges:
            model.drop_experts()  # those of the last round; they are placed anew after the plan
        self._saved.profile = make_profile(
            model, self.shape, request.run.training, request.blocks, request.source, self._usable_of(request),
            request.progress, storage=self._limits.profile_storage, attention=method.profiling is not None and method.profiling.attention,
        )  # fmt: skip
        self._saved.profile_round = request.manifest.server_round

    def _usable_of(self, request: PlanRequest) -> int:
        """What the allocator may use: without what a measured step showed that the process takes beside it."""
        return request.usable_bytes - (self._saved.correction.process_bytes if self._saved.correction else 0)

    # --- the load ---------------------------------------------------------------------------------------------------

    def _settle(self, before: StepPlan | None, wanted: StepPlan, usable_bytes: int, progress: ProgressSink) -> StepPlan:
        """The load of this round: as it was, or less, or more where there is plenty. Raises BudgetTooSmall."""
        search = self._search
        if before is None:
            load, fallbacks = fit(search, wanted, usable_bytes)
            for fallback in fallbacks:
                progress.message(f"memory: {fallback.sentence}")
            return load
        need = search.needs_bytes(before)
        if need > usable_bytes:
            load, _ = fit(search, wanted, usable_bytes)
            self._tell_change(before, load, usable_bytes, progress)
            return load
        if usable_bytes < GROWTH * self._saved.failed_bytes:
            return before
        try:
            load, _ = fit(search, wanted, int(usable_bytes / GROWTH))
        except BudgetTooSmall:
            return before
        if load.rank() <= before.rank():
            return before
        self._saved.failed_bytes = 0
        self._tell_change(before, load, usable_bytes, progress)
        return load

    def _tell_change(self, before: StepPlan, load: StepPlan, usable_bytes: int, progress: ProgressSink) -> None:
        total = sum(self.shape.experts_per_layer)
        why = "less" if load.rank() < before.rank() else "more"
        progress.message(
            f"memory: {format_bytes(max(0, usable_bytes))} for the model now, {why} than before: "
            f"{describe(load, total)} (before: {describe(before, total)})"
        )

    def _resumed(self, wanted: StepPlan) -> StepPlan | None:
        """The load of the last round, or the one that was saved, as far as it can still be had."""
        if self.load is not None:
            load = self.load
        elif self._saved.load is not None:
            saved = self._saved.load
            setup = dataclasses.replace(wanted.setup, **{name: saved["setup"][name] for name in SAVED_SETUP})
            load = StepPlan(setup, saved["held"], saved["trained"])
        else:
            return None
        changes = {
            field: getattr(wanted.setup, field)
            for problem, field in (("chunked_loss",) * 2, ("checkpointing",) * 2, ("adamw_8bit", "optimizer"))
            if problem in self._problems
        }
        storage = wanted.setup.expert_storage
        may_pack = storage is None and "nf4_experts" not in self._problems
        if load.setup.expert_storage not in ((None, "nf4") if may_pack else (storage,)):
            changes["expert_storage"] = storage
        held = min(load.held, wanted.held)
        return StepPlan(dataclasses.replace(load.setup, **changes), held, min(load.trained, held))

    def _make_search(
        self, run: RunConfig, method: ExpertMethod, layout: Callable[[int, int], ExpertPlan]
    ) -> FallbackSearch:
        shape, correction = self.shape, self._saved.correction
        return FallbackSearch(
            estimate=lambda setup, kept, trainable: training_memory(shape, setup, kept, trainable, correction),
            layout=layout,
            num_layers=len(shape.experts_per_layer),
            run_sequence_length=run.training.sequence_length,
            problems=self._problems | (_OFFLOADING_PROBLEMS if method.requirements.offloading else {}),
            all_experts=method.requirements.all_experts,
            may_offload=method.requirements.offloading,
        )

    def _layout(self, request: PlanRequest) -> Callable[[int, int], ExpertPlan]:
        """Which experts, for so many held and trained: the method's choice; drawn from the same numbers each time, so
        fewer experts are a part of more.
        """
        run, method, server_round = request.run, request.method, request.manifest.server_round
        drawn_in = server_round if method.plans_every_round else 0
        progress = (server_round - 1) / (run.rounds - 1) if run.rounds > 1 else 1.0
        context = RoundContext(server_round, progress, request.assignment)
        merging, profile, sizes = method.merging, self._saved.profile, request.manifest.experts_per_layer

        @functools.lru_cache(maxsize=64)
        def choose(count: int) -> ExpertPlan:
            rng = np.random.default_rng([run.seed, drawn_in, zlib.crc32(self._identity.encode())])
            budget = DeviceBudget(count, self._limits.compute_share)
            plan = method.plan_experts(profile, sizes, budget, rng, context)
            return with_placeholder_groups(plan, count, profile, merging.sizes) if merging else plan

        def layout(held: int, trained: int) -> ExpertPlan:
            return _train_some(choose(held), choose(trained)) if trained < held else choose(held)

        return layout

    # --- plan.json --------------------------------------------------------------------------------------------------

    def _restore(self, run: RunConfig) -> None:
        """Read what this device saved earlier in the same run with the same data and shares, once per run.

        With it neither a later round nor a restart downloads all experts again, or measures a step again.
        """
        fingerprint = [run.run_id, self._identity, self._limits.expert_share, self._limits.compute_share]
        if fingerprint == self._fingerprint:
            return
        self._saved, self.load = read_saved_plan(self._path, fingerprint), None
        self._fingerprint = fingerprint

    def _keep(self, plan: ExpertPlan) -> None:
        self._saved.keep(plan, self.load)
        self._write()

    def _write(self) -> None:
        self._saved.write(self._path, self._fingerprint)


def _spread_evenly(experts_per_layer: tuple[int, ...], held: int, trained: int) -> ExpertPlan:
    """A plan of so many experts before anything is known of them: the same share of each layer."""

    def counts(total: int) -> list[int]:
        share, layers = total / sum(experts_per_layer), len(experts_per_layer)
        found = [max(1, math.floor(share * size)) for size in experts_per_layer]
        for layer in range(layers):
            if sum(found) < total and found[layer] < experts_per_layer[layer]:
                found[layer] += 1
        return found

    kept, trainable = counts(held), counts(trained)
    return ExpertPlan.of(
        experts_per_layer,
        [range(count) for count in trainable],
        [range(low, high) for low, high in zip(trainable, kept, strict=True)],
    )


def _train_some(held: ExpertPlan, trained: ExpertPlan) -> ExpertPlan:
    """``held`` with only the experts of ``trained`` trainable, at least one per layer."""
    roles = []
    for mine, theirs in zip(held.roles, trained.roles, strict=True):
        both = (mine == Role.TRAINABLE) & (theirs == Role.TRAINABLE)
        if not both.any():
            both[np.flatnonzero(mine == Role.TRAINABLE)[:1]] = True
        roles.append(np.where((mine == Role.TRAINABLE) & ~both, Role.FROZEN, mine).astype(np.int8))
    return ExpertPlan(tuple(roles), held.merged)


# What a device remembers of a run from round to round and across restarts: plan.json in its state folder.

PLAN_FILE = "plan.json"
"""Profile, load, plan and correction, in the device's state folder."""

SAVED_SETUP = ("chunked_loss", "checkpointing", "optimizer", "expert_storage", "offload", "sequence_length")
"""Fields of a `StepSetup` that are the device's own; the run says the others."""


@dataclasses.dataclass
class SavedPlan:
    """``profile_round``: whose experts the profile is of. ``load``: the saved fields of a `Load`. ``failed_bytes``: the
    budget under which a plan ran out of memory, 0: none.
    """

    profile: ActivationProfile | None = None
    profile_round: int = 0
    plan: dict | None = None
    load: dict | None = None
    correction: Correction | None = None
    failed_bytes: int = 0

    def keep(self, plan: ExpertPlan, load: StepPlan) -> None:
        self.plan = plan.to_dict()
        self.load = {
            "setup": {name: getattr(load.setup, name) for name in SAVED_SETUP},
            "held": load.held,
            "trained": load.trained,
        }

    def write(self, path: Path, fingerprint: list) -> None:
        """Put it on disk for the run and device that ``fingerprint`` tells. Raises StorageError."""
        content = {
            "fingerprint": fingerprint,
            "profile_round": self.profile_round,
            "plan": self.plan,
            "load": self.load,
            "failed_bytes": self.failed_bytes,
            "correction": dataclasses.asdict(self.correction) if self.correction else None,
            "profile": self.profile.to_dict() if self.profile else None,
        }
        write_durably(path, json.dumps(content).encode())


def read_saved_plan(path: Path, fingerprint: list) -> SavedPlan:
    """What was written for ``fingerprint``; empty where there is nothing, or something of another run or device.

    Raises StateCorrupt, StorageError.
    """
    if not path.exists():
        return SavedPlan()
    try:
        with disk_errors(path):
            saved = json.loads(path.read_text())
        if saved["fingerprint"] != fingerprint:
            return SavedPlan()
        return SavedPlan(
            profile=ActivationProfile.from_dict(saved["profile"]) if saved["profile"] else None,
            profile_round=int(saved["profile_round"]),
            plan=saved["plan"],
            load=_checked_load(saved["load"]),
            correction=Correction(**saved["correction"]) if saved["correction"] else None,
            failed_bytes=int(saved["failed_bytes"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateCorrupt(
            f"{path} is not what was written: {error}", remedy="Delete the file; the device plans again."
        ) from error


def _checked_load(load: Mapping) -> dict:
    return {
        "setup": {name: load["setup"][name] for name in SAVED_SETUP},
        "held": int(load["held"]),
        "trained": int(load["trained"]),
    }


# How the experts of a device are to be stored: what the owner allows, what the method asks for, what can be had.

STORAGE_CHOICES = ("auto", "full", *EXPERT_STORAGES)
"""What an owner may ask for. "auto": as the search of savings decides; "full": the way experts come, always."""


def required_storage(requested: str, method: ExpertMethod, training: TrainingConfig, model: MoeModel) -> str | None:
    """What experts that do not learn must be stored as from the start; None where nobody asks for anything.

    ``requested`` is one of STORAGE_CHOICES. Raises ConfigError where it contradicts the method, makes no sense, or cannot be
    had on this device.
    """
    if requested not in STORAGE_CHOICES:
        raise ConfigError(f"experts can be stored as {', '.join(STORAGE_CHOICES)}; asked for {requested!r}")
    asked = f"`expert_storage={requested}`"
    fixed = method.requirements.expert_storage
    if fixed is not None:
        if requested not in ("auto", fixed):
            raise ConfigError(
                f"the method {method.name} keeps experts in {fixed}, this device has {asked}",
                remedy="Join without `expert_storage`, or run another method.",
            )
        requested, asked = method.requirements.expert_storage, f"the method {method.name}"
    if requested in ("auto", "full"):
        return None
    if method.requirements.offloading:
        raise ConfigError(
            f"{asked} wants {requested}, but {method.name} offloads experts the way they come",
            remedy="Join without `expert_storage`, or run another method.",
        )
    if method.requirements.all_experts and training.experts == "full":
        raise ConfigError(
            f"{asked} wants {requested}, but {method.name} trains every expert in full: none is left to be quantised",
            remedy="Join without `expert_storage`, or serve with `train_experts=lora`.",
        )
    if problem := packing_problem(requested, str(model.module.device), model.dtype):
        raise ConfigError(
            f"{asked} cannot be had here: {problem}", remedy="Join with `expert_storage=full`, or on another device."
        )
    return requested
