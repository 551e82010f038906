"""Held-out losses: of the resident experts around a round's training, and of the whole model, streamed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from edgefed.kernels.out_of_memory import with_smaller_batches
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.lockstep import run_in_lockstep
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.trainer.activation_profile import ONE_EXPERT_AT_A_TIME, choose_profile_pass
from edgefed.training.encoding import IGNORED_LABEL, TokenBlocks
from edgefed.training.loss import configured_balancing, evaluate_loss
from edgefed.training.profiling import ProfilePass, spread_blocks
from edgefed.training.steps import step_setup, train_scope


def held_out_sample(blocks: TokenBlocks, training: TrainingConfig) -> TokenBlocks:
    """The blocks of an evaluation, spread evenly over ``blocks``.

    At most ``training.evaluation_tokens``, and at most ``training.evaluation_share`` of the tokens that a round trains
    on, but at least one batch.
    """
    length = blocks.input_ids.shape[1]
    sample = spread_blocks(blocks, training.evaluation_tokens)
    if training.evaluation_share >= 1:
        return sample
    batch = training.batch_size * training.sequence_length
    limit = max(batch, int(training.evaluation_share * training.local_steps * batch))
    return spread_blocks(blocks, limit) if sample.num_tokens > max(limit, length) else sample


class HeldOutLosses:
    """Losses before and after the training of each round. What was evaluated before is not evaluated again.

    ``weights`` names the weights of the resident experts and all others; equal names are equal weights.
    """

    def __init__(self) -> None:
        self._global: tuple[object, float] | None = None
        self._own: tuple[object, float] | None = None
        self._announced = False

    def before(
        self, weights: object, own: bool, model: MoeModel, training: TrainingConfig, blocks: TokenBlocks, chunked: bool,
        progress: ProgressSink,
    ) -> float:  # fmt: skip
        """Loss before training. ``own``: the weights are those that the last round of this device left."""
        known, self._own = (self._own if own else self._global), None
        if known and known[0] == weights:
            progress.message("evaluation: the weights are as in an earlier evaluation, whose loss is used")
            return known[1]
        sample = held_out_sample(blocks, training)
        if not self._announced and sample.num_tokens < spread_blocks(blocks, training.evaluation_tokens).num_tokens:
            progress.message(
                f"evaluation: {sample.num_tokens:,} of {blocks.num_tokens:,} held-out tokens, at most "
                f"{100 * training.evaluation_share:g} % of what a round trains on, or one batch"
            )
            self._announced = True
        loss = evaluate_resident(model, training, blocks, chunked, progress)
        if not own:
            self._global = weights, loss
        return loss

    def after(
        self, weights: object, own: bool, model: MoeModel, training: TrainingConfig, blocks: TokenBlocks, chunked: bool,
        progress: ProgressSink,
    ) -> float:  # fmt: skip
        """Loss after training. ``own``: the next round begins with these weights."""
        loss = evaluate_resident(model, training, blocks, chunked, progress)
        self._own = (weights, loss) if own else None
        return loss


def evaluate_resident(
    model: MoeModel, training: TrainingConfig, blocks: TokenBlocks, chunked: bool, progress: ProgressSink
) -> float:
    """Loss of the resident experts on the `held_out_sample` of ``blocks``, in nats per token.

    After an out-of-memory it continues with half as many sequences.
    """
    blocks = held_out_sample(blocks, training)

    def evaluate(batch_size: int) -> float:
        progress.phase("evaluate", blocks.num_tokens, "token")
        return evaluate_loss(model.module, blocks, batch_size, chunked=chunked, on_batch=progress.advance)

    loss = with_smaller_batches(evaluate, training.batch_size, _report_smaller(progress))
    progress.done()
    return loss


def evaluate_streamed(
    model: MoeModel,
    run: RunConfig,
    blocks: TokenBlocks,
    source: FrameSource,
    usable_bytes: int,
    progress: ProgressSink,
    *,
    chunked: bool,
) -> tuple[float, int]:
    """Loss of the whole model on held-out text, in nats per token, and the number of tokens that it is of.

    Every expert is read from ``source``, at most a layer or one at a time where ``usable_bytes`` do not hold them all
    (`choose_profile_pass`); where all batches fit side by side, each expert is read once. Experts are never quantized.
    The model has no resident experts. ``chunked``: the model's loss may be computed in chunks.
    """
    training = run.training
    blocks = held_out_sample(blocks, training)
    setup = dataclasses.replace(step_setup(model, training), sequence_length=blocks.input_ids.shape[1])
    shape = shape_from_config(model.config, run.model)
    chosen, _ = choose_profile_pass(
        shape, setup, len(blocks), usable_bytes, "full", threads=torch.get_num_threads()
    )  # fmt: skip
    if not chunked and configured_balancing(model.module):  # the model's configuration is changed around each batch
        chosen = dataclasses.replace(chosen, concurrent_batches=1)

    def evaluate(batch_size: int) -> float:
        progress.phase("evaluate", blocks.num_tokens, "token")
        each = chosen if batch_size == chosen.batch_size else dataclasses.replace(
            ONE_EXPERT_AT_A_TIME, batch_size=batch_size
        )  # fmt: skip
        with model.streaming(source, train_scope(training), residency=each.residency):
            return _mean_loss(model, blocks, each, chunked, progress.advance)

    loss = with_smaller_batches(evaluate, chosen.batch_size, _report_smaller(progress))
    progress.done()
    return loss, blocks.num_tokens


def _mean_loss(
    model: MoeModel, blocks: TokenBlocks, each: ProfilePass, chunked: bool, on_batch: Callable[[int], None]
) -> float:
    """Mean loss per predicted token, with the batches of ``each`` side by side."""
    sums: list[tuple[float, int]] = []
    module = model.module
    was_training = module.training
    module.train(False)

    def forward(batch: TokenBlocks) -> None:
        predicted = int((batch.labels[:, 1:] != IGNORED_LABEL).sum())
        if predicted:
            loss = evaluate_loss(module, batch, len(batch), chunked=chunked)
            sums.append((loss * predicted, predicted))
        on_batch(batch.num_tokens)

    batches = [TokenBlocks(input_ids, labels) for input_ids, labels in blocks.batches(each.batch_size)]
    concurrent = each.concurrent_batches or len(batches)
    try:
        for first in range(0, len(batches), concurrent):
            group = batches[first : first + concurrent]
            if len(group) == 1:
                forward(group[0])
            else:
                run_in_lockstep([functools.partial(forward, batch) for batch in group], module.device)
    finally:
        module.train(was_training)
    tokens = sum(count for _, count in sums)
    return sum(total for total, _ in sums) / tokens if tokens else math.nan


def _report_smaller(progress: ProgressSink) -> Callable[[int], None]:
    return lambda size: progress.message(f"memory: out of memory while evaluating; {size} sequences at a time")
