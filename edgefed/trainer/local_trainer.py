"""The trainer of a device: one model that stays loaded, and one round from global weights to an update file.

    files, dense, routers -> memory, activation profile (once) -> plan -> planned experts -> local steps -> update

The model is built once, without experts; a round loads what has changed and places the planned experts. The profile
streams experts from their files, so a device with room for a tenth of them still sees how its data uses them all.
Memory is read before each round. If it gets tight or runs out during a round, the plan shrinks and the round continues
(`edgefed.trainer.memory_guard`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path

import msgspec
import torch

from edgefed.errors import ConfigError, first_line
from edgefed.expert_records import ExpertPlan
from edgefed.kernels.failures import record_backward_failure
from edgefed.kernels.out_of_memory import device_lost, free_memory, is_device_lost, is_out_of_memory
from edgefed.methods.pace import refresh_rounds
from edgefed.methods.registry import make_expert_method, make_method
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.merging.plan import ExpertMerger
from edgefed.moe.model import MoeModel
from edgefed.progress import ProgressSink
from edgefed.protocol.alternation import sent_units
from edgefed.protocol.messages import Assignment, Manifest, RunConfig
from edgefed.protocol.trainer import Fetch, TrainedUpdate
from edgefed.trainer import reports
from edgefed.trainer.device_round import DeviceRound
from edgefed.trainer.evaluation import HeldOutLosses, evaluate_streamed
from edgefed.trainer.finished_steps import FinishedSteps
from edgefed.trainer.kernel_proof import compile_products, prove_before_round
from edgefed.trainer.memory_guard import MemoryGuard, PlanShrunk, check_chunked_loss
from edgefed.trainer.optimizer_state import OptimizerState
from edgefed.trainer.placement import (
    ExpertPlacer,
    StaleExperts,
    add_own_units,
    keep_model,
    load_own_units,
    save_own_units,
    with_newest_trainable,
)
from edgefed.trainer.planner import DeviceLimits, Planner, PlanRequest
from edgefed.trainer.ports import FormulaCosts, Memory, ModelHost, OwnModel, StepCosts
from edgefed.trainer.private_part import PrivatePart
from edgefed.training.calibration import can_measure, correction_from, measure_step
from edgefed.training.data import AUTOMATIC, Corpus, RecordFields, load_corpus
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.step_clock import StepClock
from edgefed.training.steps import StepsOutcome, run_steps
from edgefed.training.user_functions import NONE, UserFunctions
from edgefed.training.utility import GradientNorms, ProbeOutcome

MODEL_FOLDER = "model"
"""Files of the model (config.json, tokenizer.json, ...), in the device's state folder."""


class LocalTrainer:
    """A `Trainer` with a real model. One per process; not thread-safe.

    Args:
        data: Training data (see `load_corpus`).
        folder: The device's state: model files, plan, caches.
        limits: What the owner allows.
        name: Name of the device. With the data it seeds what is random, so a device repeats itself.
        memory: How much memory the model may use.
        held_out_share: Share of the data that is evaluated and not trained on.
        corpus_seed: Seed of that split.
        device: Where the model lives, as torch names it.
        costs: The memory model of a training step.
        models: Provides the model.
        merger: Merges experts, for methods that do.
        evaluates: Measure the held-out loss before and after training.
        fields: Names of the fields of the data's records.
        functions: Functions of the user.

    Raises DataError if the data cannot be used. It is read at once.
    """

    def __init__(
        self,
        data: str,
        folder: Path,
        limits: DeviceLimits,
        name: str,
        memory: Memory,
        *,
        held_out_share: float = 0.1,
        corpus_seed: int = 0,
        device: str = "cpu",
        costs: StepCosts | None = None,
        models: ModelHost | None = None,
        merger: ExpertMerger | None = None,
        evaluates: bool = True,
        fields: RecordFields = AUTOMATIC,
        functions: UserFunctions = NONE,
    ):
        self.corpus: Corpus = load_corpus(data, held_out_share, corpus_seed, fields)
        self.num_examples = len(self.corpus.train)
        self._folder = folder
        self._limits = limits
        self._identity = f"{name}/{self.corpus.sha256}"
        self._memory = memory
        self._costs: StepCosts = costs or FormulaCosts(stream_folder=folder, device=device)
        self._models: ModelHost = models or OwnModel(folder / MODEL_FOLDER, device)
        self._device, self._functions = device, functions
        self.planner = self._make_planner(folder, merger)
        self.plan: ExpertPlan | None = None
        """The plan of the last round."""
        self._placer = ExpertPlacer(folder)
        self.evaluates = evaluates
        self._train_blocks: TokenBlocks | None = None
        self._held_out_blocks: TokenBlocks | None = None
        self._losses = HeldOutLosses()
        self._private = PrivatePart(folder, limits.private)
        self.has_private_part = self._private.exists
        self._last: DeviceRound | None = None
        self._chunking_checked = False

    @property
    def model(self) -> MoeModel:
        """The model, once a round has opened it."""
        model = self._models.model
        assert model is not None, "a round has opened the model"
        return model

    def train_round(
        self,
        run: RunConfig,
        manifest: Manifest,
        assignment: Assignment,
        fetch: Fetch,
        progress: ProgressSink,
        update_path: Path,
    ) -> TrainedUpdate:
        """Train one round and write the update to ``update_path``; returns what the aggregator is told of it.

        Raises BudgetTooSmall, OutOfMemory, DeviceLost, DataError, ModelError, TrainingDiverged.
        """
        method = make_method(run.method, run.method_options)
        if method.personal:
            raise ConfigError(
                f"the run at this server is {run.method!r}: clients train models of their own",
                remedy="Join with `task`, labelled `data` and a `model` of your own.",
            )
        newest = units = {unit.key: unit for unit in manifest.units}
        model = self._models.open(run, method, manifest, fetch, progress)
        blocks = self._encode(run, progress)
        self._private.open(model, run, method, manifest.server_round)
        refresh, copies = refresh_rounds(method, run.pace), None
        if refresh > 1:
            copies, kept = StaleExperts(self._folder, run.run_id), reports.fetch_kept(fetch, method, self.plan)
            units = copies.view(newest, manifest.server_round, refresh, kept)
        own = {} if model.plan is None or method.exchanges else save_own_units(model, units, self._folder)
        ctx = DeviceRound(run, method, manifest, assignment, fetch, progress, newest, units, own)
        guard = MemoryGuard(self.planner.shrink, progress, self._device, self._memory.watch)
        try:
            plan, outcome, before, after = self._train_within_memory(ctx, model, guard)
        finally:
            FinishedSteps.remove(self._folder)
        self.plan = plan
        if note := reports.starved_note(plan, outcome):
            progress.message(note)
        probed, survey = ProbeOutcome({}, 0), None
        if method.assigning:
            probed = reports.probe_explored(
                model, plan, blocks, method.assigning, self.planner.step_plan.setup, self._seed(ctx), progress
            )
            survey = reports.expert_survey(plan, self.planner.profile, self.planner.train_slots, outcome, probed)
        elif run.pace:
            survey = reports.pace_survey(plan, self.planner.own_pace)
        sent = {unit.key: unit for unit in sent_units(manifest.units, run.training, manifest.server_round)}
        experts, unsent = reports.write_update(model, run, method, plan, outcome, sent, update_path, progress)
        keep_model(model, method, run, manifest, self._folder)
        self._private.save(run.run_id, manifest.server_round)
        if copies:
            copies.keep(reports.kept_units(method, plan, ctx.units), newest, manifest.server_round)
        more = {"probe_forwards": float(probed.forwards)} if method.assigning and method.assigning.directions else {}
        rank = reports.own_rank(run.training, self.planner.step_plan.setup)
        more |= unsent | reports.profile_metrics(self.planner.sufficiency) | reports.rank_metrics(rank)
        self.planner.sufficiency = None  # reported
        metrics = reports.round_metrics(plan, outcome, before, after, guard.num_shrinks, **more)
        if ctx.evaluates:
            with self._private.active(model):
                metrics |= self._functions.metrics_of(model.module, metrics, progress.message)
        self._models.close(method, newest)
        self._last = ctx
        return TrainedUpdate(
            experts=experts,
            metrics=metrics, num_examples=len(blocks), num_tokens=outcome.num_tokens, survey=survey, lora_rank=rank,
            keep=reports.kept_blobs(method, plan, manifest.files, ctx.units.values()),
        )  # fmt: skip

    def between_rounds(self, fetch: Fetch, progress: ProgressSink) -> None:
        """Make the profile of the next round from the experts of the last one, if the method asks for it."""
        ctx, self._last = self._last, None
        if ctx is None or ctx.method.profiling is None or ctx.method.profiling.when != "while_waiting":
            return
        ctx = dataclasses.replace(ctx, fetch=fetch, progress=progress)
        self.planner.profile_ahead(self._plan_request(ctx))

    def evaluate_whole(
        self, run: RunConfig, manifest: Manifest, fetch: Fetch, progress: ProgressSink, *, private: bool = False
    ) -> tuple[float, int]:
        """(held-out loss of the whole global model in nats per token, number of tokens); (NaN, 0) without such text.

        With ``private``, of the global model with this device's private part. Every expert is streamed through the
        device's memory; the resident ones are dropped. Raises what `train_round` raises, and out-of-memory errors.
        """
        method = make_expert_method(run.method, run.method_options)
        model = self._models.open(run, method, manifest, fetch, progress)
        self._encode(run, progress)
        if self._held_out_blocks is None:
            return math.nan, 0
        model.drop_experts()
        source = self._models.load_shared(manifest.units, fetch)
        source.add(manifest.units, fetch(manifest.units))
        usable_bytes = self._memory.usable_bytes()
        chunked = self._chunking_checked and self.planner.step_plan.setup.chunked_loss
        if private:
            self._private.open(model, run, method, manifest.server_round)
        with self._private.active(model) if private else contextlib.nullcontext():
            return evaluate_streamed(model, run, self._held_out_blocks, source, usable_bytes, progress, chunked=chunked)

    def sibling(self, folder: Path) -> LocalTrainer:
        """A trainer with the same data, model, loss and memory, but with a plan and a state of its own in ``folder``.

        Only one of the two has experts in the model at a time.
        """
        other = copy.copy(self)
        other._folder, other._placer, other._private = folder, ExpertPlacer(folder), PrivatePart(folder)
        other.planner = other._make_planner(folder)
        other._functions = dataclasses.replace(self._functions, on_step=None, evaluate=None)
        other.plan = other._last = None
        self.model.drop_experts()
        return other

    def _make_planner(self, folder: Path, merger: ExpertMerger | None = None) -> Planner:
        excluded = {} if self._functions.loss is None else {"chunked_loss": "the loss is a function of yours"}
        return Planner(folder, self._limits, self._identity, self._memory, self._costs, merger, excluded)

    def _encode(self, run: RunConfig, progress: ProgressSink) -> TokenBlocks:
        """The training blocks; encodes the data in the first round."""
        if self._train_blocks is None:
            length, tokenizer = run.training.sequence_length, self._models.tokenizer

            def report(note: str) -> None:
                progress.message(f"{self.corpus.source} {note}")

            self._train_blocks = encode_examples(self.corpus.train, tokenizer, length, on_message=report)
            if self.evaluates and self.corpus.held_out:
                self._held_out_blocks = encode_examples(self.corpus.held_out, tokenizer, length, on_message=report)
            compile_products(self._device, self.model, run)
            self._memory.model_is_empty()
            progress.done()
        return self._train_blocks

    # --- a round --------------------------------------------------------------------------------------------------

    def _train_within_memory(
        self, ctx: DeviceRound, model: MoeModel, guard: MemoryGuard
    ) -> tuple[ExpertPlan, StepsOutcome, float, float]:
        """(plan, outcome, held-out loss before, after) of the first plan that runs to its end.

        Under pressure between two steps the plan shrinks, and the finished steps count. After an out-of-memory it
        starts again from the first weights of the round, or those after such finished steps: an optimizer step may have
        changed half of the weights. After a failed kernel it starts again with another backend.
        """
        plan: ExpertPlan | None = None
        finished: FinishedSteps | None = None
        before: dict[Hashable, float] = {}  # by what is computed with
        while True:
            reason = ""
            try:
                if plan is None:
                    ctx.phase = "planning"
                    prove_before_round(self._device, model, ctx.run, ctx.progress)
                    plan = self.planner.make_plan(self._plan_request(ctx))
                storage, streamed = (setup := self.planner.step_plan.setup).expert_storage, setup.streamed_layers
                if not (ctx.own and (plan, storage, streamed) == (model.plan, model.storage, model.streamed_layers)):
                    self._place(ctx, model, plan)
                if setup.chunked_loss and not self._chunking_checked:
                    ctx.phase, self._chunking_checked = "comparing the chunked loss with the model's own", True
                    check_chunked_loss(model, self._train_blocks, self.planner.exclude, ctx.progress)
                computed = plan.computed_with(storage is not None)
                if computed not in before:
                    before[computed] = self._held_out_loss(ctx, plan, self._losses.before)
                if finished:
                    finished.restore(model, ctx.units, plan)
                outcome = self._train(ctx, model, plan, guard, finished)
                if not outcome.interrupted:
                    return plan, outcome, before[computed], self._held_out_loss(ctx, plan, self._losses.after)
                # Slices of other neurons cannot go on from these.
                finished = None if plan.neurons else FinishedSteps.save(model, ctx.units, outcome, self._folder)
                self._private.mark(finished is not None)
                plan = guard.plan
            except PlanShrunk:
                plan = guard.plan
            except Exception as error:
                backend = record_backward_failure(self._device, error)
                if is_device_lost(error):
                    raise device_lost(error, self._device) from error
                if backend:
                    ctx.progress.message(f"kernels: the round starts again without the backend {backend}")
                elif is_out_of_memory(error):
                    reason = first_line(error)[:160]
                else:
                    raise
            # Outside the handlers: their traceback keeps what the failed step had allocated.
            for parameter in model.module.parameters():
                parameter.grad = None
            model.drop_experts()
            free_memory(self._device)
            if reason:
                guard.ran_out(ctx.phase, reason)
                plan = guard.plan or plan

    def _plan_request(self, ctx: DeviceRound) -> PlanRequest:
        source = FrameSource() if ctx.own else self._models.load_shared(ctx.units.values(), ctx.fetch)
        assert self._train_blocks is not None, "the data has been encoded"
        return PlanRequest(
            run=ctx.run, method=ctx.method, model=self.model, blocks=self._train_blocks,
            manifest=msgspec.structs.replace(ctx.manifest, units=tuple(ctx.units.values())),
            source=source, fetch=ctx.fetch, progress=ctx.progress,
            assignment=ctx.assignment.experts, train_limit=ctx.assignment.train_limit,
        )  # fmt: skip

    def _place(self, ctx: DeviceRound, model: MoeModel, plan: ExpertPlan) -> None:
        """Put the planned experts on the device, and all weights at the values that the round begins with."""
        ctx.phase = "loading the planned experts"
        setup = self.planner.step_plan.setup
        offload = self._placer.reserve(model, plan, setup, self.planner.shape_of(plan), ctx.progress)
        ctx.units = with_newest_trainable(ctx.units, ctx.newest, plan)
        source = self._models.load_shared(ctx.units.values(), ctx.fetch)
        resident = reports.resident_parts(ctx.units.values(), plan)
        source.add(resident, ctx.fetch(resident))
        add_own_units(source, ctx.units, ctx.own)
        hashes = None if ctx.own else {key: unit.sha256 for key, unit in ctx.units.items()}
        self._placer.place(model, plan, source, ctx.run, ctx.method, setup, offload, hashes)
        load_own_units(model, source, ctx.units, ctx.own)

    def _held_out_loss(self, ctx: DeviceRound, plan: ExpertPlan, evaluate: Callable[..., float]) -> float:
        """Loss of the resident experts on the held-out text; NaN without any, and in a round without evaluation."""
        if self._held_out_blocks is None or not (self.evaluates and ctx.evaluates):
            return math.nan
        ctx.phase = "evaluating"
        own, setup, blocks = not ctx.method.exchanges, self.planner.step_plan.setup, self._held_out_blocks
        units = () if own else ctx.units.values()
        weights = reports.weights_in_use(ctx.run.run_id, plan, setup, units), self._private.version
        with self._private.active(self.model):
            return evaluate(weights, own, self.model, ctx.run.training, blocks, setup.chunked_loss, ctx.progress)

    def _train(
        self, ctx: DeviceRound, model: MoeModel, plan: ExpertPlan, guard: MemoryGuard, finished: FinishedSteps | None
    ) -> StepsOutcome:
        """The steps of the round, those that are ``finished`` included; fewer if the plan has to shrink."""
        ctx.phase = "training"
        training, progress, setup = ctx.run.training, ctx.progress, self.planner.step_plan.setup
        if training.round_seconds and ctx.clock is None:
            ctx.clock = StepClock(training.round_seconds, self._costs.step_seconds(setup, plan))
        assert self._train_blocks is not None, "the data has been encoded"

        def measure(optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> None:
            measurement = measure_step(model, optimizer, step)
            self.planner.correct(correction_from(measurement, self.planner.shape_of(plan), setup))

        kept = None
        if training.keep_optimizer:
            round_ = ctx.assignment.server_round
            kept = OptimizerState(self._folder, ctx.run.run_id, round_, model, progress.message)
        measures = self._costs.measures_steps and self.planner.correction is None and can_measure(setup)
        progress.phase("train", training.local_steps, "step")
        with self._memory.watch or contextlib.nullcontext(), self._private.active(model):
            outcome = run_steps(
                model, plan, ctx.method, self._train_blocks, training,
                compute_share=self._limits.compute_share, seed=self._seed(ctx), setup=setup,
                on_step=lambda loss: progress.advance(1), reconsider=guard.reconsider,
                norms=GradientNorms(model) if ctx.method.assigning else None,
                first_step=finished.outcome.steps if finished else 0, measure=measure if measures else None,
                server_round=ctx.assignment.server_round, rounds=ctx.run.rounds,
                private_step=self._private.restart(training), clock=ctx.clock, moments=kept,
                functions=self._functions,
            )  # fmt: skip
        progress.done()
        return finished.before(outcome, plan) if finished else outcome

    def _seed(self, ctx: DeviceRound) -> int:
        """A seed that only this device has, in this round of this run."""
        return zlib.crc32(f"{ctx.assignment.seed}/{ctx.assignment.server_round}/{self._identity}".encode())
