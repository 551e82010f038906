"""Neuron alignment: bring the intermediate neurons of one expert into the order of another's before they are averaged.

An expert computes the same when its I intermediate neurons are permuted, so the average of two experts depends on an
order that means nothing. Weight matching (Ainsworth et al., arXiv 2209.04836; for experts M-SMoE, arXiv 2310.01334)
takes the permutation p that minimises the distance of the weights,

    sum_i || neuron_i(reference) - neuron_p(i)(member) ||^2,    neuron_i = (gate row i, up row i, down column i)

a linear assignment over the (I, I) inner products. It costs 2 I^2 3H FLOPs for the products and O(I^3) for the
assignment, per member. The output bias belongs to no neuron and stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from edgefed.errors import UnsupportedArchitecture
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.merged_cache import Align


@dataclasses.dataclass(frozen=True)
class NeuronLayout:
    """Where the neurons of an expert are in its tensors."""

    up_name: str
    is_transposed: bool
    gate: str
    """Rows of the up projection that make neuron i: "none" row i, "halves" i and I + i, "neighbours" 2i and 2i + 1."""

    def rows(self, size: int) -> torch.Tensor:
        """Those rows for I = ``size`` neurons: (I, 2), or (I, 1) without a gate; int64."""
        places = torch.arange(size)
        if self.gate == "none":
            return places[:, None]
        return torch.stack([places, places + size] if self.gate == "halves" else [2 * places, 2 * places + 1], dim=1)


def neuron_layout(layer: ExpertLayer) -> NeuronLayout:
    """The layout of a layer's experts. Measured, not known by name: a neuron of the layer's gating has a gradient to
    exactly two rows of the up projection. Raises UnsupportedArchitecture where that is not so.
    """
    if not layer.has_gate:
        return NeuronLayout(layer.up_name, layer.is_transposed, "none")
    size = 8
    rows = torch.rand(1, 2 * size, generator=torch.Generator().manual_seed(0)) + 0.5  # away from kinks and clamps
    with torch.enable_grad():
        outputs = layer.experts._apply_gate(rows.requires_grad_())[0]  # (I,)
        touched = [
            torch.autograd.grad(output, rows, retain_graph=True)[0][0].nonzero().flatten().tolist()
            for output in outputs
        ]
    for gate in ("halves", "neighbours"):
        layout = NeuronLayout(layer.up_name, layer.is_transposed, gate)
        if layout.rows(size).tolist() == touched:
            return layout
    raise UnsupportedArchitecture(
        f"the gating of {layer.experts_path!r} makes its first neuron of the rows {touched[0]} of {2 * size}, expected "
        f"[0, {size}] or [0, 1]: its experts cannot be aligned",
        remedy="Merge without neuron alignment.",
    )


def neuron_aligner(layers: Sequence[ExpertLayer]) -> Align:
    """The ``align`` of `merge_experts` for the experts of these layers, which must be laid out alike.

    It takes two experts, dense, by tensor name, and returns the second with its neurons in the order that fits the
    first. Exact: a member that is the reference with its neurons permuted comes back bit for bit as the reference, if
    no two neurons are equal. Values and dtypes stay. Raises UnsupportedArchitecture.
    """
    layouts = {neuron_layout(layer) for layer in layers}
    if len(layouts) != 1:
        raise UnsupportedArchitecture(
            f"neuron alignment needs layers that are laid out alike, found {len(layouts)} kinds: {layouts}",
            remedy="Merge without neuron alignment.",
        )
    (layout,) = layouts

    def align(reference: Mapping[str, torch.Tensor], member: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        scores = _neurons(layout, reference) @ _neurons(layout, member).T  # (I, I)
        return permute_neurons(layout, member, torch.from_numpy(best_assignment(scores.cpu().numpy())))

    return align


def permute_neurons(
    layout: NeuronLayout, tensors: Mapping[str, torch.Tensor], order: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The same expert with neuron ``order[i]`` (I,) at place i."""
    wanted = layout.rows(len(order))
    rows = torch.empty(wanted.numel(), dtype=torch.int64)
    rows[wanted.flatten()] = wanted[order].flatten()
    permuted = {}
    for name, tensor in tensors.items():
        if name == "down_proj_bias":
            permuted[name] = tensor
        elif name == "down_proj":
            permuted[name] = tensor.index_select(0 if layout.is_transposed else 1, order.to(tensor.device))
        else:  # the up projection or its bias
            place = 1 if tensor.ndim == 2 and layout.is_transposed else 0
            permuted[name] = tensor.index_select(place, rows.to(tensor.device))
    return permuted


def _neurons(layout: NeuronLayout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All that belongs to each neuron in one row: (I, 3H), (I, 2H) without a gate, the biases of the rows appended."""
    up, down = tensors[layout.up_name].detach().float(), tensors["down_proj"].detach().float()
    if layout.is_transposed:
        up, down = up.T, down.T
    rows = layout.rows(down.shape[1]).to(up.device)
    parts = [*(up[own] for own in rows.T), down.T]  # each (I, H)
    bias = tensors.get(f"{layout.up_name}_bias")
    if bias is not None:
        parts.append(bias.detach().float()[rows])  # (I, 1 or 2)
    return torch.cat(parts, dim=1)


# The linear assignment problem: which column each row gets so that the sum of the chosen entries is largest.
#
# Shortest augmenting paths after a column and a row reduction (Jonker and Volgenant, Computing 38, 1987), exact, O(n^3);
# the innermost loop is one numpy operation over a row. Why our own: nothing that edgefed depends on brings scipy.


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
