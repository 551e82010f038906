"""Two baselines of Flux (arXiv 2508.19078) that train every expert on every device: FMD and FMQ.

Both average as FedAvg does. FMD offloads experts: it is exact, and its speed is limited by the link over which experts
are loaded. FMQ quantises experts to NF4 and trains LoRA adapters on them, because quantised weights cannot be trained.
"""

from __future__ import annotations

import dataclasses

from edgefed.methods.fedavg import FedAvg
from edgefed.methods.interface import Requirements


@dataclasses.dataclass(frozen=True)
class OffloadedExperts(FedAvg):
    """FMD: the whole model; experts are offloaded and loaded when a token is routed to them."""

    name = "fmd"
    requirements = Requirements(all_experts=True, offloading=True)


@dataclasses.dataclass(frozen=True)
class QuantizedExperts(FedAvg):
    """FMQ: the whole model, with experts in NF4 and a trained LoRA adapter for each."""

    name = "fmq"
    requirements = Requirements(all_experts=True, expert_storage="nf4", train_experts="lora")
