"""Gradient norms of single experts, collected while they train."""

from __future__ import annotations

import torch

from edgefed.moe.model import MoeModel


class GradientNorms:
    """Squared gradient norms of the trainable experts over the batches of a round. Call `add` after each backward pass."""

    def __init__(self, model: MoeModel):
        self._model = model
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._batches: dict[tuple[int, int], int] = {}

    def add(self) -> None:
        """Count the gradients that are there now. No host synchronisation."""
        for key, gradients in self._model.expert_gradients():
            norms = torch.stack(torch._foreach_norm(gradients))
            squared = norms.double().square().sum()
            self._sums[key] = self._sums[key] + squared if key in self._sums else squared
            self._batches[key] = self._batches.get(key, 0) + 1

    def mean_squares(self) -> dict[tuple[int, int], float]:
        """(layer, expert) -> mean squared norm over the batches in which it had a gradient."""
        return {key: float(total) / self._batches[key] for key, total in self._sums.items()}
