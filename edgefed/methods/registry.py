"""The methods by name. `register` adds one, `make_method` builds one from its name and options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from edgefed.errors import ConfigError, UnknownMethod, did_you_mean
from edgefed.methods.baselines import (
    FrequentExperts,
    Local,
    OffloadedExperts,
    QuantizedExperts,
    RandomExperts,
    Submodel,
)
from edgefed.methods.fedavg import FedAvg
from edgefed.methods.fedmoe import FedMoE
from edgefed.methods.flux import Flux
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import ExpertMethod, Method, PersonalMethod
from edgefed.methods.options import Value, check_options, options_of, read_options
from edgefed.methods.slices import Slices
from edgefed.protocol.messages import RunConfig
from edgefed.protocol.training import TrainingConfig

METHODS: dict[str, type[Method]] = {}
"""The classes by method name, in the order in which they were registered."""

MethodClass = TypeVar("MethodClass", bound=type[Any])

_SERVER_HALF: tuple[str, ...] = ("plan_merge",)
_EXPERT_METHOD: tuple[str, ...] = ("plan_experts", "schedule_experts", "expert_importance", *_SERVER_HALF)


def register(kind: MethodClass) -> MethodClass:
    """Make a method's class known by its ``name``; returns the class, so it also works as a decorator.

    The class is a dataclass whose fields are the options (`edgefed.methods.options`) and either an
    `edgefed.methods.interface.ExpertMethod` or a `PersonalMethod`; see there for an example. Defining the same class
    again, as a notebook does that runs a cell twice, replaces it.

    Raises:
        ConfigError: invalid name, a name that another class has, or a missing function.
        TypeError: not a dataclass, or a field whose type is not supported for options.
    """
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_.-]{0,63}", name):
        raise ConfigError(
            f"invalid method name {name!r} in {kind.__qualname__}",
            remedy="Set the class attribute name: a lower-case letter, then letters, digits, '_', '-' or '.'.",
        )
    other = METHODS.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ConfigError(
            f"the method name {name!r} is already used by {other.__module__}.{other.__qualname__}",
            remedy="Choose another name.",
        )
    options_of(kind)
    base = next((base for base in (ExpertMethod, PersonalMethod) if base in kind.__mro__), None)
    if base is None:
        raise ConfigError(f"the method {name!r} is derived from neither ExpertMethod nor PersonalMethod")
    needed = _EXPERT_METHOD if base is ExpertMethod else _SERVER_HALF
    if getattr(kind, "assigning", None) not in (None, ExpertMethod.assigning):
        needed += ("assign_experts",)
    missing = [member for member in needed if getattr(kind, member) is getattr(base, member)]
    if missing:
        raise ConfigError(
            f"the method {name!r} does not define {', '.join(missing)}",
            remedy="Write them, or derive the class from edgefed.methods.averaging.MeanOfHolders.",
        )
    METHODS[name] = kind
    return kind


def method_options(name: str) -> dict[str, Value]:
    """Options of a method with their defaults. Raises UnknownMethod."""
    return {option.name: option.default for option in options_of(method_class(name)).values()}


def make_method(name: str, options: Mapping[str, object] | None = None) -> Method:
    """Build a method. Option values may be text (from a command line) or typed (from a file or the wire).

    Raises UnknownMethod, or ConfigError for an option that the method does not have or a value that is not allowed.
    """
    kind = method_class(name)
    method: Method = kind(**read_options(name, kind, options or {}))
    check_options(method)
    return method


def make_expert_method(name: str, options: Mapping[str, object] | None = None) -> ExpertMethod:
    """As `make_method`. Raises ConfigError for a method whose clients train models of their own."""
    method = make_method(name, options)
    if method.personal:
        raise ConfigError(f"the clients of {name!r} train models of their own, not experts of a global model")
    return method


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises UnknownMethod."""
    if name not in METHODS:
        listed = ", ".join(METHODS)
        raise UnknownMethod(f"unknown method {name!r}; the methods are {listed}.{did_you_mean(name, METHODS)}")
    return METHODS[name]


def is_personal(name: str) -> bool:
    """Whether the clients of this method train models of their own; False for an unknown name."""
    return name in METHODS and METHODS[name].personal


def check_training(method: Method, experts: str) -> None:
    """Raise ConfigError unless ``method`` supports this mode of training experts ("full", "lora", "none")."""
    required = None if method.personal else method.requirements.train_experts
    if required not in (None, experts):
        raise ConfigError(
            f"{method.name} trains experts as {required!r}; asked for {experts!r}",
            remedy=f"Set `train_experts={required}`.",
        )


def check_alternation(method: Method, training: TrainingConfig, max_staleness: int = 0) -> None:
    """Raise ConfigError if factors of adapters are to alternate and cannot: there are none, or a round would mix them.

    ``max_staleness``: rounds by which an update may be late.
    """
    if training.lora_factors != "alternate":
        return
    if method.personal or "lora" not in (training.experts, training.router, training.attention):
        raise ConfigError("`adapter_average=alternate` has no effect: nothing trains by LoRA", remedy="Remove it.")
    if method.requirements.neurons:
        raise ConfigError(
            f"`adapter_average=alternate` cannot be combined with {method.name}: a row of a neuron has both factors",
            remedy="Remove it, or choose another method.",
        )
    if max_staleness:
        raise ConfigError(
            f"`adapter_average=alternate` cannot be combined with `max_staleness={max_staleness}`: a late update may "
            "have the other factor",
            remedy="Set `max_staleness=0`.",
        )


def check_ranks(method: Method, training: TrainingConfig) -> None:
    """Raise ConfigError if devices may have smaller ranks of adapters than the run (`protocol.ranks`), and cannot."""
    asked = f"`min_lora_rank={training.min_lora_rank}`"
    if not training.min_lora_rank:
        return
    if method.personal or not method.exchanges or "lora" not in (training.experts, training.router, training.attention):
        raise ConfigError(f"{asked} has no effect: no adapters are exchanged", remedy="Remove it.")
    if method.requirements.neurons:
        raise ConfigError(
            f"{asked} cannot be combined with {method.name}: a row of a neuron has both factors",
            remedy="Remove it, or choose another method.",
        )


def check_ordered(run: RunConfig, max_staleness: int, download_compression: str) -> None:
    """Raise ConfigError if something relates factors of two rounds, and products order them anew in each round.

    They do where devices may have smaller ranks than the run.
    """
    if not run.training.min_lora_rank:
        return
    kept: dict[str, object] = {
        "compression": run.compression, "download_compression": download_compression,
        "server_optimizer": run.server_optimizer and run.server_optimizer.kind,
        "keep_optimizer": run.training.keep_optimizer, "max_staleness": max_staleness,
    }  # fmt: skip
    for name, value in kept.items():
        if value not in (None, 0, "none"):  # False is 0
            raise ConfigError(
                f"`min_lora_rank={run.training.min_lora_rank}` with `adapter_average=product` cannot be combined with "
                f"`{name}={value}`: factors are ordered by singular value in each round, so those of two rounds do not "
                "compare",
                remedy=f"Remove `{name}`, or set `adapter_average=factors`.",
            )


for _kind in (
    HFedMoE,
    Flux,
    FedMoE,
    FedAvg,
    OffloadedExperts,
    QuantizedExperts,
    FrequentExperts,
    Submodel,
    RandomExperts,
    Local,
    Slices,
):
    register(_kind)
