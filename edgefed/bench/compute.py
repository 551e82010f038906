"""Compute speed: copies, matrix products, and the experts of one MoE layer, timed on a torch device.

Copies count the bytes read and the bytes written, as device profiles do. Products count 2 n^3 operations.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from edgefed.bench.statistics import Entry, Sampling, collect
from edgefed.kernels.dispatch import observe_backends
from edgefed.kernels.masked_experts import SlotWeights, masked_experts

MIB = 2**20
SAMPLE_S = 0.03
"""Length of one sample: long enough to hide the clock and the launch, short enough to take many samples."""
LONGEST_CALL_S = 0.1
"""The size of a product stops growing when the next size would take longer than this."""
SLOWEST_CALL_S = 2.0
"""A dtype whose smallest product takes longer than this gets one sample instead of seven."""
MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)


class Stopwatch:
    """Times calls on one device, ``cpu`` or ``cuda:N``.

    `torch.utils.benchmark.Timer` would measure something else: it runs one CPU thread by default, adds at least two
    calls before every measurement (a single call here may take seconds), and on a GPU it reads the host's clock around
    a synchronisation, while CUDA events exclude the time that the host takes to launch and to wait.
    """

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for all queued work. Raises the errors of that work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """Mean seconds of ``times`` calls of ``work`` in a row: CUDA events on a GPU, the host's clock on a CPU."""
        if self.is_cuda:
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            with torch.cuda.device(self.device):
                self.synchronize()
                begin.record()
                for _ in range(times):
                    work()
                end.record()
                end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / times
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    def calls_for(self, work: Callable[[], object], sample_s: float) -> tuple[int, float]:
        """Number of calls in a sample of about ``sample_s`` seconds (1 to 1000), and seconds of one warm call."""
        self.seconds(work)
        once = max(self.seconds(work), 1e-7)
        return max(1, min(1000, math.ceil(sample_s / once))), once

    def release(self) -> None:
        """Return unused memory to the device, so that the next measurement starts with all of it."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


# --- copies -----------------------------------------------------------------------------------------------------


def copy_bandwidth(watch: Stopwatch, sampling: Sampling, sizes: tuple[int, ...], free_bytes: int) -> Entry:
    """Measure copies between two buffers on the device, in GB/s, read and write counted.

    The result is the best median over those ``sizes`` (bytes) that fit in a quarter of ``free_bytes``.
    """
    by_size: dict[str, float] = {}
    params: dict[str, Any] = {"counts": "read + write", "median_by_size": by_size}
    best: list[float] = []
    for size in sizes:
        if 2 * size > free_bytes // 4 and best:
            break
        source = torch.ones(size, dtype=torch.uint8, device=watch.device)
        target = torch.zeros_like(source)
        samples = _rates(watch, functools.partial(target.copy_, source), 2 * size / 1e9, sampling)
        del source, target
        watch.release()
        median = sorted(samples)[len(samples) // 2]
        by_size[f"{size // MIB} MiB"] = round(median, 3)
        if not best or median > sorted(best)[len(best) // 2]:
            best = samples
            params["size_bytes"] = size
    return Entry.of("copy", "GB/s", best, params=params)


def host_to_device(watch: Stopwatch, sampling: Sampling, sizes: tuple[int, ...], pinned: bool) -> Entry:
    """Measure copies from pinned or pageable host memory to a GPU, in GB/s one way, at the largest of ``sizes``."""
    name = f"host to device, {'pinned' if pinned else 'pageable'}"
    size = sizes[-1]
    source = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=watch.device)
    samples = _rates(watch, lambda: target.copy_(source, non_blocking=pinned), size / 1e9, sampling)
    return Entry.of(name, "GB/s", samples, params={"size_bytes": size, "counts": "one way"})


def _rates(watch: Stopwatch, work: Callable[[], object], amount: float, sampling: Sampling) -> list[float]:
    calls, _ = watch.calls_for(work, SAMPLE_S)
    return collect(lambda: amount / watch.seconds(work, calls), sampling)[0]


# --- matrix products --------------------------------------------------------------------------------------------


def matmul(watch: Stopwatch, sampling: Sampling, dtype: torch.dtype, free_bytes: int) -> Entry:
    """Measure square products in ``dtype``, in TFLOPS, at the largest size that takes less than 0.1 s.

    float32 runs with torch's current settings (TF32 is off by default); the parameters record them.
    """
    short = dtype_name(dtype)
    name = f"matmul {short}"
    params: dict[str, Any] = {"dtype": short}
    if dtype is torch.float32 and watch.is_cuda:
        params["tf32"] = bool(torch.backends.cuda.matmul.allow_tf32)
    n, work = MATMUL_SIZES[0], product(watch, dtype, MATMUL_SIZES[0])
    for size in MATMUL_SIZES:
        smallest = size == MATMUL_SIZES[0]
        if 3 * size * size * dtype.itemsize > free_bytes // 4 and not smallest:
            break
        n, work = size, work if smallest else product(watch, dtype, size)
        first = watch.seconds(work)
        once = min(first, *(watch.seconds(work) for _ in range(2))) if first < SLOWEST_CALL_S else first
        if smallest and first > SLOWEST_CALL_S:
            return Entry.of(
                name, "TFLOPS", [2 * n**3 / first / 1e12], params={**params, "n": n, "calls_per_sample": 1},
                reason=f"slow {short}: {first:.1f} s for n = {n}, one sample",
            )  # fmt: skip
        if 8 * once > LONGEST_CALL_S:
            break
    calls, _ = watch.calls_for(work, SAMPLE_S)
    samples, warm_up = collect(lambda: 2 * n**3 / watch.seconds(work, calls) / 1e12, sampling)
    return Entry.of(
        name, "TFLOPS", samples, params={**params, "n": n, "calls_per_sample": calls, "warm_up": len(warm_up)}
    )


def product(watch: Stopwatch, dtype: torch.dtype, n: int) -> Callable[[], object]:
    """Return a call that multiplies two (n, n) matrices on the device."""
    generator = torch.Generator().manual_seed(0)
    # Values like those of a network: products of zeros or of huge numbers can run faster or hotter than real ones.
    a, b = (torch.randn(n, n, generator=generator).to(watch.device, dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=watch.device)
    return lambda: torch.mm(a, b, out=out)


def matmul_dtypes(watch: Stopwatch) -> Iterator[tuple[torch.dtype, str]]:
    """Yield the dtypes to measure, each with the reason to skip it ("" to measure it).

    torch reports bfloat16 as supported on GPUs before compute capability 8.0, which only emulate it.
    """
    emulated = watch.is_cuda and torch.cuda.get_device_capability(watch.device) < (8, 0)
    yield torch.bfloat16, "emulated below compute capability 8.0" if emulated else ""
    yield torch.float16, ""
    yield torch.float32, ""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


# --- experts ----------------------------------------------------------------------------------------------------


def expert_forward(
    watch: Stopwatch,
    sampling: Sampling,
    *,
    hidden_size: int,
    expert_width: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    dtype: torch.dtype,
    free_bytes: int,
    model: str,
) -> Entry:
    """Measure the forward pass of one layer's experts at a model's real width, in tokens/s.

    ``tokens`` tokens are spread evenly over the resident experts, ``top_k`` experts each. As many experts are resident
    as fit in a quarter of ``free_bytes``. Routing is not included. The parameter ``kernel`` is the backend that ran.
    Raises MemoryError when not even one expert fits.
    """
    one = 3 * hidden_size * expert_width * dtype.itemsize
    resident = min(num_experts, free_bytes // 4 // one)
    if resident < 1:
        raise MemoryError(f"not enough memory for one expert of {one} bytes")
    k = min(top_k, resident)
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(2 * expert_width, hidden_size, generator=generator) * hidden_size**-0.5
    down = torch.randn(hidden_size, expert_width, generator=generator) * expert_width**-0.5
    up, down = up.to(watch.device, dtype), down.to(watch.device, dtype)
    slots = [SlotWeights(up=up.clone(), down=down.clone()) for _ in range(resident)]
    x = torch.randn(tokens, hidden_size, generator=generator).to(watch.device, dtype)
    scores = torch.rand(tokens, resident, generator=generator)
    indices = scores.topk(k, dim=-1).indices.to(watch.device)
    weights = torch.full((tokens, k), 1 / k, device=watch.device, dtype=dtype)

    def work() -> None:
        with torch.no_grad():
            masked_experts(x, indices, weights, slots, activation=_swiglu)

    with observe_backends() as ran:
        work()
    calls, _ = watch.calls_for(work, SAMPLE_S)
    samples, warm_up = collect(lambda: tokens / watch.seconds(work, calls), sampling)
    return Entry.of(
        "expert forward", "tokens/s", samples,
        params={
            "model": model, "dtype": dtype_name(dtype), "tokens": tokens, "experts": resident,
            "experts_of": num_experts, "top_k": k, "hidden_size": hidden_size, "expert_width": expert_width,
            "flops_per_token": 6 * k * hidden_size * expert_width, "warm_up": len(warm_up),
            "kernel": ran["masked_experts"],
        },
        note=f"{resident} of {num_experts} experts, 1 layer",
    )  # fmt: skip


def _swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value
