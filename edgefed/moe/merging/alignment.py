"""Neuron alignment: permute the intermediate neurons of one expert to match another's before averaging the two.

Permuting the I intermediate neurons of an expert does not change its output, but it does change the average of two
experts. Weight matching (Ainsworth et al., arXiv 2209.04836; for experts M-SMoE, arXiv 2310.01334) chooses the
permutation p that minimizes the distance between the weights,

    sum_i || neuron_i(reference) - neuron_p(i)(member) ||^2,    neuron_i = (gate row i, up row i, down column i)

This is a linear assignment problem over the (I, I) inner products. Per member it costs 2 I^2 3H FLOPs for the products
and O(I^3) for the assignment. The output bias does not belong to any neuron and is left unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from edgefed.errors import UnsupportedArchitecture
from edgefed.moe.architecture import ExpertLayer
from edgefed.moe.merged_cache import Align


@dataclasses.dataclass(frozen=True)
class NeuronLayout:
    """Where each neuron of an expert lies in the expert's tensors."""

    up_name: str
    is_transposed: bool
    gate: str
    """Rows of the up projection of neuron i: "none": i; "halves": i and I + i; "neighbours": 2i and 2i + 1."""

    def rows(self, size: int) -> torch.Tensor:
        """Rows of the up projection for each of I = ``size`` neurons: (I, 2), or (I, 1) without a gate; int64."""
        places = torch.arange(size)
        if self.gate == "none":
            return places[:, None]
        return torch.stack([places, places + size] if self.gate == "halves" else [2 * places, 2 * places + 1], dim=1)


def neuron_layout(layer: ExpertLayer) -> NeuronLayout:
    """Measure the layout of a layer's experts, without knowing the model by name.

    Each neuron of the gating function must have a gradient to exactly two rows of the up projection. Raises
    UnsupportedArchitecture otherwise.
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
        f"the experts of {layer.experts_path!r} cannot be aligned: the first neuron of their gating uses the rows "
        f"{touched[0]} of {2 * size}, expected [0, {size}] or [0, 1]",
        remedy="Merge without neuron alignment.",
    )


def neuron_aligner(layers: Sequence[ExpertLayer]) -> Align:
    """Return the ``align`` function of `merge_experts` for these layers, which must all have the same layout.

    It takes two dense experts as {tensor name: tensor} and returns the second with its neurons reordered to match the
    first. If the second is a permutation of the first and no two neurons are equal, the result equals the first bit
    for bit. Values and dtypes are not changed. Raises UnsupportedArchitecture.
    """
    layouts = {neuron_layout(layer) for layer in layers}
    if len(layouts) != 1:
        raise UnsupportedArchitecture(
            f"neuron alignment needs layers with the same layout, found {len(layouts)} different ones: {layouts}",
            remedy="Merge without neuron alignment.",
        )
    (layout,) = layouts

    def align(reference: Mapping[str, torch.Tensor], member: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        from scipy.optimize import linear_sum_assignment

        scores = _neurons(layout, reference) @ _neurons(layout, member).T  # (I, I)
        _, order = linear_sum_assignment(scores.cpu().numpy(), maximize=True)  # (I,) int64
        return permute_neurons(layout, member, torch.from_numpy(order))

    return align


def permute_neurons(
    layout: NeuronLayout, tensors: Mapping[str, torch.Tensor], order: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the same expert with neuron ``order[i]`` at position i; ``order`` is (I,) int64."""
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
    """All weights of each neuron as one row: (I, 3H), or (I, 2H) without a gate, plus the biases of its rows."""
    up, down = tensors[layout.up_name].detach().float(), tensors["down_proj"].detach().float()
    if layout.is_transposed:
        up, down = up.T, down.T
    rows = layout.rows(down.shape[1]).to(up.device)
    parts = [*(up[own] for own in rows.T), down.T]  # each (I, H)
    bias = tensors.get(f"{layout.up_name}_bias")
    if bias is not None:
        parts.append(bias.detach().float()[rows])  # (I, 1 or 2)
    return torch.cat(parts, dim=1)
