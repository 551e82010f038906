"""Find the MoE layers of any transformers model that uses the experts interface, by structure and not by model name.

A MoE layer is an experts module together with a router. The class of an experts module is decorated with
``@use_experts_implementation``, which sets the attributes is_transposed, has_bias and has_gate; its weights are stacks
with one row per expert. The router is a sibling module whose weight has one row per expert.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from edgefed.errors import UnsupportedArchitecture
from edgefed.moe.gate_probe import GateFacts, GateNotUnderstood, probe_gate


class ExpertsModule(nn.Module):
    """Static type of modules that use transformers' experts interface. It is only used in annotations."""

    num_experts: int
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]


def expert_activation(experts: ExpertsModule) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function between the two projections: the gating of gated experts, else the activation."""
    return experts._apply_gate if experts.has_gate else experts.act_fn


def expert_finish(experts: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the function that the layer applies to each expert's output, or None."""
    return cast(ExpertsModule, experts).post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None


@dataclasses.dataclass(frozen=True)
class ExpertParameter:
    """One tensor of an expert: a row of a stack of the experts module. ``shape`` excludes the expert dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One MoE layer. ``ordinal`` counts MoE layers from 0; dense layers are not counted."""

    ordinal: int
    block_path: str
    experts_path: str
    router_path: str
    experts: ExpertsModule
    router: nn.Module
    num_experts: int
    top_k: int
    gate_kind: str
    """One of `edgefed.moe.gate_probe.GATE_KINDS`."""
    selection_bias: str | None
    """Full name of the (E,) tensor that the router adds to its scores for the selection, or None."""
    parameters: tuple[ExpertParameter, ...]
    is_transposed: bool
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool

    @property
    def up_name(self) -> str:
        """Name of the up projection, which includes the gate if the experts have one."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def matrices(self) -> tuple[ExpertParameter, ...]:
        """The parameters that can have a LoRA adapter."""
        return tuple(parameter for parameter in self.parameters if len(parameter.shape) == 2)

    @property
    def parameters_per_expert(self) -> int:
        """Number of parameters of one expert."""
        return sum(torch.Size(parameter.shape).numel() for parameter in self.parameters)

    @property
    def bytes_per_expert(self) -> int:
        """Weight bytes of one expert."""
        return sum(torch.Size(p.shape).numel() * p.dtype.itemsize for p in self.parameters)

    @property
    def num_neurons(self) -> int:
        """I, the neurons of an expert: its intermediate size."""
        return self.matrix_sizes("down_proj")[0]

    @functools.cached_property
    def is_interleaved(self) -> bool:
        """Whether the gate and up rows of a neuron are neighbours (GPT-OSS) instead of I rows apart.

        Found by one run of the layer's gating. Raises UnsupportedArchitecture if a neuron depends on other rows.
        """
        if not self.has_gate:
            return False
        width = 4
        with torch.enable_grad():  # small numbers: a gating that clamps has no gradient beyond its limits
            probe = torch.linspace(0.1, 0.8, 2 * width).unsqueeze(0).requires_grad_()
            output = expert_activation(self.experts)(probe)
            used = torch.autograd.grad(output[0, 0], probe)[0][0].nonzero().flatten().tolist()
        if used not in ([0, width], [0, 1]):
            raise UnsupportedArchitecture(
                f"the experts of {self.experts_path!r} cannot be sliced: their first neuron uses the rows {used}"
            )
        return used == [0, 1]

    def expert_key(self, expert: int) -> str:
        """Return the key of the expert's unit."""
        return f"{self.experts_path}.{expert}"

    def input_output_sizes(self, parameter: ExpertParameter) -> tuple[int, int]:
        """Return (in, out) of a matrix, independent of its storage order."""
        first, second = parameter.shape
        return (first, second) if self.is_transposed else (second, first)

    def matrix_sizes(self, name: str) -> tuple[int, int]:
        """Return (in, out) of the matrix ``name``, independent of its storage order."""
        return next(self.input_output_sizes(parameter) for parameter in self.matrices if parameter.name == name)


def discover_layers(model: nn.Module) -> tuple[ExpertLayer, ...]:
    """Return all MoE layers of ``model`` in module order. Works with real and with meta parameters.

    Raises UnsupportedArchitecture with the model type and the reason.
    """
    modules = dict(model.named_modules())
    layers: list[ExpertLayer] = []
    facts: dict[tuple[type, type, int, str], GateFacts] = {}
    for path, module in modules.items():
        if not _follows_experts_interface(module):
            continue
        parameters = _expert_parameters(model, path, module)
        block_path, _, experts_name = path.rpartition(".")
        block = modules[block_path]
        num_experts = module.num_experts
        router_name = _router_name(model, path, block, experts_name, num_experts)
        router = block.get_submodule(router_name)
        # Layers of the same class and size route in the same way, so they share one measurement.
        key = (type(block), type(router), num_experts, str([(n, p.shape) for n, p in router.named_parameters()]))
        if key not in facts:
            try:
                facts[key] = probe_gate(block, router_name, experts_name, num_experts)
            except GateNotUnderstood as error:
                raise _unsupported(model, f"in {block_path!r} {error}") from error
        bias = facts[key].selection_bias
        layers.append(
            ExpertLayer(
                ordinal=len(layers),
                block_path=block_path,
                experts_path=path,
                router_path=f"{block_path}.{router_name}",
                experts=cast(ExpertsModule, module),
                router=router,
                num_experts=num_experts,
                top_k=facts[key].top_k,
                gate_kind=facts[key].kind,
                selection_bias=None if bias is None else f"{block_path}.{bias}",
                parameters=parameters,
                is_transposed=module.is_transposed,
                has_bias=module.has_bias,
                has_gate=module.has_gate,
                has_post_expert_norm=getattr(module, "has_post_expert_norm", False),
            )
        )
    if not layers:
        raise _unsupported(model, _why_no_layers(modules))
    return tuple(layers)


def model_type(model: nn.Module) -> str:
    """Return the model type from the configuration, for messages."""
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def _unsupported(model: nn.Module, reason: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(f"unsupported experts in model type {model_type(model)!r}: {reason}")


def _follows_experts_interface(module: nn.Module) -> bool:
    flags = ("is_transposed", "has_bias", "has_gate", "num_experts", "_apply_gate")
    return all(hasattr(module, flag) for flag in flags)


def _expert_parameters(model: nn.Module, path: str, module: nn.Module) -> tuple[ExpertParameter, ...]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    expected = {up, "down_proj"} | ({f"{up}_bias", "down_proj_bias"} if module.has_bias else set())
    found = dict(module.named_parameters(recurse=False))
    if set(found) != expected:
        raise _unsupported(
            model, f"{path!r} must have the parameters {', '.join(sorted(expected))}; found {', '.join(sorted(found))}"
        )
    odd = [name for name, p in found.items() if p.ndim != (2 if name.endswith("_bias") else 3)]
    odd += [name for name, p in found.items() if p.shape[0] != module.num_experts]
    if odd:
        raise _unsupported(
            model, f"{path}.{odd[0]} must have one row for each of {module.num_experts} experts; found shape "
            f"{tuple(found[odd[0]].shape)}"
        )  # fmt: skip
    return tuple(ExpertParameter(name, tuple(p.shape[1:]), p.dtype) for name, p in found.items())


def _router_name(model: nn.Module, path: str, block: nn.Module, experts_name: str, num_experts: int) -> str:
    """Return the name of the sibling of the experts whose weight has E rows."""
    candidates = [
        name
        for name, child in block.named_children()
        if name != experts_name and any(p.ndim == 2 and p.shape[0] == num_experts for p in child.parameters())
    ]
    if len(candidates) > 1:  # a shared expert of intermediate size E also has E rows
        is_router = re.compile("rout|gate", re.IGNORECASE)
        candidates = [
            name
            for name in candidates
            if is_router.search(name) or is_router.search(type(block.get_submodule(name)).__name__)
        ]
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        raise _unsupported(model, f"{path!r} needs exactly one sibling router with {num_experts} rows; found {found}")
    return candidates[0]


def _why_no_layers(modules: dict[str, nn.Module]) -> str:
    """Distinguish a dense model from a model whose experts are not accessible."""
    for path, module in modules.items():
        if re.search("experts?$|ExpertsModule$", path.rpartition(".")[2], re.IGNORECASE) or re.search(
            r"Experts?\b|Experts?$|ExpertGLU$", type(module).__name__
        ):
            return f"the experts at {path!r} ({type(module).__name__}) do not use transformers' experts interface"
    return "it is a dense model without experts"
