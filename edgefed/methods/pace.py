"""How many experts each device trains so that all devices of a fleet finish at about the same time. Ours.

On home connections a round is transfer, and the slowest uplink decides its length. Flux has this in its options `pace`
and `pace_factor`; for every other method it is the setting `pace` of the run: the aggregator tells a device how many of
its experts to train (`Assignment.train_limit`), the others stay frozen, and what a device does not train may be
`REFRESH_ROUNDS` old.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgefed.errors import ConfigError
from edgefed.methods.interface import ExpertMethod, Method
from edgefed.protocol.messages import ExpertSurvey

FIRST_SHARE = 0.02
"""Largest share of all experts that a device trains before its upload rate is known, at least one of each layer."""
REFRESH_ROUNDS = 4
"""Maximum age in rounds of an expert that a device does not train, in a paced run."""


def check_pace(method: Method, pace: float) -> None:
    """Raise ConfigError if ``pace``, a multiple of the fleet's time or 0, is not for runs of ``method``."""
    if not 0 <= pace <= 1000:
        raise ConfigError(f"`pace` is {pace:g}, expected 0 to 1000")
    if not pace:
        return
    if method.personal or not method.exchanges:
        raise ConfigError(f"`pace` has no effect with {method.name}: it exchanges no experts", remedy="Remove `pace`.")
    if method.assigning:
        raise ConfigError(
            f"`pace` has no effect with {method.name}: it assigns experts itself",
            remedy="Remove it; flux has method options for its pace, `pace` and `pace_factor`.",
        )


def refresh_rounds(method: ExpertMethod, pace: float) -> int:
    """Maximum age in rounds of an expert that a device holds frozen; 1: it is downloaded whenever it changed."""
    return max(method.refresh_rounds, REFRESH_ROUNDS if pace else 1)


def train_limits(surveys: Mapping[str, ExpertSurvey], pace: float) -> dict[str, int | None]:
    """Maximum number of trainable experts of each client; None: as many as its plan has.

    ``tune_slots`` of a survey is the number of experts that the client trains at its own pace.
    """
    found = paced_limits(surveys, dict.fromkeys(surveys, 1.0), pace)
    return {client: found.get(client) for client in surveys}


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
