"""Steps of a round that are done when the plan has to shrink between two steps: they count, and training goes on.

The weights that they trained are written to files, the smaller plan is placed with the weights that the round begins
with, and what it still trains is read back. An expert that no longer trains has its first weights again, and its steps
do not count. Optimizer moments start anew.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from edgefed.expert_records import ExpertPlan, Role
from edgefed.moe.expert_reading import FrameSource
from edgefed.moe.model import MoeModel
from edgefed.protocol.messages import UnitInfo
from edgefed.trainer.placement import save_own_units
from edgefed.training.steps import StepsOutcome

FINISHED_FOLDER = "finished"
"""In the device's state folder, during a round."""


@dataclasses.dataclass(frozen=True)
class FinishedSteps:
    """What was trained so far: the steps' outcome, and files of the weights after them by unit key."""

    outcome: StepsOutcome
    paths: Mapping[str, Path]

    @classmethod
    def save(cls, model: MoeModel, units: Mapping[str, UnitInfo], outcome: StepsOutcome, folder: Path) -> FinishedSteps:
        """Write what ``model`` trains to the device's state ``folder``. Raises StorageError."""
        return cls(outcome, save_own_units(model, units, folder / FINISHED_FOLDER))

    def restore(self, model: MoeModel, units: Mapping[str, UnitInfo], plan: ExpertPlan) -> None:
        """Load the weights of all units that ``plan``, which is applied to ``model``, still trains."""
        for key, path in self.paths.items():
            unit = units[key]
            if unit.kind != "expert" or plan.roles[unit.layer][unit.expert] == Role.TRAINABLE:
                model.load_unit(key, FrameSource([unit], {unit.sha256: path}).read(key))

    def before(self, outcome: StepsOutcome, plan: ExpertPlan) -> StepsOutcome:
        """These steps and those of ``outcome``, which followed under ``plan``, as one."""
        first, steps = self.outcome, self.outcome.steps + outcome.steps
        seconds = first.num_tokens / first.tokens_per_s + outcome.num_tokens / outcome.tokens_per_s
        trained = {(layer, int(expert)) for layer in range(plan.num_layers) for expert in plan.trainable(layer)}

        def still_trained(values: Mapping[tuple[int, int], int]) -> Counter[tuple[int, int]]:
            return Counter({key: value for key, value in values.items() if key in trained})

        gradients = {key: value for key, value in first.expert_gradients.items() if key in trained}
        for key, value in outcome.expert_gradients.items():
            share = first.steps / steps if key in gradients else 0.0
            gradients[key] = share * gradients.get(key, 0.0) + (1 - share) * value
        return dataclasses.replace(
            outcome,
            loss=(first.loss * first.steps + outcome.loss * outcome.steps) / steps,
            steps=steps,
            num_tokens=first.num_tokens + outcome.num_tokens,
            tokens_per_s=(first.num_tokens + outcome.num_tokens) / seconds,
            expert_steps=still_trained(first.expert_steps) + outcome.expert_steps,
            record=first.record + outcome.record,
            peak_expert_bytes=max(first.peak_expert_bytes, outcome.peak_expert_bytes),
            expert_gradients=gradients,
            expert_tokens=still_trained(first.expert_tokens) + Counter(outcome.expert_tokens),
        )

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove the files of a round that is over."""
        shutil.rmtree(folder / FINISHED_FOLDER, ignore_errors=True)
