"""What the store keeps of clients, rounds and updates."""

from __future__ import annotations

import dataclasses

from edgefed.aggregator.rounds import Phase
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.messages import DeviceInfo, ExpertSurvey, UpdateMeta

MOMENTS = "moments:"
"""Begin of the key of a unit that holds moments of the server optimizer. Manifests have none of them."""


@dataclasses.dataclass
class ClientRecord:
    """What is stored of a client. ``key_sha256``: hash of its secret. ``joined``: it has not left since.

    ``lost``: it fell silent. ``last_seen_at``: when it was last heard of, as of its leaving, its falling silent or the
    stop of the server; seconds since the epoch. ``survey``: its reports about experts up to the last folded round.
    ``changed_bytes``: those among ``downloaded_bytes`` that were changes of blobs, which saved it ``saved_bytes``.
    ``held_out``: (round, held-out loss of that round's global model), as it last reported.
    """

    client_id: str
    name: str
    key_sha256: str
    memory_bytes: int
    expert_share: float
    compute_share: float
    num_examples: int
    joined: bool = True
    rounds_done: int = 0
    uploaded_bytes: int = 0
    downloaded_bytes: int = 0
    changed_bytes: int = 0
    saved_bytes: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    device: DeviceInfo | None = None
    survey: ExpertSurvey | None = None
    lost: bool = False
    last_seen_at: float | None = None
    comparison: Comparison | None = None
    held_out: tuple[int, float] | None = None


@dataclasses.dataclass(frozen=True)
class RoundRecord:
    """The newest round. ``opened_at`` is wall-clock seconds, None before it opened."""

    server_round: int
    phase: Phase
    participants: tuple[str, ...]
    opened_at: float | None


@dataclasses.dataclass(frozen=True)
class UpdateRecord:
    """An acknowledged update. ``meta`` is None after its round was folded; its bytes and reports are then deleted."""

    server_round: int
    client_id: str
    attempt: int
    sha256: str
    size_bytes: int
    meta: UpdateMeta | None

    @property
    def file_name(self) -> str:
        """Its file in the folder ``updates``. The client id was checked at registration."""
        return f"{self.client_id}-{self.server_round}-{self.attempt}.safetensors"
