"""Every message that crosses the wire, as msgspec structs in JSON.

Three groups: what a *unit* of the global model is (`UnitInfo`, `Manifest`), what a client is told (`Registered`,
`Assignment`, `Wait`, `Finished`) and what it says (`Register`, `Heartbeat`, `UpdateMeta`, `Leave`).
Sizes are bytes, times are seconds, shapes are lists. Decoding is strict: a wrong type or a missing field is a
`MalformedMessage`, an unknown field is ignored so that a newer peer may say more.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edgefed.errors import EdgefedError, MalformedMessage, ProtocolError, all_errors

UNIT_KINDS = ("dense", "router", "expert")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every message: immutable, fields by name."""


# --- the global model -------------------------------------------------------------------------------------------


class TensorInfo(Message):
    """One tensor of a unit. ``dtype`` is a safetensors name: F32, BF16, F16, ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class UnitInfo(Message, kw_only=True):
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


class FileInfo(Message):
    """A small file beside the weights: config.json, tokenizer.json, ..."""

    name: str
    sha256: str
    size_bytes: int


class Manifest(Message):
    """The global model at the start of one round: which bytes belong to which unit."""

    run_id: str
    server_round: int
    experts_per_layer: tuple[int, ...]
    units: tuple[UnitInfo, ...]
    files: tuple[FileInfo, ...]


class TrainingConfig(Message):
    """What a client does locally in one round. ``experts``, ``router`` and ``attention``: "full", "lora" or "none"."""

    local_steps: int = 20
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    experts: str = "full"
    router: str = "full"
    attention: str = "none"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    missing: str = "renormalize"
    """Tokens routed to an absent expert: "renormalize" picks the next best resident one, "skip" leaves it out."""
    profile_tokens: int = 16384
    """Most tokens of the training text that a profile looks at; 0 means all."""
    evaluation_tokens: int = 4096
    """Most tokens of the held-out text that an evaluation looks at, before and after training; 0 means all."""


class RunConfig(Message):
    """What a run is; fixed from its first round to its last."""

    run_id: str
    model: str
    method: str
    method_options: dict[str, float | int | str | bool]
    rounds: int
    seed: int
    training: TrainingConfig
    tokenizer: str = ""
    """Where the tokenizer of a shared extractor of text came from; its files are the manifest's."""


# --- what a client says -----------------------------------------------------------------------------------------


class DeviceInfo(Message):
    """What a device says of itself, for `edgefed status`; None where its sensors do not tell. No identifiers.

    ``kind``: "discrete", "unified" or "cpu". ``trains_on``: "cpu" or "cuda". ``profile``: the shipped device profile
    that it matches, or "". ``budget_bytes`` is what it can afford now, ``ideal_budget_bytes`` with nothing else
    running, ``budget_origin`` where the numbers come from. ``total_bytes``: of the memory that the model lives in.
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


class Register(Message):
    """First message of an agent, repeated after every reconnect; the same ``client_id`` is the same client.

    ``client_key`` is a secret that the agent made; later requests carry it in the header `routes.CLIENT_KEY_HEADER`.
    ``memory_bytes`` is the budget that the device starts with.
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


class Heartbeat(Message):
    """What the agent is doing, for the aggregator's liveness and for `edgefed status`. ``fraction`` is 0..1.

    ``budget_bytes``: its memory budget as last measured, before the current round; None before the first time.
    """

    phase: str
    fraction: float
    server_round: int
    budget_bytes: int | None = None


class ExpertReport(Message):
    """What a client says of one expert that it held in a round.

    ``usage``: mean router probability u_c(e), HFedMoE (16). ``importance``: s_c(e), HFedMoE (5). ``steps``: optimizer
    steps that changed it. ``tokens``: tokens routed to it while it was trained.
    """

    layer: int
    expert: int
    usage: float
    importance: float
    steps: int
    tokens: int


class ExpertSurvey(Message):
    """What a client tells an aggregator that assigns experts: numbers per layer and expert.

    ``utility``: u_c(e) of Flux (arXiv 2508.19078), measured in this round, None where it was not. ``frequency``: share
    of the client's tokens routed to e. ``tune_slots``: experts that the client can hold as themselves, one by one.
    ``train_slots``: experts that its memory lets learn. ``upload_bytes_per_s``, ``download_bytes_per_s``: what its
    transfers reached. None where it does not know.
    """

    utility: tuple[tuple[float | None, ...], ...]
    frequency: tuple[tuple[float, ...], ...]
    tune_slots: int
    train_slots: int | None = None
    upload_bytes_per_s: float | None = None
    download_bytes_per_s: float | None = None


class UpdateMeta(Message):
    """Closes an upload. ``(client_id, server_round, attempt)`` names it; sending it twice has one effect.

    ``metrics`` are plain numbers for the ledger: losses, seconds, bytes. ``survey`` only where the method assigns
    experts.
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


class Leave(Message):
    """The client goes; the round does not wait for it."""

    reason: str


# --- what a client is told --------------------------------------------------------------------------------------


class Registered(Message):
    """Answer to `Register`."""

    run: RunConfig
    heartbeat_s: float


class Wait(Message, tag="wait"):
    """Nothing to do yet; ask again."""

    retry_after_s: float
    reason: str


class ExpertAssignment(Message):
    """What a client is to do with experts, as (layer, expert), the most useful first: ``tune`` them, or ``explore``:
    hold them unchanged and measure their utility again, as far as the method measures so many. A client that can hold
    fewer takes the first ones.
    """

    tune: tuple[tuple[int, int], ...]
    explore: tuple[tuple[int, int], ...]


class Assignment(Message, tag="assignment"):
    """Train in this round, from the manifest of this round. ``deadline_s`` counts from now; None means none.

    ``seed`` is that of the run and the round; a device mixes in its name and data, so that the same devices in the same
    run do the same again. ``experts``: only where the method assigns them, and from a client's second round on.
    """

    server_round: int
    deadline_s: float | None
    seed: int
    experts: ExpertAssignment | None = None


class Finished(Message, tag="finished"):
    """The run is over; the agent may stop. The manifest of ``server_round`` is the final model."""

    server_round: int
    reason: str


AssignmentReply = Wait | Assignment | Finished


class UploadState(Message):
    """How much of an upload has arrived. ``status``: "partial", "accepted" (acknowledged and safe on disk)."""

    offset: int
    status: str


class UpdateAccepted(Message):
    """The acknowledgement: the update is on disk and survives a crash. ``repeated``: it was already there."""

    server_round: int
    repeated: bool


class ErrorReply(Message):
    """An error of the tree in `edgefed.errors`, on the wire. ``offset`` only with `OffsetMismatch`."""

    code: str
    message: str
    remedy: str
    offset: int | None = None


# --- status -----------------------------------------------------------------------------------------------------


class ClientStatus(Message):
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


class RoundStatus(Message):
    """One finished round in `edgefed status`."""

    server_round: int
    participants: int
    updates: int
    seconds: float
    uploaded_bytes: int
    experts_changed: int
    metrics: dict[str, float]


class Status(Message):
    """Answer of GET status. ``state``: "waiting", "training", "aggregating" or "finished"."""

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

_encoder = msgspec.json.Encoder()


def encode_message(message: object) -> bytes:
    """Encode a message as JSON bytes. NaN and infinity become null, which a strict decoder then refuses."""
    return _encoder.encode(message)


def decode_message(data: bytes, kind: type[T]) -> T:
    """Decode JSON bytes into ``kind``. Raises MalformedMessage with the place of the first fault."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as fault:
        label = getattr(kind, "__name__", "assignment reply")
        raise MalformedMessage(f"expected a {label} message, found something else: {fault}") from fault


def encode_error(error: EdgefedError) -> bytes:
    """Encode an error of the tree for the wire."""
    return encode_message(ErrorReply(code=error.code, message=str(error), remedy=error.remedy, offset=error.offset))


def decode_error(data: bytes) -> EdgefedError:
    """Turn an error reply back into the exception it was. An unknown code becomes a plain ProtocolError."""
    reply = decode_message(data, ErrorReply)
    kind = all_errors().get(reply.code, ProtocolError)
    return kind(reply.message, remedy=reply.remedy, offset=reply.offset)
