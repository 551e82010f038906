"""FedMoE (Mei et al., arXiv 2402.01350): model-heterogeneous personalised federated learning.

Every client k trains a model of its own, F_k, and a small homogeneous extractor G(theta). A gate mixes the two for each
example (`edgefed.personal.mixture`). Only theta is exchanged:

    theta^t = sum_{k in S} (n_k / n) theta_k^t                                                             (Algorithm 1)

    paper          here
    eta_theta      ``extractor_lr``
    eta_omega      ``model_lr``
    eta_phi        ``gate_lr``
    E              ``local_epochs``
    m              ``gate_width``
    C              the setting `clients_per_round`

The two experts of a client are its own model and the shared extractor; there is nothing to select.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

from msgspec import Meta

from edgefed.errors import ConfigError
from edgefed.methods.averaging import merge_by_examples
from edgefed.methods.interface import Contribution, PersonalMethod, UnitMerge
from edgefed.methods.options import check_options
from edgefed.protocol.messages import UnitInfo

IMAGES, TEXT, NEXT_TOKEN = "images", "text", "next-token"
TASKS = (IMAGES, TEXT, NEXT_TOKEN)
EXTRACTORS: Mapping[str, str] = MappingProxyType(
    {**{f"cnn{number}": IMAGES for number in range(1, 6)}, "text-small": TEXT}
)
"""The shared extractors by name, with the task of each; those for "text" also support "next-token".
`edgefed.personal.extractors` builds them."""


def extractor_task(name: str) -> str:
    """The task of an extractor. Raises ConfigError for an unknown name."""
    if name not in EXTRACTORS:
        raise ConfigError(f"unknown extractor {name!r}", remedy=f"Set `extractor` to one of {', '.join(EXTRACTORS)}.")
    return EXTRACTORS[name]


_Rate = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]


@dataclasses.dataclass(frozen=True)
class FedMoE(PersonalMethod):
    """Hyper-parameters with the paper's values; ``expert_loss`` and ``feature_pull`` are ours, and off by default."""

    extractor_lr: _Rate = 0.01
    """Learning rate of the shared extractor."""
    model_lr: _Rate = 0.01
    """Learning rate of the client's own model."""
    gate_lr: _Rate = 0.01
    """Learning rate of the gate."""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Momentum of SGD."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    """Weight decay of SGD."""
    local_epochs: _Count = 1
    """Passes over the client's data in a round."""
    batch_size: _Count = 64
    """Examples in a batch."""
    gate_width: _Count = 64
    """Hidden features of the gate."""
    gate_norm: Literal["switch", "layer"] = "switch"
    """"switch": SwitchNorm and BatchNorm, as in the paper; "layer": LayerNorm, which also works for a batch of one."""
    expert_loss: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Weight of the mean loss of the two experts, each on its own (`edgefed.personal.local_training`)."""
    feature_pull: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Weight of the mean square distance of the own model's features to the client's mean of their class."""

    name = "fedmoe"

    def __post_init__(self) -> None:
        check_options(self)
        if self.gate_norm == "switch" and self.batch_size < 2:
            raise ConfigError(
                "fedmoe: batch_size must be at least 2 with gate_norm=switch, which normalises over the batch",
                remedy="Set the option gate_norm to layer, or a larger batch_size.",
            )

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Average theta over the clients, weighted by examples."""
        return merge_by_examples(contributions, units)
