"""Whether experts may be outside the memory that computes: offloaded by the method, or the frozen ones streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import StepPlan
from edgefed.costs.streaming import slowdown, streamed_bytes
from edgefed.errors import ConfigError
from edgefed.methods.interface import Requirements
from edgefed.trainer.expert_choice import Layout
from edgefed.trainer.ports import StepCosts

STREAM_CHOICES = ("auto", "always", "never")
"""What an owner can request. "auto": while a step takes at most `edgefed.costs.fallbacks.MAX_SLOWDOWN` times as long;
"always": rather than with fewer experts, however long it takes."""


OFFLOADING_PROBLEMS = {
    "adamw_8bit": "moments of offloaded experts stay as they are",
    "nf4_experts": "a method that offloads experts does not quantize them",
}


def outside_memory(
    requested: str,
    needs: Requirements,
    costs: StepCosts,
    shape: ModelShape,
    layout: Layout,
    own_bytes: Callable[[], int],
) -> dict[str, Any]:
    """Return ``may_offload``, ``may_stream`` and ``slowdown`` of a `FallbackSearch`.

    ``requested`` is one of `STREAM_CHOICES`, ``own_bytes`` the model's memory. Methods that offload all experts do not
    stream. Raises ConfigError on an unknown choice.
    """
    if requested not in STREAM_CHOICES:
        raise ConfigError(f"invalid `stream_experts` {requested!r}, expected one of {', '.join(STREAM_CHOICES)}")
    rates_of = costs.stream_rates

    def slower(step_plan: StepPlan) -> float:
        if requested == "always" or rates_of is None:
            return 1.0
        setup, plan = step_plan.setup, layout(step_plan.resident, step_plan.trainable)
        counts, own = plan.counts(), shape.sliced(plan.slice_shares()) if plan.neurons else shape
        rates = rates_of(setup, streamed_bytes(own, setup, *counts), own_bytes())
        return slowdown(own, setup, *counts, rates)

    return {
        "may_offload": needs.offloading and costs.offloads,
        "may_stream": requested != "never" and rates_of is not None and not needs.offloading,
        "slowdown": slower,
    }
