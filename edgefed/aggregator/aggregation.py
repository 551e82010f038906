"""One round: which of its accepted updates count, how much each counts, and the units that follow.

An update was checked when it was accepted, but a file can decay on the disk, and a method can fail on numbers that pass
every check. Such an update is *set aside* with its reason, and the round goes on without it. Only a failure of this
machine's disk leaves `aggregate_round`, since a later try may succeed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.fold import FoldCancelled, Robustness, default_threads, fold_round
from edgefed.aggregator.privacy import GaussianNoise, client_norms, private_plan
from edgefed.aggregator.ranks import widen_update
from edgefed.aggregator.records import UpdateRecord
from edgefed.aggregator.repair import Repairs
from edgefed.aggregator.robust import MIN_CLIENTS, absurd_moves, clip_factors, find_rule, measure_moves
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.aggregator.server_optimizer import Stepping, undone_moments
from edgefed.aggregator.staleness import BaseLost, Rebasing, rebase_update
from edgefed.aggregator.update_files import UpdateDamaged, sent_bytes
from edgefed.aggregator.validate import MAX_EXAMPLES, update_units
from edgefed.disk import hash_file
from edgefed.errors import StorageError, first_line
from edgefed.kernels.fold import FoldBackend
from edgefed.methods.interface import Contribution, Method, UnitMerge
from edgefed.progress import round_range
from edgefed.protocol.alternation import sent_units
from edgefed.protocol.messages import Manifest, TrainingConfig, UnitInfo
from edgefed.protocol.privacy import PrivacyConfig
from edgefed.protocol.server_optimizer import ServerOptimizer

logger = logging.getLogger(__name__)

EXAMPLES_RATIO = 10.0
"""An update counts at most so many times the examples of the round's median update. Clients claim these numbers."""
HELD_OUT_LOSS = "held_out_loss_before"
"""Metric of an update: the loss of the global model that it was trained from, on the client's held-out data."""
REBASED = "rebased"
"""Folder of rebased late updates, beside that of the updates; emptied after each aggregation."""
MIN_FOR_UNDO = 2
"""Clients that must have compared two models before one is undone."""


@dataclasses.dataclass(frozen=True)
class Aggregated:
    """``changed``: units of the next global model that differ. ``set_aside``: {client_id: why its update is not in}.

    ``undone``: the earlier round whose aggregation this one undoes, or None. ``restored``: the earlier round whose
    model the run ends with, or None. ``metrics``: of the model's step. ``damaged``: keys of units that stay as they are
    because their blob is damaged and no client has sent a copy.
    """

    changed: list[UnitInfo]
    set_aside: dict[str, str]
    undone: int | None = None
    damaged: tuple[str, ...] = ()
    restored: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """What a round is aggregated with; ``threads`` and ``cancelled`` as in `fold_round`.

    ``repairs`` None: blobs of the current units are not checked. With ``privacy``, clipping, weights and noise are
    those of `edgefed.aggregator.privacy`, and the method plans nothing.
    """

    method: Method
    policy: RoundPolicy
    blobs: BlobStore
    backend: FoldBackend
    threads: int | None = None
    cancelled: Callable[[], bool] = lambda: False
    repairs: Repairs | None = None
    privacy: PrivacyConfig | None = None
    server_round: int = 0
    """The round; an update of an earlier one is late."""
    model: Callable[[int], Manifest | None] = lambda server_round: None
    """The model at the start of an earlier round, from which a late update was trained."""
    training: TrainingConfig = TrainingConfig()
    """What clients train, and so send, in the round."""
    optimizer: ServerOptimizer | None = None
    """Makes the next model from the aggregate; None: that is the next model."""
    moments: Callable[[int], Mapping[str, UnitInfo]] = lambda server_round: {}
    """Moments of the optimizer at the start of a round, by their key."""


def aggregate_round(
    how: Aggregation, units: Sequence[UnitInfo], updates: Sequence[UpdateRecord], folder: Path
) -> Aggregated:
    """Aggregate the ``updates`` of a round, whose files are in ``folder``, over the current ``units``.

    The blobs of the changed units are durable when this returns. Raises DiskFull and StorageError (try again later),
    FoldCancelled, and the error of a method that fails whatever clients send; then the updates stay.
    """
    rebased = folder.parent / REBASED
    try:
        return _aggregate(how, units, updates, folder, rebased)
    finally:
        shutil.rmtree(rebased, ignore_errors=True)


def _aggregate(
    how: Aggregation, units: Sequence[UnitInfo], updates: Sequence[UpdateRecord], folder: Path, rebased: Path
) -> Aggregated:
    set_aside: dict[str, str] = {}
    paths = {update.client_id: folder / update.file_name for update in updates}
    with concurrent.futures.ThreadPoolExecutor(how.threads or default_threads(), thread_name_prefix="hash") as pool:
        problems = pool.map(lambda update: file_problem(update, paths[update.client_id]), updates)
        set_aside |= {u.client_id: reason for u, reason in zip(updates, problems, strict=True) if reason is not None}
    trained, sent = [unit for unit in units if unit.trainable], sent_units(units, how.training, how.server_round)
    damaged = (
        ()
        if how.repairs is None
        else tuple(
            unit.key
            for unit in how.repairs.damaged(trained, threads=how.threads or default_threads(), cancelled=how.cancelled)
        )
    )
    if damaged:
        logger.error("the round goes on without %d damaged units: %s", len(damaged), ", ".join(damaged[:4]))
    current = {unit.sha256 for unit in units}  # checked, but for the damaged ones
    for update in updates:
        late, rank = how.server_round - update.server_round, rank_of(update)
        if update.client_id in set_aside or not (late > 0 or rank):
            continue
        model = how.model(update.server_round) if late > 0 else None
        base = units if late <= 0 else None if model is None else model.units
        rebased.mkdir(exist_ok=True)
        try:
            if rank:
                path = rebased / f"{update.file_name}.wide"
                widen_update(paths[update.client_id], path, rank, base, how.blobs, current, damaged)
                paths[update.client_id] = path
            if late > 0:
                path = rebased / update.file_name
                rebase_update(
                    paths[update.client_id], path, Rebasing(base, units, late, damaged), how.blobs, how.backend
                )
                paths[update.client_id] = path
        except BaseLost as error:
            set_aside[update.client_id] = str(error)
    while True:
        counted = [update for update in updates if update.client_id not in set_aside]
        if not counted:
            return Aggregated([], set_aside, damaged=damaged)
        files = {update.client_id: paths[update.client_id] for update in counted}
        try:
            contributions: list[Contribution] = []
            if how.privacy is not None:
                plan, robustness = privately(how, how.privacy, sent, files, damaged)
            else:
                robustness, absurd = resist(how, sent, files, damaged)
                if absurd:
                    set_aside |= absurd
                    continue
                contributions = weighed(counted, paths, how.policy.max_examples)
                planned = how.method.plan_merge(contributions, units)
                plan = {key: merge for key, merge in planned.items() if key not in damaged}
            stepping = Stepping(
                *(how.optimizer, how.moments(how.server_round)), how.policy.step_limits(how.server_round)
            )  # fmt: skip
            traffic = sent_bytes(units, {folder / update.file_name: rank_of(update) for update in counted})
            changed = fold_round(
                *(units, plan, files, how.blobs, how.backend),
                robustness=robustness,
                stepping=stepping if stepping.needed else None,
                threads=how.threads,
                cancelled=how.cancelled,
                sent=sent,
            )
            return Aggregated(changed, set_aside, damaged=damaged, metrics=stepping.metrics() | traffic)
        except (FoldCancelled, StorageError):
            raise
        except UpdateDamaged as error:
            set_aside[error.client_id] = str(error)
        except Exception as error:
            set_aside |= culprits(how, units, contributions, first_line(error))


def undo_round(
    updates: Sequence[UpdateRecord],
    earlier: Mapping[str, tuple[int, float] | None],
    ratio: float | None,
    now: Manifest,
    model: Callable[[int], Manifest | None],
    moments: Callable[[int], Mapping[str, UnitInfo]],
    last: int,
) -> Aggregated | None:
    """Undo what was aggregated since round ``last``, the last one in which clients evaluated the model.

    That is done if the held-out loss of most clients has grown to ``ratio`` times what it was then; otherwise the
    result is None.

    ``earlier``: what clients reported of an earlier model, {client_id: (round, loss)}; only that of ``last`` counts.
    ``now``: the model that they evaluated. ``model``: that of an earlier round, which is restored; None if it is not
    stored. ``moments``: those of the server optimizer at the start of a round. ``ratio`` None: never undo.
    """
    if ratio is None:
        return None
    jumps = []
    for update in (update for update in updates if update.server_round == now.server_round):
        loss = None if update.meta is None else update.meta.metrics.get(HELD_OUT_LOSS)
        known = earlier.get(update.client_id)
        if loss is not None and known is not None and known[0] == last:
            jumps.append(loss > ratio * known[1])
    if len(jumps) < MIN_FOR_UNDO or 2 * sum(jumps) <= len(jumps):
        return None
    if (before := model(last)) is None:
        logger.error(
            "round %d: the held-out loss jumped on %d of %d clients, and the model of round %d is not stored",
            *(now.server_round, sum(jumps), len(jumps), last),
        )
        return None
    current = {unit.key: unit.sha256 for unit in now.units}
    why = f"the held-out loss jumped on {sum(jumps)} of {len(jumps)} clients"
    logger.error("round %d: %s undone: %s", now.server_round, round_range(last, now.server_round - 1), why)
    return Aggregated(
        [unit for unit in before.units if unit.sha256 != current[unit.key]]
        + undone_moments(moments(before.server_round), moments(now.server_round)),
        {update.client_id: f"the model that it trained was undone: {why}" for update in updates},
        before.server_round,
    )


def rank_of(update: UpdateRecord) -> int:
    """Rank of the adapters in an update; 0: that of the run."""
    return 0 if update.meta is None else update.meta.lora_rank


def within_claims(update: UpdateRecord, num_examples: int, training: TrainingConfig, rounds: int) -> UpdateRecord:
    """An update with at most the examples that its client registered, and a held-out loss only if its round evaluates.

    Otherwise the few clients that report a loss between two evaluations would decide what becomes of the run.
    """
    meta = update.meta
    if meta is None:
        return update
    metrics = meta.metrics
    if not training.evaluates(update.server_round, rounds):
        metrics = {name: value for name, value in metrics.items() if name != HELD_OUT_LOSS}
    examples = min(meta.num_examples, max(1, num_examples))
    return dataclasses.replace(update, meta=msgspec.structs.replace(meta, num_examples=examples, metrics=metrics))


def resist(
    how: Aggregation, units: Sequence[UnitInfo], files: Mapping[str, Path], left_out: Sequence[str] = ()
) -> tuple[Robustness, dict[str, str]]:
    """The limits of the round, and the clients whose update changes the model far too much, with the reason.

    ``left_out``: keys of units that are not looked at.
    """
    rule, products = find_rule(how.policy.robust), how.policy.adapter_average == "product"
    found = Robustness(
        {}, rule.combine, rule.min_clients, products=products, smallest_rank=how.training.min_lora_rank
    )  # fmt: skip
    if how.policy.clip is None:
        return found, {}
    moves = measure_moves(
        units, files, how.blobs, how.backend, threads=how.threads or default_threads(), cancelled=how.cancelled,
        left_out=left_out,
    )  # fmt: skip
    factors = clip_factors(units, moves, how.policy.clip)
    for client_id in sorted({client_id for client_id, _ in factors}):
        of_client = [factor for (other, _), factor in factors.items() if other == client_id]
        logger.warning(
            "client %s: %d parts changed more than %g times the median and are shortened, the farthest to %.3g",
            *(client_id[:8], len(of_client), how.policy.clip, min(of_client)),
        )
    return dataclasses.replace(found, factors=factors), absurd_moves(moves)


def privately(
    how: Aggregation,
    privacy: PrivacyConfig,
    units: Sequence[UnitInfo],
    files: Mapping[str, Path],
    left_out: Sequence[str] = (),
) -> tuple[dict[str, UnitMerge], Robustness]:
    """The plan and limits of a round with differential privacy."""
    moves = measure_moves(
        units, files, how.blobs, how.backend, threads=how.threads or default_threads(), cancelled=how.cancelled,
        left_out=left_out,
    )  # fmt: skip
    plan, factors = private_plan([u for u in units if u.key not in left_out], moves, list(files), privacy.clip)
    norms = sorted(client_norms(units, moves).values())
    logger.debug(
        "changes of %d clients: median L2 norm %.4g, clip %g", len(norms), norms[len(norms) // 2], privacy.clip
    )
    scale = privacy.noise * privacy.clip / len(files)
    return plan, Robustness(factors, make_noise=lambda: GaussianNoise(scale).draw)


def file_problem(update: UpdateRecord, path: Path) -> str | None:
    """Why the file of an accepted update is not what was accepted; None if it is. Raises StorageError."""
    if not path.is_file():
        return f"its file {path.name} is missing"
    if update.meta is None:
        return f"the record of {path.name} has no metadata"
    found, size_bytes = hash_file(path)
    if (found, size_bytes) != (update.sha256, update.size_bytes):
        return (
            f"its file {path.name} is damaged: {size_bytes} bytes with SHA-256 {found[:12]}, expected "
            f"{update.size_bytes} with {update.sha256[:12]}"
        )
    return None


def culprits(
    how: Aggregation, units: Sequence[UnitInfo], contributions: Sequence[Contribution], reason: str
) -> dict[str, str]:
    """The clients whose contribution alone makes the method fail, with the error; all of them if none does alone.

    Raises the error of a method that fails even on an empty contribution: then it is not the clients' fault.
    """
    how.method.plan_merge([Contribution("nobody", 1, {}, frozenset())], units)  # raises if the method itself is broken
    found: dict[str, str] = {}
    for contribution in contributions:
        try:
            how.method.plan_merge([contribution], units)
        except Exception as error:
            found[contribution.client_id] = f"the method fails on it: {first_line(error)}"
    return found or {c.client_id: f"the method fails on the updates of this round: {reason}" for c in contributions}


def weighed(updates: Sequence[UpdateRecord], paths: Mapping[str, Path], max_examples: int | None) -> list[Contribution]:
    """The updates as the method sees them, with the examples of each cut to what one client may count.

    That is ``max_examples``; or, if the round has at least `MIN_CLIENTS` updates, `EXAMPLES_RATIO` times their median
    and at most the second-largest claim, so that no client gains weight by claiming more than all others.
    """
    metas = [(update.client_id, update.meta) for update in updates if update.meta is not None]
    limit = usual = MAX_EXAMPLES if max_examples is None else max_examples
    if max_examples is None and len(metas) >= MIN_CLIENTS:
        claims = sorted(meta.num_examples for _, meta in metas)
        usual = int(EXAMPLES_RATIO * statistics.median_low(claims))
        limit = min(usual, claims[-2])
    found = []
    for client_id, meta in metas:
        examples = min(meta.num_examples, limit)
        if examples < meta.num_examples:
            level = logging.WARNING if meta.num_examples > usual else logging.INFO
            logger.log(level, "client %s has %d examples; they count as %d", client_id[:8], meta.num_examples, examples)
        reports = {(report.layer, report.expert): report for report in meta.experts}
        found.append(Contribution(client_id, examples, reports, update_units(paths[client_id])))
    return found
