"""The methods by name, and how their options are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgefed.errors import ConfigError, UnknownMethod
from edgefed.methods.fedavg import FedAvg
from edgefed.methods.fedmoe import FedMoE
from edgefed.methods.flux import Flux
from edgefed.methods.frequent import FrequentExperts, Submodel
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.methods.interface import Method
from edgefed.methods.local import Local
from edgefed.methods.random_experts import RandomExperts
from edgefed.methods.whole_model import OffloadedExperts, QuantizedExperts

METHODS: dict[str, type] = {
    kind.name: kind
    for kind in (
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
    )
}

Option = float | int | str | bool


def method_options(name: str) -> dict[str, Option]:
    """Options of a method with their defaults. Raises UnknownMethod."""
    return {
        field.name.rstrip("_"): field.default
        for field in dataclasses.fields(_method_class(name))
        if field.default is not dataclasses.MISSING
    }


def make_method(name: str, options: Mapping[str, object] | None = None) -> Method:
    """Build a method. Option values may be text (from a command line) or typed (from a file or the wire).

    Raises UnknownMethod, or ConfigError for an option that the method does not have or a value of the wrong type.
    """
    kind, known, values = _method_class(name), method_options(name), {}
    for option, value in (options or {}).items():
        if option not in known:
            allowed = ", ".join(f"{key}={default}" for key, default in known.items()) or "none"
            raise ConfigError(f"{name} has no option {option!r}; its options are {allowed}")
        field = next(field.name for field in dataclasses.fields(kind) if field.name.rstrip("_") == option)
        values[field] = _convert(name, option, value, type(known[option]))
    return kind(**values)


def check_training(method: Method, experts: str) -> None:
    """Raise ConfigError unless ``method`` works with this mode of training experts ("full", "lora", "none")."""
    if method.trains_experts_as not in (None, experts):
        raise ConfigError(
            f"{method.name} trains experts as {method.trains_experts_as!r}; asked for {experts!r}",
            remedy=f"Set `train_experts={method.trains_experts_as}`.",
        )


def _method_class(name: str) -> type:
    if name not in METHODS:
        raise UnknownMethod(f"there is no method {name!r}; the methods are {', '.join(METHODS)}")
    return METHODS[name]


def _convert(name: str, option: str, value: object, kind: type) -> Option:
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if (kind is float and isinstance(value, int) and not isinstance(value, bool)) or (
        kind in (int, float) and isinstance(value, str)
    ):
        try:
            return kind(value)
        except ValueError:
            pass
    raise ConfigError(f"{name}: option {option} is {value!r}, expected {kind.__name__}")
