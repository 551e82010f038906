"""Prepare the kernels of a device before a round is planned: prove them on a GPU, compile products on a CPU."""

from __future__ import annotations

import dataclasses
import functools

import torch

from edgefed.costs.shapes import Matrix, ModelShape
from edgefed.kernels.dispatch import needs_proof
from edgefed.kernels.masked_experts import LowRankPair, SlotWeights, masked_experts
from edgefed.kernels.out_of_memory import free_memory
from edgefed.kernels.proof import TRAINING_LIMIT_S, prove_wanted, standard_cases
from edgefed.kernels.row_sizes import ROW_SIZES, is_compiled, padded_size
from edgefed.kernels.verdicts import Case
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import RunConfig, TrainingConfig


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


def compile_products(device: str, model: MoeModel, run: RunConfig) -> None:
    """Compile the products of a training step's experts, which the process keeps (`edgefed.kernels.row_sizes`).

    So the memory that they take is measured before the first plan. Does nothing where products are not compiled.
    """
    if not is_compiled(model.dtype, torch.device(device).type):
        return
    tokens = run.training.batch_size * run.training.sequence_length
    sizes = [size for size in ROW_SIZES if size <= padded_size(tokens)]
    token = torch.arange(sizes[-1]).unsqueeze(1)  # (T, 1)
    indices = torch.where(
        token < torch.tensor(sizes), torch.arange(len(sizes)), -1
    )  # (T, S): slot s has sizes[s] tokens
    kinds = {(layer.expert_matrices, layer.is_transposed) for layer in shape_from_config(model.config).moe_layers}
    for matrices, is_transposed in kinds:
        up, down = matrices[0], matrices[-1]
        slot = _empty_slot(up, down, is_transposed, run.training, model.dtype)
        hidden = torch.zeros(sizes[-1], up[0], dtype=model.dtype, requires_grad=True)
        output = masked_experts(
            hidden, indices, torch.ones(indices.shape), [slot] * len(sizes), is_transposed=is_transposed,
            activation=functools.partial(torch.narrow, dim=1, start=0, length=down[0]),
        )  # fmt: skip
        torch.autograd.backward(output.sum())
    free_memory(device)


def _empty_slot(
    up: Matrix, down: Matrix, is_transposed: bool, training: TrainingConfig, dtype: torch.dtype
) -> SlotWeights:
    """Return an expert of zeros that trains as ``training`` says."""

    def weight(matrix: Matrix) -> torch.Tensor:
        shape = matrix if is_transposed else matrix[::-1]
        return torch.zeros(shape, dtype=dtype, requires_grad=training.experts == "full")

    def adapter(matrix: Matrix) -> LowRankPair | None:
        if training.experts != "lora":
            return None
        size_in, size_out = matrix
        leaves = [
            torch.zeros(shape, requires_grad=True)
            for shape in ((training.lora_rank, size_in), (size_out, training.lora_rank))
        ]
        return LowRankPair(leaves[0], leaves[1], 1.0)

    return SlotWeights(weight(up), weight(down), up_lora=adapter(up), down_lora=adapter(down))
