"""Cuts a model into units: the smallest parts that are downloaded, trained and averaged on their own.

    expert   ``<experts module>.<e>``            the tensors of one expert, by the names of the stacks
    router   ``<router module>``                 all parameters and persistent buffers below it, by relative name
    dense    ``<full parameter name>``           everything else: one tensor called "value"
    adapter  ``<key of one of the above>:lora``  ``<tensor>.lora_a`` (R, in) and ``<tensor>.lora_b`` (out, R), float32

A parameter that two modules share (tied embeddings) is one unit, named by its first place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

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


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype. Raises CheckpointError on one that a frame cannot hold."""
    if dtype not in _DTYPE_NAMES:
        raise CheckpointError(f"tensors of {dtype} cannot be exchanged; known are {', '.join(_DTYPE_NAMES.values())}")
    return _DTYPE_NAMES[dtype]


def tensor_infos(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorInfo, ...]:
    """Describe tensors as they are."""
    return tuple(TensorInfo(name=n, dtype=dtype_name(t.dtype), shape=tuple(t.shape)) for n, t in tensors.items())


class TensorPlace:
    """Where one parameter or buffer lives in a model, in all modules that share it. Survives parametrisation."""

    def __init__(self, full_name: str, owners: list[tuple[nn.Module, str]], is_buffer: bool):
        self.full_name = full_name
        self.owners = owners
        self.is_buffer = is_buffer
        tensor = self.get()
        self.learnable = not is_buffer and tensor.is_floating_point() and tensor.requires_grad
        """The model's authors meant it to be trained (correction biases, for one, are not)."""

    def get(self) -> torch.Tensor:
        module, name = self.owners[0]
        if parametrize.is_parametrized(module, name):
            return module.parametrizations[name].original
        return getattr(module, name)

    def replace(self, tensor: torch.Tensor) -> None:
        """Put another tensor in all its places, frozen."""
        value = tensor if self.is_buffer else nn.Parameter(tensor, requires_grad=False)
        for module, name in self.owners:
            if parametrize.is_parametrized(module, name):
                module.parametrizations[name].original = value
            else:
                setattr(module, name, value)


@dataclasses.dataclass(frozen=True, eq=False)
class FixedTensors:
    """The tensors of a dense or router unit in a model, which are always on the device.

    ``unit`` describes it as in a manifest, but without its tensors: their dtypes may still change while it is loaded.
    """

    unit: UnitInfo
    is_attention: bool
    places: dict[str, TensorPlace]

    @property
    def key(self) -> str:
        """Key of the unit."""
        return self.unit.key

    def mode(self, scope: TrainScope) -> str:
        """How it is trained: full, lora or none."""
        if self.unit.kind == "router":
            return scope.router
        return scope.attention if self.is_attention else "none"

    @property
    def matrices(self) -> dict[str, TensorPlace]:
        """What takes a LoRA adapter: learnable two-dimensional weights."""
        return {name: place for name, place in self.places.items() if place.learnable and place.get().ndim == 2}

    def matrix_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each weight that takes an adapter."""
        return {name: (place.get().shape[1], place.get().shape[0]) for name, place in self.matrices.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: place.get().detach() for name, place in self.places.items()}

    def load(
        self, tensors: Mapping[str, torch.Tensor], device: torch.device, *, materialize: bool, adopt_dtype: bool
    ) -> None:
        """Copy values in place; with ``materialize`` into new memory, whose dtype ``adopt_dtype`` lets them choose.

        Raises CheckpointError, and then has changed nothing.
        """
        check_tensors(self.key, tensors, {name: tuple(place.get().shape) for name, place in self.places.items()})
        for name, place in self.places.items():
            target, value = place.get(), tensors[name]
            adopts = adopt_dtype and target.is_floating_point() and value.is_floating_point()
            if target.dtype != value.dtype and not adopts:
                raise CheckpointError(f"{name!r} of unit {self.key!r} is {value.dtype}, the model needs {target.dtype}")
        for name, place in self.places.items():
            if materialize:
                place.replace(tensors[name].detach().to(device, copy=True))
            else:
                copy_into(self.key, name, place.get(), tensors[name])


def find_fixed_tensors(model: nn.Module, layers: tuple[ExpertLayer, ...]) -> dict[str, FixedTensors]:
    """All dense and router units of ``model`` by key, in module order. Call it before parameters are moved."""
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
    """Each unit that is no adapter, with (in, out) of its matrices if ``scope`` gives it an adapter, else nothing."""
    for unit in fixed:
        lora = scope is not None and unit.mode(scope) == "lora"
        yield fixed_unit(unit, scope), unit.matrix_sizes() if lora else {}
    for layer in layers:
        lora = scope is not None and scope.experts == "lora"
        sizes = {parameter.name: layer.input_output_sizes(parameter) for parameter in layer.matrices} if lora else {}
        for expert in range(layer.num_experts):
            yield expert_unit(layer, expert, scope), sizes


def fixed_unit(fixed: FixedTensors, scope: TrainScope | None) -> UnitInfo:
    """The record of a dense or router unit."""
    trainable = scope is not None and fixed.mode(scope) == "full"
    return msgspec.structs.replace(fixed.unit, trainable=trainable, tensors=tensor_infos(fixed.tensors()))


def expert_unit(layer: ExpertLayer, expert: int, scope: TrainScope | None) -> UnitInfo:
    """The record of an expert unit, whether or not the expert is on the device."""
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
    """The record of a base unit's adapter; ``sizes`` maps its matrices to (in, out)."""
    name = dtype_name(ADAPTER_DTYPE)
    infos = []
    for tensor, (size_in, size_out) in sizes.items():
        infos.append(TensorInfo(name=f"{tensor}.lora_a", dtype=name, shape=(rank, size_in)))
        infos.append(TensorInfo(name=f"{tensor}.lora_b", dtype=name, shape=(size_out, rank)))
    return msgspec.structs.replace(base, key=base.key + LORA_SUFFIX, trainable=True, tensors=tuple(infos))


def unit_from_tensors(base: UnitInfo, tensors: Mapping[str, torch.Tensor], *, adapter: bool) -> UnitInfo:
    """The record of ``base``, or of its adapter, as trainable and with these tensors."""
    key = base.key + LORA_SUFFIX if adapter else base.key
    return msgspec.structs.replace(base, key=key, trainable=True, tensors=tensor_infos(tensors))


def check_tensors(key: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless ``tensors`` are exactly the named ones in these shapes."""
    if set(tensors) != set(shapes):
        raise CheckpointError(
            f"unit {key!r} has the tensors {', '.join(sorted(tensors)) or 'none'}, expected {', '.join(sorted(shapes))}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise CheckpointError(
                f"{name!r} of unit {key!r} has shape {tuple(tensors[name].shape)}, the model needs {tuple(shape)}"
            )


def copy_into(key: str, name: str, target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value in place. Raises CheckpointError when the dtypes differ: a silent cast would lose bits."""
    if target.dtype != value.dtype:
        raise CheckpointError(f"{name!r} of unit {key!r} is {value.dtype}, the model holds {target.dtype}")
    with torch.no_grad():
        target.copy_(value)


# What a run trains: experts, router and attention, each in full, by LoRA adapters, or not at all.

TRAINING_MODES = ("full", "lora", "none")


@dataclasses.dataclass(frozen=True)
class TrainScope:
    """What is trained. Raises ConfigError on a value that does not exist.

    ``attention`` means the two-dimensional weights below any module whose attribute or class name holds "attn" or
    "attention". A LoRA update adds ``lora_alpha / lora_rank * B A`` to a weight (out, in).
    """

    experts: str = "full"
    router: str = "full"
    attention: str = "none"
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        for part in ("experts", "router", "attention"):
            mode = getattr(self, part)
            if mode not in TRAINING_MODES:
                raise ConfigError(f"{part} can be trained as {', '.join(TRAINING_MODES)}; asked for {mode!r}")
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise ConfigError(
                f"LoRA needs a rank of at least 1 and an alpha above 0, found rank {self.lora_rank} and "
                f"alpha {self.lora_alpha}"
            )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def uses_lora(self) -> bool:
        return "lora" in (self.experts, self.router, self.attention)


# Where the weights of experts come from: anything that reads a unit by its key.


class ExpertSource(Protocol):
    """Reads units of the global model. The tensors may be memory-mapped; they are copied, never changed."""

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors by name. Raises CheckpointError when there is no such unit."""
        ...


class MemorySource:
    """Units in memory, e.g. ``MemorySource({unit.key: tensors for unit, tensors in model.iter_units()})``."""

    def __init__(self, units: Mapping[str, Mapping[str, torch.Tensor]]):
        self._units = units

    def read(self, unit_key: str) -> Mapping[str, torch.Tensor]:
        if unit_key not in self._units:
            raise CheckpointError(f"no unit {unit_key!r} among the {len(self._units)} units in memory")
        return self._units[unit_key]
