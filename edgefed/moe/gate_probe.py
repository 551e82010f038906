"""Routers: gate probabilities, routing to resident experts, and a probe that measures how a router works.

There are three kinds of router:

    softmax       G = softmax(logits)                          OLMoE, Mixtral, Qwen, GPT-OSS, ...
    sigmoid       G = sigmoid(logits) / sum sigmoid(logits)    DeepSeek-V3 and related models
    probability   G = logits                                   routers that already return probabilities

`probe_gate` measures the kind instead of looking up the model's name. It runs the MoE block on random tokens, with
random router weights and with all other tensors replaced by constants that take no memory. From the router's logits and
the choice that arrives at the experts it derives

    kind             the score that reproduces the weights of the chosen experts,
    selection_bias   the (E,) tensor that is added to the scores for the choice, but not to the logits,
    top_k            the number of experts per token.

The model's own tensors are never read, so the probe works on a model without weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

GATE_KINDS = ("softmax", "sigmoid", "probability")

_TOKENS = 192
# Two formulas count as equal up to this error of a chosen expert's share of its token's weight (float32 arithmetic).
_SAME = 1e-3


def gate_scores(router_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the router's score of each expert, (T, E) in at least float32. Sigmoid scores are not normalized."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if kind == "softmax":
        return torch.softmax(logits, dim=-1)
    return torch.sigmoid(logits) if kind == "sigmoid" else logits


def gate_probabilities(router_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """Return G, (T, E) in at least float32: non-negative, with rows that sum to 1."""
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
    """Reroute each token with an absent expert in its choice to resident experts.

    A token whose top-k experts are all resident keeps its indices and weights bit for bit. Every other token gets the
    top-min(K, R) resident experts in the router's own order (score plus selection bias), weighted by their scores and
    scaled so that the sum of the token's weights, and so the scale of the layer's output, does not change.

    Args:
        router_logits: (T, E).
        slot_indices: (T, K) slots of the router's choice, -1 for an absent expert.
        expert_weights: (T, K), the router's weights.
        resident: (R,) int64 ids of the resident experts, in slot order unless ``slot_of`` is given.
        kind: one of `GATE_KINDS`.
        selection_bias: (E,), added to the scores for the choice (DeepSeek-V3), or None.
        slot_of: (E,) int64 slot of each expert, if several share a slot (merged experts). The choice is then among the
            original experts, and a slot may occur twice for a token.

    Returns:
        (slot_indices, expert_weights), both (T, K). Differentiable in router_logits and expert_weights, without host
        synchronization. Group limits of a router (DeepSeek's n_group) do not apply to the replacement: with few
        resident experts they would leave tokens without an expert.

    """
    top_k = slot_indices.shape[1]
    num_chosen = min(top_k, len(resident))
    incomplete = (slot_indices < 0).any(dim=1, keepdim=True)  # (T, 1)
    logits = router_logits.index_select(1, resident)  # (T, R)
    with torch.no_grad():
        order = logits.float()
        if selection_bias is not None:
            order = gate_scores(router_logits, kind).index_select(1, resident) + selection_bias.reshape(-1)[resident]
        chosen = order.topk(num_chosen, dim=1).indices  # (T, min(K, R)) positions in resident
    chosen_logits = logits.gather(1, chosen)
    if kind == "softmax":  # equals the renormalized softmax over all experts, but cannot underflow
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


class GateNotUnderstood(Exception):
    """The block does not route in a supported way; the message says what was found."""


@dataclasses.dataclass(frozen=True)
class GateFacts:
    """Result of `probe_gate`. ``selection_bias`` is the name of a tensor, relative to the block."""

    kind: str
    top_k: int
    selection_bias: str | None


@dataclasses.dataclass(frozen=True)
class _Routing:
    logits: torch.Tensor  # (T, E)
    indices: torch.Tensor  # (T, K)
    weights: torch.Tensor  # (T, K)


class _ChoiceMade(Exception):
    """Ends the block's forward pass when its experts are called."""


def split_expert_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (hidden_states, expert_indices, expert_weights) of a call of an experts module, by position."""
    values = (*args, *kwargs.values())
    if len(values) != 3:
        raise GateNotUnderstood(f"the experts must be called with 3 arguments; found {len(values)}")
    hidden_states, indices, weights = values
    return hidden_states, indices, weights


def router_logits_of(output: object) -> torch.Tensor:
    """Return the logits in a router's output: the first item of a tuple, or the tensor itself (DeepSeek-V3 < 5.17)."""
    logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, torch.Tensor):
        raise GateNotUnderstood(f"the router must return logits; found a {type(logits).__name__}")
    return logits


def probe_gate(block: nn.Module, router_name: str, experts_name: str, num_experts: int) -> GateFacts:
    """Measure how ``block``, an MoE block with these two children, routes. Deterministic; does not change the block.

    Raises GateNotUnderstood.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, per_expert, hidden_size = _substitutes(block, router_name, experts_name, num_experts, generator)
    hidden = torch.randn(_TOKENS, hidden_size, generator=generator)
    plain = _route(block, router_name, experts_name, num_experts, tensors, hidden)
    kind = _gate_kind(plain)
    selection_bias = None
    for name, shape in per_expert.items():
        bias = torch.rand(num_experts, generator=generator)
        routing = _route(block, router_name, experts_name, num_experts, {**tensors, name: bias.reshape(shape)}, hidden)
        scores = gate_scores(routing.logits, kind)
        # A bias of the logits would change the scores themselves. A group limit lowers both agreements equally.
        if _agreement(routing, scores + bias) > _agreement(routing, scores):
            selection_bias = name
    return GateFacts(kind, plain.indices.shape[1], selection_bias)


def _substitutes(
    block: nn.Module, router_name: str, experts_name: str, num_experts: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]], int]:
    """Return values for all tensors outside the experts, the shapes of those with E elements, and the hidden size."""
    tensors: dict[str, torch.Tensor] = {}
    per_expert: dict[str, tuple[int, ...]] = {}
    hidden_size = 0
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        in_router, direct = name.startswith(f"{router_name}."), "." not in name
        if name.startswith(f"{experts_name}."):
            continue
        if in_router and tensor.ndim == 2 and tensor.shape[0] == num_experts and tensor.shape[1] > 1:
            hidden_size = tensor.shape[1]
            tensors[name] = torch.randn(tensor.shape, generator=generator) * (2.0 * hidden_size**-0.5)
        elif (in_router or direct) and tensor.numel() == num_experts and tensor.is_floating_point():
            per_expert[name] = tuple(tensor.shape)
            tensors[name] = torch.zeros(tensor.shape)
        else:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            tensors[name] = torch.full((1,), int(in_router), dtype=dtype).expand(tensor.shape)
    return tensors, per_expert, hidden_size


def _route(
    block: nn.Module,
    router_name: str,
    experts_name: str,
    num_experts: int,
    tensors: dict[str, torch.Tensor],
    hidden: torch.Tensor,
) -> _Routing:
    seen: dict[str, torch.Tensor] = {}

    def store_logits(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        seen["logits"] = router_logits_of(output)

    def store_choice(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, seen["indices"], seen["weights"] = split_expert_arguments(args, kwargs)
        raise _ChoiceMade

    router = block.get_submodule(router_name)
    hooks = [router.register_forward_hook(store_logits)]
    hooks.append(block.get_submodule(experts_name).register_forward_pre_hook(store_choice, with_kwargs=True))
    modes = {module: module.training for module in block.modules()}
    try:
        block.eval()  # some routers add noise in training mode
        block_error = _run(block, tensors, hidden.unsqueeze(0))
        if block_error is not None:  # the block may be a whole decoder layer, which needs more than hidden states
            own = {name[len(router_name) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{router_name}.")}
            router_error = _run(router, own, hidden, routing=seen)
            if router_error is not None:
                raise GateNotUnderstood(
                    f"neither the MoE block ({block_error}) nor the router ({router_error}) can be run on its own"
                )
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if len(seen) < 3:
        missing = ", ".join(sorted({"logits", "indices", "weights"} - seen.keys()))
        raise GateNotUnderstood(f"the router did not produce {missing}")
    logits = seen["logits"].reshape(-1, seen["logits"].shape[-1]).float()
    indices, weights = (seen[name].reshape(-1, seen[name].shape[-1]) for name in ("indices", "weights"))
    if logits.shape != (_TOKENS, num_experts) or len(indices) != _TOKENS or indices.shape != weights.shape:
        raise GateNotUnderstood(
            f"unexpected shapes of the router's output for {_TOKENS} tokens and {num_experts} experts: logits "
            f"{tuple(logits.shape)}, indices {tuple(indices.shape)}, weights {tuple(weights.shape)}"
        )
    if indices.dtype != torch.int64 or (len(indices) and int(indices.max()) >= num_experts):
        raise GateNotUnderstood(
            f"expert indices must be int64 below {num_experts}; found {indices.dtype} up to {int(indices.max())}"
        )
    return _Routing(logits, indices, weights.float())


def _run(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    routing: dict[str, torch.Tensor] | None = None,
) -> str | None:
    """Run a module on substitute tensors until its experts are called. Returns the error message, or None.

    With ``routing``, the weights and indices in the output of a router are stored there.
    """
    try:
        with torch.no_grad():
            output = torch.func.functional_call(module, tensors, (hidden.clone(),))
        if routing is not None and isinstance(output, tuple) and len(output) >= 3:
            routing["weights"], routing["indices"] = output[1], output[2]
    except _ChoiceMade:
        return None
    except Exception as error:  # the model's own code runs here and may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _gate_kind(routing: _Routing) -> str:
    """Return the kind whose scores explain the weights; "softmax" if only the order of the logits does."""
    logits, chosen = routing.logits, routing.indices
    if bool((logits >= 0).all()) and bool((logits.sum(dim=1) - 1).abs().max() < _SAME):
        return "probability"
    for kind in ("softmax", "sigmoid"):
        scores = gate_scores(logits, kind).gather(1, chosen)
        if chosen.shape[1] > 1:
            error = routing.weights / routing.weights.sum(dim=1, keepdim=True) - scores / scores.sum(
                dim=1, keepdim=True
            )
        else:  # with one expert per token the share is always 1, so compare the weights up to a common factor
            factor = routing.weights / scores
            error = factor / factor.mean() - 1
        if bool(error.abs().max() < _SAME):
            return kind
    if _agreement(routing, logits) == 1.0:
        return "softmax"
    raise GateNotUnderstood("neither the weights nor the choice of the router follow from its logits")


def _agreement(routing: _Routing, order: torch.Tensor) -> float:
    """Return the share of the chosen experts that are in the top-k of ``order`` (T, E)."""
    best = torch.zeros_like(order, dtype=torch.bool).scatter_(
        1, order.topk(routing.indices.shape[1], dim=1).indices, True
    )
    return float(best.gather(1, routing.indices).float().mean())
