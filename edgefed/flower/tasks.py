"""What a ServerApp and a device say to each other, apart from the tensors.

    query.join   -> Introduction
    train        RoundTask, blobs -> RoundReply: the blobs that are still missing, or the update of the round
    query.end    the run is over

A round is one `RoundTask`, sent again with more blobs until the device has trained: a device learns only from its
activation profile which experts it needs. A repeated task has no further effect.
"""

from __future__ import annotations

from typing import Literal

from edgefed.errors import EdgefedError
from edgefed.protocol.messages import (
    Assignment,
    DeviceInfo,
    ErrorReply,
    Manifest,
    Message,
    RunConfig,
    UpdateMeta,
)

JOIN, TRAIN, END = "query.join", "train", "query.end"
"""Flower's message types."""


class Introduction(Message, frozen=True):
    """A device that can take part, as `edgefed.protocol.messages.Register` describes it, or why it cannot."""

    name: str = ""
    memory_bytes: int = 0
    num_examples: int = 0
    device: DeviceInfo | None = None
    error: ErrorReply | None = None


class RoundTask(Message, frozen=True):
    """Train in the round of ``assignment`` as ``client_id``, from ``manifest``."""

    run: RunConfig
    manifest: Manifest
    assignment: Assignment
    client_id: str
    attempt: int


class RoundReply(Message, frozen=True):
    """State of a round. "needs": hashes of blobs, in ``missing``; "trained": ``meta`` describes the update.

    ``resident``: blobs of the round that the device keeps for the next one. ``update``: path of the update on the
    device; the ServerApp gets its tensors instead.
    """

    status: Literal["needs", "trained", "failed"]
    missing: tuple[str, ...] = ()
    meta: UpdateMeta | None = None
    resident: tuple[str, ...] = ()
    update: str = ""
    error: ErrorReply | None = None


class Ended(Message, frozen=True):
    """Answer to `END`."""


def failed(error: EdgefedError) -> RoundReply:
    """The reply of a device that cannot train the round."""
    return RoundReply(status="failed", error=describe(error))


def describe(error: EdgefedError) -> ErrorReply:
    """An error for the other side."""
    return ErrorReply(code=error.code, message=str(error), remedy=error.remedy)
