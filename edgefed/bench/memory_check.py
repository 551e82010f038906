"""Is the planned memory really there? Allocates it, touches every page, and measures whether it is still fast.

A budget is arithmetic over what sensors say. Some of them lie (unified memory), and where Windows lends system memory
to a GPU an allocation succeeds and is slow: so the first and the last blocks are copied and compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from edgefed.bench.report import MemoryCheck
from edgefed.bench.stopwatch import Stopwatch
from edgefed.hardware.memory import format_bytes

STEP_BYTES = 256 * 2**20
SPILL_BELOW = 0.5
"""The last blocks copy at less than this share of the first ones' speed: they are somewhere else."""
SINGLE_BLOCK_STEPS = 4
"""Halvings of the search for the largest single block: it is found within a sixteenth."""


def verify_memory(
    watch: Stopwatch,
    asked_bytes: int,
    room_bytes: Callable[[], int | None],
    is_out_of_memory: Callable[[BaseException], bool],
    *,
    on_bytes: Callable[[int], None] = lambda size: None,
    limit_s: float = 60.0,
    step_bytes: int = STEP_BYTES,
) -> MemoryCheck:
    """Allocate ``asked_bytes`` in steps of 256 MiB, writing each, and let go of them again.

    ``room_bytes`` is asked before every step: bytes that may still be taken without going below the floor that belongs
    to the system; None when that cannot be seen, which ends the test, for nothing would stop it in time. Errors that
    are no lack of memory are raised.
    """
    started = time.monotonic()
    blocks: list[torch.Tensor] = []
    taken, stopped, failed = 0, "", False
    try:
        while taken < asked_bytes and not stopped:
            step = min(step_bytes, asked_bytes - taken)
            room = room_bytes()
            if room is None:
                stopped = "cannot see how much memory is left"
            elif room < step:
                stopped = f"{format_bytes(max(0, room))} left above the system's reserve"
            elif time.monotonic() - started > limit_s:
                stopped = f"time limit of {limit_s:.0f} s"
            else:
                try:
                    blocks.append(torch.empty(step, dtype=torch.uint8, device=watch.device).fill_(1))
                    watch.synchronize()
                    taken += step
                    on_bytes(step)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    stopped, failed = f"out of memory after {format_bytes(taken)}", True
        share = _last_speed_share(watch, blocks)
    finally:
        blocks.clear()
        watch.release()
    return MemoryCheck(
        asked_bytes=asked_bytes,
        verified_bytes=taken,
        complete=taken >= asked_bytes,
        stopped=stopped,
        seconds=time.monotonic() - started,
        last_speed_share=share,
        spilled=share is not None and share < SPILL_BELOW,
        largest_block_bytes=_largest_block(watch, taken, is_out_of_memory) if taken else None,
        out_of_memory=failed,
    )


def _last_speed_share(watch: Stopwatch, blocks: list[torch.Tensor]) -> float | None:
    if len(blocks) < 4:
        return None
    first, last = blocks[0], blocks[-2]  # the very last may be a smaller one
    speeds = []
    for target, source in ((blocks[1], first), (blocks[-3], last)):
        watch.seconds(lambda t=target, s=source: t.copy_(s))
        speeds.append(1 / max(1e-9, min(watch.seconds(lambda t=target, s=source: t.copy_(s)) for _ in range(3))))
    return speeds[1] / speeds[0]


def _largest_block(watch: Stopwatch, size: int, is_out_of_memory: Callable[[BaseException], bool]) -> int | None:
    """Halve the interval between what worked and what did not."""
    low, high = 0, size
    attempt = size
    for _ in range(SINGLE_BLOCK_STEPS + 1):
        try:
            block = torch.empty(attempt, dtype=torch.uint8, device=watch.device)
            del block
            low = attempt
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            high = attempt
        watch.release()
        if low == size:
            break
        attempt = (low + high) // 2
    return low or None
