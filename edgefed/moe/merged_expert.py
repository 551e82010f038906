"""One frozen expert made of several: W = sum_i weights[i] W_i over the members of a group, biases alike.

    "W_merged = sum_{e in cluster} (alpha_e / sum alpha) W_e" (Flux, arXiv 2508.19078)

Sums run in at least float32. One member is in memory at a time beside the sum, and with ``align`` the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from edgefed.experts import MergedGroup

Tensors = Mapping[str, torch.Tensor]

Align = Callable[[Tensors, Tensors], Tensors]
"""(reference, member) -> the member with its hidden neurons in the reference's order."""


def merge_experts(
    read: Callable[[int], Tensors], group: MergedGroup, align: Align | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the merged expert, by name, in the dtype that its members have.

    ``read(expert)`` gives the tensors of a member, its adapter added where it has one; it is asked once for each that
    has a weight, heaviest first. The heaviest is the reference of ``align``. Raises what ``read`` and ``align`` raise.
    """
    order = sorted(range(len(group.experts)), key=lambda place: (-group.weights[place], place))
    sums: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    reference: Tensors | None = None
    for place in order:
        weight = group.weights[place]
        if not weight:
            continue
        tensors = read(group.experts[place])
        if reference is None:
            dtypes = {name: value.dtype for name, value in tensors.items()}
            sums = {
                name: value.detach().to(torch.promote_types(value.dtype, torch.float32)) * weight
                for name, value in tensors.items()
            }
            reference = tensors if align is not None else {}
        else:
            if align is not None:
                tensors = align(reference, tensors)
            for name, value in tensors.items():
                sums[name].add_(value.detach(), alpha=weight)
        del tensors
    return {name: value.to(dtypes[name]) for name, value in sums.items()}
