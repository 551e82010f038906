"""Two records that all layers of edgefed share: which experts are where, and how the router used them.

`ExpertPlan` says which experts a device holds and which of them it trains. `ActivationProfile` says how often and how
strongly the router chose each expert. Both consist of numpy arrays: methods decide on them without torch, and they fit
into a message.

Dimension letters: ``L`` MoE layers, ``E`` experts of a layer (may differ between layers), ``S`` expert slots, ``I``
neurons of an expert (its intermediate size).
"""

from __future__ import annotations

import base64
import dataclasses
import enum
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
NeuronMask: TypeAlias = npt.NDArray[np.bool_]
"""(E, I): which neurons of each expert of a layer are on a device."""


class Role(enum.IntEnum):
    """What a device does with an expert."""

    ABSENT = 0
    """Not on the device: no memory in forward, backward or optimizer."""
    FROZEN = 1
    """On the device, used in the forward pass, never changed."""
    TRAINABLE = 2
    """On the device and trained."""
    MERGED = 3
    """On the device as part of a frozen expert that is merged from several (`MergedGroup`)."""


@dataclasses.dataclass(frozen=True)
class MergedGroup:
    """A frozen expert in place of several: the sum of ``weights[i]`` times expert ``experts[i]``.

    Tokens of all members are routed to it with the sum of their gate weights. ``experts`` ascend, ``weights`` sum to 1.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.experts or list(self.experts) != sorted(set(self.experts)):
            raise ValueError(f"the members of a merged expert must ascend, found {self.experts}")
        if len(self.weights) != len(self.experts) or abs(sum(self.weights) - 1) > 1e-6 or min(self.weights) < 0:
            raise ValueError(
                f"the weights of merged experts {self.experts} must be at least 0 and sum to 1, found {self.weights}"
            )


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """The role of every expert on one device.

    Slots are dense: first the trainable experts, then the frozen ones, each in ascending order, so that the trainable
    part of a bank is one contiguous block; then the merged groups in their order.

    A sliced plan also says which neurons of each expert are on the device; an expert without any is absent.
    """

    roles: tuple[npt.NDArray[np.int8], ...]
    """(E_l,) of `Role` values for each layer."""
    merged: tuple[tuple[MergedGroup, ...], ...] = ()
    """The merged groups of each layer; () for a plan without any."""
    neurons: tuple[NeuronMask, ...] = ()
    """(E_l, I_l) bool for each layer of a sliced plan; () for a plan of whole experts."""

    def __post_init__(self) -> None:
        for layer, roles in enumerate(self.roles):
            if roles.ndim != 1 or roles.dtype != np.int8:
                raise ValueError(f"roles of layer {layer} must be int8 (E,), found {roles.dtype} {roles.shape}")
            if not np.isin(roles, [role.value for role in Role]).all():
                raise ValueError(f"invalid role in layer {layer}: {sorted(set(roles.tolist()))}")
        if self.merged and len(self.merged) != len(self.roles):
            raise ValueError(f"expected merged groups for {len(self.roles)} layers, found {len(self.merged)}")
        for layer, roles in enumerate(self.roles):
            members = sorted(expert for group in self.groups(layer) for expert in group.experts)
            if members != np.flatnonzero(roles == Role.MERGED).tolist():
                raise ValueError(f"the groups of layer {layer} have experts {members}, but others have the role MERGED")
        if self.neurons:
            self._check_neurons()

    def _check_neurons(self) -> None:
        if len(self.neurons) != len(self.roles) or any(self.merged):
            raise ValueError(
                f"a sliced plan has the neurons of all {len(self.roles)} layers and no merged experts; found neurons "
                f"of {len(self.neurons)} layers"
            )
        for layer, (roles, mask) in enumerate(zip(self.roles, self.neurons, strict=True)):
            if mask.dtype != np.bool_ or mask.ndim != 2 or len(mask) != len(roles):
                raise ValueError(
                    f"neurons of layer {layer} must be bool ({len(roles)}, I), found {mask.dtype} {mask.shape}"
                )
            if ((roles == Role.ABSENT) == mask.any(axis=1)).any():
                raise ValueError(f"in layer {layer} exactly the absent experts must be without neurons")

    @property
    def neuron_share(self) -> float:
        """Share of all neurons that a sliced plan has on the device."""
        return sum(int(mask.sum()) for mask in self.neurons) / sum(mask.size for mask in self.neurons)

    @classmethod
    def full(cls, experts_per_layer: Sequence[int], role: Role = Role.TRAINABLE) -> ExpertPlan:
        """Every expert resident with the same role."""
        return cls(tuple(np.full(count, role, dtype=np.int8) for count in experts_per_layer))

    @classmethod
    def of(
        cls,
        experts_per_layer: Sequence[int],
        trainable: Sequence[Iterable[int]],
        frozen: Sequence[Iterable[int]] | None = None,
    ) -> ExpertPlan:
        """Build from expert ids per layer; all others are absent. Raises ValueError for an id that does not exist."""
        roles = []
        for layer, count in enumerate(experts_per_layer):
            row = np.zeros(count, dtype=np.int8)
            for ids, role in (
                ((frozen or [()] * len(experts_per_layer))[layer], Role.FROZEN),
                (trainable[layer], Role.TRAINABLE),
            ):
                for expert in ids:
                    if not 0 <= expert < count:
                        raise ValueError(f"layer {layer} has experts 0..{count - 1}, found {expert}")
                    row[expert] = role
            roles.append(row)
        return cls(tuple(roles))

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Number of experts of each layer, (L,)."""
        return tuple(len(roles) for roles in self.roles)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.roles)

    @property
    def num_resident(self) -> int:
        """Number of experts in memory: trainable ones, frozen ones, and one per merged group."""
        return sum(self.num_slots(layer) for layer in range(self.num_layers))

    @property
    def num_trainable(self) -> int:
        """Number of trainable experts."""
        return int(sum((roles == Role.TRAINABLE).sum() for roles in self.roles))

    def trainable(self, layer: int) -> npt.NDArray[np.int64]:
        """Trainable expert ids of a layer, ascending."""
        return np.flatnonzero(self.roles[layer] == Role.TRAINABLE)

    def frozen(self, layer: int) -> npt.NDArray[np.int64]:
        """Frozen expert ids of a layer, ascending."""
        return np.flatnonzero(self.roles[layer] == Role.FROZEN)

    def groups(self, layer: int) -> tuple[MergedGroup, ...]:
        """The merged groups of a layer, in slot order."""
        return self.merged[layer] if self.merged else ()

    def resident(self, layer: int) -> npt.NDArray[np.int64]:
        """Unmerged expert ids of a layer in slot order: trainable ascending, then frozen ascending."""
        return np.concatenate([self.trainable(layer), self.frozen(layer)])

    def num_slots(self, layer: int) -> int:
        """Number of experts of a layer in memory, S, with merged groups."""
        return len(self.resident(layer)) + len(self.groups(layer))

    def slots(self, layer: int) -> npt.NDArray[np.int64]:
        """Slot of each expert of a layer, (E,). Members of a group share a slot; absent experts have -1."""
        slots = np.full(len(self.roles[layer]), -1, dtype=np.int64)
        resident = self.resident(layer)
        slots[resident] = np.arange(len(resident))
        for slot, group in enumerate(self.groups(layer), start=len(resident)):
            slots[list(group.experts)] = slot
        return slots

    def neuron_indices(self, layer: int, expert: int) -> npt.NDArray[np.int64] | None:
        """Neurons of an expert on the device, ascending; None in a plan of whole experts."""
        return np.flatnonzero(self.neurons[layer][expert]) if self.neurons else None

    def slice_shares(self) -> tuple[float, ...]:
        """Mean share of their neurons that the resident experts of each layer have, (0, 1]; 1 for whole experts."""
        if not self.neurons:
            return (1.0,) * self.num_layers
        return tuple(float(mask[mask.any(axis=1)].mean()) for mask in self.neurons)

    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(resident, trainable) experts of each layer, as the memory model counts them.

        Slices count as if all resident experts of their layer had the mean width: the trainable ones, if they are
        wider than the others, as more.
        """
        layers = range(self.num_layers)
        resident = tuple(self.num_slots(layer) for layer in layers)
        trainable = [len(self.trainable(layer)) for layer in layers]
        for layer, mask in enumerate(self.neurons):
            widths = mask.sum(axis=1)
            wide = int(widths[self.trainable(layer)].sum())
            trainable[layer] = min(resident[layer], -(-wide * resident[layer] // int(widths.sum())))
        return resident, tuple(trainable)

    def computed_with(self, quantized: bool) -> Hashable:
        """What a forward pass under this plan computes with: plans with the same value give the same loss.

        ``quantized``: experts that do not train are stored with fewer bits.
        """
        roles = [row if quantized else np.where(row == Role.TRAINABLE, Role.FROZEN, row) for row in self.roles]
        groups = self.merged if any(self.merged) else ()
        neurons = tuple(mask.tobytes() for mask in self.neurons)
        return tuple(row.astype(np.int8).tobytes() for row in roles), groups, neurons, quantized

    def resident_keys(self) -> list[tuple[int, int]]:
        """All (layer, expert) whose weights the device needs, unmerged or as part of a merged expert."""
        return [
            (layer, int(expert))
            for layer, roles in enumerate(self.roles)
            for expert in np.flatnonzero(roles != Role.ABSENT)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON; `from_dict` is the inverse."""
        groups = [[dataclasses.asdict(group) for group in self.groups(layer)] for layer in range(self.num_layers)]
        found: dict[str, Any] = {"roles": [roles.tolist() for roles in self.roles]}
        found["merged"] = groups if any(groups) else []
        if self.neurons:
            found["neurons"] = [_encode_mask(mask) for mask in self.neurons]
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertPlan:
        """Inverse of `to_dict`. Raises ValueError for an invalid role, or groups that do not match the roles."""
        return cls(
            tuple(np.asarray(row, dtype=np.int8) for row in data["roles"]),
            tuple(
                tuple(MergedGroup(tuple(group["experts"]), tuple(group["weights"])) for group in groups)
                for groups in data["merged"]
            ),
            tuple(_decode_mask(mask) for mask in data.get("neurons", ())),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        roles, neurons = ([array.tobytes() for array in arrays] for arrays in (self.roles, self.neurons))
        return hash((*roles, self.merged if any(self.merged) else (), *neurons))


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """Router statistics of one MoE layer over ``num_tokens`` tokens. All arrays are float64 (E,).

    G_e(x) is the router's probability of expert e for token x.
    """

    num_tokens: int
    tokens_per_expert: Array
    """Tokens with e among the top k."""
    gate_sum: Array
    """Sum over tokens of G_e."""
    gate_max: Array
    """Maximum over tokens of G_e."""
    gate_log_sum: Array
    """Sum over tokens of G_e ln G_e (<= 0)."""
    gate_complement_log_sum: Array
    """Sum over tokens of (1 - G_e) ln (1 - G_e) (<= 0)."""
    routed_gate_sum: Array
    """Sum of the weights by which the layer multiplies the output of e; 0 outside the top k."""
    attention_sum: Array | None = None
    """Sum over the tokens routed to e of the attention that each receives; None if it was not recorded.

    The attention of a token is the mean of its column of the attention matrix, over heads and over the queries that can
    attend to it; a sum would favour early tokens under a causal mask."""
    neuron_energy: Array | None = None
    """(E, I) sum over the tokens routed to e of (gate weight times h_j)^2 ||down_j||^2, with h_j the activation of
    neuron j and down_j its column of the down projection: what neuron j adds to the layer's output, squared. None if it
    was not recorded."""

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.tokens_per_expert)

    @property
    def mean_gate(self) -> Array:
        """Mean router probability of each expert, (E,): the usage u(e) of HFedMoE (16). 0 without tokens."""
        return self.gate_sum / max(self.num_tokens, 1)

    @property
    def frequency(self) -> Array:
        """Share of tokens routed to each expert, (E,); sums to top-k."""
        return self.tokens_per_expert / max(self.num_tokens, 1)

    @property
    def mean_attention(self) -> Array | None:
        """Mean attention that tokens routed to each expert receive, (E,): a_e of Flux (2). 0 without tokens."""
        return None if self.attention_sum is None else self.attention_sum / np.maximum(self.tokens_per_expert, 1)

    def __add__(self, other: LayerProfile) -> LayerProfile:
        """Statistics of both token sets together. Raises ValueError if only one has attention, or neuron energies."""
        return LayerProfile(
            num_tokens=self.num_tokens + other.num_tokens,
            tokens_per_expert=self.tokens_per_expert + other.tokens_per_expert,
            gate_sum=self.gate_sum + other.gate_sum,
            gate_max=np.maximum(self.gate_max, other.gate_max),
            gate_log_sum=self.gate_log_sum + other.gate_log_sum,
            gate_complement_log_sum=self.gate_complement_log_sum + other.gate_complement_log_sum,
            routed_gate_sum=self.routed_gate_sum + other.routed_gate_sum,
            attention_sum=_added(self.attention_sum, other.attention_sum, "attention"),
            neuron_energy=_added(self.neuron_energy, other.neuron_energy, "neuron energies"),
        )


@dataclasses.dataclass(frozen=True)
class ActivationProfile:
    """Router statistics of a whole model: one `LayerProfile` per MoE layer. A few kilobytes."""

    layers: tuple[LayerProfile, ...]

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Number of experts of each layer, (L,)."""
        return tuple(layer.num_experts for layer in self.layers)

    @property
    def num_tokens(self) -> int:
        """Tokens that each layer has seen."""
        return self.layers[0].num_tokens if self.layers else 0

    def __add__(self, other: ActivationProfile) -> ActivationProfile:
        """Statistics of both token sets together."""
        return ActivationProfile(tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists, for JSON; `from_dict` is the inverse."""

        def plain(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            return value.tolist() if value.ndim == 1 else _encode_matrix(value)

        fields = [field.name for field in dataclasses.fields(LayerProfile)]
        return {"layers": [{name: plain(getattr(layer, name)) for name in fields} for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ActivationProfile:
        """Inverse of `to_dict`."""

        def read(value: Any) -> Any:
            if isinstance(value, dict):
                return _decode_matrix(value)
            return np.asarray(value, dtype=np.float64) if isinstance(value, list) else value

        return cls(
            tuple(LayerProfile(**{name: read(value) for name, value in layer.items()}) for layer in data["layers"])
        )


def _added(one: Array | None, other: Array | None, what: str) -> Array | None:
    if (one is None) != (other is None):
        raise ValueError(f"cannot add a profile with {what} and one without")
    return None if one is None or other is None else np.add(one, other, dtype=np.float64)


def _encode_mask(mask: NeuronMask) -> dict[str, Any]:
    """A bit per neuron: the numbers of a large model would take megabytes of JSON."""
    return {"shape": list(mask.shape), "bits": base64.b64encode(np.packbits(mask).tobytes()).decode()}


def _decode_mask(data: Mapping[str, Any]) -> NeuronMask:
    rows, columns = data["shape"]
    bits = np.frombuffer(base64.b64decode(data["bits"]), dtype=np.uint8)
    return np.unpackbits(bits, count=rows * columns).astype(np.bool_).reshape(rows, columns)


def _encode_matrix(matrix: Array) -> dict[str, Any]:
    """In float32, whose 24 bits are more than a choice needs."""
    raw = np.ascontiguousarray(matrix, dtype="<f4").tobytes()
    return {"shape": list(matrix.shape), "float32": base64.b64encode(raw).decode()}


def _decode_matrix(data: Mapping[str, Any]) -> Array:
    raw = np.frombuffer(base64.b64decode(data["float32"]), dtype="<f4")
    matrix: Array = raw.reshape(data["shape"]).astype(np.float64)
    return matrix
