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

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from edgefed.protocol.alternation import LORA_A, LORA_B
from edgefed.protocol.messages import NEURON_TABLE, TensorInfo

Columns = tuple[float, np.ndarray, np.ndarray, np.ndarray]
"""A contribution with a weight of each column."""
SMALLEST_SCALE = 0.1
"""Smallest scale of a direction of A, as a share of the largest: keeps B within ten times its size."""
MOST_COLUMNS = 3
"""Columns that are stacked, in multiples of the output size, before they are joined into a basis of that size."""


def adapter_groups(tensors: Sequence[TensorInfo]) -> list[tuple[str, ...]]:
    """Names of the tensors of each adapter in a unit: B (out, R) and A (R, in); of slices all tensors, the table first.

    The weights by row of a group are those of its first tensor.
    """
    infos = {info.name: info for info in tensors}
    if NEURON_TABLE in infos:
        ends = sorted(name[-len(LORA_A) :] for name in infos if name != NEURON_TABLE)
        group = sorted(infos, key=lambda name: (name != NEURON_TABLE, name.endswith(LORA_B)))
        return [tuple(group)] if ends == [LORA_A, LORA_B] else []
    stems = [name.removesuffix(LORA_B) for name in infos if name.endswith(LORA_B)]
    pairs = [(stem + LORA_B, stem + LORA_A) for stem in stems if stem + LORA_A in infos]
    return [pair for pair in pairs if all(len(infos[name].shape) == 2 for name in pair)]


def average_group(
    contributions: Iterable[tuple[float | np.ndarray, Sequence[np.ndarray]]], smallest_rank: int = 0
) -> list[np.ndarray] | None:
    """The means of a group of `adapter_groups`, each of the shape of its tensor; None as in `average_products`.

    ``contributions``: (weight, tensors), at least one. Those of slices are all in memory at a time. Row j of the table
    of a slice has the rows of B of neuron j of the expert's first matrix, whose A (R, H) follows the table, and then
    column j of A of its last one, whose B (H, R) comes last. So a weight of neuron j is one of rows of the first
    product and of a column of the other.
    """
    stream = iter(contributions)
    first_of_all = next(stream)
    stream = itertools.chain([first_of_all], stream)
    if len(first_of_all[1]) == 2:  # taken one by one
        return _as_list(average_products(((weight, pair[0], pair[1]) for weight, pair in stream), smallest_rank))
    parts, (num_rows, columns), rank = list(stream), first_of_all[1][0].shape, len(first_of_all[1][1])
    rows = columns // rank - 1
    if rows < 1 or columns != (rows + 1) * rank:
        return None

    def weights(weight: float | np.ndarray, times: int) -> np.ndarray:
        return np.repeat(np.broadcast_to(weight, (num_rows,)), times)

    first = average_products(
        (weights(weight, rows), table[:, : rows * rank].reshape(-1, rank), lora_a)
        for weight, (table, lora_a, _) in parts
    )  # fmt: skip
    last = average_products(
        (1.0, lora_b, table[:, rows * rank :].T, weights(weight, 1)) for weight, (table, _, lora_b) in parts
    )
    if first is None or last is None:
        return None
    return [np.hstack([first[0].reshape(num_rows, -1), last[1].T]), first[1], last[0]]


def _as_list(pair: tuple[np.ndarray, np.ndarray] | None) -> list[np.ndarray] | None:
    return None if pair is None else list(pair)


def average_products(
    contributions: Iterable[tuple[float | np.ndarray, np.ndarray, np.ndarray] | Columns], smallest_rank: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """The factors (out, R) and (R, in), float64, of the best rank-R approximation of the weighted sum of products.

    ``contributions``: (weight, B (out, R), A (R, in)), taken one by one; a weight is a number or (out,), and the
    weights sum to 1. A fourth value is a weight of columns of the product, (in,), by which those of A are multiplied;
    these sum to 1. ``smallest_rank``: the leading factors are the best of each rank from this one on; 0: only all R
    are. Memory is that of a few whole weights at most. None if the input size is smaller than R, where the rows of A
    cannot be independent.
    """
    lefts: list[np.ndarray] = []
    rights: list[np.ndarray] = []
    mean_a = np.zeros(())
    for weight, lora_b, lora_a, *columns_weight in contributions:
        if lora_a.shape[1] < lora_a.shape[0]:
            return None
        lora_a = lora_a * columns_weight[0] if columns_weight else lora_a
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
