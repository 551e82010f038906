"""Copy bandwidth and matrix products: what everything else is made of.

Copies count the bytes read and the bytes written, as profiles do. Products count 2 n^3 operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from edgefed.bench.statistics import Entry, Sampling, collect
from edgefed.bench.stopwatch import Stopwatch

MIB = 2**20
SAMPLE_S = 0.03
"""Long enough for the clock and for a launch not to count, short enough for many samples."""
LONGEST_CALL_S = 0.1
"""A product is not made larger when the next size would take longer than that."""
SLOWEST_CALL_S = 2.0
"""A dtype whose smallest product takes longer is not worth seven samples."""
MATMUL_SIZES = (256, 512, 1024, 2048, 4096, 8192)
COPY_SIZES = tuple(MIB * size for size in (64, 128, 256, 512, 1024))


def copy_bandwidth(watch: Stopwatch, sampling: Sampling, sizes: tuple[int, ...], free_bytes: int) -> Entry:
    """Copies on the device between two buffers; the best plateau over ``sizes`` that fit into a quarter of what is
    free. GB/s, read and write counted.
    """
    params: dict = {"counts": "read + write", "median_by_size": {}}
    best: list[float] = []
    for size in sizes:
        if 2 * size > free_bytes // 4 and best:
            break
        source = torch.ones(size, dtype=torch.uint8, device=watch.device)
        target = torch.zeros_like(source)
        samples = _rates(watch, lambda s=source, t=target: t.copy_(s), 2 * size / 1e9, sampling)
        del source, target
        watch.release()
        median = sorted(samples)[len(samples) // 2]
        params["median_by_size"][f"{size // MIB} MiB"] = round(median, 3)
        if not best or median > sorted(best)[len(best) // 2]:
            best = samples
            params["size_bytes"] = size
    return Entry.of("copy", "GB/s", best, params=params)


def host_to_device(watch: Stopwatch, sampling: Sampling, sizes: tuple[int, ...], pinned: bool) -> Entry:
    """Copies from host memory to a GPU, from pinned or from pageable memory; the largest of ``sizes``. GB/s one way."""
    name = f"host to device, {'pinned' if pinned else 'pageable'}"
    size = sizes[-1]
    source = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=watch.device)
    samples = _rates(watch, lambda: target.copy_(source, non_blocking=pinned), size / 1e9, sampling)
    return Entry.of(name, "GB/s", samples, params={"size_bytes": size, "counts": "one way"})


def matmul(watch: Stopwatch, sampling: Sampling, dtype: torch.dtype, free_bytes: int) -> Entry:
    """Square products in ``dtype``, as large as one takes less than 0.1 s. TFLOPS.

    float32 runs with torch's settings as they are (TF32 off unless somebody turned it on); it says so.
    """
    short = str(dtype).removeprefix("torch.")
    name, params = f"matmul {short}", {"dtype": short}
    if dtype is torch.float32 and watch.is_cuda:
        params["tf32"] = bool(torch.backends.cuda.matmul.allow_tf32)
    chosen = None
    for n in MATMUL_SIZES:
        if 3 * n * n * dtype.itemsize > free_bytes // 4 and chosen:
            break
        work = product(watch, dtype, n)
        first = watch.seconds(work)
        once = min(first, *(watch.seconds(work) for _ in range(2))) if first < SLOWEST_CALL_S else first
        if chosen is None and first > SLOWEST_CALL_S:
            return Entry.of(
                name, "TFLOPS", [2 * n**3 / first / 1e12], params={**params, "n": n, "calls_per_sample": 1},
                reason=f"no fast {short} here: {first:.1f} s for n = {n}, one sample",
            )  # fmt: skip
        chosen = (n, work)
        if 8 * once > LONGEST_CALL_S:
            break
    n, work = chosen
    calls, _ = watch.calls_for(work, SAMPLE_S)
    samples, warm_up = collect(lambda: 2 * n**3 / watch.seconds(work, calls) / 1e12, sampling)
    return Entry.of(
        name, "TFLOPS", samples, params={**params, "n": n, "calls_per_sample": calls, "warm_up": len(warm_up)}
    )


def product(watch: Stopwatch, dtype: torch.dtype, n: int) -> Callable[[], object]:
    """A call that multiplies two (n, n) matrices on the device."""
    generator = torch.Generator().manual_seed(0)
    # Values like those of a network: products of zeros or of huge numbers can run faster or hotter than real ones.
    a, b = (torch.randn(n, n, generator=generator).to(watch.device, dtype) for _ in range(2))
    out = torch.empty(n, n, dtype=dtype, device=watch.device)
    return lambda: torch.mm(a, b, out=out)


def _rates(watch: Stopwatch, work: Callable[[], object], amount: float, sampling: Sampling) -> list[float]:
    calls, _ = watch.calls_for(work, SAMPLE_S)
    return collect(lambda: amount / watch.seconds(work, calls), sampling)[0]


def matmul_dtypes(watch: Stopwatch) -> Iterator[tuple[torch.dtype, str]]:
    """The dtypes to measure, each with a reason to skip it ("" to run).

    torch says that bfloat16 is supported on GPUs before compute capability 8.0, where it is emulated.
    """
    emulated = watch.is_cuda and torch.cuda.get_device_capability(watch.device) < (8, 0)
    yield torch.bfloat16, "emulated below compute capability 8.0" if emulated else ""
    yield torch.float16, ""
    yield torch.float32, ""
