"""Prove the kernels of a device before a round is planned, where they are used only if proved (on a GPU)."""

from __future__ import annotations

import dataclasses

from edgefed.costs.shapes import ModelShape
from edgefed.kernels.dispatch import needs_proof
from edgefed.kernels.proof import TRAINING_LIMIT_S, prove_wanted, standard_cases
from edgefed.kernels.verdicts import Case
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import RunConfig


def prove_before_round(
    device: str, model: MoeModel, run: RunConfig, progress: ProgressSink, limit_s: float = TRAINING_LIMIT_S
) -> None:
    """Prove what the last round wanted and what this one is likely to want; takes ``limit_s`` at most.

    Costs nothing once everything is proved, and on a device where no backend needs proof.
    """
    if needs_proof(device):
        cases = likely_cases(shape_from_config(model.config), str(model.dtype).removeprefix("torch."), run)
        prove_wanted(device, cases, on_message=progress.message, limit_s=limit_s)


def likely_cases(shape: ModelShape, dtype: str, run: RunConfig) -> list[Case]:
    """Return the cases of a round of ``run`` for the widest MoE layer, most important first."""
    layer = max(shape.moe_layers, key=lambda layer: layer.parameters_per_expert)
    cases = standard_cases(shape.hidden_size, layer.expert_width, layer.num_experts, dtype)
    if run.training.experts == "lora":
        rank = run.training.lora_rank
        return [dataclasses.replace(case, rank=rank) if case.trains == "weights" else case for case in cases]
    return [case for case in cases if not case.rank]
