"""What a federated method is: the two small interfaces between a method and the rest of edgefed.

The client half decides which experts a device holds and which of them learn in a batch. The server half decides with
which weight each client's tensor enters the global one, and may assign experts to clients. Both only decide:
downloading, training and averaging are done elsewhere, by code that knows no method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.protocol.messages import ExpertAssignment, ExpertReport, ExpertSurvey, UnitInfo


@dataclasses.dataclass(frozen=True)
class DeviceBudget:
    """What one device can afford in this round.

    ``resident_experts``: experts over all layers that fit its memory, merged ones included. ``compute_share``: share
    (0..1] of the resident experts of a layer whose gradients it computes in one batch.
    """

    resident_experts: int
    compute_share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Contribution:
    """One client's accepted update, as the server half sees it: facts, no tensors.

    ``experts`` holds a report per (layer, expert) that the client held; ``units`` are the keys that it uploaded.
    """

    client_id: str
    num_examples: int
    experts: Mapping[tuple[int, int], ExpertReport]
    units: frozenset[str]


@dataclasses.dataclass(frozen=True)
class UnitMerge:
    """How one unit of the next global model is made: sum_c w_c x_c / sum_c w_c.

    ``weights`` lists (client_id, w_c), sorted by client. ``w_c`` is a number, or an array (E,) that weights each row of
    a router's tensors on its own; a row whose weights sum to zero keeps its old value.
    """

    weights: tuple[tuple[str, float | np.ndarray], ...]


@dataclasses.dataclass(frozen=True)
class RoundContext:
    """Where a run is when a plan is made. ``progress`` is 0 in the first round and 1 in the last.

    ``server_round`` counts from 1. ``assignment``: what the aggregator wants of this device, None where it said
    nothing.
    """

    server_round: int = 1
    progress: float = 0.0
    assignment: ExpertAssignment | None = None


FIRST_ROUND = RoundContext()


@dataclasses.dataclass(frozen=True)
class Coverage:
    """``idle_rounds[l]`` (E_l,): rounds since somebody trained each expert; 0 in the round after that."""

    idle_rounds: tuple[np.ndarray, ...]


class Method(Protocol):
    """A federated method. ``name`` is the value of the setting `method`. Attributes with a value here are optional."""

    name: str
    needs_profile: bool
    """The client runs all experts over its data once before it plans."""
    holds_all_experts: bool = False
    """A device that cannot hold every expert is refused."""
    profiles_every_round: bool = False
    """The profile is made anew each round; needs every expert that changed."""
    profiles_while_waiting: bool = False
    """The profile of the next round is made after this round's upload, from this round's global experts: it is one
    round old when it is used, and costs no time while others still train or the aggregator aggregates."""
    profiles_attention: bool = False
    """The profile also records the attention that tokens receive."""
    plans_every_round: bool = False
    """False: the plan of the first round stays, so that later rounds download only what changed in it."""
    refresh_rounds: int = 1
    """Rounds after which an expert that a device holds frozen is fetched anew at the latest; 1: whenever it changed."""
    merges_rest: bool = False
    """Experts that a plan leaves out are merged into frozen ones, as many as the budget has slots left."""
    merge_sizes: str = "adaptive"
    """How many merged experts a layer gets; a `MergingOptions.sizes`."""
    merge_weights: str = "attention"
    """What an expert weighs within a merged one; a `MergingOptions.importance`."""
    merge_aligned: bool = False
    """Neurons of merged experts are brought into one order before they are averaged."""
    assigns_experts: bool = False
    """The aggregator assigns experts to clients (`assign_experts`), which measure utilities for it."""
    utility_probes: int = 0
    """Random directions by which the gradient of an expert that is held but not trained is estimated, forward only."""
    most_explored: int = 0
    """Most experts of a device that are probed in a round."""
    expert_storage: str | None = None
    """How experts that do not learn as themselves are stored on every device; None: the device chooses."""
    offloads_experts: bool = False
    """Where experts do not fit beside the processor, they lie in host memory or on disk, and come when a token needs
    them."""
    trains_experts_as: str | None = None
    """The only mode of `TrainingConfig.experts` that it works with; None: any."""
    personal: bool = False
    """Every client trains a model of its own; the global model is the extractor that they share, and has no experts."""
    exchanges: bool = True
    """False: nothing but metadata is uploaded, and nothing is downloaded after the first round."""

    def plan_experts(
        self,
        record: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Choose the device's experts for a round. ``record`` is None only if not ``needs_profile``.

        A method that ``merges_rest`` leaves out what is to be merged, and fewer experts than the budget has slots.
        """
        ...

    def schedule_experts(self, batch: LayerProfile, trainable: np.ndarray, limit: int) -> np.ndarray:
        """Choose at most ``limit`` of the ``trainable`` expert ids of a layer that get gradients in this batch.

        ``batch`` is the layer's record of this batch alone. Only called when ``limit < len(trainable)``.
        """
        ...

    def expert_importance(self, record: LayerProfile) -> np.ndarray:
        """Importance s_c(e) of each expert of a layer, (E,), that the client reports with its update."""
        ...

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Decide each unit's weights. A unit that is not in the result keeps its old value.

        Only (client, unit) pairs that the client really uploaded may appear. The result does not depend on the order
        of ``contributions``.
        """
        ...

    def assign_experts(
        self, surveys: Mapping[str, ExpertSurvey], coverage: Coverage, server_round: int, seed: int
    ) -> dict[str, ExpertAssignment]:
        """An assignment for every client that has sent a survey. Only called when ``assigns_experts``."""
        raise NotImplementedError(f"{self.name} assigns no experts")
