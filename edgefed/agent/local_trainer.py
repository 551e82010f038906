"""The trainer that an agent drives: one warm model, and one round of it from global weights to an update file.

    files, dense, routers -> profile (once) -> plan -> planned experts -> local steps -> update

The model is built once, with every expert absent; a round loads what changed and puts the planned experts in place.
Profiling streams the experts from the downloaded files one at a time, so a device that can hold a tenth of the experts
still sees how its data uses all of them.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from edgefed.agent.agent import Fetch, TrainedUpdate
from edgefed.agent.disk import disk_errors
from edgefed.agent.planner import DeviceLimits, Planner
from edgefed.agent.progress import ProgressSink
from edgefed.errors import MalformedMessage, TrainingDiverged
from edgefed.experts import ExpertPlan, Role
from edgefed.hardware.memory import process_peak_rss_bytes, process_rss_bytes
from edgefed.methods.interface import Method
from edgefed.methods.registry import make_method
from edgefed.moe.frame_source import FrameSource, raw_array
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SUFFIX
from edgefed.protocol import frames
from edgefed.protocol.messages import Assignment, ExpertReport, Manifest, RunConfig, UnitInfo
from edgefed.training.data import Corpus, load_corpus
from edgefed.training.encoding import TokenBlocks, encode_examples
from edgefed.training.evaluate import evaluate_loss
from edgefed.training.profiling import load_tokenizer, spread_blocks
from edgefed.training.steps import StepsOutcome, run_steps, train_scope


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
    ):
        """``data`` is a file or ``silo:NAME`` (see `load_corpus`); ``folder`` is where files and the plan are kept.
        ``name`` and the data seed what is random here, so the same devices in the same run do the same again.

        Raises DataError when the data cannot be used. The data is read now, so that a bad file is told at once.
        """
        self.corpus: Corpus = load_corpus(data, held_out_share, corpus_seed)
        self.num_examples = len(self.corpus.train)
        self._folder = folder
        self._limits = limits
        self._identity = f"{name}/{self.corpus.sha256}"
        self._planner = Planner(folder, limits, self._identity)
        self._model: MoeModel | None = None
        self._loaded: dict[str, str] = {}  # unit key -> sha256 of what the model holds
        self._train_blocks: TokenBlocks | None = None
        self._held_out_blocks: TokenBlocks | None = None
        self._own_bytes_before_model = 0

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

        Raises BudgetTooSmall, DataError, ModelError, TrainingDiverged.
        """
        method = make_method(run.method, run.method_options)
        scope = train_scope(run.training)
        units = {unit.key: unit for unit in manifest.units}
        model = self._ensure_model(run, manifest, fetch, progress)
        if model.plan is None or method.exchanges:
            source = self._load_shared(model, units.values(), fetch)
            memory_bytes = self._limits.memory_bytes - self._own_bytes_before_model
            plan = self._planner.make_plan(
                run, method, manifest, model, self._train_blocks, source, memory_bytes, fetch, progress
            )
            held = [unit for unit in units.values() if _is_held(unit, plan)]
            source.add(held, fetch(held))
            model.apply_plan(plan, source, scope, missing=run.training.missing)
        plan = model.plan
        before = self._held_out_loss(run, progress)
        outcome = self._train(run, model, plan, method, assignment, progress)
        after = self._held_out_loss(run, progress)
        self._write_update(model if method.exchanges else None, units, update_path)
        keep = {file.sha256 for file in manifest.files}
        keep |= {
            unit.sha256
            for unit in units.values()
            if unit.kind != "expert" or method.profiles_every_round or _is_held(unit, plan)
        }
        return TrainedUpdate(
            experts=_expert_reports(method, plan, outcome),
            metrics=self._metrics(plan, outcome, before, after),
            num_examples=len(self._train_blocks),
            num_tokens=outcome.num_tokens,
            keep=frozenset(keep),
        )

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
        self._own_bytes_before_model = process_rss_bytes()
        self._model = MoeModel.skeleton(folder)
        tokenizer = load_tokenizer(folder)
        length = run.training.sequence_length
        self._train_blocks = encode_examples(self.corpus.train, tokenizer, length)
        if self.corpus.held_out:
            self._held_out_blocks = encode_examples(self.corpus.held_out, tokenizer, length)
        progress.done()
        return self._model

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

    # --- a round --------------------------------------------------------------------------------------------------

    def _held_out_loss(self, run: RunConfig, progress: ProgressSink) -> float:
        """Loss of the model that this device runs (its resident experts) on its held-out text; NaN without any."""
        if self._held_out_blocks is None:
            return math.nan
        blocks = spread_blocks(self._held_out_blocks, run.training.evaluation_tokens)
        progress.phase("evaluate", blocks.num_tokens, "token")
        loss = evaluate_loss(self._model.module, blocks, run.training.batch_size, on_batch=progress.advance)
        progress.done()
        return loss

    def _train(
        self,
        run: RunConfig,
        model: MoeModel,
        plan: ExpertPlan,
        method: Method,
        assignment: Assignment,
        progress: ProgressSink,
    ) -> StepsOutcome:
        progress.phase("train", run.training.local_steps, "step")
        outcome = run_steps(
            model,
            plan,
            method,
            self._train_blocks,
            run.training,
            compute_share=self._limits.compute_share,
            seed=zlib.crc32(f"{assignment.seed}/{assignment.server_round}/{self._identity}".encode()),
            on_step=lambda loss: progress.advance(1),
        )
        progress.done()
        return outcome

    def _write_update(self, model: MoeModel | None, units: Mapping[str, UnitInfo], path: Path) -> None:
        """Write what was trained as one frame; an empty frame when nothing is exchanged. Raises TrainingDiverged."""
        tensors: dict[str, tuple[str, np.ndarray]] = {}
        for spec, values in model.trained_units() if model else ():
            unit = units[spec.key]
            for info in unit.tensors:
                value = values[info.name].detach()
                if not torch.isfinite(value).all():
                    raise TrainingDiverged(f"{spec.key} {info.name} holds a value that is not finite")
                tensors[frames.update_name(spec.key, info.name)] = (info.dtype, raw_array(value))
        with disk_errors(path):
            frames.write_frame(path, tensors)

    def _metrics(self, plan: ExpertPlan, outcome: StepsOutcome, before: float, after: float) -> dict[str, float]:
        metrics = {
            "train_loss": outcome.loss,
            "held_out_loss_before": before,
            "held_out_loss_after": after,
            "experts_held": float(plan.num_resident),
            "experts_trained": float(len(outcome.expert_steps)),
            "peak_expert_bytes": float(outcome.peak_expert_bytes),
            "peak_rss_bytes": float(process_peak_rss_bytes()),
            "train_tokens_per_s": outcome.tokens_per_s,
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _is_held(unit: UnitInfo, plan: ExpertPlan) -> bool:
    """Whether ``unit`` is an expert, or the adapter of one, that the plan puts on the device."""
    return unit.kind == "expert" and plan.roles[unit.layer][unit.expert] != Role.ABSENT


def _expert_reports(method: Method, plan: ExpertPlan, outcome: StepsOutcome) -> tuple[ExpertReport, ...]:
    """What the aggregator is told of each expert held, from the router's statistics over the training tokens."""
    reports = []
    for layer, record in enumerate(outcome.record.layers):
        importance = method.expert_importance(record)
        for expert in sorted(plan.resident(layer).tolist()):
            reports.append(
                ExpertReport(
                    layer=layer,
                    expert=expert,
                    usage=float(min(1.0, record.mean_gate[expert])),
                    importance=float(importance[expert]),
                    steps=outcome.expert_steps[layer, expert],
                    tokens=int(record.tokens_per_expert[expert]),
                )
            )
    return tuple(reports)
