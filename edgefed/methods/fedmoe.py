"""FedMoE (Mei et al., arXiv 2402.01350): model-heterogeneous personalised federated learning.

Every client k trains a model of its own, F_k, and a small homogeneous extractor G(theta), mixed per example by a gate
(`edgefed.personal.mixture`). Only theta travels:

    theta^t = sum_{k in S} (n_k / n) theta_k^t                                                             (Algorithm 1)

    paper          here
    eta_theta      ``extractor_lr``
    eta_omega      ``model_lr``
    eta_phi        ``gate_lr``
    E              ``local_epochs``
    m              ``gate_width``
    C              `clients_per_round`  

There are no experts to choose here: the two experts of a client are its own model and the shared extractor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from edgefed.errors import ConfigError
from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.methods.averaging import MeanOfHolders
from edgefed.methods.interface import FIRST_ROUND, DeviceBudget, RoundContext

IMAGES, TEXT, NEXT_TOKEN = "images", "text", "next-token"
TASKS = (IMAGES, TEXT, NEXT_TOKEN)
EXTRACTORS: Mapping[str, str] = MappingProxyType(
    {**{f"cnn{number}": IMAGES for number in range(1, 6)}, "text-small": TEXT}
)
"""The shared extractors by name, and the task of each; `edgefed.personal.extractors` makes them. Those of "text" also
serve "next-token"."""


def extractor_task(name: str) -> str:
    """The task of an extractor. Raises ConfigError for an unknown name."""
    if name not in EXTRACTORS:
        raise ConfigError(
            f"there is no extractor {name!r}", remedy=f"Set `extractor` to one of {', '.join(EXTRACTORS)}."
        )
    return EXTRACTORS[name]


@dataclasses.dataclass(frozen=True)
class FedMoE(MeanOfHolders):
    """Hyper-parameters with the paper's values; ``expert_loss`` and ``feature_pull`` are ours, and off."""

    extractor_lr: float = 0.01
    model_lr: float = 0.01
    gate_lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    local_epochs: int = 1
    batch_size: int = 64
    gate_width: int = 64
    gate_norm: str = "switch"
    """"switch": SwitchNorm and BatchNorm, as the paper has it; "layer": LayerNorm, also for batches of one."""
    expert_loss: float = 0.0
    """Weight of the mean loss of the two experts, each answering alone (`edgefed.personal.guided_loss`)."""
    feature_pull: float = 0.0
    """Weight of the mean square distance of the own model's features to the client's mean for the class."""

    name = "fedmoe"
    needs_profile = False
    personal = True

    def __post_init__(self) -> None:
        for option in ("extractor_lr", "model_lr", "gate_lr"):
            if not getattr(self, option) > 0:
                raise ConfigError(f"fedmoe: {option} is {getattr(self, option)}, it must be above 0")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ConfigError("fedmoe: momentum is 0 up to below 1, weight_decay is not negative")
        for option in ("expert_loss", "feature_pull"):
            if not 0 <= getattr(self, option) <= 1e6:
                raise ConfigError(f"fedmoe: {option} is {getattr(self, option)}, allowed is 0 to 1000000")
        for option in ("local_epochs", "batch_size", "gate_width"):
            if getattr(self, option) < 1:
                raise ConfigError(f"fedmoe: {option} is {getattr(self, option)}, it must be at least 1")
        if self.gate_norm not in ("switch", "layer"):
            raise ConfigError(f"fedmoe: gate_norm is {self.gate_norm!r}, allowed are switch, layer")
        if self.gate_norm == "switch" and self.batch_size < 2:
            raise ConfigError(
                "fedmoe: batch_size is 1, and the statistics of one example say nothing",
                remedy="Set the method's option gate_norm to layer, or a larger batch_size.",
            )

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """There is nothing to plan. Raises ConfigError."""
        raise ConfigError("fedmoe has no experts to choose: its clients bring models of their own")

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """There are no experts. Raises ConfigError."""
        raise ConfigError("fedmoe has no experts whose importance could be told")
