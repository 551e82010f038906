"""Decides what a device does in a round: which experts are resident and train, and how a step saves memory.

    activation profile (once) -> fit to memory (`edgefed.costs.fallbacks`) -> the method's choice -> merged experts

The step plan (how a step is done, and with how many experts) is kept across rounds and restarts, with the profile and
the correction of a measured step. It shrinks when memory has become too small for it. It grows only when a larger one
fits into ten per cent less than there is: measured memory fluctuates, and every change of the plan costs a download.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from edgefed.costs.fallbacks import Fallback, fit, next_fallback
from edgefed.costs.price import QUANTIZED, LossPrice
from edgefed.costs.search import FallbackSearch
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import Correction, StepPlan, describe
from edgefed.errors import BudgetTooSmall
from edgefed.expert_records import ActivationProfile, ExpertPlan
from edgefed.hardware.memory import format_bytes
from edgefed.methods.interface import ExpertMethod, Profiling, RoundContext
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.merging.plan import ExpertMerger, MergingOptions
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import ExpertAssignment, Manifest, RunConfig
from edgefed.protocol.ranks import smaller_ranks
from edgefed.protocol.trainer import Fetch
from edgefed.trainer.activation_profile import make_profile, stage_blocks
from edgefed.trainer.expert_choice import Layout, even_layout, method_layout, paced, trainable_worth
from edgefed.trainer.placement import requested_rank, required_storage
from edgefed.trainer.ports import Memory, StepCosts
from edgefed.trainer.saved_plan import PLAN_FILE, SavedPlan, SavedStepPlan, read_saved_plan
from edgefed.trainer.stream_choice import OFFLOADING_PROBLEMS, outside_memory
from edgefed.training.encoding import TokenBlocks
from edgefed.training.savings import problems
from edgefed.training.steps import step_setup
from edgefed.training.stopping import Sufficiency

GROWTH = 1.10
"""A step plan grows only into memory divided by this; see the top of this file."""


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """What the owner allows.

    Attributes:
        expert_share: Share of the experts that may be resident.
        compute_share: Share of the resident experts of a layer that train on one batch.
        profile_storage: How an activation profile stores experts (`activation_profile.PROFILE_STORAGES`).
        expert_storage, stream_experts: How frozen experts are stored (`placement`), if streamed (`stream_choice`).
        private: "adapter": also train an adapter that is never sent (`private_part`); or "none".
        lora_rank: Of the adapters (`protocol.ranks`); None: that of the run, or what memory has room for.
    """

    expert_share: float = 1.0
    compute_share: float = 1.0
    profile_storage: str = "auto"
    expert_storage: str = "auto"
    stream_experts: str = "auto"
    private: str = "none"
    lora_rank: int | None = None


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """What a plan is made from.

    Attributes:
        run: The run.
        method: Its method.
        manifest: The round's units, in the versions that this device uses.
        model: The model.
        blocks: The device's training text.
        source: Reads units that are on disk.
        fetch: Downloads the others.
        progress: Where messages go.
        assignment: Experts that the aggregator assigns to this device, None without an assignment.
        train_limit: Maximum number of trainable experts in a paced run, None without a limit.
    """

    run: RunConfig
    method: ExpertMethod
    manifest: Manifest
    model: MoeModel
    blocks: TokenBlocks
    source: FrameSource
    fetch: Fetch
    progress: ProgressSink
    assignment: ExpertAssignment | None = None
    train_limit: int | None = None

    def add_all_experts(self) -> None:
        """Make every expert of the round readable in ``source``; download the missing ones."""
        experts = [unit for unit in self.manifest.units if unit.kind == "expert"]
        self.source.add(experts, self.fetch(experts))

    def context(self, *, ahead: int = 0) -> RoundContext:
        """The round, or the one ``ahead``, for the method."""
        server_round, rounds = min(self.manifest.server_round + ahead, self.run.rounds), self.run.rounds
        return RoundContext(server_round, (server_round - 1) / (rounds - 1) if rounds > 1 else 1.0, self.assignment)


@dataclasses.dataclass(frozen=True)
class _Current:
    """What led to the plan of this round, so that it can shrink."""

    search: FallbackSearch
    step_plan: StepPlan
    merge: Callable[[ExpertPlan], ExpertPlan]
    usable_bytes: int
    train_limit: int | None


class Planner:
    """Makes and keeps a device's plan. ``folder``: its state; ``identity`` seeds draws; ``excluded``: see `exclude`."""

    def __init__(
        self, folder: Path, limits: DeviceLimits, identity: str, memory: Memory, costs: StepCosts,
        merger: ExpertMerger | None = None, excluded: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self._path = folder / PLAN_FILE
        self._limits, self._identity = limits, identity
        self._memory = memory
        self._costs = costs
        self._merger = merger or ExpertMerger()
        self._saved = SavedPlan()
        self._fingerprint: list[object] = []
        self._shape: ModelShape | None = None
        self._excluded = dict(excluded or {})
        self._problems: dict[str, str] | None = None
        self._current: _Current | None = None
        self.train_slots = self.own_pace = 0
        """Largest number of experts that could train in this round if every resident expert were trainable, and number
        of experts that train without the limit of a paced run."""
        self.sufficiency: Sufficiency | None = None  # how much text the newest profile used, until that is reported

    # --- the plan of now --------------------------------------------------------------------------------------------

    @property
    def step_plan(self) -> StepPlan:
        """How the steps of the current plan are done."""
        assert self._current is not None, "there is a plan"
        return self._current.step_plan

    @property
    def needs_bytes(self) -> int:
        """Peak of a training step under the current plan, by the memory model."""
        assert self._current is not None, "there is a plan"
        return self._current.search.needs_bytes(self._current.step_plan)

    @property
    def correction(self) -> Correction | None:
        """What a measured step of this run said about the memory model."""
        return self._saved.correction

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        assert self._shape is not None, "there is a plan"
        return self._shape

    def shape_of(self, plan: ExpertPlan) -> ModelShape:
        """The shape of the model with the plan's slices, if it has any."""
        return self.shape.sliced(plan.slice_shares()) if plan.neurons else self.shape

    @property
    def profile(self) -> ActivationProfile:
        """The newest profile."""
        assert self._saved.profile is not None, "the method makes a profile"
        return self._saved.profile

    # --- planning ---------------------------------------------------------------------------------------------------

    def make_plan(self, request: PlanRequest) -> ExpertPlan:
        """The plan of this round; `step_plan` then says how its steps are done.

        All experts are downloaded only for a profile, once or as often as the method asks for it, or to be merged.
        Raises BudgetTooSmall and ConfigError before anything is downloaded.
        """
        wanted = self._prepare(request)
        usable_bytes = self._tensor_bytes()
        method, sizes, progress = request.method, request.manifest.experts_per_layer, request.progress
        most = fit(self._search(request, even_layout(sizes), None), wanted, usable_bytes)[0]
        self.train_slots = most.trainable
        profile = self._current_profile(request, usable_bytes, most)
        search = self._search(request, self._layout(request, profile, request.context()), profile)
        previous = self._previous(wanted)
        step_plan = self._settle(search, previous, wanted, usable_bytes, progress)
        plan = self._saved.plan
        if plan is None or method.plans_every_round or previous != step_plan:
            plan = search.layout(step_plan.resident, step_plan.trainable)
        merge, limit = self._merging(request), request.train_limit
        self._current = _Current(search, step_plan, merge, usable_bytes, limit)  # merging may run out of memory
        plan = self._finished(merge(plan))
        # A method may not use every expert that would fit.
        real = dataclasses.replace(step_plan, resident=plan.num_resident, trainable=plan.num_trainable)
        slices = f"slices with {plan.neuron_share:.1%} of all neurons" if plan.neurons else ""
        notes = describe(real, sum(sizes)), slices, search.rank_note(real)
        progress.message(f"plan: {'; '.join(filter(None, notes))}")
        if step_plan != wanted:
            progress.message(f"plan: {search.price.describe(step_plan.setup, plan)}")
        return plan

    def estimate(self, request: PlanRequest) -> StepPlan:
        """The step plan before anything is known of the experts. Downloads nothing; raises as `make_plan` does."""
        wanted, layout = self._prepare(request), even_layout(request.manifest.experts_per_layer)
        return fit(self._search(request, layout, None), wanted, self._tensor_bytes())[0]

    def shrink(self, missing_bytes: int = 0) -> tuple[Fallback, ExpertPlan] | None:
        """Take the next fallback (`next_fallback`), whatever the memory model says; None when nothing is left.

        Later rounds keep the smaller plan until memory has grown by a tenth.
        """
        current = self._current
        fallback = next_fallback(current.search, current.step_plan, missing_bytes) if current else None
        if current is None or fallback is None:
            return None
        step_plan = fallback.step_plan
        self._current = dataclasses.replace(current, step_plan=step_plan)
        self._saved.failed_bytes = current.usable_bytes
        return fallback, self._finished(current.merge(current.search.layout(step_plan.resident, step_plan.trainable)))

    def profile_ahead(self, request: PlanRequest) -> None:
        """Make the profile of the round after ``request.manifest``'s now; see `Profiling.when`."""
        self._make_profile(request, self._tensor_bytes(), self.step_plan, request.context(ahead=1))
        self._saved.write(self._path, self._fingerprint)

    def exclude(self, saving: str, reason: str) -> None:
        """``saving`` does not work with this model, for ``reason``. The next `make_plan` does without."""
        assert self._problems is not None, "there was a plan"
        self._problems[saving] = reason

    def correct(self, correction: Correction) -> None:
        """Keep what a measured step says; later plans of this run are made with it."""
        self._saved.correction = correction
        self._saved.write(self._path, self._fingerprint)

    def _prepare(self, request: PlanRequest) -> StepPlan:
        """Restore what was saved of the run; returns the step plan that the device would have with memory to spare.

        Raises ConfigError when experts cannot be stored as requested.
        """
        run, method, model, sizes = request.run, request.method, request.model, request.manifest.experts_per_layer
        # With the saved plan neither a later round nor a restart downloads all experts again, or measures a step again.
        fingerprint = [run.run_id, self._identity, self._limits.expert_share, self._limits.compute_share]
        if fingerprint != self._fingerprint:
            self._saved, self._current = read_saved_plan(self._path, fingerprint), None
            self._fingerprint = fingerprint
        storage = required_storage(self._limits.expert_storage, method, run.training, model)
        rank = requested_rank(self._limits.lora_rank, run.training)
        setup = step_setup(model, run.training, expert_storage=storage, private=self._limits.private, lora_rank=rank)
        if self._saved.correction and self._saved.correction.kernels != setup.kernels:
            self._saved.correction = None  # it is of other kernels; the next step is measured
        self._shape = self._shape or shape_from_config(model.config, run.model)
        if self._problems is None:
            self._problems = problems(model.module, model.device) | self._excluded
            if self._limits.expert_storage == "full":
                self._problems["nf4_experts"] = "this device has `expert_storage=full`"
        # The small term keeps 0.29 of 100 experts at 29; a layer without any expert would pass no gradient.
        count = max(len(sizes), math.floor(self._limits.expert_share * sum(sizes) + 1e-9))
        return StepPlan(setup, count, count)

    def _tensor_bytes(self) -> int:
        """Bytes that tensors may take: the model's memory without what a step was measured to take beside them."""
        return self._memory.usable_bytes() - (self._saved.correction.process_bytes if self._saved.correction else 0)

    def _search(self, request: PlanRequest, layout: Layout, profile: ActivationProfile | None) -> FallbackSearch:
        needs, shape, training = request.method.requirements, self.shape, request.run.training
        correction, length = self._saved.correction, training.sequence_length
        return FallbackSearch(
            estimate=lambda setup, resident, trainable, shares=(): self._costs.estimate(
                shape, setup, resident, trainable, correction, offloading=needs.offloading, slice_shares=shares
            ),
            layout=layout,
            price=LossPrice.of(profile, shape.experts_per_layer, length, needs.neurons, training.lora_rank),
            num_layers=len(shape.experts_per_layer),
            run_sequence_length=length,
            problems=(self._problems or {}) | (OFFLOADING_PROBLEMS if needs.offloading else {}),
            all_experts=needs.all_experts,
            smaller_ranks=() if self._limits.lora_rank else smaller_ranks(training),
            **outside_memory(self._limits.stream_experts, needs, self._costs, shape, layout, self._tensor_bytes),
        )

    # --- the profile ------------------------------------------------------------------------------------------------

    def _layout(self, request: PlanRequest, profile: ActivationProfile | None, context: RoundContext) -> Layout:
        return method_layout(
            request.method, profile, request.manifest.experts_per_layer, context,
            compute_share=self._limits.compute_share, seed=request.run.seed, identity=self._identity,
        )  # fmt: skip

    def _current_profile(self, request: PlanRequest, usable_bytes: int, likely: StepPlan) -> ActivationProfile | None:
        """The profile that this round's plan is made from, of about the size of ``likely``; None if none is needed."""
        method, saved = request.method, self._saved
        if profiling := method.profiling:
            due = saved.profile is None or profiling.when == "each_round"
            # A profile made while waiting is of the round before. An older one is from before a time of absence.
            due |= profiling.when == "while_waiting" and saved.profile_round < request.manifest.server_round - 1
            if due:
                self._make_profile(request, usable_bytes, likely, request.context())
        return saved.profile

    def _make_profile(self, request: PlanRequest, usable_bytes: int, likely: StepPlan, context: RoundContext) -> None:
        method, model, training = request.method, request.model, request.run.training
        request.add_all_experts()
        if method.exchanges:
            model.drop_experts()  # those of the last round; they are placed again after the plan
        profiling = method.profiling or Profiling()
        storage = self._costs.profile_storage(
            self._limits.profile_storage, step_setup(model, training), stage_blocks(request.blocks, training),
            usable_bytes, attention=profiling.attention,
        )  # fmt: skip

        def choice(profile: ActivationProfile) -> ExpertPlan:
            return self._layout(request, profile, context)(likely.resident, likely.trainable)

        self._saved.profile, self.sufficiency = make_profile(
            model, self.shape, training, request.blocks, request.source, usable_bytes, request.progress,
            profiling, storage=storage, choice=choice, seed=zlib.crc32(self._identity.encode()),
        )  # fmt: skip
        self._saved.profile_round = request.manifest.server_round

    # --- the step plan ----------------------------------------------------------------------------------------------

    def _previous(self, wanted: StepPlan) -> StepPlan | None:
        """The step plan of the last round, or the saved one, as far as it is still possible."""
        if self._current is not None:
            previous = self._current.step_plan
        elif self._saved.step is not None:
            previous = self._saved.step.step_plan(wanted.setup)
        else:
            return None
        problems = self._problems or {}
        fields = {"chunked_loss": "chunked_loss", "checkpointing": "checkpointing", "adamw_8bit": "optimizer"}
        changes = {field: getattr(wanted.setup, field) for saving, field in fields.items() if saving in problems}
        storage = wanted.setup.expert_storage
        may_quantize = storage is None and "nf4_experts" not in problems
        if previous.setup.expert_storage not in ((None, *QUANTIZED) if may_quantize else (storage,)):
            changes["expert_storage"] = storage
        changes |= {"streamed_layers": 0} if self._limits.stream_experts == "never" else {}
        changes |= {"lora_rank": wanted.setup.lora_rank} if self._limits.lora_rank else {}
        resident = min(previous.resident, wanted.resident)
        return StepPlan(dataclasses.replace(previous.setup, **changes), resident, min(previous.trainable, resident))

    def _settle(
        self, search: FallbackSearch, previous: StepPlan | None, wanted: StepPlan, usable_bytes: int,
        progress: ProgressSink,
    ) -> StepPlan:  # fmt: skip
        """The step plan of this round: as before, or less, or more if there is plenty. Raises BudgetTooSmall."""
        if previous is None:
            step_plan, fallbacks = fit(search, wanted, usable_bytes)
            for fallback in fallbacks:
                progress.message(f"memory: {fallback.sentence}")
            return step_plan
        if search.needs_bytes(previous) > usable_bytes:
            step_plan, _ = fit(search, wanted, usable_bytes)
        elif usable_bytes < GROWTH * self._saved.failed_bytes:
            return previous
        else:
            try:
                step_plan, _ = fit(search, wanted, int(usable_bytes / GROWTH))
            except BudgetTooSmall:
                return previous
            if search.standing(step_plan) <= search.standing(previous):
                return previous
            self._saved.failed_bytes = 0
        total = sum(self.shape.experts_per_layer)
        change = "less" if search.standing(step_plan) < search.standing(previous) else "more"
        progress.message(
            f"memory: {format_bytes(max(0, usable_bytes))} for the model now, {change} than before: "
            f"{describe(step_plan, total)} (before: {describe(previous, total)})"
        )
        return step_plan

    def _merging(self, request: PlanRequest) -> Callable[[ExpertPlan], ExpertPlan]:
        """Fills the merged groups of a plan, if the method merges experts."""
        merging, previous = request.method.merging, self._saved.plan
        if not merging:
            return lambda plan: plan
        request.add_all_experts()
        options = MergingOptions(merging.sizes, merging.weights)
        return lambda plan: self._merger.merge(
            plan, options, self.profile, request.model.layers, request.source, previous, request.progress
        )

    def _finished(self, plan: ExpertPlan) -> ExpertPlan:
        """Save ``plan``; returns it within the limit of a paced run, which may be another one in the next round."""
        assert self._current is not None, "there is a plan"
        self._saved.plan, self._saved.step = plan, SavedStepPlan.of(self.step_plan)
        self._saved.write(self._path, self._fingerprint)
        self.own_pace = trainable_worth(plan)
        return paced(plan, self._current.search.layout, self._current.train_limit)
