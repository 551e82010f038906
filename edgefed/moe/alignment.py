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

import torch

from edgefed.errors import UnsupportedArchitecture
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.linear_assignment import best_assignment
from edgefed.moe.merged_expert import Align


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
