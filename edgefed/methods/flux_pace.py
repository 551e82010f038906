"""Flux, ours: how many experts each device trains so that all devices of a fleet finish at about the same time."""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgefed.protocol.messages import ExpertSurvey


def own_count(slots: int, layers: int, eps: float) -> int:
    """Trainable experts among ``slots``: a share ``eps``, at least one per layer."""
    return min(slots, max(layers, round(eps * slots)))


def round_trip_rate(survey: ExpertSurvey) -> float | None:
    """Bytes of trainable experts per second, each downloaded once and uploaded once.

    The upload rate where the download rate is unknown; None where the upload rate is.
    """
    up, down = survey.upload_bytes_per_s, survey.download_bytes_per_s
    return up if up is None or down is None else 1 / (1 / up + 1 / down)


def paced_limits(surveys: Mapping[str, ExpertSurvey], eps: Mapping[str, float], factor: float = 1.0) -> dict[str, int]:
    """Maximum number of trainable experts per client, at least one; only clients that this limits are listed.

        n_c = min(eps slots_c, train_slots_c)    what c would train at its own pace
        t_c = n_c / rate_c,    pace = factor (prod_c t_c)^(1/C),    limit_c = min(n_c, floor(rate_c pace))

    c ranges over the C clients whose rate (`round_trip_rate`) is known. Experts are taken to be equally large, so their
    bytes cancel. The mean is geometric because rates differ by orders of magnitude: one very slow or very fast device
    barely changes it, and equal clients are not limited. The sum is exact (fsum), so it does not depend on their order.
    """
    rates = {client: rate for client, survey in surveys.items() if (rate := round_trip_rate(survey)) is not None}
    if not rates:
        return {}
    counts = {
        client: own_count(surveys[client].tune_slots, len(surveys[client].frequency), eps[client]) for client in rates
    }
    own = {client: min(count, surveys[client].train_slots or count) for client, count in counts.items()}
    pace = factor * math.exp(math.fsum(math.log(own[client] / rate) for client, rate in rates.items()) / len(rates))
    # The small term keeps 4.9999999 at 5: equal clients must not lose an expert to rounding.
    sent = {client: max(1, math.floor(rate * pace * (1 + 1e-9))) for client, rate in rates.items()}
    return {
        client: min(own[client], sent[client]) for client in rates if min(own[client], sent[client]) < counts[client]
    }
