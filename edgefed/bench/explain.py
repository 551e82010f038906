"""Where every byte of a training step goes: predicted by the memory model, and measured where the model can run.

A model that is too large to run here is measured with its first layers only: the prediction that is compared is then
the one for these layers, by the same formulas.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from edgefed.bench.models import BenchModel, build_model, random_blocks
from edgefed.bench.stopwatch import Stopwatch
from edgefed.bench.training_step import LEARNING_RATE, StepWork, cut_shape, depths
from edgefed.costs.memory import StepSetup, compute_budget, training_memory
from edgefed.moe.units import TrainScope
from edgefed.training.calibration import correction_from, measure_step
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import take_step


@dataclasses.dataclass(frozen=True)
class PlanCase:
    """One way to train: a name for people, the set-up, and experts per layer."""

    name: str
    setup: StepSetup
    kept: int
    trainable: int


def plan_cases(model: BenchModel, setup: StepSetup, usable_bytes: int | None) -> list[PlanCase]:
    """The ways worth looking at: as a run trains by default, with all savings, one expert a layer, and adapters.

    Each with as many experts as fit into ``usable_bytes``, at least one: what does not fit is shown, too.
    """
    saving = dataclasses.replace(setup, checkpointing=True, chunked_loss=True)
    lora = dataclasses.replace(saving, experts="lora")

    def tune(case: StepSetup) -> int:
        if usable_bytes is None:
            return model.shape.num_experts
        return max(1, compute_budget(model.shape, case, usable_bytes).tune_per_layer)

    def keep(case: StepSetup) -> int:
        if usable_bytes is None:
            return model.shape.num_experts
        return max(1, compute_budget(model.shape, case, usable_bytes).keep_per_layer)

    return [
        PlanCase("in full, no savings", setup, tune(setup), tune(setup)),
        PlanCase("in full, checkpointing and chunked loss", saving, tune(saving), tune(saving)),
        PlanCase("one expert a layer in full, the others frozen", saving, keep(saving), 1),
        PlanCase(f"LoRA rank {setup.lora_rank} on all that are kept", lora, tune(lora), tune(lora)),
    ]


def predict(model: BenchModel, case: PlanCase, usable_bytes: int | None) -> dict[str, Any]:
    """The parts of one way at its peak, for the whole model."""
    estimate = training_memory(model.shape, case.setup, case.kept, case.trainable)
    return {
        "plan": case.name,
        "model": model.name,
        "kept": case.kept,
        "trainable": case.trainable,
        "of": model.shape.num_experts,
        "setup": dataclasses.asdict(case.setup),
        "parts": dict(estimate.parts),
        "total_bytes": estimate.total_bytes,
        "phase": estimate.phase,
        "phases": dict(estimate.phases),
        "fits": None if usable_bytes is None else estimate.total_bytes <= usable_bytes,
        "measured": None,
    }


def measure(watch: Stopwatch, model: BenchModel, case: PlanCase, work: StepWork) -> dict[str, Any]:
    """One real step of the case: {layers, predicted_bytes, measured_bytes, corrected_bytes, phases}.

    The second step is the one that is measured: the first has no optimizer state yet. ``corrected_bytes`` is what the
    model predicts for this plan once the step has corrected it. Raises MemoryError when not even two layers fit.
    """
    work = dataclasses.replace(work, kept=case.kept, trainable=case.trainable)
    found = depths(model, case.setup, work)
    if not found:
        raise MemoryError(f"two layers of {model.name} do not fit")
    depth = found[-1]
    shape = cut_shape(model.shape, depth)
    setup = case.setup
    scope = TrainScope(setup.experts, setup.router, setup.attention, setup.lora_rank)
    moe, plan, source = build_model(model, depth, case.kept, case.trainable, scope, watch.device)
    del source
    setup = dataclasses.replace(setup, kernels=moe.training_kernels())  # of this model, where the case assumes
    parameters = list(moe.trainable_parameters())
    optimizer = make_optimizer(parameters, setup.optimizer, learning_rate=LEARNING_RATE, weight_decay=0.0)
    blocks = random_blocks(moe.config.get_text_config().vocab_size, setup.batch_size, setup.sequence_length)
    moe.module.train()

    def step() -> None:
        take_step(
            moe, optimizer, parameters, blocks.input_ids, blocks.labels, setup=setup, max_grad_norm=1.0
        )  # fmt: skip

    step()
    optimizer.zero_grad(set_to_none=True)
    measured = measure_step(moe, optimizer, step)
    predicted = training_memory(shape, setup, case.kept, case.trainable)
    correction = correction_from(measured, shape, setup)
    corrected = training_memory(shape, setup, case.kept, case.trainable, correction)
    return {
        "layers": depth,
        "layers_of": len(model.shape.layers),
        "predicted_bytes": predicted.total_bytes,
        "measured_bytes": measured.peak_bytes,
        "corrected_bytes": corrected.total_bytes,
        "process_bytes": measured.process_bytes,
        "phases": dict(measured.phases),
    }
