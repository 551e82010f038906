"""Describe experts by short vectors and cluster them, so that similar experts can be merged (Flux, arXiv 2508.19078).

**Embeddings.** An expert with D weights is cut into chunks of m. Each weight is multiplied by a random sign, and the
chunks are summed:

    s = sum_j sign_j * chunk_j,    E <s(a), s(b)> = <a, b>

This is a count sketch; the relative error of a squared distance is about sqrt(2 / m). Experts are read one at a time:
the memory is one expert, its signs and E sketches, and the time is O(D) per expert. m is prime, because the width of a
matrix is usually a power of two and the weights of one row or column must not all fall into a few positions. The
embeddings are the principal components of a layer's sketches.

**K-means.** Flux (section 4) fuses all layers into one distance matrix and masks pairs of different layers. Here such
pairs are never computed: layers and restarts form the batch of one matrix product, padded to the largest layer. An
iteration costs O(L R N C d) for L layers, R restarts, N experts and C clusters of the largest layer, and d components,
against O(L^2 R N C d) for the masked matrix; memory is O(L R N C). A layer gets the same clusters when it is clustered
alone, because its random numbers depend on (seed, layer) only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.expert_reading import check_expert
from edgefed.moe.units import ExpertSource

SKETCH_SIZE = 4093
"""m, the length of a sketch: a prime below 4096. The error of a squared distance is about 2 %."""
COMPONENTS = 32
"""Number of principal components. Our choice: Flux does not give a number."""
PREFER_PREVIOUS = 1.02
"""Our choice: keep the clusters of the previous round unless other clusters cost less by more than this factor."""
_LEAST_WEIGHT = 1e-6  # relative to the mean weight: the centre of points with weight 0 is their unweighted mean


def sketch_layer(layer: ExpertLayer, source: ExpertSource, *, seed: int = 0, size: int = SKETCH_SIZE) -> np.ndarray:
    """Return the sketches of all experts of a layer, (E, size) float32.

    Only base weights are sketched, not adapters: adapters are small in comparison, and the base weights of a LoRA run
    never change, so one sketch serves the whole run. The signs depend only on ``seed``, on the tensor's position in the
    expert and on its shape. Raises CheckpointError.
    """
    signs = {}
    for place, parameter in enumerate(layer.parameters):
        numel = torch.Size(parameter.shape).numel()
        generator = torch.Generator().manual_seed(seed * len(layer.parameters) + place)
        bits = torch.randint(0, 2, (numel,), generator=generator, dtype=torch.int8)
        signs[parameter.name] = bits.mul_(2).sub_(1)
    rows = []
    for expert in range(layer.num_experts):
        key = layer.expert_key(expert)
        tensors = source.read(key)
        check_expert(layer, key, tensors)
        row = torch.zeros(size)
        for name, sign in signs.items():
            _add_chunks(row, tensors[name].detach().reshape(-1), sign)
        rows.append(row.numpy())
    return np.stack(rows)


def _add_chunks(row: torch.Tensor, values: torch.Tensor, signs: torch.Tensor) -> None:
    """Add the signed chunks of ``values`` (D,) to ``row`` (m,), about a million values at a time."""
    size = len(row)
    step = max(1, (1 << 20) // size) * size
    for begin in range(0, len(values), step):
        part = values[begin : begin + step].to("cpu", torch.float32) * signs[begin : begin + step]
        whole = len(part) // size * size
        row += part[:whole].view(-1, size).sum(dim=0)
        row[: len(part) - whole] += part[whole:]


def expert_embeddings(
    layers: Sequence[ExpertLayer],
    source: ExpertSource,
    *,
    components: int = COMPONENTS,
    seed: int = 0,
    on_layer: Callable[[int], None] = lambda ordinal: None,
) -> tuple[np.ndarray, ...]:
    """Return the embeddings of every layer's experts, (E_l, d_l) float64: the points that `plan_merging` clusters.

    Holds the sketches of one layer at a time. The result covers all experts, not only those to be merged, so it stays
    valid from round to round as long as the weights do. Raises CheckpointError.
    """
    embeddings = []
    for layer in layers:
        embeddings.append(principal_components(sketch_layer(layer, source, seed=seed), components))
        on_layer(layer.ordinal)
    return tuple(embeddings)


def principal_components(rows: np.ndarray, components: int) -> np.ndarray:
    """Return the coordinates of ``rows`` (E, m) along their first principal axes, (E, d) float64, d <= components.

    Computed from the Gram matrix of the centred rows in O(E^2 m + E^3), so m may be much larger than E. d is at most
    E - 1; with d = E - 1 all distances are exact. Signs are fixed: the largest coordinate of each axis is positive.
    """
    rows = np.asarray(rows, dtype=np.float64)
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)  # ascending
    count = min(components, max(len(rows) - 1, 1))
    coordinates: np.ndarray = vectors[:, ::-1][:, :count] * np.sqrt(np.maximum(values[::-1][:count], 0))  # (E, d)
    largest = np.abs(coordinates).argmax(axis=0)
    coordinates *= np.where(coordinates[largest, np.arange(count)] < 0, -1.0, 1.0)
    return coordinates


def cluster_layers(
    points: Sequence[np.ndarray],
    counts: Sequence[int],
    *,
    weights: Sequence[np.ndarray] | None = None,
    previous: Sequence[np.ndarray] | None = None,
    seed: int = 0,
    restarts: int = 4,
    max_iterations: int = 100,
    ordinals: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Run K-means on every layer in one batch and return the labels of each layer, (n_l,) int64.

    Minimizes sum_i w_i ||x_i - centre||^2 per layer and returns the best of several k-means++ starts, each followed by
    Lloyd's iterations. An empty cluster takes the point with the highest cost in its current cluster. Every label from
    0 to counts[l] - 1 is used; labels are numbered by their first member. Deterministic.

    Args:
        points: (n_l, d_l) per layer; d may differ between layers.
        counts: number of clusters of each layer, 1 <= counts[l] <= n_l, or 0 if n_l is 0.
        weights: (n_l,) per layer, >= 0. None gives every point the weight 1.
        previous: labels of the previous call, (n_l,), -1 for a point without a label. Their centres are one additional
            start, whose result is preferred unless another costs less by the factor `PREFER_PREVIOUS`.
        seed: seed of the k-means++ starts.
        restarts: number of k-means++ starts.
        max_iterations: limit on Lloyd's iterations.
        ordinals: number of each layer, used with ``seed`` for its random numbers. None: 0, 1, ...

    Raises:
        ValueError: a count does not fit the number of points.

    """
    sizes = [len(p) for p in points]
    for layer, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if not (1 <= count <= size or count == size == 0):
            raise ValueError(f"layer {layer} has {size} points, which cannot make {count} clusters")
    num_layers, num_points, num_clusters = len(sizes), max(sizes, default=0), max(counts, default=0)
    if not num_points:
        return [np.zeros(0, dtype=np.int64) for _ in sizes]
    x = np.zeros((num_layers, num_points, max(p.shape[1] for p in points if len(p))))  # (L, N, d)
    w = np.zeros((num_layers, num_points))
    draws = np.zeros((num_layers, restarts + 1, num_clusters))
    for layer, p in enumerate(points):
        if sizes[layer]:
            x[layer, : sizes[layer], : p.shape[1]] = p
            own = np.ones(sizes[layer]) if weights is None else np.asarray(weights[layer], dtype=np.float64)
            w[layer, : sizes[layer]] = np.maximum(own, _LEAST_WEIGHT * own.mean()) if own.sum() > 0 else 1.0
        rng = np.random.default_rng([seed, layer if ordinals is None else ordinals[layer]])
        draws[layer, :, : counts[layer]] = rng.random((restarts + 1, counts[layer]))
    if previous is None:
        draws = draws[:, :-1]  # the random starts are the same with and without previous labels
    centres = _spread_centres(x, w, draws)  # (L, R, C, d)
    if previous is not None:
        for layer, old in enumerate(previous):
            _start_from(centres[layer, -1], x[layer, : sizes[layer]], w[layer, : sizes[layer]], old, counts[layer])
    starts = centres.shape[1]
    labels, costs = _iterate(
        np.repeat(x, starts, axis=0),
        np.repeat(w, starts, axis=0),
        centres.reshape(-1, *centres.shape[2:]),
        np.repeat(sizes, starts),
        np.repeat(counts, starts),
        max_iterations,
    )
    labels, costs = labels.reshape(num_layers, starts, -1), costs.reshape(num_layers, starts)
    best = costs.argmin(axis=1)
    if previous is not None:
        best = np.where(costs[:, -1] <= costs.min(axis=1) * PREFER_PREVIOUS, starts - 1, best)
    return [_by_first_member(labels[layer, best[layer], :size]) for layer, size in enumerate(sizes)]


def _spread_centres(x: np.ndarray, w: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Choose k-means++ centres: each is a point, drawn by weight times squared distance to the centres so far.

    x (L, N, d), w (L, N), draws (L, R, C) in [0, 1) -> (L, R, C, d).
    """
    num_layers, starts, num_clusters = draws.shape
    centres = np.empty((num_layers, starts, num_clusters, x.shape[2]))
    mass = np.broadcast_to(w[:, None], (num_layers, starts, w.shape[1]))  # (L, R, N)
    distance = np.full(mass.shape, np.inf)
    squares = (x**2).sum(axis=2)  # (L, N)
    rows = np.arange(num_layers)[:, None]
    for cluster in range(num_clusters):
        cumulated = np.cumsum(mass, axis=2)
        target = draws[:, :, cluster, None] * cumulated[:, :, -1:]
        index = np.minimum((cumulated <= target).sum(axis=2), x.shape[1] - 1)  # (L, R)
        centre = centres[:, :, cluster] = x[rows, index]  # (L, R, d)
        new = centre @ x.swapaxes(1, 2)  # (L, R, N)
        new *= -2
        new += squares[:, None] + squares[rows, index][..., None]
        np.minimum(distance, new.clip(0), out=distance)
        mass = w[:, None] * distance
    return centres


def _start_from(centres: np.ndarray, x: np.ndarray, w: np.ndarray, labels: np.ndarray, count: int) -> None:
    """Overwrite ``centres`` (C, d) with the means of the ``count`` heaviest clusters of the old ``labels``."""
    old = [label for label in np.unique(labels) if label >= 0]
    heaviest = sorted(old, key=lambda label: (-w[labels == label].sum(), label))[:count]
    for place, label in enumerate(heaviest):
        own = labels == label
        centres[place] = (w[own, None] * x[own]).sum(axis=0) / w[own].sum()


def _iterate(
    x: np.ndarray, w: np.ndarray, centres: np.ndarray, sizes: np.ndarray, counts: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run Lloyd's iterations on all problems until no label changes; finished problems leave the batch.

    x (P, N, d), w (P, N), centres (P, C, d) -> labels (P, N) and costs (P,).
    """
    labels = np.full(w.shape, -1)
    final = centres.copy()
    at = np.arange(len(x))  # indices of the problems that are still in the batch
    num_clusters = centres.shape[1]
    beyond = np.where(np.arange(num_clusters) < counts[:, None], 0.0, np.inf)  # (P, C)
    own_x, own_w = x, w
    for _ in range(limit):
        distance = own_x @ centres.swapaxes(1, 2)  # (P, N, C), without the term x^2
        distance *= -2
        distance += ((centres**2).sum(axis=2) + beyond[at])[:, None]
        nearest = distance.argmin(axis=2)  # (P, N)
        flat = (nearest + num_clusters * np.arange(len(at))[:, None]).reshape(-1)
        used = np.bincount(flat, own_w.reshape(-1), len(at) * num_clusters).reshape(len(at), num_clusters) > 0
        for place in np.flatnonzero((~used & (beyond[at] == 0)).any(axis=1)):
            size, count = sizes[at[place]], counts[at[place]]
            own = nearest[place, :size]
            away = distance[place, np.arange(size), own] + (own_x[place, :size] ** 2).sum(axis=1)
            _fill_empty(own, own_w[place, :size] * away, count)
        is_done = (nearest == labels[at]).all(axis=1)
        labels[at] = nearest
        shares = np.zeros((*nearest.shape, num_clusters))
        np.put_along_axis(shares, nearest[..., None], own_w[..., None], axis=2)
        mass = np.maximum(shares.sum(axis=1), np.finfo(float).tiny)  # (P, C)
        centres = (shares.swapaxes(1, 2) @ own_x) / mass[..., None]
        final[at] = centres
        if is_done.any():
            at, centres = at[~is_done], centres[~is_done]
            own_x, own_w = x[at], w[at]
        if not len(at):
            break
    away = x - np.take_along_axis(final, labels[..., None], axis=1)
    return labels, (w * (away**2).sum(axis=2)).sum(axis=1)


def _fill_empty(labels: np.ndarray, cost: np.ndarray, count: int) -> None:
    """Move the costliest point of a cluster with several points into each empty cluster. Changes ``labels`` (n,)."""
    for cluster in range(count):
        if not (labels == cluster).any():
            shared = np.bincount(labels, minlength=count)[labels] > 1
            labels[int(np.where(shared, cost, -np.inf).argmax())] = cluster


def _by_first_member(labels: np.ndarray) -> np.ndarray:
    """Number the clusters in order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]
