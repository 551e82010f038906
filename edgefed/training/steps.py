"""The local steps of one round: forward, backward, AdamW, and a count of which experts they changed.

How a step saves memory (`StepSetup`: chunked loss, checkpointing, optimizer, sequence length) changes neither its loss
nor its gradients, except for the sequence length. It may change from one step to the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import torch
from torch import nn

from edgefed.costs.memory import StepSetup
from edgefed.errors import TrainingDiverged
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.interface import ExpertMethod
from edgefed.moe.adapters import adapter_factors
from edgefed.moe.model import MoeModel
from edgefed.moe.units import LORA_SCALINGS, TrainScope
from edgefed.protocol.alternation import resting_factor
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.encoding import TokenBlocks
from edgefed.training.loss import batch_loss, configured_balancing
from edgefed.training.optimizers import KeptMoments, clip_gradients, learning_rate_at
from edgefed.training.savings import checkpointing, make_optimizer
from edgefed.training.step_clock import StepClock
from edgefed.training.user_functions import NONE, UserFunctions
from edgefed.training.utility import GradientNorms

STOP: Final = "stop"
"""Answer of ``reconsider``: the remaining steps need another plan."""
STARVED_LOAD = 0.1
"""An expert with less than this share of an even load counts as starved."""


@dataclasses.dataclass(frozen=True)
class StepsOutcome:
    """The result of a round of local steps.

    Attributes:
        loss: mean training loss of the steps, cross-entropy alone.
        steps: number of optimizer steps.
        num_tokens: tokens that went through the model.
        tokens_per_s: training speed.
        expert_steps: optimizer steps that changed an expert, by (layer, expert).
        record: the router's statistics over all training tokens.
        peak_expert_bytes: largest sum of expert weights, gradients and optimizer state in memory at one time.
        expert_gradients: mean squared gradient norm by (layer, expert), if it was asked for.
        expert_tokens: tokens that an expert was trained on, by (layer, expert); a token counts in each of its experts.
        starved_experts: resident experts that got less than a tenth of an even load, of the layer's routed tokens.
        interrupted: the remaining steps need another plan.

    """

    loss: float
    steps: int
    num_tokens: int
    tokens_per_s: float
    expert_steps: Counter[tuple[int, int]]
    record: ActivationProfile
    peak_expert_bytes: int
    expert_gradients: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    expert_tokens: Mapping[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    starved_experts: int = 0
    interrupted: bool = False


def train_scope(training: TrainingConfig, rank: int = 0) -> TrainScope:
    """Return what a run trains, as the model side takes it, with adapters of ``rank``; 0: the rank of the run.

    The factor of adapters is that of the run's rank in any case. Raises ConfigError for an unknown mode.
    """
    whole = TrainScope(
        experts=training.experts, router=training.router, attention=training.attention, lora_rank=training.lora_rank,
        lora_alpha=training.lora_alpha, lora_scaling=training.lora_scaling,
    )  # fmt: skip
    if rank in (0, training.lora_rank):
        return whole
    divisor = LORA_SCALINGS[training.lora_scaling]
    alpha = training.lora_alpha * divisor(rank) / divisor(training.lora_rank)
    return dataclasses.replace(whole, lora_rank=rank, lora_alpha=alpha)


def step_setup(model: MoeModel, training: TrainingConfig, private: str = "none", **savings: Any) -> StepSetup:
    """Return how a step of a run is taken on the model's device, and with which kernels.

    With ``private="adapter"`` attention trains by LoRA on this device. ``savings`` are other fields of `StepSetup`.
    float64, which the memory formulas do not cover, counts as float32.
    """
    device = model.device.type
    return StepSetup(
        batch_size=training.batch_size,
        sequence_length=training.sequence_length,
        dtype=_DTYPES.get(model.dtype, "float32"),
        experts=training.experts,
        router=training.router,
        attention="lora" if private == "adapter" else training.attention,
        **{
            "lora_rank": training.lora_rank,
            "device": "cuda" if device == "cuda" else "cpu",
            "kernels": model.training_kernels(),
            **savings,
        },
    )


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def take_step(
    model: MoeModel,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    *,
    setup: StepSetup,
    max_grad_norm: float,
    balancing: float = 0.0,
    on_gradients: Callable[[], None] = lambda: None,
    functions: UserFunctions = NONE,
) -> tuple[float, list[tuple[int, int]]]:
    """Take one training step; returns (cross-entropy, experts that it changed). Gradients are left in place.

    ``balancing`` is the coefficient of the load-balancing loss (`MoeModel.balancing`); 0 leaves it out.
    ``on_gradients`` is called after the backward pass, before gradients are clipped.

    Raises:
        TrainingDiverged: the loss is not finite; no weight has changed.

    """
    collected = model.balancing() if balancing else contextlib.nullcontext()
    with checkpointing(model.module, setup.checkpointing), collected as terms:
        if functions.loss is not None:
            loss = functions.batch_loss(model.module, input_ids, labels)
        else:
            loss = batch_loss(model.module, input_ids, labels, chunked=setup.chunked_loss)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(f"the training loss is {value}")
        if terms:
            loss = loss + balancing * torch.stack(terms).mean()
        torch.autograd.backward(loss)
    del loss, terms
    on_gradients()
    clip_gradients(parameters, max_grad_norm)
    changed = model.experts_with_gradient()
    optimizer.step()
    return value, changed


def run_steps(
    model: MoeModel,
    plan: ExpertPlan,
    method: ExpertMethod,
    blocks: TokenBlocks,
    training: TrainingConfig,
    *,
    compute_share: float,
    seed: int,
    setup: StepSetup | None = None,
    on_step: Callable[[float], None] = lambda loss: None,
    norms: GradientNorms | None = None,
    reconsider: Callable[[], StepSetup | Literal["stop"] | None] = lambda: None,
    first_step: int = 0,
    measure: Callable[[torch.optim.Optimizer, Callable[[], None]], None] | None = None,
    server_round: int = 1,
    rounds: int = 1,
    private_step: Callable[[float], None] = lambda rate: None,
    clock: StepClock | None = None,
    moments: KeptMoments | None = None,
    functions: UserFunctions = NONE,
) -> StepsOutcome:
    """Train ``training.local_steps`` steps on ``blocks``, in a shuffled order that depends on ``seed`` alone.

    ``clock`` ends them earlier; None: that of ``training.round_seconds``. ``functions`` are the user's.
    The optimizer is AdamW; it starts fresh, as in FedAvg, or with the ``moments`` of the last round, which get those of
    this one. Its learning rate is that of round ``server_round`` of ``rounds`` (`optimizers.learning_rate_at`). With
    ``compute_share`` < 1 the method's schedule decides per batch and layer which trainable experts get gradients. The
    optimizer skips an expert without a gradient, so neither momentum nor weight decay moves it.

    ``setup`` says how a step saves memory (None: it does not); its sequence length cuts the blocks. ``on_step`` is
    called with the loss of each step, ``norms`` counts the gradients. ``reconsider`` is called between steps, when
    there are no gradients. It may return another setup for the steps that follow: another optimizer starts with fresh
    moments, another length cuts the blocks anew; with `STOP` the outcome has fewer steps. ``first_step`` steps of the
    round are done already. ``measure(optimizer, step)`` is called for the first step and must
    call ``step()`` once. ``private_step`` is called in each step with the learning rate, when there are gradients.

    Raises:
        TrainingDiverged: the loss is not finite. Also what ``on_step`` and ``reconsider`` raise.

    """
    clock = clock or StepClock(training.round_seconds)

    def rate_at(share: float) -> float:
        return learning_rate_at(training, rounds, server_round, share)

    shares = [(step + 0.5) / training.local_steps for step in range(first_step, training.local_steps)]
    steps = _LocalSteps(
        *(model, blocks, training, setup or step_setup(model, training), seed + first_step, norms),
        *(min(map(rate_at, shares)), private_step, moments, resting_factor(training, server_round), functions),
    )
    interrupted = False
    started = time.perf_counter()
    model.module.train()
    trained_before = Counter(model.trained_tokens())
    model.set_schedule(make_schedule(plan, method, compute_share))
    try:
        with model.record_statistics() as statistics:
            for step in range(first_step, training.local_steps):
                steps.rate, step_started = rate_at(max(shares[step - first_step], clock.share)), time.perf_counter()
                try:
                    if measure is not None and step == first_step:
                        measure(steps.optimizer, steps.take)
                    else:
                        steps.take()
                except TrainingDiverged as error:
                    raise TrainingDiverged(f"{error} at step {step + 1}") from None
                steps.count_memory()
                on_step(steps.losses[-1])
                functions.stepped(server_round, step + 1, steps.losses[-1])
                clock.count(time.perf_counter() - step_started)
                if step + 1 == training.local_steps or not clock.has_time:
                    break
                other = reconsider()
                if other == STOP:
                    interrupted = True
                    break
                if other is not None:
                    steps.adopt(other)
            record = statistics.take()
        if moments is not None and not interrupted:
            moments.save(steps.optimizer)
    finally:
        model.set_schedule(None)
        model.module.train(False)
    seconds = time.perf_counter() - started
    return StepsOutcome(
        loss=sum(steps.losses) / len(steps.losses),
        steps=len(steps.losses),
        num_tokens=steps.num_tokens,
        tokens_per_s=steps.num_tokens / seconds,
        expert_steps=steps.expert_steps,
        record=record,
        peak_expert_bytes=steps.peak_expert_bytes,
        expert_gradients=norms.mean_squares() if norms else {},
        expert_tokens=Counter(model.trained_tokens()) - trained_before,
        starved_experts=_starved_experts(record, plan),
        interrupted=interrupted,
    )


class _LocalSteps:
    """State between the steps of a round: optimizer, order of the data, and counts."""

    def __init__(
        self,
        model: MoeModel,
        blocks: TokenBlocks,
        training: TrainingConfig,
        setup: StepSetup,
        seed: int,
        norms: GradientNorms | None,
        smallest_rate: float,
        private_step: Callable[[float], None],
        moments: KeptMoments | None,
        resting: str | None,
        functions: UserFunctions,
    ):
        self._functions, self._moments = functions, moments
        self._resting = [] if resting is None else adapter_factors(model.module, resting)
        self._norms, self._private_step = norms, private_step
        self.losses: list[float] = []
        self.expert_steps: Counter[tuple[int, int]] = Counter()
        self.num_tokens = 0
        self.peak_expert_bytes = 0
        self._model, self._blocks, self._training, self._setup, self._seed = model, blocks, training, setup, seed
        self.rate, self._smallest_rate = smallest_rate, smallest_rate
        self._parameters = list(model.trainable_parameters())
        asked = training.balancing
        self._balancing = configured_balancing(model.module) if asked is None else asked
        self.optimizer = self._make_optimizer()
        self._batches = self._shuffled(seed)

    def take(self) -> None:
        """Take one step. Raises TrainingDiverged."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        input_ids, labels = next(self._batches)
        loss, changed = take_step(
            self._model,
            self.optimizer,
            self._parameters,
            input_ids,
            labels,
            setup=self._setup,
            max_grad_norm=self._training.max_grad_norm,
            balancing=self._balancing,
            on_gradients=self._on_gradients,
            functions=self._functions,
        )
        self.losses.append(loss)
        self.expert_steps.update(changed)
        self.num_tokens += input_ids.numel()

    def _on_gradients(self) -> None:
        for parameter in self._resting:
            parameter.grad = None
        if self._norms:
            self._norms.add()
        self._private_step(self.rate)

    def count_memory(self) -> None:
        """Count the experts' memory after a step, with gradients and optimizer state: its peak. Drops the gradients."""
        self.peak_expert_bytes = max(self.peak_expert_bytes, self._model.expert_memory_bytes(self.optimizer))
        self.optimizer.zero_grad(set_to_none=True)

    def adopt(self, setup: StepSetup) -> None:
        """Use another setup from the next step on."""
        before, self._setup = self._setup, setup
        if setup.optimizer != before.optimizer:
            del self.optimizer  # its state, before the next one makes its own
            self.optimizer = self._make_optimizer()
        if (setup.sequence_length, setup.batch_size) != (before.sequence_length, before.batch_size):
            self._batches = self._shuffled(self._seed + len(self.losses))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        training = self._training
        optimizer = make_optimizer(
            self._parameters,
            self._setup.optimizer,
            learning_rate=self._smallest_rate,  # it decides how weights are rounded
            weight_decay=training.weight_decay,
            seed=self._seed,
        )
        if self._moments is not None:
            self._moments.load(optimizer)
        return optimizer

    def _shuffled(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return _endless_batches(self._blocks.shortened(self._setup.sequence_length), self._setup.batch_size, seed)


def make_schedule(
    plan: ExpertPlan, method: ExpertMethod, compute_share: float
) -> Callable[[int, LayerProfile], list[int]] | None:
    """Return the callback that the model asks in each layer which experts get gradients; None if all do.

    A layer's limit is ``compute_share`` of its trainable experts, rounded up, so at least one.
    """
    if compute_share >= 1:
        return None
    trainable = [plan.trainable(layer) for layer in range(plan.num_layers)]
    limits = [math.ceil(compute_share * len(ids)) for ids in trainable]

    def schedule(layer: int, batch: LayerProfile) -> list[int]:
        if limits[layer] < len(trainable[layer]):
            return [int(expert) for expert in method.schedule_experts(batch, trainable[layer], limits[layer])]
        return [int(expert) for expert in trainable[layer]]

    return schedule


def _starved_experts(record: ActivationProfile, plan: ExpertPlan) -> int:
    """Number of resident experts with less than `STARVED_LOAD` of an even load."""
    starved = 0
    for layer, statistics in enumerate(record.layers):
        tokens = statistics.tokens_per_expert
        starved += int((tokens[plan.resident(layer)] < STARVED_LOAD * tokens.sum() / len(tokens)).sum())
    return starved


def _endless_batches(blocks: TokenBlocks, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from blocks.batches(batch_size, generator)
