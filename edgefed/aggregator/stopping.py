"""Early stopping: a run ends once the held-out loss no longer falls, with the best model that it had.

L_r is the loss of the model at the start of round r: the median over the clients that evaluated it before they trained
in that round, each on its own held-out data. The median, since a client may report anything. With b the round of the
smallest L so far, round r ends the run if r - b >= K. Its updates train a model that is not the best, so nothing is
aggregated: the final model is that of round b.

The numbers are metrics of each round's status, so a restart knows them. The model of round b stays stored, and can be
exported.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from edgefed.aggregator.aggregation import HELD_OUT_LOSS, Aggregated, Aggregation, aggregate_round, undo_round
from edgefed.aggregator.records import UpdateRecord
from edgefed.aggregator.rounds import RoundState
from edgefed.aggregator.server_optimizer import undone_moments
from edgefed.errors import ConfigError
from edgefed.progress import counted
from edgefed.protocol.messages import Manifest, RoundStatus, UnitInfo

logger = logging.getLogger(__name__)

MEDIAN_LOSS = "held_out_loss_median"
"""Metric of a round: L_r."""
BEST_ROUND = "best_round"
"""Metric of a round: b, as of this round."""
RESTORED_ROUND = "restored_round"
"""Metric of the round that ended the run early: the round whose model is the final one."""


def median_loss(updates: Sequence[UpdateRecord], server_round: int) -> float | None:
    """L_r of the updates that were trained from the model of this round; None if no client has evaluated it."""
    metas = [update.meta for update in updates if update.server_round == server_round]
    losses = [meta.metrics[HELD_OUT_LOSS] for meta in metas if meta is not None and HELD_OUT_LOSS in meta.metrics]
    return statistics.median(losses) if losses else None


def loss_metrics(
    history: Sequence[RoundStatus], updates: Sequence[UpdateRecord], server_round: int
) -> dict[str, float]:
    """`MEDIAN_LOSS` and `BEST_ROUND` of a round, as far as they are known."""
    loss = median_loss(updates, server_round)
    losses = {done.server_round: done.metrics[MEDIAN_LOSS] for done in history if MEDIAN_LOSS in done.metrics}
    found = {} if loss is None else {MEDIAN_LOSS: loss}
    losses |= {} if loss is None else {server_round: loss}
    return {**found, BEST_ROUND: float(min(losses, key=lambda each: (losses[each], each)))} if losses else found


def best_round(history: Sequence[RoundStatus]) -> int | None:
    """The round with the best model, as of the last round of ``history``; None if no model was evaluated."""
    found = history[-1].metrics.get(BEST_ROUND) if history else None
    return None if found is None else int(found)


def describe_best(history: Sequence[RoundStatus], *, private: bool) -> tuple[int, str]:
    """(best round, a sentence that says why it is the best). ``private``: the run has differential privacy.

    Raises ConfigError if there is none, or if it cannot be told without what the noise protects.
    """
    best, remedy = best_round(history), "Choose a round by its number, or the newest."
    if private:
        raise ConfigError(
            "the best round of a run with `dp_noise` cannot be chosen: the held-out losses of clients have no noise",
            remedy=remedy,
        )
    if best is None:
        raise ConfigError("no round is the best: no client has evaluated a model of this run", remedy=remedy)
    losses = {done.server_round: done.metrics[MEDIAN_LOSS] for done in history if MEDIAN_LOSS in done.metrics}
    of = f"round {best}: held-out loss {losses[best]:.4f}, the smallest of {counted(len(losses), 'evaluated model')}"
    return best, of + ("; the newest model is later, and not evaluated" if best == max(losses) else "")


def restored_metric(result: Aggregated) -> dict[str, float]:
    """`RESTORED_ROUND` of a round that ended the run early; nothing of another one."""
    return {} if result.restored is None else {RESTORED_ROUND: float(result.restored)}


def finish_reason(state: RoundState) -> str:
    """What clients are told about the end of a run."""
    early = state.server_round <= state.policy.rounds
    return "Run finished early: the held-out loss no longer improves" if early else "Run finished"


def close_round(
    how: Aggregation,
    manifest: Manifest,
    updates: Sequence[UpdateRecord],
    banned: Container[str],
    folder: Path,
    earlier: Mapping[str, tuple[int, float] | None],
    metrics: Mapping[str, float],
) -> Aggregated:
    """Undo the rounds since the last evaluation, end the run, or aggregate updates of clients that are not ``banned``.

    ``earlier`` as in `undo_round`, ``metrics`` as in `stop_round`, ``folder`` and errors as in `aggregate_round`.
    """
    last = how.training.evaluated_before(manifest.server_round)
    return (
        undo_round(updates, earlier, how.policy.rollback, manifest, how.model, how.moments, last)
        or stop_round(how.policy.stop_after, metrics, manifest, how.model, how.moments)
        or aggregate_round(how, manifest.units, [u for u in updates if u.client_id not in banned], folder)
    )


def stop_round(
    patience: int | None,
    metrics: Mapping[str, float],
    now: Manifest,
    model: Callable[[int], Manifest | None],
    moments: Callable[[int], Mapping[str, UnitInfo]],
) -> Aggregated | None:
    """The best model in place of an aggregation, which ends the run; None if the run goes on.

    ``patience``: K; None: never. ``metrics``: `loss_metrics` of the round. ``now``: the model of the round. ``model``:
    that of an earlier round, None if it is not stored. ``moments``: those of the server optimizer at a round's start.
    """
    if patience is None:
        return None
    if BEST_ROUND not in metrics:
        logger.warning("round %d: no client has evaluated a model yet; `stop_after` needs that", now.server_round)
    best = int(metrics.get(BEST_ROUND, now.server_round))
    if MEDIAN_LOSS not in metrics or now.server_round - best < patience:
        return None
    if (before := model(best)) is None:
        logger.error(
            "round %d: the model of round %d, the best, is not stored; the run goes on", now.server_round, best
        )
        return None
    logger.info(
        "round %d: the held-out loss has not improved for %d rounds; the run ends with the model of round %d",
        *(now.server_round, now.server_round - best, best),
    )
    current = {unit.key: unit.sha256 for unit in now.units}
    changed = [unit for unit in before.units if unit.sha256 != current[unit.key]]
    return Aggregated(changed + undone_moments(moments(best), moments(now.server_round)), {}, restored=best)
