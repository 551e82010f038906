"""The mean of LoRA adapters as products: what clients add to a weight is B_c A_c, and not its factors.

    W = sum_c D_c B_c A_c,    D_c = w_c / sum w, one number or one for each row of the weight

The mean of the B_c times the mean of the A_c is another matrix. Here W is computed from its factors and never formed:
stacked B = [D_1 B_1, D_2 B_2, ...] (out, n R) and A = [A_1; A_2; ...] (n R, in), thin QR of B = Q_B T_B and of
A^T = Q_A T_A, and a singular value decomposition of the small T_B T_A^T (FlexLoRA, arXiv 2402.11505, does so with the
whole matrix). The R largest singular values make the best adapter of rank R. It is W itself if the rank of W is at most
R, as with one contributor.

A product has many pairs of factors. Ours are those with A nearest to the mean of the A_c, as long as this is well
conditioned: of a LoRA adapter A is large and B begins at 0, and AdamW's steps have the size of the learning rate, so
equal singular values in both factors would change how fast an adapter learns. Directions without a singular value keep
a row in A, so that they can learn.

Where clients may have smaller ranks (`edgefed.protocol.ranks`), factors are ordered by singular value: the leading r
rows of A and columns of B are the best adapter of each rank r from the smallest one on, so that a client takes a slice.
The rows of A are then orthogonal and have the root mean square length of those of the mean. Within the smallest rank
they are turned towards that, beyond it only their signs are free.

float64, contributors in the order that is given, so results are the same on every run of one machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from edgefed.protocol.alternation import LORA_A, LORA_B
from edgefed.protocol.messages import NEURON_TABLE, TensorInfo

SMALLEST_SCALE = 0.1
"""Smallest scale of a direction of A, as a share of the largest: keeps B within ten times its size."""
MOST_COLUMNS = 3
"""Columns that are stacked, in multiples of the output size, before they are joined into a basis of that size."""


def factor_pairs(tensors: Sequence[TensorInfo]) -> list[tuple[str, str]]:
    """Names of B (out, R) and A (R, in) of each adapter in a unit; none of slices, which have other neurons each."""
    infos = {info.name: info for info in tensors}
    stems = [name.removesuffix(LORA_B) for name in infos if name.endswith(LORA_B) and NEURON_TABLE not in infos]
    pairs = [(stem + LORA_B, stem + LORA_A) for stem in stems if stem + LORA_A in infos]
    return [pair for pair in pairs if all(len(infos[name].shape) == 2 for name in pair)]


def average_products(
    contributions: Iterable[tuple[float | np.ndarray, np.ndarray, np.ndarray]], smallest_rank: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """The factors (out, R) and (R, in), float64, of the best rank-R approximation of the weighted sum of products.

    ``contributions``: (weight, B (out, R), A (R, in)), taken one by one; a weight is a number or (out,), and the
    weights sum to 1. ``smallest_rank``: the leading factors are the best of each rank from this one on; 0: only all R
    are. Memory is that of a few whole weights at most. None if the input size is smaller than R, where the rows of A
    cannot be independent.
    """
    lefts: list[np.ndarray] = []
    rights: list[np.ndarray] = []
    mean_a = np.zeros(())
    for weight, lora_b, lora_a in contributions:
        if lora_a.shape[1] < lora_a.shape[0]:
            return None
        lefts.append(np.reshape(weight, (-1, 1)) * lora_b)
        rights.append(lora_a)
        mean_a = mean_a + float(np.mean(weight)) * lora_a
        if len(lora_a) <= len(lora_b) < len(lefts) * len(lora_a) / MOST_COLUMNS:
            basis, core = np.linalg.qr(np.hstack(lefts))
            lefts, rights = [basis], [core @ np.vstack(rights)]
    rank = len(mean_a)
    basis_left, core_left = np.linalg.qr(np.hstack(lefts))
    basis_right, core_right = np.linalg.qr(np.vstack(rights).T)
    vectors_left, values, vectors_right = np.linalg.svd(core_left @ core_right.T)
    found = min(rank, len(values))
    rows = vectors_right[:rank] @ basis_right.T
    columns = np.zeros((len(basis_left), rank))
    columns[:, :found] = basis_left @ (vectors_left[:, :found] * values[:found])
    if smallest_rank:
        return _ordered(columns, rows, mean_a, smallest_rank)
    turn, scales, turn_back = np.linalg.svd(mean_a @ rows.T)
    scales = np.maximum(scales, SMALLEST_SCALE * scales[0]) if scales[0] > 0 else np.ones(rank)
    return (columns @ turn_back.T / scales) @ turn.T, (turn * scales) @ (turn_back @ rows)


def _ordered(
    columns: np.ndarray, rows: np.ndarray, mean_a: np.ndarray, smallest_rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of ``columns`` (out, R) times orthonormal ``rows`` (R, in), by descending singular value, in that order.

    The first ``smallest_rank`` rows of A are turned to be nearest to those of ``mean_a`` (R, in), the others flipped.
    """
    rank = len(rows)
    lora_b, lora_a = np.empty_like(columns), np.empty_like(rows)
    scale = float(np.linalg.norm(mean_a)) / math.sqrt(rank) or 1.0
    bounds = [0, *range(min(smallest_rank, rank), rank), rank]
    for part in map(slice, bounds, bounds[1:]):
        left, _, right = np.linalg.svd(mean_a[part] @ rows[part].T)
        lora_a[part] = scale * (left @ right) @ rows[part]
        lora_b[:, part] = columns[:, part] @ (left @ right).T / scale
    return lora_b, lora_a
