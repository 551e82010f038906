"""The linear assignment problem: which column each row gets so that the sum of the chosen entries is largest.

Shortest augmenting paths after a column and a row reduction (Jonker and Volgenant, Computing 38, 1987), exact, O(n^3);
the innermost loop is one numpy operation over a row. Why our own: nothing that edgefed depends on brings scipy.
"""

from __future__ import annotations

import numpy as np


def best_assignment(scores: np.ndarray) -> np.ndarray:
    """The permutation p (n,) int64 that maximises sum_i scores[i, p[i]], for a finite (n, n) matrix.

    Exact up to rounding in float64. Deterministic. Raises ValueError unless the matrix is square and finite.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not np.isfinite(scores).all():
        raise ValueError(f"scores must be a finite square matrix, found shape {scores.shape}")
    size = len(scores)
    costs = -np.asarray(scores, dtype=np.float64)
    v = costs.min(axis=0) if size else np.zeros(0)  # the price of each column
    column_of = np.full(size, -1, dtype=np.int64)
    row_of = np.full(size, -1, dtype=np.int64)
    nearest = costs.argmin(axis=0) if size else np.zeros(0, dtype=np.int64)
    for column in range(size - 1, -1, -1):
        row = nearest[column]
        if column_of[row] < 0:
            column_of[row], row_of[column] = column, row
    _reduce_rows(costs, v, column_of, row_of)
    for row in np.flatnonzero(column_of < 0):
        _augment(costs, v, column_of, row_of, int(row))
    return column_of


def _reduce_rows(costs: np.ndarray, v: np.ndarray, column_of: np.ndarray, row_of: np.ndarray) -> None:
    """Let free rows bid for their best column; who is outbid bids again. Most rows have a column afterwards."""
    for row in np.flatnonzero(column_of >= 0):  # lower the price of owned columns until their owner is about to leave
        own = column_of[row]
        reduced = costs[row] - v
        reduced[own] = np.inf
        v[own] -= max(reduced.min() - (costs[row, own] - v[own]), 0) if len(v) > 1 else 0
    for _ in range(2):
        queue = list(np.flatnonzero(column_of < 0))
        bids = 0
        while queue and bids < 4 * len(v):
            row = queue.pop()
            bids += 1
            reduced = costs[row] - v
            best = int(reduced.argmin())
            least = reduced[best]
            reduced[best] = np.inf
            gap = reduced.min() - least
            holder = row_of[best]
            if gap <= 0 and holder >= 0:
                continue  # a tie with somebody else's column is for the search to settle
            v[best] -= gap if np.isfinite(gap) else 0
            column_of[row], row_of[best] = best, row
            if holder >= 0:
                column_of[holder] = -1
                queue.append(holder)


def _augment(costs: np.ndarray, v: np.ndarray, column_of: np.ndarray, row_of: np.ndarray, start: int) -> None:
    """Dijkstra from a free row to the nearest free column over reduced costs; flip the path, update the prices."""
    distance = costs[start] - v  # of each column
    came_from = np.full(len(v), start)
    is_open = np.ones(len(v), dtype=bool)
    open_distance = distance.copy()  # inf where not open
    while True:
        column = int(open_distance.argmin())
        reached = distance[column]
        if row_of[column] < 0:
            break
        is_open[column] = False
        open_distance[column] = np.inf
        row = row_of[column]
        through = costs[row] - v
        through += reached - through[column]
        shorter = (through < distance) & is_open
        open_distance[shorter] = distance[shorter] = through[shorter]
        came_from[shorter] = row
    done = ~is_open
    v[done] += distance[done] - reached
    while True:
        row = came_from[column]
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return
