"""`load_mixture`: the model that a client of FedMoE trained for itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgefed.personal.prediction import Predictor


def load_mixture(state: str | Path) -> Predictor:
    """Load the mixture in a device's state folder: its own model, the shared extractor and the gate.

    >>> mixture = edgefed.load_mixture("me")                                              # doctest: +SKIP
    >>> mixture.predict(["a great film"])[0].label                                        # doctest: +SKIP

    Needs neither a server nor the training data; a model of the user's own code must be importable. Raises ConfigError
    (no mixture, or one that predicts no class), StateCorrupt, ModelError, ModelNotFound.
    """
    from edgefed.personal.prediction import Predictor

    return Predictor(state)
