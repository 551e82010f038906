"""Makes the activation profile of a device's data within the device's memory.

    residency   in memory at a time            reads of an expert
    all         every expert                   one
    layer       the experts of one layer       one, as all batches go through the layers side by side
    expert      one expert                     one for each batch that needs it

The first that fits is used, in that order. Experts keep the model's dtype while each needs to be read only once; else
those of a layer are quantized, to 8 bits before 4: reading is what a profile costs in time, quantizing costs accuracy
(`benchmarks/results/profiling.json` has both). It ends when the plan made from it is stable
(`edgefed.training.stopping`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

from edgefed.costs.memory import profiling_memory
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import StepSetup
from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile
from edgefed.hardware.memory import format_bytes
from edgefed.kernels.out_of_memory import with_smaller_batches
from edgefed.methods.interface import Profiling
from edgefed.moe.model import MoeModel
from edgefed.moe.slots import PACKABLE
from edgefed.moe.units import ExpertSource
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.encoding import TokenBlocks
from edgefed.training.profiling import NUM_GROUPS, ProfilePass, profile_blocks, spread_blocks
from edgefed.training.steps import step_setup, train_scope
from edgefed.training.stopping import Choice, SequentialTest, Sufficiency, num_first_blocks

PROFILE_STORAGES = ("auto", "full", "int8", "nf4")
"""How an owner may have a profile store experts. "full" is the model's dtype."""

MAX_CONCURRENT_BATCHES = 64
"""Each has a thread, though only one runs at a time."""

ONE_EXPERT_AT_A_TIME = ProfilePass("expert", None, 1, 1)
"""The pass that needs least memory."""


def choose_profile_pass(
    shape: ModelShape,
    setup: StepSetup,
    num_blocks: int,
    usable_bytes: int,
    requested: str = "auto",
    *,
    attention: bool = False,
    energies: int = 0,
    packable: bool = True,
    threads: int = 1,
) -> tuple[ProfilePass, str]:
    """The best pass over ``num_blocks`` blocks of text within ``usable_bytes``, and a sentence that explains it.

    Args:
        shape: The model.
        setup: How a step is done. Its batch size is the largest that is tried.
        num_blocks: Blocks of text.
        usable_bytes: Memory. If nothing fits, the pass is `ONE_EXPERT_AT_A_TIME`.
        requested: One of `PROFILE_STORAGES`.
        attention: The profile records attention.
        energies: Sets of energies of all neurons that it keeps.
        packable: The experts' dtype can be quantized.
        threads: Threads of the CPU.

    Raises:
        ConfigError: Unknown ``requested``.
    """
    if requested not in PROFILE_STORAGES:
        raise ConfigError(f"invalid storage of a profile {requested!r}, expected one of {', '.join(PROFILE_STORAGES)}")

    def needs(each: ProfilePass) -> int:
        return profiling_memory(
            shape,
            dataclasses.replace(setup, batch_size=each.batch_size, expert_storage=each.storage),
            shape.num_experts,  # more than a layer has means all of it
            residency=each.residency,
            concurrent_batches=each.concurrent_batches,
            attention=attention,
            energies=energies,
            threads=threads,
        ).total_bytes

    for each in _passes(num_blocks, setup.batch_size, requested, packable):
        size = needs(each)
        if size <= usable_bytes:
            sentence = _describe(each, num_blocks, requested)
            return each, f"{sentence}: {format_bytes(size)} of {format_bytes(usable_bytes)}"
    sentence = _describe(ONE_EXPERT_AT_A_TIME, num_blocks, requested)
    lacking = (
        f"needs {format_bytes(needs(ONE_EXPERT_AT_A_TIME))}, but only {format_bytes(max(0, usable_bytes))} are free"
    )
    return ONE_EXPERT_AT_A_TIME, f"{sentence}: {lacking}"


def _passes(num_blocks: int, batch_size: int, requested: str, packable: bool) -> Iterator[ProfilePass]:
    """Yield passes from the best to the one that needs least memory, each with the largest batches first."""
    sizes = [max(1, batch_size >> halved) for halved in range(batch_size.bit_length())]
    as_requested = {"auto": None, "full": None}.get(requested, requested)
    storages = (None, "int8", "nf4") if requested == "auto" and packable else (as_requested,)

    def batches(size: int) -> int:
        return math.ceil(num_blocks / size)

    for size in sizes:
        yield ProfilePass("all", as_requested, size, 1)
    for storage in storages:  # each expert read once
        for size in sizes:
            if batches(size) <= MAX_CONCURRENT_BATCHES:
                yield ProfilePass("layer", storage, size, batches(size))
    concurrent = min(MAX_CONCURRENT_BATCHES, batches(sizes[0]))
    while concurrent > 1:  # each expert read once per group of batches
        for storage in storages:
            for size in sizes:
                yield ProfilePass("layer", storage, size, min(concurrent, batches(size)))
        concurrent = math.ceil(concurrent / 2)
    if as_requested is not None:
        for size in sizes:
            yield ProfilePass("layer", as_requested, size, 1)
    for size in sizes:
        yield ProfilePass("expert", None, size, 1)


def _describe(each: ProfilePass, num_blocks: int, requested: str) -> str:
    stored = f"in {each.storage}" if each.storage else "in the model's dtype"
    passes = math.ceil(num_blocks / (each.batch_size * each.concurrent_batches))
    if each.residency == "all":
        return f"all experts {stored} in memory"
    if each.residency == "layer":
        return f"layer by layer, experts {stored}, {'read once' if passes == 1 else f'read {passes} times'}"
    instead = "" if requested in ("auto", "full") else f" (a layer in {requested} does not fit)"
    return f"one expert at a time{instead}, read for each of {passes} batches"


def make_profile(
    model: MoeModel,
    shape: ModelShape,
    training: TrainingConfig,
    blocks: TokenBlocks,
    source: ExpertSource,
    usable_bytes: int,
    progress: ProgressSink,
    profiling: Profiling,
    *,
    storage: str = "auto",
    choice: Choice,
    seed: int = 0,
) -> tuple[ActivationProfile, Sufficiency]:
    """Router statistics of the full model over the training text, or over as much of it as ``choice`` needs.

    After an out-of-memory it starts again with one expert at a time and half as many sequences.

    Args:
        model: The model; experts are read from ``source``.
        shape: Its shape.
        training: Says how many tokens, how sure the choice must be, and which adapters there are.
        blocks: The device's text.
        source: Reads every expert.
        usable_bytes: Memory for the model, including what it has loaded.
        progress: Where the chosen pass is reported.
        profiling: What is recorded. With energies of neurons, batches are small enough that the first stage has one
            for each group (`edgefed.training.profiling.NUM_GROUPS`).
        storage: One of `PROFILE_STORAGES`.
        choice: The plan that is made from a profile (`edgefed.training.stopping`).
        seed: Of the order in which blocks are profiled.

    Raises:
        ConfigError: Unknown ``storage``.
        CheckpointError: An expert cannot be read.
    """
    picked = spread_blocks(blocks, training.profile_tokens)
    length = picked.input_ids.shape[1]
    takes_all = training.profile_agreement >= 1
    if not takes_all:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(picked)))
        picked = TokenBlocks(picked.input_ids[order], picked.labels[order])
    setup, scope = step_setup(model, training), train_scope(training)
    setup = dataclasses.replace(setup, sequence_length=length)
    num_groups = 0 if not profiling.neurons else 1 if takes_all else NUM_GROUPS
    if num_groups > 1:
        smallest = max(1, num_first_blocks(len(picked), length) // num_groups)
        setup = dataclasses.replace(setup, batch_size=min(setup.batch_size, smallest))
    chosen, reason = choose_profile_pass(
        shape, setup, len(picked) if takes_all else stage_blocks(blocks, training), usable_bytes, storage,
        attention=profiling.attention, energies=num_groups, packable=model.dtype in PACKABLE,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    progress.message(f"profile: {reason}")

    def run_with(batch_size: int) -> tuple[ActivationProfile, Sufficiency]:
        test = SequentialTest(
            len(picked), length, choice, training.profile_agreement, seed,
            lambda tokens: progress.phase("profile", tokens, "token"),
        )  # fmt: skip
        if takes_all:
            progress.phase("profile", picked.num_tokens, "token")
        one_expert = dataclasses.replace(ONE_EXPERT_AT_A_TIME, batch_size=batch_size)
        made = profile_blocks(
            model, picked, source, chosen if batch_size == chosen.batch_size else one_expert,
            enough=None if takes_all else test, scope=scope, attention=profiling.attention, neurons=profiling.neurons,
            on_batch=progress.advance, on_message=progress.message,
        )  # fmt: skip
        return made, test.result if not takes_all else Sufficiency(picked.num_tokens, picked.num_tokens)

    profile, sufficiency = with_smaller_batches(
        run_with,
        chosen.batch_size,
        lambda size: progress.message(
            f"memory: out of memory in the profile; {size} sequences at a time, and one expert at a time"
        ),
    )
    progress.done()
    if not sufficiency.uses_all:
        progress.message(f"profile: {sufficiency}")
    return profile, sufficiency


def stage_blocks(blocks: TokenBlocks, training: TrainingConfig) -> int:
    """Blocks that a profile of ``blocks`` should take side by side: all, or those of a stage if it may end early."""
    count, length = len(spread_blocks(blocks, training.profile_tokens)), blocks.input_ids.shape[1]
    return count if training.profile_agreement >= 1 else min(count, 2 * num_first_blocks(count, length))
