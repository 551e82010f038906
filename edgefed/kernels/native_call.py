"""The parts of a call of the native and CUDA experts: experts, projections, and their tensors by index."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from edgefed.kernels.native_products import Matrix
from edgefed.kernels.quantization import QuantizedMatrix
from edgefed.native import DTYPE_CODES

if TYPE_CHECKING:
    from edgefed.kernels.masked_experts import LowRankPair


class Projection(NamedTuple):
    """One of an expert's two matrices, with the indices of its bias and adapter (A, B, scale); -1 for none."""

    matrix: Matrix
    bias: int
    lora: tuple[int, int, float] | None

    def trainable(self) -> tuple[int, ...]:
        """Return the indices of the tensors that can be trainable, -1 for those that are missing."""
        return (self.matrix.data, self.bias, *(self.lora[:2] if self.lora else ()))


class Expert(NamedTuple):
    """One slot with tokens: the sorted pairs begin .. end. ``width``: outputs of the up projection, 2I or I."""

    up: Projection
    down: Projection
    begin: int
    end: int
    width: int


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything about a call except its tensors."""

    experts: tuple[Expert, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]
    is_transposed: bool
    int8: bool
    keep_activations: bool
    is_swiglu: bool
    on_activation: Callable[[Expert, torch.Tensor], None] | None = None
    """Called in the forward pass with each expert and its activation (p, I)."""


_known: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], bool]] = weakref.WeakKeyDictionary()


def is_swiglu(activation: Callable[[torch.Tensor], torch.Tensor], columns: int) -> bool:
    """Return whether ``activation`` maps (P, columns) to silu(first half) * second half, by running it once.

    The inputs include large numbers, to recognize an activation that clamps.
    """
    if columns % 2:
        return False
    owner = getattr(activation, "__self__", activation)
    try:
        known = _known.setdefault(owner, {})
    except TypeError:  # the result could not be cached
        return False
    key = (getattr(activation, "__name__", ""), columns)
    if key not in known:
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor([[1.0], [30.0], [1000.0]])
        probe = torch.randn(3, columns, generator=generator) * scale
        gate, value = probe.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * value
        try:
            with torch.no_grad():
                found = activation(probe)
            known[key] = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        except RuntimeError:  # parameters on a GPU: it stays itself
            known[key] = False
    return known[key]


class Tensors:
    """Collects the tensors of a call."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor | None) -> int:
        """Add a tensor and return its index, -1 for None."""
        if tensor is None:
            return -1
        self.all.append(tensor)
        return len(self.all) - 1

    def projection(
        self, weight: torch.Tensor | QuantizedMatrix, bias: torch.Tensor | None, lora: LowRankPair | None
    ) -> Projection:
        """Add the tensors of a projection."""
        if isinstance(weight, QuantizedMatrix):
            matrix = Matrix(
                self.add(weight.packed), self.add(weight.scales()), DTYPE_CODES[weight.format],
                (weight.shape[0], weight.shape[1]), weight.blocksize, weight.dtype,
            )  # fmt: skip
        else:
            code = DTYPE_CODES.get(str(weight.dtype).removeprefix("torch."), -1)
            matrix = Matrix(self.add(weight), -1, code, (weight.shape[0], weight.shape[1]), 0, weight.dtype)
        adapter = None if lora is None else (self.add(lora.lora_a), self.add(lora.lora_b), lora.scale)
        return Projection(matrix, self.add(bias), adapter)
