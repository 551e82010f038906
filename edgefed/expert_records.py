"""The two records that every layer of edgefed talks about: which experts are where, and how the router used them.

``ExpertPlan`` says which experts a device holds and trains. ``ActivationProfile`` says how often and how strongly the
router chose them. Both are plain numpy: methods decide on them without torch, the model side acts on them, and
they fit into a message.

Dimension letters: ``L`` MoE layers, ``E`` experts of a layer (may differ between layers), ``S`` expert slots.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence

import numpy as np


class Role(enum.IntEnum):
    """What a device does with one expert."""

    ABSENT = 0
    """Not on the device: no memory in forward, backward or optimizer."""
    FROZEN = 1
    """On the device, used in the forward pass, never changed."""
    TRAINABLE = 2
    """On the device and trained."""
    MERGED = 3
    """On the device only within a frozen expert that is made of several (`MergedGroup`)."""


@dataclasses.dataclass(frozen=True)
class MergedGroup:
    """One frozen expert that stands for several: the sum of ``weights[i]`` times expert ``experts[i]``.

    Tokens of any member go to it, their gate weights added. ``experts`` ascend, ``weights`` sum to 1.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.experts or list(self.experts) != sorted(set(self.experts)):
            raise ValueError(f"the members of a merged expert must ascend; found {self.experts}")
        if len(self.weights) != len(self.experts) or abs(sum(self.weights) - 1) > 1e-6 or min(self.weights) < 0:
            raise ValueError(f"weights of merged experts {self.experts} must sum to 1, none below 0: {self.weights}")


@dataclasses.dataclass(frozen=True)
class ExpertPlan:
    """The role of every expert on one device.

    ``roles[l]`` is an int8 array (E_l,) of `Role` values; ``merged[l]`` are the groups of the layer's merged experts,
    () for a plan without any. Slots are dense: trainable experts first, then frozen ones, each in ascending expert order,
    so that the trained part of a bank is one contiguous block; then the merged groups in their order.
    """

    roles: tuple[np.ndarray, ...]
    merged: tuple[tuple[MergedGroup, ...], ...] = ()

    def __post_init__(self) -> None:
        for layer, roles in enumerate(self.roles):
            if roles.ndim != 1 or roles.dtype != np.int8:
                raise ValueError(f"roles of layer {layer} must be int8 (E,), found {roles.dtype} {roles.shape}")
            if not np.isin(roles, [role.value for role in Role]).all():
                raise ValueError(f"roles of layer {layer} hold a value that is no Role: {sorted(set(roles.tolist()))}")
        if self.merged and len(self.merged) != len(self.roles):
            raise ValueError(f"{len(self.roles)} layers need as many lists of groups, found {len(self.merged)}")
        for layer, roles in enumerate(self.roles):
            members = sorted(expert for group in self.groups(layer) for expert in group.experts)
            if members != np.flatnonzero(roles == Role.MERGED).tolist():
                raise ValueError(f"the groups of layer {layer} hold experts {members}, other ones have the role MERGED")

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
        """Build from expert ids per layer; everything else is absent. Raises ValueError on an id outside the layer."""
        roles = []
        for layer, count in enumerate(experts_per_layer):
            row = np.zeros(count, dtype=np.int8)
            for ids, role in (
                ((frozen or [()] * len(experts_per_layer))[layer], Role.FROZEN),
                (trainable[layer], Role.TRAINABLE),
            ):
                for expert in ids:
                    if not 0 <= expert < count:
                        raise ValueError(f"layer {layer} has experts 0..{count - 1}, asked for {expert}")
                    row[expert] = role
            roles.append(row)
        return cls(tuple(roles))

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        return tuple(len(roles) for roles in self.roles)

    @property
    def num_layers(self) -> int:
        return len(self.roles)

    @property
    def num_resident(self) -> int:
        """Experts in memory: trainable and frozen ones, and one per merged group."""
        return sum(self.num_slots(layer) for layer in range(self.num_layers))

    @property
    def num_trainable(self) -> int:
        return int(sum((roles == Role.TRAINABLE).sum() for roles in self.roles))

    def trainable(self, layer: int) -> np.ndarray:
        """Expert ids trained in this layer, ascending (int64)."""
        return np.flatnonzero(self.roles[layer] == Role.TRAINABLE)

    def frozen(self, layer: int) -> np.ndarray:
        """Expert ids held but not trained in this layer, ascending (int64)."""
        return np.flatnonzero(self.roles[layer] == Role.FROZEN)

    def groups(self, layer: int) -> tuple[MergedGroup, ...]:
        """The merged experts of this layer, in slot order."""
        return self.merged[layer] if self.merged else ()

    def resident(self, layer: int) -> np.ndarray:
        """Expert ids that are here as themselves, in slot order, int64: trainable ascending, then frozen ascending."""
        return np.concatenate([self.trainable(layer), self.frozen(layer)])

    def num_slots(self, layer: int) -> int:
        """Experts in memory of this layer: S, merged groups included."""
        return len(self.resident(layer)) + len(self.groups(layer))

    def slots(self, layer: int) -> np.ndarray:
        """Slot of each expert, (E,) int64; members of a group share one; -1 where absent."""
        slots = np.full(len(self.roles[layer]), -1, dtype=np.int64)
        resident = self.resident(layer)
        slots[resident] = np.arange(len(resident))
        for slot, group in enumerate(self.groups(layer), start=len(resident)):
            slots[list(group.experts)] = slot
        return slots

    def resident_keys(self) -> list[tuple[int, int]]:
        """All (layer, expert) whose weights the device needs: on it as themselves, or within a merged expert."""
        return [
            (layer, int(expert))
            for layer, roles in enumerate(self.roles)
            for expert in np.flatnonzero(roles != Role.ABSENT)
        ]

    def to_dict(self) -> dict:
        """Plain numbers and lists, for JSON. `from_dict` is the inverse."""
        groups = [[dataclasses.asdict(group) for group in self.groups(layer)] for layer in range(self.num_layers)]
        return {"roles": [roles.tolist() for roles in self.roles], "merged": groups if any(groups) else []}

    @classmethod
    def from_dict(cls, data: dict) -> ExpertPlan:
        """Inverse of `to_dict`. Raises ValueError on a value that is no role, or groups that do not fit the roles."""
        return cls(
            tuple(np.asarray(row, dtype=np.int8) for row in data["roles"]),
            tuple(
                tuple(MergedGroup(tuple(group["experts"]), tuple(group["weights"])) for group in groups)
                for groups in data["merged"]
            ),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((tuple(roles.tobytes() for roles in self.roles), self.merged if any(self.merged) else ()))


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """Router statistics of one MoE layer over ``num_tokens`` tokens. Every array is float64 (E,).

    With G_e(x) the router's probability of expert e for token x:
    """

    num_tokens: int
    tokens_per_expert: np.ndarray
    """Tokens whose top-k holds e."""
    gate_sum: np.ndarray
    """Sum over tokens of G_e."""
    gate_max: np.ndarray
    """Maximum over tokens of G_e."""
    gate_log_sum: np.ndarray
    """Sum over tokens of G_e ln G_e (<= 0)."""
    gate_complement_log_sum: np.ndarray
    """Sum over tokens of (1 - G_e) ln (1 - G_e) (<= 0)."""
    routed_gate_sum: np.ndarray
    """Sum of the top-k weight that the layer really multiplies with; 0 outside the top-k."""
    attention_sum: np.ndarray | None = None
    """Sum over the tokens routed to e of the attention that each receives; None where it was not recorded.

    That of a token is the mean over heads and over the queries that can see it of its column of the attention matrix:
    causal masks would otherwise favour early tokens."""

    @property
    def num_experts(self) -> int:
        return len(self.tokens_per_expert)

    @property
    def mean_gate(self) -> np.ndarray:
        """Mean router probability of each expert, (E,): the usage u(e) of HFedMoE (16). Zero without tokens."""
        return self.gate_sum / max(self.num_tokens, 1)

    @property
    def frequency(self) -> np.ndarray:
        """Share of tokens routed to each expert, (E,); sums to top-k."""
        return self.tokens_per_expert / max(self.num_tokens, 1)

    @property
    def mean_attention(self) -> np.ndarray | None:
        """Mean attention that tokens routed to each expert receive, (E,): a_e of Flux (2). Zero without tokens."""
        return None if self.attention_sum is None else self.attention_sum / np.maximum(self.tokens_per_expert, 1)

    def __add__(self, other: LayerProfile) -> LayerProfile:
        """The record of both token sets. Raises ValueError where only one of them has attention."""
        if (self.attention_sum is None) != (other.attention_sum is None):
            raise ValueError("one record has the attention that tokens received, the other has not")
        return LayerProfile(
            num_tokens=self.num_tokens + other.num_tokens,
            tokens_per_expert=self.tokens_per_expert + other.tokens_per_expert,
            gate_sum=self.gate_sum + other.gate_sum,
            gate_max=np.maximum(self.gate_max, other.gate_max),
            gate_log_sum=self.gate_log_sum + other.gate_log_sum,
            gate_complement_log_sum=self.gate_complement_log_sum + other.gate_complement_log_sum,
            routed_gate_sum=self.routed_gate_sum + other.routed_gate_sum,
            attention_sum=None if self.attention_sum is None else self.attention_sum + other.attention_sum,
        )


@dataclasses.dataclass(frozen=True)
class ActivationProfile:
    """Router statistics of a whole model: one `LayerProfile` per MoE layer. A few kilobytes."""

    layers: tuple[LayerProfile, ...]

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        return tuple(layer.num_experts for layer in self.layers)

    @property
    def num_tokens(self) -> int:
        return self.layers[0].num_tokens if self.layers else 0

    def __add__(self, other: ActivationProfile) -> ActivationProfile:
        return ActivationProfile(tuple(a + b for a, b in zip(self.layers, other.layers, strict=True)))

    def to_dict(self) -> dict:
        """Plain numbers and lists, for JSON. `from_dict` is the inverse."""
        return {
            "layers": [
                {
                    field.name: value.tolist() if isinstance(value := getattr(layer, field.name), np.ndarray) else value
                    for field in dataclasses.fields(LayerProfile)
                }
                for layer in self.layers
            ]
        }

    @classmethod
    def from_dict(cls, data: dict) -> ActivationProfile:
        return cls(
            tuple(
                LayerProfile(
                    **{
                        name: np.asarray(value, dtype=np.float64) if isinstance(value, list) else value
                        for name, value in layer.items()
                    }
                )
                for layer in data["layers"]
            )
        )
