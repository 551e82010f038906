"""The local steps of one round: forward, backward, AdamW, and a count of which experts they changed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from edgefed.errors import TrainingDiverged
from edgefed.experts import ExpertPlan, LayerRecord, RouterRecord
from edgefed.methods.interface import Method
from edgefed.moe.model import MoeModel
from edgefed.moe.scope import TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.encoding import TokenBlocks


@dataclasses.dataclass(frozen=True)
class StepsOutcome:
    """What a round of local steps did.

    ``expert_steps`` counts optimiser steps per (layer, expert) that changed it; ``record`` is the router's statistics
    over all training tokens; ``peak_expert_bytes`` is the largest sum of expert weights, gradients and optimiser state
    that was ever held.
    """

    loss: float
    steps: int
    num_tokens: int
    tokens_per_s: float
    expert_steps: Counter[tuple[int, int]]
    record: RouterRecord
    peak_expert_bytes: int


def train_scope(training: TrainingConfig) -> TrainScope:
    """What a run trains, as the model side takes it. Raises ConfigError on an unknown mode."""
    return TrainScope(
        experts=training.experts,
        router=training.router,
        attention=training.attention,
        lora_rank=training.lora_rank,
        lora_alpha=training.lora_alpha,
    )


def run_steps(
    model: MoeModel,
    plan: ExpertPlan,
    method: Method,
    blocks: TokenBlocks,
    training: TrainingConfig,
    *,
    compute_share: float,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> StepsOutcome:
    """Train ``training.local_steps`` steps on ``blocks``, in a shuffled order that depends on ``seed`` alone.

    The optimiser is AdamW with a constant learning rate; it starts fresh, as in FedAvg. With ``compute_share`` < 1 the
    method's schedule decides per batch and layer which tuned experts get gradients; an expert without a gradient is
    not touched by the optimiser, so neither momentum nor weight decay moves it. Gradients are clipped to
    ``max_grad_norm``.

    Raises TrainingDiverged when the loss is not finite.
    """
    module = model.module
    parameters = list(model.trainable_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    batches = _endless_batches(blocks, training.batch_size, seed)
    expert_steps: Counter[tuple[int, int]] = Counter()
    peak_expert_bytes, tokens, losses = 0, 0, []
    started = time.perf_counter()
    module.train()
    model.set_schedule(make_schedule(plan, method, compute_share))
    try:
        with model.record_statistics() as statistics:
            for step in range(training.local_steps):
                input_ids, labels = next(batches)
                loss = module(input_ids=input_ids, labels=labels, use_cache=False).loss
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise TrainingDiverged(f"the training loss is {losses[-1]} at step {step + 1}")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                changed = model.experts_with_gradient()
                optimizer.step()
                expert_steps.update(changed)
                # Gradients and optimiser state live together here, so this is where the step's memory peaks.
                peak_expert_bytes = max(peak_expert_bytes, model.expert_memory_bytes(optimizer))
                optimizer.zero_grad(set_to_none=True)
                tokens += input_ids.numel()
                on_step(losses[-1])
            record = statistics.take()
    finally:
        model.set_schedule(None)
        module.eval()
    seconds = time.perf_counter() - started
    return StepsOutcome(
        loss=sum(losses) / len(losses),
        steps=len(losses),
        num_tokens=tokens,
        tokens_per_s=tokens / seconds,
        expert_steps=expert_steps,
        record=record,
        peak_expert_bytes=peak_expert_bytes,
    )


def make_schedule(plan: ExpertPlan, method: Method, compute_share: float) -> Callable | None:
    """The callback that the model asks in each layer which experts get gradients; None when all may.

    A layer's limit is ``compute_share`` of its tuned experts, rounded up: never none.
    """
    if compute_share >= 1:
        return None
    tuned = [plan.tuned(layer) for layer in range(plan.num_layers)]
    limits = [math.ceil(compute_share * len(ids)) for ids in tuned]

    def schedule(layer: int, batch: LayerRecord) -> list[int]:
        if limits[layer] >= len(tuned[layer]):
            return tuned[layer].tolist()
        return method.schedule_experts(batch, tuned[layer], limits[layer]).tolist()

    return schedule


def _endless_batches(blocks: TokenBlocks, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from blocks.batches(batch_size, generator)
