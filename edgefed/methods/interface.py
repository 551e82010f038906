"""What a federated method is: the interface between a method and the rest of edgefed.

A method decides and does nothing else; other code, which knows no method by name, downloads, trains and averages. Every
method has a server half: it chooses the weight of each client's tensor in the global model. There are two kinds of
client half:

    `ExpertMethod`      chooses which experts of the global model a device holds and trains
    `PersonalMethod`    trains a model of the client's own beside a small shared one

``method.personal`` tells them apart, for readers and for type checkers. Register a method of your own with
`edgefed.methods.registry.register`::

    @register
    @dataclasses.dataclass(frozen=True)
    class LargestGate(MeanOfHolders):                  # an `ExpertMethod` that averages by examples
        '''Train the experts with the largest mean gate probability.'''

        sharpness: Annotated[float, Meta(gt=0)] = 1.0  # an option, with its range

        name = "largest_gate"
        profiling = Profiling()                        # profile once, before the first plan

        def plan_experts(self, profile, experts_per_layer, budget, rng, context=FIRST_ROUND):
            scores = [layer.mean_gate**self.sharpness for layer in profile.layers]
            used = [layer.tokens_per_expert > 0 for layer in profile.layers]
            return plan_trainable(experts_per_layer, select_by_score(scores, used, budget.resident_experts))

        def expert_importance(self, layer):
            return layer.mean_gate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgefed.expert_records import ActivationProfile, ExpertPlan, LayerProfile
from edgefed.protocol.messages import ExpertAssignment, ExpertReport, ExpertSurvey, UnitInfo

Array: TypeAlias = npt.NDArray[Any]
MergeSizes: TypeAlias = Literal["adaptive", "deviation", "depth", "uniform", "one"]
MergeWeights: TypeAlias = Literal["attention", "frequency"]
TrainExperts: TypeAlias = Literal["full", "lora", "none"]


# What an `ExpertMethod` asks of a client, in three values and the limits of what it works with.


@dataclasses.dataclass(frozen=True)
class Profiling:
    """How a client makes the activation profile that the method plans from: one pass over its data with all experts."""

    when: Literal["once", "each_round", "while_waiting"] = "once"
    """"once": before the first plan. "each_round": before every plan; downloads every expert that changed.
    "while_waiting": after the upload, from the experts of the round that ends. The profile is then one round old when
    it is used, and costs no time while other clients still train or the aggregator aggregates."""
    attention: bool = False
    """Whether the profile also records the attention that tokens receive."""
    neurons: bool = False
    """Whether the profile also records how much each neuron adds to the output (`LayerProfile.neuron_energy`)."""


@dataclasses.dataclass(frozen=True)
class Merging:
    """How the experts that a plan leaves out are merged into frozen ones: as many as the budget has slots left."""

    sizes: MergeSizes = "adaptive"
    """How the slots are divided among layers; see `edgefed.moe.merging.plan.MergingOptions`."""
    weights: MergeWeights = "attention"
    """Weight of an expert within a merged one. "attention" needs a profile with attention."""
    align: bool = False
    """Whether the neurons of the experts are brought into a common order before they are averaged."""


@dataclasses.dataclass(frozen=True)
class Assigning:
    """The aggregator assigns experts to clients, which measure utilities for it (`edgefed.training.utility`)."""

    directions: int = 0
    """Random directions from which the gradient of a frozen expert is estimated, by forward passes alone."""
    max_explored: int = 0
    """Maximum number of frozen experts whose gradient a device estimates in a round."""


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a method works with. The defaults accept every device and every way of training."""

    all_experts: bool = False
    """A device that cannot hold every expert is refused."""
    expert_storage: Literal["nf4"] | None = None
    """Storage of frozen experts on every device; None: each device chooses."""
    offloading: bool = False
    """Experts that do not fit next to the processor stay in host memory or on disk and are loaded on demand."""
    neurons: bool = False
    """Plans have slices of experts: a run stores and exchanges experts neuron by neuron (`edgefed.moe.neurons`)."""
    train_experts: TrainExperts | None = None
    """The only supported value of `TrainingConfig.experts`; None: any."""


# What a method decides from.


@dataclasses.dataclass(frozen=True)
class DeviceBudget:
    """What one device can afford in this round."""

    resident_experts: int
    """Experts over all layers that fit into its memory, merged ones included."""
    compute_share: float = 1.0
    """Share (0..1] of a layer's resident experts that get gradients in one batch."""


@dataclasses.dataclass(frozen=True)
class RoundContext:
    """The position of a plan in its run."""

    server_round: int = 1
    """Counts from 1."""
    progress: float = 0.0
    """0 in the first round, 1 in the last."""
    assignment: ExpertAssignment | None = None
    """The experts that the aggregator assigned to this device; None without an assignment."""


FIRST_ROUND = RoundContext()


@dataclasses.dataclass(frozen=True)
class Contribution:
    """One client's accepted update, as the server half sees it: metadata without tensors."""

    client_id: str
    num_examples: int
    experts: Mapping[tuple[int, int], ExpertReport]
    """A report per (layer, expert) that the client held."""
    units: frozenset[str]
    """Keys of the uploaded units."""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """``idle_rounds[l]`` (E_l,): rounds since each expert was last trained by any client; 0 directly after that."""

    idle_rounds: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class UnitMerge:
    """How one unit of the next global model is computed: sum_c w_c x_c / sum_c w_c."""

    weights: tuple[tuple[str, float | Array], ...]
    """(client_id, w_c), sorted by client. ``w_c`` is a number, or an array (E,) with a weight for each row of a
    router's tensors; a row whose weights sum to zero keeps its old value."""


class ExpertMethod(Protocol):
    """A method whose clients train experts of the global model. Only members without a default must be written."""

    name: ClassVar[str]
    """The value of the setting `method`."""
    personal: ClassVar[Literal[False]] = False

    @property
    def profiling(self) -> Profiling | None:
        """How profiles are made; None: the method plans without one."""
        return None

    @property
    def merging(self) -> Merging | None:
        """How the experts that a plan leaves out are merged; None: they are absent."""
        return None

    @property
    def assigning(self) -> Assigning | None:
        """What clients measure so that the aggregator can assign experts; None: it assigns none."""
        return None

    @property
    def requirements(self) -> Requirements:
        """What the method works with."""
        return Requirements()

    @property
    def plans_every_round(self) -> bool:
        """False: a device keeps the plan of its first round and downloads only what changed in it."""
        return False

    @property
    def refresh_rounds(self) -> int:
        """Maximum age in rounds of an expert that a device holds frozen; 1: it is downloaded whenever it changed."""
        return 1

    @property
    def exchanges(self) -> bool:
        """False: a client uploads metadata alone and downloads nothing after the first round."""
        return True

    @property
    def importance_limit(self) -> float:
        """Upper end of the range of `expert_importance`, which begins at 0. The aggregator refuses what is above."""
        return 1.0

    def plan_experts(
        self,
        profile: ActivationProfile | None,
        experts_per_layer: Sequence[int],
        budget: DeviceBudget,
        rng: np.random.Generator,
        context: RoundContext = FIRST_ROUND,
    ) -> ExpertPlan:
        """Choose the experts of a device for a round.

        With ``merging``, the plan leaves out the experts to merge and uses fewer slots than the budget has.

        Args:
            profile: the device's activation profile; None only if ``profiling`` is None.
            experts_per_layer: (L,), the number of experts of each MoE layer.
            budget: what the device can afford.
            rng: the only source of randomness; the same state gives the same plan.
            context: round, progress and assignment.

        Raises:
            BudgetTooSmall: the budget is too small for any plan.
        """
        ...

    def schedule_experts(self, batch: LayerProfile, trainable: Array, limit: int) -> Array:
        """Choose at most ``limit`` of the ``trainable`` expert ids of a layer; only these get gradients in this batch.

        ``batch`` holds the layer's statistics of this batch. Called only if ``limit < len(trainable)``.
        """
        ...

    def expert_importance(self, layer: LayerProfile) -> Array:
        """Importance s_c(e) of each expert of a layer, (E,), which the client reports with its update."""
        ...

    def counts(self, report: ExpertReport, num_experts: int) -> bool:
        """Whether `plan_merge` can give a weight to an expert with this report; if not, a device does not send it.

        ``num_experts``: of its layer.
        """
        return True

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Choose the weights of each unit. A unit that is missing in the result keeps its old value.

        Only (client, unit) pairs that were uploaded may appear. The result must not depend on the order of
        ``contributions``.
        """
        ...

    def assign_experts(
        self, surveys: Mapping[str, ExpertSurvey], coverage: Coverage, server_round: int, seed: int
    ) -> dict[str, ExpertAssignment]:
        """Choose an assignment for every client that has sent a survey. Called only with ``assigning``."""
        return {}


class PersonalMethod(Protocol):
    """A method whose clients train models of their own; only a small shared feature extractor is exchanged."""

    name: ClassVar[str]
    """The value of the setting `method`."""
    personal: ClassVar[Literal[True]] = True

    extractor_lr: float
    """Learning rate of the shared extractor; like the others, of SGD."""
    model_lr: float
    """Learning rate of the client's own model."""
    gate_lr: float
    """Learning rate of the gate."""
    momentum: float
    weight_decay: float
    local_epochs: int
    """Passes over the client's data in a round."""
    batch_size: int
    """Examples in a batch."""
    gate_width: int
    """Hidden features of the gate."""
    gate_norm: Literal["switch", "layer"]
    """Normalisation inside the gate (`edgefed.personal.mixture`)."""
    expert_loss: float
    """Weight of the mean loss of the two experts on their own (`edgefed.personal.local_training`); 0: without."""
    feature_pull: float
    """Weight of the mean square distance of features to the mean of their class; 0: without."""

    def plan_merge(self, contributions: Sequence[Contribution], units: Sequence[UnitInfo]) -> dict[str, UnitMerge]:
        """Choose the weights of each unit, as `ExpertMethod.plan_merge` does."""
        ...


Method: TypeAlias = ExpertMethod | PersonalMethod
"""Any method. After ``if method.personal`` a type checker knows which kind it is."""
