"""Finds out what a router does by running it, not by its model's name.

The MoE block of a model is run on random tokens, with random router weights and with everything else replaced by
constants that take no memory. Its router's logits and the choice that arrives at its experts then tell

    kind             which score reproduces the weights of the chosen experts,
    selection_bias   which (E,) tensor is added to the scores before the choice, though not to the logits,
    top_k            how many experts a token gets.

The model's own tensors are never read, so this works on a skeleton without weights.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

_TOKENS = 192
# Largest error of a chosen expert's share of its token's weight that counts as the same formula (float32 arithmetic).
_SAME = 1e-3


class GateNotUnderstood(Exception):
    """The block does not route as described above; the message says what was seen."""


@dataclasses.dataclass(frozen=True)
class GateFacts:
    """What `probe_gate` measured. ``selection_bias`` is a tensor's name relative to the block."""

    kind: str
    top_k: int
    selection_bias: str | None


@dataclasses.dataclass(frozen=True)
class _Routing:
    logits: torch.Tensor  # (T, E)
    indices: torch.Tensor  # (T, K)
    weights: torch.Tensor  # (T, K)


class _ChoiceMade(Exception):
    """Ends the block's forward pass as soon as its experts are called."""


def split_expert_arguments(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden_states, expert_indices, expert_weights) of a call of an experts module, whatever the names are."""
    values = (*args, *kwargs.values())
    if len(values) != 3:
        raise GateNotUnderstood(f"its experts are called with {len(values)} arguments, expected 3")
    return values


def router_logits_of(output: object) -> torch.Tensor:
    """The logits in what a router returns: the first of a tuple, or the tensor itself (DeepSeek-V3 before 5.17)."""
    logits = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits, torch.Tensor):
        raise GateNotUnderstood(f"its router returns a {type(logits).__name__} instead of logits")
    return logits


def probe_gate(block: nn.Module, router_name: str, experts_name: str, num_experts: int) -> GateFacts:
    """Measure how ``block`` (an MoE block with those two children) routes. Deterministic; changes nothing.

    Raises GateNotUnderstood.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, per_expert, hidden_size = _stand_ins(block, router_name, experts_name, num_experts, generator)
    hidden = torch.randn(_TOKENS, hidden_size, generator=generator)
    plain = _route(block, router_name, experts_name, num_experts, tensors, hidden)
    kind = _gate_kind(plain)
    selection_bias = None
    for name, shape in per_expert.items():
        bias = torch.rand(num_experts, generator=generator)
        routing = _route(block, router_name, experts_name, num_experts, {**tensors, name: bias.reshape(shape)}, hidden)
        scores = gate_scores(routing.logits, kind)
        # A bias of the logits changes the scores themselves; a limit to groups lowers both sides alike.
        if _agreement(routing, scores + bias) > _agreement(routing, scores):
            selection_bias = name
    return GateFacts(kind, plain.indices.shape[1], selection_bias)


def _stand_ins(
    block: nn.Module, router_name: str, experts_name: str, num_experts: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]], int]:
    """Values for all tensors outside the experts; names and shapes of those with one number per expert; hidden size."""
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

    def keep_logits(module: nn.Module, args: tuple, output: object) -> None:
        seen["logits"] = router_logits_of(output)

    def keep_choice(module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, seen["indices"], seen["weights"] = split_expert_arguments(args, kwargs)
        raise _ChoiceMade

    router = block.get_submodule(router_name)
    hooks = [router.register_forward_hook(keep_logits)]
    hooks.append(block.get_submodule(experts_name).register_forward_pre_hook(keep_choice, with_kwargs=True))
    modes = {module: module.training for module in block.modules()}
    try:
        block.eval()  # routers add noise while they train
        fault = _run(block, tensors, hidden.unsqueeze(0))
        if fault is not None:  # the block may be a whole decoder layer, which needs more than hidden states
            own = {name[len(router_name) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{router_name}.")}
            fault_alone = _run(router, own, hidden, keep_routing=seen)
            if fault_alone is not None:
                raise GateNotUnderstood(
                    f"neither its MoE block ({fault}) nor its router ({fault_alone}) can be run on its own"
                )
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if len(seen) < 3:
        raise GateNotUnderstood(f"no {', '.join({'logits', 'indices', 'weights'} - seen.keys())} of its router seen")
    logits = seen["logits"].reshape(-1, seen["logits"].shape[-1]).float()
    indices, weights = (seen[name].reshape(-1, seen[name].shape[-1]) for name in ("indices", "weights"))
    if logits.shape != (_TOKENS, num_experts) or len(indices) != _TOKENS or indices.shape != weights.shape:
        raise GateNotUnderstood(
            f"its router gives logits {tuple(logits.shape)}, indices {tuple(indices.shape)} and weights "
            f"{tuple(weights.shape)} for {_TOKENS} tokens and {num_experts} experts"
        )
    if indices.dtype != torch.int64 or (len(indices) and int(indices.max()) >= num_experts):
        raise GateNotUnderstood(f"its experts are addressed by {indices.dtype} up to {int(indices.max())}")
    return _Routing(logits, indices, weights.float())


def _run(
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    keep_routing: dict[str, torch.Tensor] | None = None,
) -> str | None:
    """Run a module on stand-in tensors until its experts are called. Returns what went wrong, or None."""
    try:
        with torch.no_grad():
            output = torch.func.functional_call(module, tensors, (hidden.clone(),))
        if keep_routing is not None and isinstance(output, tuple) and len(output) >= 3:
            keep_routing["weights"], keep_routing["indices"] = output[1], output[2]
    except _ChoiceMade:
        return None
    except Exception as fault:  # any model's code runs here; whatever it raises means the same to the caller
        return f"{type(fault).__name__}: {fault}"
    return None


def _gate_kind(routing: _Routing) -> str:
    """Which score explains the weights. A rule that fits none but follows the logits' order counts as softmax."""
    logits, chosen = routing.logits, routing.indices
    if bool((logits >= 0).all()) and bool((logits.sum(dim=1) - 1).abs().max() < _SAME):
        return "probability"
    for kind in ("softmax", "sigmoid"):
        scores = gate_scores(logits, kind).gather(1, chosen)
        if chosen.shape[1] > 1:
            error = routing.weights / routing.weights.sum(dim=1, keepdim=True) - scores / scores.sum(
                dim=1, keepdim=True
            )
        else:  # one expert per token: its share is always 1, so compare the weights themselves up to one factor
            factor = routing.weights / scores
            error = factor / factor.mean() - 1
        if bool(error.abs().max() < _SAME):
            return kind
    if _agreement(routing, logits) == 1.0:
        return "softmax"
    raise GateNotUnderstood("neither the weights nor the choice of its router follow from its logits")


def _agreement(routing: _Routing, order: torch.Tensor) -> float:
    """Share of the chosen experts that are in the top-k of ``order`` (T, E)."""
    best = torch.zeros_like(order, dtype=torch.bool).scatter_(
        1, order.topk(routing.indices.shape[1], dim=1).indices, True
    )
    return float(best.gather(1, routing.indices).float().mean())


# From router logits to gate probabilities, and to a choice among the experts that are here.
#
# Three kinds of router are told apart (`gate_probe` measures which one a model has):
#
#     softmax       G = softmax(logits)                          OLMoE, Mixtral, Qwen, GPT-OSS, ...
#     sigmoid       G = sigmoid(logits) / sum sigmoid(logits)    DeepSeek-V3 and its relatives
#     probability   G = logits                                   routers that return probabilities already

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
