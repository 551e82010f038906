"""What one client did in one round, as far as it costs time: the facts between the trainer and the virtual clock.

Numbers are of the model that was trained; `edgefed.simulation.cost_shape` turns them into those of the model that is
charged. Everything here is counted, nothing is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgefed.costs.step_setup import StepSetup


@dataclasses.dataclass(frozen=True)
class RoundWork:
    """One client's round.

    Per MoE layer: ``held`` slots in memory (one for a merged group), ``trainable`` of them that train, ``groups`` of merged
    experts and ``members`` that went into them, ``trainable_pairs`` share of the (token, expert) pairs that trainable experts
    computed. ``setup``: how a step was done. ``steps`` with ``tokens`` in all.

    ``profile_tokens`` went forward through all experts, stored as ``profile_storage`` (None: the model's dtype), each
    expert read ``profile_reads`` times from disk; ``waiting_profile_tokens`` did after the upload, for the next round.
    ``explored_tokens`` went forward to measure utilities, ``evaluated_tokens`` for the held-out loss. ``compares``:
    whether all experts were compared with each other, to be merged. ``offloads``: experts stay in host memory, and come
    when a token needs them.

    ``down`` and ``up``: bytes by kind of unit (`cost_shape.byte_kind`), ``waiting_down`` of those downloaded only for a
    profile after the upload.
    """

    held: tuple[int, ...]
    trainable: tuple[int, ...]
    trainable_pairs: tuple[float, ...]
    setup: StepSetup
    steps: int
    tokens: int
    groups: tuple[int, ...] = ()
    members: tuple[int, ...] = ()
    profile_tokens: int = 0
    profile_storage: str | None = None
    profile_reads: int = 1
    waiting_profile_tokens: int = 0
    explored_tokens: int = 0
    evaluated_tokens: int = 0
    compares: bool = False
    offloads: bool = False
    down: Mapping[str, int] = dataclasses.field(default_factory=dict)
    up: Mapping[str, int] = dataclasses.field(default_factory=dict)
    waiting_down: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict:
        """For JSON. `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping) -> RoundWork:
        """Raises KeyError, TypeError, ConfigError on what `to_dict` did not write."""
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists, "setup": StepSetup(**data["setup"])})
