"""From router logits to gate probabilities, and to a choice among the experts that are here.

Three kinds of router are told apart (`gate_probe` measures which one a model has):

    softmax       G = softmax(logits)                          OLMoE, Mixtral, Qwen, GPT-OSS, ...
    sigmoid       G = sigmoid(logits) / sum sigmoid(logits)    DeepSeek-V3 and its relatives
    probability   G = logits                                   routers that return probabilities already
"""

from __future__ import annotations

import torch

GATE_KINDS = ("softmax", "sigmoid", "probability")


def gate_scores(router_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The router's own score of each expert, (T, E) in at least float32, before any normalisation of a sigmoid."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if kind == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if kind == "sigmoid" else logits


def gate_probabilities(router_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """G, (T, E) in at least float32: non-negative, each row with sum 1."""
    scores = gate_scores(router_logits, kind)
    if kind == "softmax":
        return scores
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def route_to_resident(
    router_logits: torch.Tensor,
    slot_indices: torch.Tensor,
    expert_weights: torch.Tensor,
    resident: torch.Tensor,
    kind: str,
    selection_bias: torch.Tensor | None = None,
    slot_of: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each token whose choice is not all here another choice among the resident experts.

    A token whose top-k experts are all resident keeps its indices and weights bit for bit. Every other token gets the
    top-min(K, R) residents in the router's own order (score plus selection bias), weighted by their scores and scaled
    so that the token's weights keep their sum: the layer's output keeps its scale.

    Args:
        router_logits: (T, E).
        slot_indices: (T, K) slots of the router's choice, -1 where that expert is absent.
        expert_weights: (T, K) the router's weights.
        resident: (R,) int64 ids of the experts that are here. In slot order, unless ``slot_of`` is given.
        kind: one of GATE_KINDS.
        selection_bias: (E,) what the router adds to its scores before it chooses (DeepSeek-V3), or None.
        slot_of: (E,) int64 slot of each expert, where several share one (merged experts): the choice is among the
            original experts, and a slot may occur twice for a token.

    Returns (slot_indices, expert_weights), both (T, K). Differentiable in router_logits and expert_weights; no host
    synchronisation. Group limits of a router (DeepSeek's n_group) are not applied to the replacement: residents are
    few, and a limit on top of them would leave tokens without an expert.
    """
    top_k = slot_indices.shape[1]
    num_chosen = min(top_k, len(resident))
    incomplete = (slot_indices < 0).any(dim=1, keepdim=True)  # (T, 1)
    logits = router_logits.index_select(1, resident)  # (T, R)
    with torch.no_grad():
        order = logits.float()
        if selection_bias is not None:
            order = gate_scores(router_logits, kind).index_select(1, resident) + selection_bias.reshape(-1)[resident]
        chosen = order.topk(num_chosen, dim=1).indices  # (T, min(K, R)) places in resident
    chosen_logits = logits.gather(1, chosen)
    if kind == "softmax":  # a softmax over some experts is the renormalised softmax over all, and cannot underflow
        share = torch.softmax(chosen_logits.to(torch.promote_types(chosen_logits.dtype, torch.float32)), dim=1)
    else:
        share = gate_probabilities(chosen_logits, kind)
    weights = share * expert_weights.sum(dim=1, keepdim=True)  # (T, min(K, R))
    if slot_of is not None:
        chosen = slot_of[resident[chosen]]
    missing = top_k - num_chosen
    chosen = torch.nn.functional.pad(chosen, (0, missing), value=-1)
    weights = torch.nn.functional.pad(weights, (0, missing))
    return (
        torch.where(incomplete, chosen, slot_indices),
        torch.where(incomplete, weights.to(expert_weights.dtype), expert_weights),
    )
