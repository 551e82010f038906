"""The feed-forward experts of one MoE layer at a model's real width, through the kernel that training uses."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from edgefed.bench.statistics import Entry, Sampling, collect
from edgefed.bench.stopwatch import Stopwatch
from edgefed.kernels.masked_experts import SlotWeights, masked_experts

SAMPLE_S = 0.03


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
    """Forward of one layer's experts for ``tokens`` tokens, each to ``top_k`` resident experts, evenly. Tokens/s.

    As many experts are resident as fit into a quarter of ``free_bytes``, at most all. Routers are not part of it.
    Raises MemoryError when not even one fits.
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

    calls, _ = watch.calls_for(work, SAMPLE_S)
    samples, warm_up = collect(lambda: tokens / watch.seconds(work, calls), sampling)
    return Entry.of(
        "expert forward", "tokens/s", samples,
        params={
            "model": model, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "experts": resident,
            "experts_of": num_experts, "top_k": k, "hidden_size": hidden_size, "expert_width": expert_width,
            "flops_per_token": 6 * k * hidden_size * expert_width, "warm_up": len(warm_up), "kernel": "reference",
        },
        note=f"{resident} of {num_experts} experts, 1 layer",
    )  # fmt: skip


def _swiglu(up: torch.Tensor) -> torch.Tensor:
    gate, value = up.chunk(2, dim=-1)
    return F.silu(gate) * value
