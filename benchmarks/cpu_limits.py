"""Limits of the processor, measured in the run of a benchmark: bytes read and operations per second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from edgefed.native import DTYPE_CODES, ISA_CODES, isa_code, load_native

clock: Callable[[], float] = time.perf_counter
"""Seconds. `time.process_time` where other programs run: with one thread, it is the time that this one takes."""


def best_time(run: Callable[[], object], repetitions: int) -> float:
    """The shortest of some runs in seconds, after one to warm up."""
    return interleaved({"": run}, repetitions)[""]


def interleaved(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """The shortest time of each, in seconds; they take turns, so that all see the same machine."""
    for run in runs.values():
        run()
    shortest = dict.fromkeys(runs, float("inf"))
    for _ in range(repetitions):
        for name, run in runs.items():
            start = clock()
            run()
            shortest[name] = min(shortest[name], clock() - start)
    return shortest


def read_bandwidth(repetitions: int = 9) -> float:
    """Bytes a second of reading 256 MB with the threads that torch uses: the faster of a sum and a product."""
    values, ones = torch.ones(64 << 20), torch.ones(32 << 10)
    runs = {"sum": values.sum, "product": lambda: torch.mv(values.view(-1, ones.numel()), ones)}
    return values.numel() * 4 / min(interleaved(runs, repetitions).values())


def arithmetic(dtype: str, repetitions: int = 5) -> float | None:
    """Operations a second (a multiply-add is two) of "float32", "bfloat16" or "int8"; None without such a unit."""
    library, steps = load_native(), 1_000_000
    code = DTYPE_CODES[dtype]
    if dtype == "bfloat16" and isa_code(library) == ISA_CODES["amx"]:
        code = 32  # EF_BF16_AMX of csrc/edgefed.h
    arguments = (code, steps, torch.get_num_threads())
    count = library.ef_arithmetic_steps(*arguments)
    if count < 0:
        return None
    return count / best_time(lambda: library.ef_arithmetic_steps(*arguments), repetitions)


def limits() -> dict:
    """All of them, for a row of a result."""
    rates = {dtype: arithmetic(dtype) for dtype in ("float32", "bfloat16", "int8")}
    return {
        "read_gb_per_s": round(read_bandwidth() / 1e9, 1),
        **{f"{dtype}_gop_per_s": None if rate is None else round(rate / 1e9) for dtype, rate in rates.items()},
    }
