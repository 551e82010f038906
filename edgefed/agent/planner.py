"""Which experts a device holds in a round: profile, budget and plan, and their memory across rounds and restarts."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path

import numpy as np

from edgefed.agent.agent import Fetch
from edgefed.agent.disk import disk_errors, write_durably
from edgefed.agent.progress import ProgressSink
from edgefed.errors import StateCorrupt
from edgefed.experts import ExpertPlan, RouterRecord
from edgefed.methods.interface import DeviceBudget, Method
from edgefed.moe.frame_source import FrameSource
from edgefed.moe.memory import experts_that_fit
from edgefed.moe.model import MoeModel
from edgefed.protocol.messages import Manifest, RunConfig
from edgefed.training.costs import training_costs
from edgefed.training.encoding import TokenBlocks
from edgefed.training.profiling import profile_blocks, spread_blocks
from edgefed.training.steps import train_scope

PLAN_FILE = "plan.json"
"""Profile and current plan, in the device's state folder."""


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """What the owner allows. ``memory_bytes`` is for the whole process; ``expert_share`` caps the experts held."""

    memory_bytes: int
    expert_share: float = 1.0
    compute_share: float = 1.0


class Planner:
    """Makes and keeps one device's plan. ``identity`` names the device and its data; it seeds what is random."""

    def __init__(self, folder: Path, limits: DeviceLimits, identity: str):
        self._path = folder / PLAN_FILE
        self._limits = limits
        self._identity = identity

    def make_plan(
        self,
        run: RunConfig,
        method: Method,
        manifest: Manifest,
        model: MoeModel,
        blocks: TokenBlocks,
        source: FrameSource,
        memory_bytes: int,
        fetch: Fetch,
        progress: ProgressSink,
    ) -> ExpertPlan:
        """The plan of this round: the one of an earlier round where the method keeps it, else a new one.

        A profile is made once, or each round if the method asks for it; all experts are downloaded for it and no other
        reason. ``memory_bytes`` is what the model may use. Raises BudgetTooSmall before anything is downloaded.
        """
        profile, roles = self._load(run)
        if roles is not None and not method.plans_every_round:
            return ExpertPlan.from_lists(roles)
        budget = self._budget(run, manifest, model, memory_bytes)
        if method.needs_profile and (profile is None or method.profiles_every_round):
            experts = [unit for unit in manifest.units if unit.kind == "expert"]
            source.add(experts, fetch(experts))
            profile = _profile(run, model, blocks, source, progress)
        drawn_in = manifest.server_round if method.plans_every_round else 0
        rng = np.random.default_rng([run.seed, drawn_in, zlib.crc32(self._identity.encode())])
        run_progress = (manifest.server_round - 1) / (run.rounds - 1) if run.rounds > 1 else 1.0
        plan = method.plan_experts(profile, manifest.experts_per_layer, budget, rng, run_progress)
        self._save(run, profile, plan)
        progress.message(f"plan: {plan.num_tuned} of {sum(plan.experts_per_layer)} experts")
        return plan

    def _budget(self, run: RunConfig, manifest: Manifest, model: MoeModel, memory_bytes: int) -> DeviceBudget:
        """Experts that fit beside the dense part and the activations, at most the owner's share of them."""
        costs = training_costs(manifest, model, run.training)
        sizes = manifest.experts_per_layer
        by_memory = experts_that_fit(memory_bytes, costs.fixed_bytes, costs.bytes_per_expert, sizes)
        # The small term keeps 0.29 of 100 experts at 29; a layer without any expert would pass no gradient.
        by_share = max(len(sizes), math.floor(self._limits.expert_share * sum(sizes) + 1e-9))
        return DeviceBudget(min(by_memory, by_share), self._limits.compute_share)

    def _load(self, run: RunConfig) -> tuple[RouterRecord | None, list[list[int]] | None]:
        """Profile and roles that this device made earlier in the same run with the same data and limits.

        With them neither a later round nor a restart downloads all experts again.
        """
        if not self._path.exists():
            return None, None
        try:
            with disk_errors(self._path):
                saved = json.loads(self._path.read_text())
            if saved["fingerprint"] != self._fingerprint(run):
                return None, None
            return RouterRecord.from_dict(saved["profile"]) if saved["profile"] else None, saved["roles"]
        except (ValueError, KeyError, TypeError) as fault:
            raise StateCorrupt(
                f"{self._path} is not what was written: {fault}", remedy="Delete the file; the device plans again."
            ) from fault

    def _save(self, run: RunConfig, profile: RouterRecord | None, plan: ExpertPlan) -> None:
        saved = {
            "fingerprint": self._fingerprint(run),
            "roles": plan.to_lists(),
            "profile": profile.to_dict() if profile else None,
        }
        write_durably(self._path, json.dumps(saved).encode())

    def _fingerprint(self, run: RunConfig) -> list:
        return [run.run_id, self._identity, *dataclasses.astuple(self._limits)]


def _profile(
    run: RunConfig, model: MoeModel, blocks: TokenBlocks, source: FrameSource, progress: ProgressSink
) -> RouterRecord:
    """Router statistics of the full model over the training text, the experts streamed from disk."""
    picked = spread_blocks(blocks, run.training.profile_tokens)
    progress.phase("profile", picked.num_tokens, "token")
    record = profile_blocks(
        model,
        picked,
        source,
        scope=train_scope(run.training),
        batch_size=run.training.batch_size,
        on_batch=progress.advance,
    )
    progress.done()
    return record
