"""Every message on the wire, as msgspec structs in JSON.

Sizes are bytes, times are seconds, shapes are lists. Decoding is strict: a wrong type or a missing field raises
`MalformedMessage`. Unknown fields are ignored, so that a newer version may add some.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edgefed.errors import EdgefedError, MalformedMessage, ProtocolError, all_errors
from edgefed.protocol.comparison import Comparison
from edgefed.protocol.privacy import PrivacyConfig, PrivacyStatus
from edgefed.protocol.server_optimizer import ServerOptimizer
from edgefed.protocol.training import TrainingConfig as TrainingConfig

UNIT_KINDS = ("dense", "router", "expert")
NEURON_TABLE, NEURON_INDEX = "neurons", "neurons.index"
"""Tensors of an expert whose slices are exchanged (`protocol.slices`): a row per neuron (I, C), and rows sent (W,)."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every message: immutable, fields by name."""


class TensorInfo(Message, frozen=True):
    """One tensor of a unit. ``dtype`` is a safetensors name: F32, BF16, F16, ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class UnitInfo(Message, frozen=True, kw_only=True):
    """The smallest part of a model that is downloaded, trained and averaged on its own.

    One expert, one router, one dense tensor, or the LoRA adapter of one of these. ``key`` is unique in a model, e.g.
    ``model.layers.0.mlp.experts.3``; the key of an adapter ends in ``:lora``. ``kind`` is one of `UNIT_KINDS`.
    ``layer`` is the ordinal of the MoE layer (0..L-1), -1 for dense units; ``expert`` is -1 unless
    ``kind == "expert"``. The unit's bytes are a safetensors file, named by its SHA-256; ``sha256`` and ``size_bytes``
    are empty until the unit is stored in a run.
    """

    key: str
    kind: str
    layer: int = -1
    expert: int = -1
    trainable: bool
    tensors: tuple[TensorInfo, ...] = ()
    sha256: str = ""
    size_bytes: int = 0


class FileInfo(Message, frozen=True):
    """A small file beside the weights: config.json, tokenizer.json, ..."""

    name: str
    sha256: str
    size_bytes: int


class Manifest(Message, frozen=True):
    """The global model at the start of one round: which bytes belong to which unit."""

    run_id: str
    server_round: int
    experts_per_layer: tuple[int, ...]
    units: tuple[UnitInfo, ...]
    files: tuple[FileInfo, ...]


class RunConfig(Message, frozen=True):
    """Configuration of a run; it never changes."""

    run_id: str
    model: str
    method: str
    method_options: dict[str, float | int | str | bool]
    rounds: int
    seed: int
    training: TrainingConfig
    tokenizer: str = ""
    """Source of the tokenizer of a shared text extractor; its files are in the manifest."""
    privacy: PrivacyConfig | None = None
    server_optimizer: ServerOptimizer | None = None
    """What makes the next model from the aggregate of a round; None: that is the next model."""
    compression: str = "none"
    """How updates are sent, one of `frames.COMPRESSIONS`."""
    pace: float = 0.0
    """A device trains what it can exchange in this multiple of the fleet's time (`methods.pace`); 0: no limit."""


class DeviceInfo(Message, frozen=True):
    """Description of a device for `edgefed status`; None for what its sensors do not report. No identifiers.

    ``kind``: "discrete", "unified" or "cpu". ``trains_on``: "cpu" or "cuda". ``profile``: id of the shipped device
    profile that it matches, or "". ``budget_bytes``: memory that it can use now; ``ideal_budget_bytes``: with no other
    program running; ``budget_origin``: source of these numbers. ``total_bytes``: of the memory that the model is in.
    """

    name: str
    kind: str
    trains_on: str
    profile: str = ""
    total_bytes: int | None = None
    budget_bytes: int | None = None
    ideal_budget_bytes: int | None = None
    budget_origin: str = ""
    power_mode: str = ""


class Register(Message, frozen=True):
    """First message of an agent, repeated after every reconnect; the same ``client_id`` is the same client.

    ``client_key`` is a secret that the agent drew; later requests carry it in the header `routes.CLIENT_KEY_HEADER`.
    ``instance`` is the random name of the agent's process (`routes.INSTANCE_HEADER`). ``memory_bytes`` is the budget
    that the device starts with.
    """

    protocol_version: int
    client_id: str
    client_key: str
    name: str
    memory_bytes: int
    expert_share: float
    compute_share: float
    num_examples: int
    edgefed_version: str
    device: DeviceInfo | None = None
    instance: str = ""


class Heartbeat(Message, frozen=True):
    """Activity of an agent, which keeps it live. ``fraction`` is 0..1, ``budget_bytes`` its memory as last measured."""

    phase: str
    fraction: float
    server_round: int
    budget_bytes: int | None = None


class ExpertReport(Message, frozen=True):
    """Report of a client about one expert that was resident in a round.

    ``usage``: mean router probability u_c(e), HFedMoE (16). ``importance``: s_c(e), HFedMoE (5). ``steps``: optimizer
    steps that changed it. ``tokens``: tokens that it was trained on.
    """

    layer: int
    expert: int
    usage: float
    importance: float
    steps: int
    tokens: int


class ExpertSurvey(Message, frozen=True):
    """Report of a client to a method that assigns experts: numbers per layer and expert, None where unknown.

    ``utility``: u_c(e) of Flux (arXiv 2508.19078), measured in this round. ``frequency``: share of the client's tokens
    routed to e. ``tune_slots``: number of experts that can be resident unmerged. ``train_slots``: number of experts
    that can train within its memory. ``upload_bytes_per_s``, ``download_bytes_per_s``: rates of its transfers.
    In a paced run ``tune_slots`` is the number that it would train, and only the rates are known beside it.
    """

    utility: tuple[tuple[float | None, ...], ...]
    frequency: tuple[tuple[float, ...], ...]
    tune_slots: int
    train_slots: int | None = None
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None


class UpdateMeta(Message, frozen=True):
    """Completes an upload, named by ``(client_id, server_round, attempt)``. Sending it again has no further effect.

    ``metrics`` are numbers for the ledger: losses, seconds, bytes. ``survey``: see `ExpertSurvey`. ``lora_rank``: of
    its adapters (`protocol.ranks`); 0: the rank of the run.
    """

    client_id: str
    server_round: int
    attempt: int
    sha256: str
    size_bytes: int
    num_examples: int
    num_tokens: int
    experts: tuple[ExpertReport, ...]
    metrics: dict[str, float]
    survey: ExpertSurvey | None = None
    lora_rank: int = 0


class Leave(Message, frozen=True):
    """The client leaves; the round does not wait for it."""

    reason: str


class Registered(Message, frozen=True):
    """Answer to `Register`."""

    run: RunConfig
    heartbeat_s: float


class HeartbeatReply(Message, frozen=True):
    """Answer to `Heartbeat`. ``wanted``: hashes of blobs that the server has lost; a client that has one sends it."""

    wanted: tuple[str, ...] = ()


class Wait(Message, frozen=True, tag="wait"):
    """No work yet; ask again."""

    retry_after_s: float
    reason: str


class ExpertAssignment(Message, frozen=True):
    """Experts of a client as (layer, expert), the most useful first.

    It trains ``tune``, and keeps ``explore`` unchanged to measure utilities. With less memory it takes the first ones.
    """

    tune: tuple[tuple[int, int], ...]
    explore: tuple[tuple[int, int], ...]


class Assignment(Message, frozen=True, tag="assignment"):
    """Train in this round, from the manifest of this round. ``deadline_s`` counts from now; None means none.

    ``seed`` depends on run and round; a device mixes in its name and data, so a repeated run gives the same results.
    ``experts``: only if the method assigns them, from a client's second round on. ``train_limit``: maximum number of
    experts to train; None: no limit.
    """

    server_round: int
    deadline_s: float | None
    seed: int
    experts: ExpertAssignment | None = None
    train_limit: int | None = None


class Finished(Message, frozen=True, tag="finished"):
    """The run is over, and the agent may stop. The manifest of ``server_round`` is the final model."""

    server_round: int
    reason: str


AssignmentReply = Wait | Assignment | Finished


class UploadState(Message, frozen=True):
    """How much of an upload has arrived. ``status``: "partial" or "accepted" (acknowledged and safe on disk).

    ``urls``: where to PUT the next pieces of ``piece_bytes``, from number ``offset // piece_bytes`` on; none: here.
    """

    offset: int
    status: str
    urls: tuple[str, ...] = ()
    piece_bytes: int = 0


class UpdateAccepted(Message, frozen=True):
    """Acknowledgement: the update is on disk and survives a crash. ``repeated``: it was acknowledged before."""

    server_round: int
    repeated: bool


class ErrorReply(Message, frozen=True):
    """An error of `edgefed.errors`. ``offset`` only with `OffsetMismatch`."""

    code: str
    message: str
    remedy: str
    offset: int | None = None


class ClientStatus(Message, frozen=True):
    """One client in `edgefed status`. ``last_seen_s`` is seconds ago; ``memory_bytes`` its newest budget."""

    client_id: str
    name: str
    state: str
    phase: str
    fraction: float
    memory_bytes: int
    expert_share: float
    rounds_done: int
    uploaded_bytes: int
    downloaded_bytes: int
    last_seen_s: float
    metrics: dict[str, float]
    device: DeviceInfo | None = None
    comparison: Comparison | None = None


class SetAside(Message, frozen=True):
    """An accepted update that did not count in its round, and why."""

    client_id: str
    name: str
    reason: str


class RoundStatus(Message, frozen=True):
    """One finished round in `edgefed status`. ``updates`` counted; ``set_aside`` were accepted, but did not.

    ``undone``: the first of the rounds that this one undid, because the held-out loss had jumped, or None. ``damaged``:
    keys of units that stayed as they were, because the server's disk had damaged them.
    """

    server_round: int
    participants: int
    updates: int
    seconds: float
    uploaded_bytes: int
    experts_changed: int
    metrics: dict[str, float]
    set_aside: tuple[SetAside, ...] = ()
    undone: int | None = None
    damaged: tuple[str, ...] = ()
    privacy: PrivacyStatus | None = None
    downloaded_bytes: int = 0


class Status(Message, frozen=True):
    """Answer to GET status. ``state``: "waiting", "training", "aggregating" or "finished"."""

    run: RunConfig
    state: str
    server_round: int
    min_clients: int
    quorum: int
    deadline_s: float | None
    updates_received: int
    clients: tuple[ClientStatus, ...]
    history: tuple[RoundStatus, ...]
    memory_peak_bytes: int


T = TypeVar("T")


def encode_message(message: object) -> bytes:
    """Encode a message as JSON. NaN and infinity become null, which a strict decoder refuses."""
    return msgspec.json.encode(message)


def decode_message(data: bytes, kind: type[T]) -> T:
    """Decode JSON into ``kind``. Raises MalformedMessage with the position of the first error."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessage(f"invalid {getattr(kind, '__name__', 'assignment reply')} message: {error}") from error


def encode_error(error: EdgefedError) -> bytes:
    """Encode an error for the wire."""
    return encode_message(ErrorReply(code=error.code, message=str(error), remedy=error.remedy, offset=error.offset))


def decode_error(data: bytes) -> EdgefedError:
    """Turn an error reply into the exception it was. An unknown code becomes a ProtocolError."""
    reply = decode_message(data, ErrorReply)
    kind = all_errors().get(reply.code, ProtocolError)
    return kind(reply.message, remedy=reply.remedy, offset=reply.offset)
