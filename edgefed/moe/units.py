"""Units of a model: the smallest parts that are downloaded, trained and averaged on their own.

    expert   ``<experts module>.<e>``            the tensors of one expert, named like the stacks they are rows of
    router   ``<router module>``                 all its parameters and persistent buffers, by relative name
    dense    ``<full parameter name>``           any other parameter: one tensor called "value"
    adapter  ``<key of one of the above>:lora``  ``<tensor>.lora_a`` (R, in) and ``<tensor>.lora_b`` (out, R), float32

A parameter that several modules share (tied embeddings) is one unit, named after the first module.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol, cast

import msgspec
import torch
from torch import nn
from torch.nn.utils import parametrize

from edgefed.errors import CheckpointError, ConfigError
from edgefed.moe.architecture import ExpertLayer
from edgefed.protocol.messages import TensorInfo, UnitInfo

LORA_SUFFIX = ":lora"
VALUE = "value"
ADAPTER_DTYPE = torch.float32

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)

TRAINING_MODES = ("full", "lora", "none")
LORA_SCALINGS: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {"standard": float, "rank_stabilized": math.sqrt}
)
"""By name, the function of the rank R that divides alpha."""


@dataclasses.dataclass(frozen=True)
class TrainScope:
    """What a run trains: each part in full, by LoRA adapters, or not at all. Raises ConfigError for an invalid value.

    ``attention`` covers the two-dimensional weights of every module whose attribute name or class name contains "attn"
    or "attention". A LoRA update adds ``lora_scale * B A`` to a weight (out, in). ``lora_scaling``: "standard",
    alpha / R, or "rank_stabilized", alpha / sqrt(R) (Kalajdzievski, arXiv 2312.03732).
    """

    experts: str = "full"
    router: str = "full"
    attention: str = "none"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_scaling: str = "standard"

    def __post_init__(self) -> None:
        for part in ("experts", "router", "attention"):
            mode = getattr(self, part)
            if mode not in TRAINING_MODES:
                raise ConfigError(f"training mode of {part} must be one of {', '.join(TRAINING_MODES)}; found {mode!r}")
        if self.lora_scaling not in LORA_SCALINGS:
            known = " or ".join(LORA_SCALINGS)
            raise ConfigError(f"`lora_scaling` must be {known}; found {self.lora_scaling!r}")
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise ConfigError(
                f"LoRA needs a rank of at least 1 and an alpha above 0; found rank {self.lora_rank} and "
                f"alpha {self.lora_alpha}"
            )

    @property
    def lora_scale(self) -> float:
        """Factor of B A in a LoRA update."""
        return self.lora_alpha / LORA_SCALINGS[self.lora_scaling](self.lora_rank)

    @property
    def uses_lora(self) -> bool:
        """Whether any part is trained by LoRA adapters."""
        return "lora" in (self.experts, self.router, self.attention)


class ExpertSource(Protocol):
    """Anything that reads units of the global model by key.

    The tensors may be memory-mapped: callers copy them and never change them.
    """

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a unit by name. Raises CheckpointError if there is no such unit."""
        ...


class MemorySource:
    """An `ExpertSource` in memory: ``MemorySource({unit.key: tensors for unit, tensors in model.iter_units()})``."""

    def __init__(self, units: Mapping[str, Mapping[str, torch.Tensor]]):
        self._units = units

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of a unit by name. Raises CheckpointError if there is no such unit."""
        if unit_key not in self._units:
            raise CheckpointError(f"{unit_key!r} not found among the {len(self._units)} parts in memory")
        return self._units[unit_key]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype. Raises CheckpointError for a dtype that cannot be exchanged."""
    if dtype not in _DTYPE_NAMES:
        known = ", ".join(_DTYPE_NAMES.values())
        raise CheckpointError(f"unsupported dtype of a tensor: {dtype}; it must be one of {known}")
    return _DTYPE_NAMES[dtype]


def named_dtype(name: str) -> torch.dtype:
    """Inverse of `dtype_name`, for the name of a checked header."""
    return next(dtype for dtype, known in _DTYPE_NAMES.items() if known == name)


def tensor_infos(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorInfo, ...]:
    """Return name, dtype and shape of each tensor."""
    return tuple(TensorInfo(name=n, dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items())


class TensorPlace:
    """Location of one parameter or buffer: all modules that share it. Stays valid while it is parametrized."""

    def __init__(self, full_name: str, owners: list[tuple[nn.Module, str]], is_buffer: bool):
        self.full_name = full_name
        self.owners = owners
        self.is_buffer = is_buffer
        tensor = self.get()
        self.learnable = not is_buffer and tensor.is_floating_point() and tensor.requires_grad
        """Whether the model's authors train it; a correction bias, for example, is a parameter that is not trained."""

    def parametrization(self, owner: int = 0) -> parametrize.ParametrizationList | None:
        """Return the parametrization of the tensor in one of its owners, or None."""
        module, name = self.owners[owner]
        if not parametrize.is_parametrized(module, name):
            return None
        return cast("dict[str, parametrize.ParametrizationList]", module.parametrizations)[name]

    def get(self) -> torch.Tensor:
        """Return the tensor itself, without a parametrization."""
        module, name = self.owners[0]
        parametrization = self.parametrization()
        return cast(torch.Tensor, getattr(module, name) if parametrization is None else parametrization.original)

    def replace(self, tensor: torch.Tensor) -> None:
        """Replace the tensor in all owners by ``tensor``, frozen."""
        value = tensor if self.is_buffer else nn.Parameter(tensor, requires_grad=False)
        for owner, (module, name) in enumerate(self.owners):
            parametrization = self.parametrization(owner)
            if parametrization is not None:
                parametrization.original = value
            else:
                setattr(module, name, value)


@dataclasses.dataclass(frozen=True, eq=False)
class FixedTensors:
    """The tensors of a dense or router unit in a model; they are always resident.

    ``unit`` is the record of the unit without its tensors, whose dtypes may still change while they are loaded.
    """

    unit: UnitInfo
    is_attention: bool
    places: dict[str, TensorPlace]

    @property
    def key(self) -> str:
        """Key of the unit."""
        return self.unit.key

    def mode(self, scope: TrainScope) -> str:
        """Return how the unit is trained: one of `TRAINING_MODES`."""
        if self.unit.kind == "router":
            return scope.router
        return scope.attention if self.is_attention else "none"

    @property
    def matrices(self) -> dict[str, TensorPlace]:
        """The tensors that can have a LoRA adapter: learnable two-dimensional weights."""
        return {name: place for name, place in self.places.items() if place.learnable and place.get().ndim == 2}

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """Return (in, out) of each weight that can have an adapter."""
        return {name: (place.get().shape[1], place.get().shape[0]) for name, place in self.matrices.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the current values by tensor name, detached."""
        return {name: place.get().detach() for name, place in self.places.items()}

    def load(
        self, tensors: Mapping[str, torch.Tensor], device: torch.device, *, materialize: bool, adopt_dtype: bool
    ) -> None:
        """Copy values in place, or with ``materialize`` into new memory.

        With ``adopt_dtype`` the new memory takes the dtype of the values; otherwise the dtypes must be equal. Raises
        CheckpointError before anything is changed.
        """
        check_tensors(self.key, tensors, {name: tuple(place.get().shape) for name, place in self.places.items()})
        for name, place in self.places.items():
            target, value = place.get(), tensors[name]
            adopts = adopt_dtype and target.is_floating_point() and value.is_floating_point()
            if target.dtype != value.dtype and not adopts:
                raise CheckpointError(f"{name!r} of {self.key!r} must be {target.dtype}; found {value.dtype}")
        for name, place in self.places.items():
            if materialize:
                place.replace(tensors[name].detach().to(device, copy=True))
            else:
                copy_into(self.key, name, place.get(), tensors[name])


def find_fixed_tensors(model: nn.Module, layers: tuple[ExpertLayer, ...]) -> dict[str, FixedTensors]:
    """Return all dense and router units of ``model`` by key, in module order. Call it before parameters are moved."""
    persistent = set(model.state_dict(keep_vars=True).keys())
    expert_names = {f"{layer.experts_path}.{p.name}" for layer in layers for p in layer.parameters}
    routers = {layer.router_path: layer for layer in layers}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, bool]] = {}
    for path, module in model.named_modules():
        for members, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in members.items():
                full = f"{path}.{name}" if path else name
                if tensor is None or full in expert_names or full not in persistent:
                    continue
                first.setdefault(id(tensor), (full, is_buffer))
                owners.setdefault(id(tensor), []).append((module, name))
    units: dict[str, FixedTensors] = {}
    for identity, (full, is_buffer) in first.items():
        place = TensorPlace(full, owners[identity], is_buffer)
        router = next((path for path in routers if full.startswith(f"{path}.")), None)
        if router is not None:
            unit = units.setdefault(router, FixedTensors(_router_unit(routers[router]), False, {}))
            unit.places[full[len(router) + 1 :]] = place
        else:
            dense = UnitInfo(key=full, kind="dense", trainable=False)
            units[full] = FixedTensors(dense, _is_attention_weight(model, full, place), {VALUE: place})
    return units


def _router_unit(layer: ExpertLayer) -> UnitInfo:
    return UnitInfo(key=layer.router_path, kind="router", layer=layer.ordinal, trainable=False)


def _is_attention_weight(model: nn.Module, full_name: str, place: TensorPlace) -> bool:
    parts = full_name.split(".")
    if parts[-1] != "weight" or place.get().ndim != 2 or not place.learnable:
        return False
    module: nn.Module = model
    for part in parts[:-1]:
        module = getattr(module, part)
        if _ATTENTION.search(part) or _ATTENTION.search(type(module).__name__):
            return True
    return False


def iter_base_units(
    fixed: Iterable[FixedTensors], layers: Iterable[ExpertLayer], scope: TrainScope | None
) -> Iterator[tuple[UnitInfo, dict[str, tuple[int, int]]]]:
    """Yield each base unit, with (in, out) of its matrices if ``scope`` gives it an adapter and {} otherwise."""
    for unit in fixed:
        lora = scope is not None and unit.mode(scope) == "lora"
        yield fixed_unit(unit, scope), unit.matrix_sizes() if lora else {}
    for layer in layers:
        lora = scope is not None and scope.experts == "lora"
        sizes = {parameter.name: layer.input_output_sizes(parameter) for parameter in layer.matrices} if lora else {}
        for expert in range(layer.num_experts):
            yield expert_unit(layer, expert, scope), sizes


def iter_units(
    fixed: Iterable[FixedTensors], layers: Iterable[ExpertLayer], scope: TrainScope | None
) -> Iterator[tuple[UnitInfo, dict[str, tuple[int, int]]]]:
    """Yield each unit, adapters after their base; for an adapter with (in, out) of its matrices, otherwise with {}."""
    for base, sizes in iter_base_units(fixed, layers, scope):
        yield base, {}
        if sizes and scope is not None:
            yield adapter_unit(base, sizes, scope.lora_rank), sizes


def fixed_unit(fixed: FixedTensors, scope: TrainScope | None) -> UnitInfo:
    """Return the record of a dense or router unit."""
    trainable = scope is not None and fixed.mode(scope) == "full"
    return msgspec.structs.replace(fixed.unit, trainable=trainable, tensors=tensor_infos(fixed.tensors()))


def expert_unit(layer: ExpertLayer, expert: int, scope: TrainScope | None) -> UnitInfo:
    """Return the record of an expert unit, whether or not the expert is resident."""
    infos = tuple(TensorInfo(name=p.name, dtype=dtype_name(p.dtype), shape=p.shape) for p in layer.parameters)
    trainable = scope is not None and scope.experts == "full"
    return UnitInfo(
        key=layer.expert_key(expert),
        kind="expert",
        layer=layer.ordinal,
        expert=expert,
        trainable=trainable,
        tensors=infos,
    )


def adapter_unit(base: UnitInfo, sizes: Mapping[str, tuple[int, int]], rank: int) -> UnitInfo:
    """Return the record of a base unit's adapter; ``sizes`` maps its matrices to (in, out)."""
    name = dtype_name(ADAPTER_DTYPE)
    infos = []
    for tensor, (size_in, size_out) in sizes.items():
        infos.append(TensorInfo(name=f"{tensor}.lora_a", dtype=name, shape=(rank, size_in)))
        infos.append(TensorInfo(name=f"{tensor}.lora_b", dtype=name, shape=(size_out, rank)))
    return msgspec.structs.replace(base, key=base.key + LORA_SUFFIX, trainable=True, tensors=tuple(infos))


def unit_from_tensors(base: UnitInfo, tensors: Mapping[str, torch.Tensor], *, adapter: bool) -> UnitInfo:
    """Return the record of ``base``, or of its adapter, as trainable and with these tensors."""
    key = base.key + LORA_SUFFIX if adapter else base.key
    return msgspec.structs.replace(base, key=key, trainable=True, tensors=tensor_infos(tensors))


def check_tensors(key: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless ``tensors`` have exactly these names and shapes."""
    if set(tensors) != set(shapes):
        raise CheckpointError(
            f"{key!r} must have the tensors {', '.join(sorted(shapes))}; found {', '.join(sorted(tensors)) or 'none'}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{name!r} of {key!r} must have shape {tuple(shape)}; found {tuple(tensors[name].shape)}"
            )


Copy = Callable[[torch.Tensor, torch.Tensor], object]
"""(target, value): copies a value into a tensor, like ``Tensor.copy_``."""


def copy_into(
    key: str, name: str, target: torch.Tensor, value: torch.Tensor, copy: Copy = torch.Tensor.copy_
) -> None:  # fmt: skip
    """Copy a value in place. Raises CheckpointError if the dtypes differ, because a silent cast would lose bits."""
    if target.dtype != value.dtype:
        raise CheckpointError(f"{name!r} of {key!r} must be {target.dtype}; found {value.dtype}")
    with torch.no_grad():
        copy(target, value)
