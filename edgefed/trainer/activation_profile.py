"""The profile of one device: how it is made within the device's memory, and the making.

    all      every expert in memory once, all batches run on them
    layer    layer by layer: all batches go through the layers side by side, the experts of a layer are read once
    expert   one expert at a time, read again for each batch that needs it

The first that fits is taken, in that order. Experts stay as they come as long as each of them needs to be read only
once; else those of a layer are quantised, in 8 bits before 4, because what a profile costs is reading, and what
quantising costs is accuracy (`benchmarks/results/profiling.json` has both).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from edgefed.costs.memory import StepSetup, profiling_memory
from edgefed.costs.shapes import ModelShape
from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile
from edgefed.hardware.memory import format_bytes
from edgefed.moe.model import MoeModel
from edgefed.moe.packed import PACKABLE
from edgefed.moe.units import ExpertSource
from edgefed.progress import ProgressSink
from edgefed.protocol.messages import TrainingConfig
from edgefed.training.encoding import TokenBlocks
from edgefed.training.out_of_memory import with_smaller_batches
from edgefed.training.profiling import ProfilePass, profile_blocks, spread_blocks
from edgefed.training.steps import step_setup, train_scope

PROFILE_STORAGES = ("auto", "full", "int8", "nf4")
"""What an owner may ask for: how experts are held for a profile. "full" is as they come."""

MAX_TOGETHER = 64
"""Batches side by side; each has a thread, though only one runs at a time."""


def check_profile_storage(requested: str) -> None:
    """Raise ConfigError unless ``requested`` is one of PROFILE_STORAGES."""
    if requested not in PROFILE_STORAGES:
        raise ConfigError(f"a profile can hold experts as {', '.join(PROFILE_STORAGES)}; asked for {requested!r}")


def choose_profile_pass(
    shape: ModelShape,
    setup: StepSetup,
    num_blocks: int,
    usable_bytes: int,
    requested: str = "auto",
    *,
    attention: bool = False,
    packable: bool = True,
    threads: int = 1,
) -> tuple[ProfilePass, str]:
    """(the way, why in words) of a profile over ``num_blocks`` blocks of text within ``usable_bytes``.

    ``setup`` says how a step is done: its batch size is the largest that is tried. ``requested`` is one of
    PROFILE_STORAGES; ``packable``: the experts' dtype can be quantised; ``threads``: the CPU's. Where nothing fits, the
    leanest way is taken, with a batch of one block. Raises ConfigError on another requested.
    """
    check_profile_storage(requested)

    def needs(way: ProfilePass) -> int:
        each = dataclasses.replace(setup, batch_size=way.batch_size, expert_storage=way.storage)
        kept = shape.num_experts  # more than a layer has means all of it
        found = profiling_memory(
            shape, each, kept, hold=way.hold, together=way.together, attention=attention, threads=threads
        )
        return found.total_bytes

    for way in _ways(num_blocks, setup.batch_size, requested, packable):
        size = needs(way)
        if size <= usable_bytes:
            return way, f"{_describe(way, num_blocks, requested)}: {format_bytes(size)} of {format_bytes(usable_bytes)}"
    leanest = ProfilePass("expert", None, 1, 1)
    lacking = format_bytes(needs(leanest)), format_bytes(max(0, usable_bytes))
    return leanest, f"{_describe(leanest, num_blocks, requested)}: {lacking[0]}, though only {lacking[1]} are free"


def _ways(num_blocks: int, batch_size: int, requested: str, packable: bool) -> Iterator[ProfilePass]:
    """From the best to the leanest. The largest batch that fits is taken of each."""
    sizes = [max(1, batch_size >> halved) for halved in range(batch_size.bit_length())]
    as_requested = {"auto": None, "full": None}.get(requested, requested)
    at_once = (None, "int8", "nf4") if requested == "auto" and packable else (as_requested,)

    def groups(size: int) -> int:
        return math.ceil(num_blocks / size)

    for size in sizes:
        yield ProfilePass("all", as_requested, size, 1)
    for storage in at_once:  # each expert read once
        for size in sizes:
            if groups(size) <= MAX_TOGETHER:
                yield ProfilePass("layer", storage, size, groups(size))
    together = min(MAX_TOGETHER, groups(sizes[0]))
    while together > 1:  # each expert read once per group of batches
        for storage in at_once:
            for size in sizes:
                yield ProfilePass("layer", storage, size, min(together, groups(size)))
        together = math.ceil(together / 2)
    if as_requested is not None:
        for size in sizes:
            yield ProfilePass("layer", as_requested, size, 1)
    for size in sizes:
        yield ProfilePass("expert", None, size, 1)


def _describe(way: ProfilePass, num_blocks: int, requested: str) -> str:
    stored = f"in {way.storage}" if way.storage else "as they come"
    passes = math.ceil(num_blocks / (way.batch_size * way.together))
    if way.hold == "all":
        return f"all experts {stored} in memory"
    if way.hold == "layer":
        return f"layer by layer, experts {stored}, {'read once' if passes == 1 else f'read {passes} times'}"
    instead = "" if requested in ("auto", "full") else f" (a layer in {requested} is too large)"
    return f"one expert at a time{instead}, read for each of {passes} batches"


def make_profile(
    model: MoeModel,
    shape: ModelShape,
    training: TrainingConfig,
    blocks: TokenBlocks,
    source: ExpertSource,
    usable_bytes: int,
    progress: ProgressSink,
    *,
    storage: str = "auto",
    attention: bool = False,
) -> ActivationProfile:
    """Router statistics of the full model over the training text; experts from ``source``.

    ``usable_bytes`` is what the model may use, what it holds now included. Tells the owner which way it goes. After an
    out-of-memory it goes on with one expert at a time and half as many sequences. Raises ConfigError, CheckpointError.
    """
    picked = spread_blocks(blocks, training.profile_tokens)
    setup, scope = step_setup(model, training), train_scope(training)
    setup = dataclasses.replace(setup, sequence_length=picked.input_ids.shape[1])
    packable = model.dtype in PACKABLE
    way, reason = choose_profile_pass(
        shape, setup, len(picked), usable_bytes, storage,
        attention=attention, packable=packable, threads=torch.get_num_threads(),
    )  # fmt: skip
    progress.message(f"profile: {reason}")

    def run_with(batch_size: int) -> ActivationProfile:
        progress.phase("profile", picked.num_tokens, "token")
        now = way if batch_size == way.batch_size else ProfilePass("expert", None, batch_size, 1)
        return profile_blocks(
            model, picked, source, now, scope=scope, attention=attention, on_batch=progress.advance,
            tell=progress.message,
        )  # fmt: skip

    record = with_smaller_batches(
        run_with,
        way.batch_size,
        lambda size: progress.message(
            f"memory: out of memory in the profile; {size} sequences at a time, and one expert at a time"
        ),
    )
    progress.done()
    return record
