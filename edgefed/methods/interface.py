"""What a federated method is: the two small interfaces between a method and the rest of edgefed.

The client half decides which experts a device holds and which of them learn in a batch. The server half decides with
which weight each client's tensor enters the global one. Both only decide: downloading, training and averaging are
done elsewhere, by code that knows no method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgefed.experts import ExpertPlan, LayerRecord, RouterRecord
from edgefed.protocol.messages import ExpertReport, UnitInfo


@dataclasses.dataclass(frozen=True)
class DeviceBudget:
    """What one device can afford in this round.

    ``resident_experts``: experts over all layers that fit its memory. ``compute_share``: share (0..1] of the resident
    experts of a layer whose gradients it computes in one batch.
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


class Method(Protocol):
    """A federated method. ``name`` is what `--method` takes."""

    name: str
    needs_profile: bool
    """The client runs all experts over its data once before it plans."""
    holds_all_experts: bool
    """A device that cannot hold every expert is refused."""
    profiles_every_round: bool
    """The profile is made anew each round; needs every expert that changed."""
    plans_every_round: bool
    """False: the plan of the first round stays, so that later rounds download only what changed in it."""
    exchanges: bool
    """False: nothing but metadata is uploaded, and nothing is downloaded after the first round."""

    def plan_experts(
        self,
        record: RouterRecord | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        run_progress: float = 0.0,
    ) -> ExpertPlan:
        """Choose the device's experts for a round. ``record`` is None only if not ``needs_profile``.

        ``run_progress`` is 0 in the first round of the run and 1 in the last.
        """
        ...

    def schedule_experts(self, batch: LayerRecord, tuned: np.ndarray, limit: int) -> np.ndarray:
        """Choose at most ``limit`` of the ``tuned`` expert ids of a layer that get gradients in this batch.

        ``batch`` is the layer's record of this batch alone. Only called when ``limit < len(tuned)``.
        """
        ...

    def expert_importance(self, record: LayerRecord) -> np.ndarray:
        """Importance s_c(e) of each expert of a layer, (E,), that the client reports with its update."""
        ...

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Decide each unit's weights. A unit that is not in the result keeps its old value.

        Only (client, unit) pairs that the client really uploaded may appear. The result does not depend on the order
        of ``contributions``.
        """
        ...
