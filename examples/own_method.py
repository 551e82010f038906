"""A federated method of your own: each device trains the experts whose router is most decided about its text.

Run it in a federation (both sides name the class, because the wire carries no code):

    edgefed serve --model tiny --method examples/own_method.py:DecidedExperts --option floor=0.1 --min-clients 1
    edgefed join http://127.0.0.1:8470 --data silo:http --experts 50% --method examples/own_method.py:DecidedExperts

or in a simulation, where `methods` of the TOML file lists it: ``methods = ["examples/own_method.py:DecidedExperts"]``.
"""

import dataclasses
from typing import Annotated

import numpy as np
from msgspec import Meta

import edgefed
from edgefed.methods.averaging import MeanOfHolders, plan_trainable, select_by_score
from edgefed.methods.interface import FIRST_ROUND, Profiling


@edgefed.register_method
@dataclasses.dataclass(frozen=True)
class DecidedExperts(MeanOfHolders):
    """Train the experts with the largest mean weight per routed token; average each over the clients that have it."""

    floor: Annotated[float, Meta(ge=0, le=1)] = 0.0  # an option: smallest share of tokens that an expert must get

    name = "decided"
    profiling = Profiling()  # profile once, before the first plan

    def plan_experts(self, profile, experts_per_layer, budget, rng, context=FIRST_ROUND):
        """Choose as many experts as the budget allows, at least one in each layer."""
        scores = [self.expert_importance(layer) for layer in profile.layers]
        used = [layer.frequency >= self.floor for layer in profile.layers]
        return plan_trainable(experts_per_layer, select_by_score(scores, used, budget.resident_experts))

    def expert_importance(self, layer):
        """The mean gate weight of the tokens that were routed to each expert, (E,)."""
        return layer.routed_gate_sum / np.maximum(layer.tokens_per_expert, 1)
