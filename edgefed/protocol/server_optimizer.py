"""How a run's server turns the aggregated change of a round into its next model: the settings."""

from __future__ import annotations

import math

import msgspec

DEFAULT_RATES = {"momentum": 0.7, "adam": 0.01}
"""Learning rates by kind. That of momentum is DiLoCo's (arXiv 2311.08105, section 3), that of adam ours."""


class ServerOptimizer(msgspec.Struct, frozen=True, kw_only=True):
    """An optimizer at the server (`aggregator.server_optimizer`).

    ``kind``: "momentum" (Nesterov) or "adam". ``learning_rate`` None: `DEFAULT_RATES`. ``momentum``: decay of the first
    moment, beta_1. ``beta2``: decay of the second moment. ``epsilon``: tau, added to its root.
    """

    kind: str
    learning_rate: float | None = None
    momentum: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3

    @property
    def rate(self) -> float:
        """The learning rate."""
        return DEFAULT_RATES[self.kind] if self.learning_rate is None else self.learning_rate

    def problems(self) -> list[str]:
        """What is wrong with the settings; empty if nothing is."""
        if self.kind not in DEFAULT_RATES:
            return [f"`server_optimizer` is {self.kind!r}, expected none, {' or '.join(DEFAULT_RATES)}"]
        found = [
            f"`server_{name}` is {value}, expected {expected}"
            for name, value, expected, fine in (
                ("learning_rate", self.rate, "a number above 0, at most 100", 0 < self.rate <= 100),
                ("momentum", self.momentum, "a number from 0 and below 1", 0 <= self.momentum < 1),
                ("beta2", self.beta2, "a number from 0 and below 1", 0 <= self.beta2 < 1),
                ("epsilon", self.epsilon, "a number above 0", 0 < self.epsilon < math.inf),
            )
            if not fine
        ]
        if self.kind == "momentum":
            fields = {field.name: field.default for field in msgspec.structs.fields(self)}
            found += [
                f"`server_{name}` has no effect with `server_optimizer=momentum`"
                for name in ("beta2", "epsilon")
                if getattr(self, name) != fields[name]
            ]
        return found
