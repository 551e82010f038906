"""Client-level differential privacy: DP-FedAvg with a trusted server (McMahan et al., arXiv 1710.06963).

With g the current model, x_c the update of client c, n the number of clients of the round, S the clip and z the noise,

    Delta_c = x_c - g                             over all units; 0 in units that c has not sent
    g'      = g + (sum_c min(1, S / |Delta_c|) Delta_c + N(0, (z S)^2 I)) / n

|.| is the L2 norm over all trainable units of the model together, so one client changes the sum by at most S, however
its change is spread over experts. All clients weigh the same, because weights are data, too: examples, importance and
experts that methods weigh by are not used.

**Sparse experts.** Which experts a client trains is data. So every trainable unit gets noise in every round, also one
that nobody has sent, and the divisor is n for every unit, not the number of clients that sent it. An expert that k of n
clients train therefore moves k/n as far as under plain averaging, at the same noise: its ratio of signal to noise is
k/n of that of a unit that all train. Sparsity costs no privacy and gains none: clipping is over the whole change.

**Accounting.** Two runs are neighbors if the changes of one client are 0 in one of them. Each round that counts an
update of the client is one Gaussian mechanism with sensitivity S and standard deviation z S; k of them are one with
z / sqrt(k). Epsilon is that of the analytic Gaussian mechanism (Balle and Wang, arXiv 1805.06530), as `dp_accounting`
computes it. Who takes part is public: nothing is gained by sampling, since the seed of the run is known to clients. The
numbers that clients report (losses, router usage) are not covered.

Noise is drawn with AES in counter mode, keyed by the system at each fold; the run's seed does not determine it. It is
added in float64 and rounded to the model's dtype. A round that is folded again after a crash has other noise; the noise
before has never left the server.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np

from edgefed.aggregator.robust import Moves
from edgefed.errors import ConfigError
from edgefed.methods.interface import UnitMerge
from edgefed.protocol.frames import FLOAT_DTYPES
from edgefed.protocol.messages import NEURON_TABLE, UnitInfo
from edgefed.protocol.privacy import PrivacyConfig, PrivacyStatus

PACKAGE = "dp_accounting"


class GaussianNoise:
    """Normal random numbers from AES-256 in counter mode, by Box and Muller's method. One per thread.

    ``scale``: their standard deviation. 53 bits a number reach 8.6 standard deviations.
    """

    def __init__(self, scale: float) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self.scale = scale
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def draw(self, count: int) -> np.ndarray:
        """``count`` numbers, float64."""
        half = (count + 1) // 2
        bits = np.frombuffer(self._stream.update(bytes(16 * half)), dtype=np.uint64)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        radius = self.scale * np.sqrt(-2.0 * np.log(uniform[:half]))
        angle = 2.0 * np.pi * uniform[half:]
        both: np.ndarray = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
        return both


def check_privacy(config: PrivacyConfig, units: Sequence[UnitInfo] = ()) -> None:
    """Raise ConfigError for invalid settings, for units that noise cannot be added to, or without the accountant."""
    wrong = [
        f"{name} is {value}, expected {expected}"
        for name, value, expected, fine in (
            ("dp_noise", config.noise, "a number above 0", 0 < config.noise < math.inf),
            ("dp_clip", config.clip, "a number above 0", 0 < config.clip < math.inf),
            ("dp_delta", config.delta, "a number between 0 and 1", 0 < config.delta < 1),
        )
        if not fine
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    trained = [info for unit in units if unit.trainable for info in unit.tensors]
    if any(info.name == NEURON_TABLE or info.dtype not in FLOAT_DTYPES for info in trained):
        raise ConfigError("`dp_noise` cannot be combined with a method that exchanges parts of experts")
    spent(config, 1)


def spent(config: PrivacyConfig, rounds: int) -> PrivacyStatus:
    """What ``rounds`` updates of one client reveal. Raises ConfigError if the accountant is not installed."""
    try:
        from dp_accounting import get_epsilon_gaussian
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`dp_noise` needs the package {error.name or PACKAGE}", remedy="pip install 'edgefed[privacy]'"
        ) from error
    with np.errstate(divide="ignore", over="ignore"):  # next to no noise: epsilon is huge
        epsilon = float(get_epsilon_gaussian(config.noise / math.sqrt(rounds), config.delta)) if rounds else 0.0
    return PrivacyStatus(epsilon=epsilon, delta=config.delta, noise=config.noise, clip=config.clip, rounds=rounds)


def client_norms(units: Sequence[UnitInfo], moves: Moves) -> dict[str, float]:
    """{client_id: |Delta_c|}."""
    sizes = {unit.key: sum(math.prod(info.shape) for info in unit.tensors) for unit in units}
    squares: dict[str, float] = {}
    for (client_id, key), root_mean_square in moves.moved.items():
        squares[client_id] = squares.get(client_id, 0.0) + root_mean_square**2 * sizes[key]
    return {client_id: math.sqrt(square) for client_id, square in squares.items()}


def private_plan(
    units: Sequence[UnitInfo], moves: Moves, clients: Sequence[str], clip: float
) -> tuple[dict[str, UnitMerge], dict[tuple[str, str], float]]:
    """The equal weights of each trainable unit, and the factor of each client's change in it.

    A mean over the k clients that sent a unit, with factors f k/n, is g + (1/n) sum f Delta.
    """
    norms = client_norms(units, moves)
    plan, factors = {}, {}
    for unit in units:
        if not unit.trainable:
            continue
        senders = [client_id for client_id in sorted(clients) if (client_id, unit.key) in moves.moved]
        plan[unit.key] = UnitMerge(tuple((client_id, 1.0) for client_id in senders))
        for client_id in senders:
            shorten = min(1.0, clip / norms[client_id]) if norms[client_id] > 0 else 1.0
            factors[client_id, unit.key] = shorten * len(senders) / len(clients)
    return plan, factors
