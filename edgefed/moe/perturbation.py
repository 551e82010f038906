"""A resident expert moved a little in a random direction, for estimates of its gradient by forward passes alone.

Nothing on the device changes: the moved weights are made when the expert is asked for, one expert at a time, and are
gone after it. So quantised experts can be moved as well, and a pass that fails leaves no trace.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from edgefed.kernels.masked_experts import LowRankPair, Slots, SlotWeights
from edgefed.kernels.quantization import QuantizedMatrix, dequantize_experts

Weight = torch.Tensor | QuantizedMatrix


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """W + ``size`` z for every tensor of ``slot`` that would train: its matrices and biases, or its adapters alone.

    z is standard normal and depends on ``seed`` alone; the opposite ``size`` gives the opposite move.
    """

    slot: int
    seed: int
    size: float


class PerturbedSlots:
    """``slots`` with one of them moved."""

    def __init__(self, slots: Slots, perturbation: Perturbation):
        self._slots, self._perturbation = slots, perturbation

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> SlotWeights:
        weights = self._slots[slot]
        if slot != self._perturbation.slot:
            return weights
        size = self._perturbation.size
        generator: torch.Generator | None = None

        def moved(weight: Weight) -> torch.Tensor:
            nonlocal generator
            dense = dequantize_experts(weight) if isinstance(weight, QuantizedMatrix) else weight.detach()
            if generator is None:
                generator = torch.Generator(dense.device).manual_seed(self._perturbation.seed)
            z = torch.randn(dense.shape, generator=generator, device=dense.device, dtype=torch.float32)
            return z.mul_(size).add_(dense).to(dense.dtype)

        if weights.up_lora is not None and weights.down_lora is not None:
            return dataclasses.replace(
                weights,
                up_lora=LowRankPair(
                    moved(weights.up_lora.lora_a), moved(weights.up_lora.lora_b), weights.up_lora.scale
                ),
                down_lora=LowRankPair(
                    moved(weights.down_lora.lora_a), moved(weights.down_lora.lora_b), weights.down_lora.scale
                ),
            )
        return dataclasses.replace(
            weights,
            up=moved(weights.up),
            down=moved(weights.down),
            up_bias=None if weights.up_bias is None else moved(weights.up_bias),
            down_bias=None if weights.down_bias is None else moved(weights.down_bias),
        )


def typical_weight(weights: SlotWeights) -> float:
    """Root mean square of what would move, 0 for an expert of zeros."""
    pairs = [pair for pair in (weights.up_lora, weights.down_lora) if pair is not None]
    tensors: list[Weight] = [part for pair in pairs for part in (pair.lora_a, pair.lora_b)] or [
        weight for weight in (weights.up, weights.down, weights.up_bias, weights.down_bias) if weight is not None
    ]
    total, count = 0.0, 0
    for tensor in tensors:
        dense = dequantize_experts(tensor) if isinstance(tensor, QuantizedMatrix) else tensor.detach()
        total += float(dense.double().square().sum())
        count += dense.numel()
    return math.sqrt(total / max(count, 1))
