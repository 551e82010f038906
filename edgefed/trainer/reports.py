"""What a device reports to the aggregator after a round: the update, one report per expert, a survey if needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from edgefed.costs.step_setup import StepSetup
from edgefed.disk import disk_errors
from edgefed.errors import NotFound, TrainingDiverged
from edgefed.expert_records import ActivationProfile, ExpertPlan, Role
from edgefed.hardware.memory import format_bytes, process_peak_rss_bytes
from edgefed.kernels.out_of_memory import with_smaller_batches
from edgefed.methods.interface import Assigning, ExpertMethod
from edgefed.moe.expert_reading import raw_array, trained_dtypes
from edgefed.moe.model import MoeModel
from edgefed.progress import ProgressSink
from edgefed.protocol import frames
from edgefed.protocol.messages import ExpertReport, ExpertSurvey, FileInfo, RunConfig, TrainingConfig, UnitInfo
from edgefed.protocol.slices import UnitSlice, neuron_table, slice_unit
from edgefed.protocol.trainer import Fetch
from edgefed.training.encoding import TokenBlocks
from edgefed.training.steps import StepsOutcome
from edgefed.training.stopping import Sufficiency
from edgefed.training.utility import ProbeOutcome, probe_gradient_norms, utilities


def write_update(
    model: MoeModel, run: RunConfig, method: ExpertMethod, plan: ExpertPlan, outcome: StepsOutcome,
    units: Mapping[str, UnitInfo], path: Path, progress: ProgressSink,
) -> tuple[tuple[ExpertReport, ...], dict[str, float]]:  # fmt: skip
    """Write what was trained as one frame, nothing if the method exchanges nothing, without experts that cannot count.

    Returns the reports of all experts, and metrics of those that are not sent. With differential privacy every expert
    counts. Raises TrainingDiverged, StorageError.
    """
    reports = expert_reports(method, plan, outcome)
    useless = {
        (report.layer, report.expert)
        for report in reports
        if run.privacy is None and not method.counts(report, plan.experts_per_layer[report.layer])
    }
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    unsent: list[int] = []
    for spec, values in model.trained_units() if method.exchanges else ():
        unit = units[spec.key]
        dtypes = trained_dtypes(unit, values)
        if (unit.layer, unit.expert) in useless:
            unsent.append(sum(values[name].numel() * frames.ITEM_BYTES[dtype] for name, dtype in dtypes.items()))
            continue
        for name, dtype in dtypes.items():
            value = values[name].detach()
            if not torch.isfinite(value).all():
                raise TrainingDiverged(f"{spec.key} {name} holds a value that is not finite")
            tensors[frames.update_name(spec.key, name)] = (dtype, raw_array(value))
    with disk_errors(path):
        frames.write_frame(path, tensors)
    if not unsent:
        return reports, {}
    progress.message(
        f"update: {len(unsent)} of {plan.num_trainable} trained experts ({format_bytes(sum(unsent))}) are not sent: "
        f"the data uses them too little to count in {method.name}"
    )
    return reports, {"experts_not_sent": float(len(unsent)), "bytes_not_sent": float(sum(unsent))}


def round_metrics(
    plan: ExpertPlan, outcome: StepsOutcome, before: float, after: float, num_shrinks: int, **more: float
) -> dict[str, float]:
    """The numbers of the ledger; ``before`` and ``after`` are held-out losses. What is not finite is left out."""
    metrics = {
        "train_loss": outcome.loss,
        "train_steps": float(outcome.steps),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "experts_resident": float(plan.num_resident),
        "experts_trained": float(len(outcome.expert_steps)),
        "experts_starved": float(outcome.starved_experts),
        "memory_shrinks": float(num_shrinks),
        "peak_expert_bytes": float(outcome.peak_expert_bytes),
        "peak_rss_bytes": float(process_peak_rss_bytes()),
        "train_tokens_per_s": outcome.tokens_per_s,
        **({"neuron_share": plan.neuron_share} if plan.neurons else {}),
        **more,
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


MAX_STARVED_SHARE = 0.25
"""Share of the resident experts without load above which a person is told."""


def starved_note(plan: ExpertPlan, outcome: StepsOutcome) -> str:
    """A warning that many resident experts got almost no tokens in training; empty if few did."""
    if outcome.starved_experts <= MAX_STARVED_SHARE * plan.num_resident:
        return ""
    return (
        f"experts: {outcome.starved_experts} of {plan.num_resident} resident experts got less than a tenth of an even "
        "load. If the number grows, the router collapses: lower the run's `learning_rate`, or set its `balancing`."
    )


def own_rank(training: TrainingConfig, setup: StepSetup) -> int:
    """Rank of the adapters on this device; 0 if it is that of the run."""
    return 0 if setup.lora_rank == training.lora_rank else setup.lora_rank


def rank_metrics(rank: int) -> dict[str, float]:
    """What the ledger says of a device with adapters of another rank than the run; nothing of others, with rank 0."""
    return {"lora_rank": float(rank)} if rank else {}


def profile_metrics(sufficiency: Sufficiency | None) -> dict[str, float]:
    """What the ledger says of a profile that was made for the round; nothing without one."""
    if sufficiency is None:
        return {}
    return {
        "profile_tokens": float(sufficiency.num_tokens),
        "profile_agreement": sufficiency.agreement,
        "profile_frequency_error": sufficiency.frequency_error,
    }


def expert_reports(method: ExpertMethod, plan: ExpertPlan, outcome: StepsOutcome) -> tuple[ExpertReport, ...]:
    """What the aggregator is told of each expert that is held as itself, from the statistics of the training tokens."""
    reports = []
    for layer, record in enumerate(outcome.record.layers):
        importance = method.expert_importance(record)
        for expert in sorted(plan.resident(layer).tolist()):
            reports.append(
                ExpertReport(
                    layer=layer,
                    expert=expert,
                    usage=float(min(1.0, record.mean_gate[expert])),
                    importance=float(min(method.importance_limit, importance[expert])),
                    steps=outcome.expert_steps[layer, expert],
                    tokens=outcome.expert_tokens.get((layer, expert), 0),
                )
            )
    return tuple(reports)


def probe_explored(
    model: MoeModel,
    plan: ExpertPlan,
    blocks: TokenBlocks,
    assigning: Assigning,
    setup: StepSetup,
    seed: int,
    progress: ProgressSink,
) -> ProbeOutcome:
    """Gradient norms of experts that are held as themselves but not trained, by forward passes over one batch.

    ``assigning.max_explored`` of them are drawn, and the batch is the first in an order, both by ``seed``. Out of
    memory, half of the batch is taken.
    """
    blocks, most, directions = blocks.shortened(setup.sequence_length), assigning.max_explored, assigning.directions
    explored = [(layer, int(expert)) for layer in range(plan.num_layers) for expert in plan.frozen(layer)]
    if len(explored) > most:
        explored = [explored[place] for place in sorted(np.random.default_rng(seed).permutation(len(explored))[:most])]
    progress.phase("explore", 1 + 2 * directions * len(explored), "pass")
    if not explored or not directions:
        progress.done()
        return ProbeOutcome({}, 0)

    def probe(size: int) -> ProbeOutcome:
        input_ids, labels = next(blocks.batches(size, torch.Generator().manual_seed(seed)))
        return probe_gradient_norms(
            model, explored, input_ids, labels, directions=directions, seed=seed, chunked=setup.chunked_loss,
            on_forward=lambda: progress.advance(1),
        )  # fmt: skip

    outcome = with_smaller_batches(
        probe,
        setup.batch_size,
        lambda size: progress.message(f"memory: out of memory while exploring; {size} sequences at a time"),
    )
    progress.done()
    return outcome


def expert_survey(
    plan: ExpertPlan, profile: ActivationProfile, train_slots: int, outcome: StepsOutcome, probed: ProbeOutcome
) -> ExpertSurvey:
    """Utilities of the experts that were trained or explored, and how often the device's text uses each.

    Without the upload rate: the delivery of the update says it (`edgefed.agent.delivery`).
    """
    squares = {**outcome.expert_gradients, **probed.mean_squares}
    return ExpertSurvey(
        utility=utilities(squares, outcome.record),
        frequency=tuple(tuple(min(1.0, float(share)) for share in layer.frequency) for layer in profile.layers),
        tune_slots=sum(len(plan.resident(layer)) for layer in range(plan.num_layers)),
        train_slots=train_slots,
    )


def pace_survey(plan: ExpertPlan, own_pace: int) -> ExpertSurvey:
    """What a paced run needs: the number of experts that would train without its limit. Rates as in `expert_survey`."""
    sizes = plan.experts_per_layer
    utility: tuple[tuple[float | None, ...], ...] = tuple((None,) * size for size in sizes)
    return ExpertSurvey(utility=utility, frequency=tuple((0.0,) * size for size in sizes), tune_slots=own_pace)


def weights_in_use(run_id: str, plan: ExpertPlan, setup: StepSetup, units: Iterable[UnitInfo]) -> object:
    """A name of the weights with which a device computes: its plan, and the hashes of the ``units`` in it."""
    hashes = tuple(unit.sha256 for unit in units if unit.kind != "expert" or is_resident(unit, plan))
    return run_id, plan, setup.expert_storage, setup.lora_rank, hashes


def is_resident(unit: UnitInfo, plan: ExpertPlan) -> bool:
    """Whether ``unit`` is an expert, or the adapter of one, that the plan puts on the device."""
    return unit.kind == "expert" and plan.roles[unit.layer][unit.expert] != Role.ABSENT


def resident_parts(units: Iterable[UnitInfo], plan: ExpertPlan) -> list[UnitInfo | UnitSlice]:
    """What the plan puts on the device of the experts among ``units`` and their adapters: whole ones, or slices."""
    found: list[UnitInfo | UnitSlice] = []
    for unit in units:
        if is_resident(unit, plan):
            neurons = plan.neuron_indices(unit.layer, unit.expert)
            found.append(unit if neurons is None or neuron_table(unit) is None else slice_unit(unit, neurons))
    return found


def profiles_again(method: ExpertMethod) -> bool:
    """Whether a device makes more than one activation profile, so that it keeps every expert of the model."""
    return method.profiling is not None and method.profiling.when != "once"


def kept_units(method: ExpertMethod, plan: ExpertPlan, units: Mapping[str, UnitInfo]) -> dict[str, UnitInfo]:
    """Of the ``units`` that a round used, the experts that the device keeps, or has slices of; by key."""
    again = profiles_again(method)
    return {key: unit for key, unit in units.items() if again or is_resident(unit, plan)}


def fetch_kept(fetch: Fetch, method: ExpertMethod, plan: ExpertPlan | None) -> Callable[[Iterable[UnitInfo]], object]:
    """Fetches what is kept of units after a round with ``plan``; raises NotFound where the plan is not known."""

    def fetch_parts(units: Iterable[UnitInfo]) -> object:
        if profiles_again(method):
            return fetch(units)
        if plan is None:
            raise NotFound("the plan of the last round is not known")
        return fetch(resident_parts(units, plan))

    return fetch_parts


def kept_blobs(
    method: ExpertMethod, plan: ExpertPlan, files: Iterable[FileInfo], units: Iterable[UnitInfo]
) -> frozenset[str]:
    """Hashes of what the next round may need: `TrainedUpdate.keep`. ``units`` as the round used them."""
    units = tuple(units)
    kept = {unit.sha256 for unit in units if profiles_again(method) or unit.kind != "expert"}
    kept |= {part.sha256 for part in resident_parts(units, plan)}
    return frozenset(kept | {file.sha256 for file in files})
