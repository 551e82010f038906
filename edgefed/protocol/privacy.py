"""Client-level differential privacy of a run: its settings, and what has been spent."""

from __future__ import annotations

import msgspec


class PrivacyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Gaussian noise on each round's sum of clipped changes (`aggregator.privacy`).

    ``noise``: standard deviation in multiples of ``clip``. ``clip``: longest change of a client, as the L2 norm over
    all that it trains. ``delta``: of the (epsilon, delta) that is reported.
    """

    noise: float
    clip: float
    delta: float


class PrivacyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the global model reveals of any one client at most: (``epsilon``, ``delta``) after ``rounds`` updates of it.

    ``noise`` and ``clip`` as in `PrivacyConfig`.
    """

    epsilon: float
    delta: float
    noise: float
    clip: float
    rounds: int

    def __str__(self) -> str:
        times = "1 update" if self.rounds == 1 else f"{self.rounds} updates"
        return f"epsilon {self.epsilon:.3g} at delta {self.delta:g} for a client with {times}"
