"""Which experts each client gets, and how many it may train: decided once per round from the clients' surveys."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
import numpy as np

from edgefed.aggregator.records import ClientRecord
from edgefed.aggregator.store import Store
from edgefed.errors import first_line
from edgefed.methods.interface import Coverage, Method
from edgefed.methods.pace import FIRST_SHARE, train_limits
from edgefed.protocol.messages import ExpertAssignment, ExpertSurvey, Manifest

logger = logging.getLogger(__name__)


def combined_survey(before: ExpertSurvey | None, now: ExpertSurvey) -> ExpertSurvey:
    """``now``, with the earlier utilities and transfer rates where it has none."""
    if before is None:
        return now
    utility = tuple(
        tuple(new if new is not None else old for old, new in zip(old_row, new_row, strict=True))
        for old_row, new_row in zip(before.utility, now.utility, strict=True)
    )
    rates = {
        name: getattr(before, name) if getattr(now, name) is None else getattr(now, name)
        for name in ("upload_bytes_per_s", "download_bytes_per_s")
    }
    return msgspec.structs.replace(now, utility=utility, **rates)


def expert_coverage(store: Store, manifest: Manifest) -> Coverage:
    """Rounds since each expert was last trained, from the rounds in which its unit or its adapter changed."""
    changed = store.last_changed()
    idle = [np.full(size, manifest.server_round - 1) for size in store.experts_per_layer]
    for unit in manifest.units:
        if unit.kind == "expert":
            since = manifest.server_round - changed[unit.key]
            idle[unit.layer][unit.expert] = min(idle[unit.layer][unit.expert], since)
    return Coverage(tuple(idle))


class Assigner:
    """Assigns experts, where the method does, or paces the run: once per round, for all clients that sent a survey.

    Surveys enter a `ClientRecord` when a round is folded, so the decision is the same after a restart within a round.
    The owner calls it under its own lock.
    """

    def __init__(self, method: Method, store: Store):
        self._method, self._store = method, store
        self._decided: dict[str, ExpertAssignment] = {}
        self._limits: dict[str, int | None] = {}
        self._decided_for = 0

    def assignment(
        self, client_id: str, clients: Mapping[str, ClientRecord], manifest: Manifest
    ) -> tuple[ExpertAssignment | None, int | None]:
        """(experts of a client in the round of ``manifest``, maximum number of experts that it trains).

        Without experts the client chooses its own, without a number it trains what its plan has.
        """
        pace = self._store.run.pace
        if self._method.personal or not (self._method.assigning or pace):
            return None, None
        if self._decided_for != manifest.server_round:
            surveys = {client.client_id: client.survey for client in clients.values() if client.survey is not None}
            self._decided_for = manifest.server_round
            self._limits = train_limits(surveys, pace) if pace else {}
            self._decided = self._assign(surveys, manifest)
        first = math.ceil(FIRST_SHARE * sum(manifest.experts_per_layer)) if pace else None
        return self._decided.get(client_id), self._limits.get(client_id, first)

    def _assign(self, surveys: Mapping[str, ExpertSurvey], manifest: Manifest) -> dict[str, ExpertAssignment]:
        if self._method.personal or not self._method.assigning:
            return {}
        coverage, seed = expert_coverage(self._store, manifest), self._store.run.seed
        try:
            return self._method.assign_experts(surveys, coverage, manifest.server_round, seed)
        except Exception as error:  # what clients report must not stop the server
            logger.error(
                "round %d: the method fails to assign experts: %s; clients choose their own",
                *(manifest.server_round, first_line(error)),
            )
            return {}
