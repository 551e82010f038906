"""Flux's baselines that train every expert on every device: FMD by offloading, FMQ by quantisation.

Both merge as FedAvg does. FMD is exact, and bound by the link that experts come over. FMQ trains LoRA adapters on
NF4 weights: quantised weights cannot be trained themselves.
"""

from __future__ import annotations

import dataclasses

from edgefed.methods.fedavg import FedAvg


@dataclasses.dataclass(frozen=True)
class OffloadedExperts(FedAvg):
    """FMD (named in arXiv 2508.19078): the whole model, experts offloaded and brought in when a token needs them."""

    name = "fmd"
    offloads_experts = True


@dataclasses.dataclass(frozen=True)
class QuantizedExperts(FedAvg):
    """FMQ (named in arXiv 2508.19078): the whole model in NF4, LoRA adapters of all experts trained on it."""

    name = "fmq"
    expert_storage = "nf4"
    trains_experts_as = "lora"
