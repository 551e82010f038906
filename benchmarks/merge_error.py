"""Error of each MoE layer's output after merging, measured on real tokens.

    error(l) = || MoE_l(x) - MoE_merged_l(x) || / || MoE_l(x) ||

over all tokens x that reach layer l of the unmerged model, so it excludes the error of earlier layers. MoE_l is the
output of the routed experts; a shared expert, which merging does not change, is not included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan
from edgefed.kernels.masked_experts import masked_experts
from edgefed.moe.architecture import ExpertLayer, expert_activation, expert_finish
from edgefed.moe.attention_received import AttentionCapture
from edgefed.moe.bank import ExpertBank
from edgefed.moe.gate_probe import split_expert_arguments
from edgefed.moe.merged_cache import Align
from edgefed.moe.model import MoeModel
from edgefed.moe.units import ExpertSource, TrainScope


@torch.no_grad()
def layer_output_errors(
    model: MoeModel,
    plans: Mapping[str, ExpertPlan],
    source: ExpertSource,
    batches: Iterable[torch.Tensor],
    *,
    aligners: Mapping[str, Align] | None = None,
    storage: str | None = None,
    by_attention: bool = False,
) -> dict[str, np.ndarray]:
    """Return error(l) of each plan by name, (L,) float64, from one pass over ``batches`` of token ids (B, S).

    ``model`` must compute the full model, with all experts in memory or streamed. Each plan must have every expert,
    resident or merged; its experts are read from ``source`` without adapters, with ``aligners[name]`` as the ``align``
    of `merge_experts`, and all plans are in memory at the same time. With ``by_attention``, each token is weighted by
    the attention that it receives, as in Flux's importance. The error is NaN for a layer whose output is always zero.
    Raises ConfigError, CheckpointError.
    """
    dense = TrainScope(experts="none", router="none")
    banks: dict[str, list[ExpertBank]] = {}
    for name, plan in plans.items():
        if plan.experts_per_layer != model.experts_per_layer or any(
            (plan.slots(layer) < 0).any() for layer in range(plan.num_layers)
        ):
            raise ConfigError(f"plan {name!r} must have every expert of this model, resident or merged")
        align = (aligners or {}).get(name)
        banks[name] = [
            ExpertBank(layer, plan, source, dense, model.module.device, storage, align) for layer in model.layers
        ]
    squares = np.zeros(len(model.layers))
    differences = {name: np.zeros(len(model.layers)) for name in plans}

    def compare(layer: ExpertLayer, module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        hidden_states, indices, weights = split_expert_arguments(args, kwargs)
        flat = output.reshape(hidden_states.shape).double()  # (T, H)
        counted = 1.0
        if capture is not None:
            counted = capture.of(layer.experts_path, len(flat), flat.device).double()[:, None]  # (T, 1)
        squares[layer.ordinal] += (flat.square() * counted).sum().item()
        for name, plan_banks in banks.items():
            bank = plan_banks[layer.ordinal]
            merged = masked_experts(
                hidden_states,
                bank.slot_of[indices],
                weights,
                bank.slots(),
                activation=expert_activation(layer.experts),
                is_transposed=layer.is_transposed,
                finish=expert_finish(layer.experts),
                int8_activations=False,  # exact, so that only merging causes an error
            )
            differences[name][layer.ordinal] += ((merged.double() - flat).square() * counted).sum().item()

    hooks = [
        layer.experts.register_forward_hook(
            lambda module, args, kwargs, output, layer=layer: compare(layer, module, args, kwargs, output),
            with_kwargs=True,
        )
        for layer in model.layers
    ]
    was_training = model.module.training
    model.module.eval()
    try:
        with AttentionCapture(model.module) if by_attention else contextlib.nullcontext() as capture:
            for input_ids in batches:
                model.module(input_ids=input_ids.to(model.module.device), use_cache=False, logits_to_keep=1)
    finally:
        model.module.train(was_training)
        for hook in hooks:
            hook.remove()
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: np.sqrt(difference / squares) for name, difference in differences.items()}
