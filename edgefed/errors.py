"""Every error that edgefed raises on purpose, in one tree.

    EdgefedError
    |- ConfigError            a setting is wrong or missing
    |  |- UnknownMethod       no federated method of that name
    |  |- UnknownProfile      no device profile of that name
    |  `- DeviceNotFound      no device of that name or number here
    |- ModelError             the model cannot be used
    |  |- ModelNotFound       no checkpoint there
    |  |- UnsupportedArchitecture   transformers loads it, edgefed cannot take its experts apart
    |  `- CheckpointError     tensors are missing, or do not fit the configuration
    |- DataError              the training text cannot be used
    |- BudgetTooSmall         the device cannot hold one expert per layer
    |  `- OutOfMemory          the memory ran out, and nothing is left to shrink
    |- DeviceLost             the GPU stopped answering
    |- TrainingDiverged       the loss or a weight is not a number any more
    |- StorageError           files and disks
    |  |- DiskFull            no room for a blob, an update or a checkpoint
    |  |- StateLocked         another process uses this state folder
    |  `- StateCorrupt        the state folder is not what was written
    |- NetworkError           sockets
    |  |- ServerUnreachable   nothing answers at that address
    |  |- PortInUse           somebody else listens there
    |  `- MissingToken        a server that others can reach needs a token
    `- ProtocolError          what one side sent, the other refuses
       |- MalformedMessage    not the message that belongs there
       |- VersionMismatch     the two sides speak different protocol versions
       |- Unauthorized        token or client key is wrong
       |- UnknownClient       never registered, or registered with another run
       |- NotFound            no such blob, round or upload
       |- RoundClosed         the round is over: the update is too late
       |- OffsetMismatch      an upload continues from somewhere else
       |- UpdateConflict      another update of this client was acknowledged before
       |- UpdateTooLarge      more bytes than the trainable model has
       |- InvalidUpdate       unknown tensor, wrong shape or type, NaN
       `- ChecksumMismatch    the bytes that arrived are not the bytes that were sent

A leaf has a ``code`` (stable, for programs), an ``exit_status`` (of the command line), an ``http_status``
(of the aggregator) and a ``remedy`` (what to do). The message says what was asked and what was found.
"""

from __future__ import annotations

from typing import ClassVar


class EdgefedError(Exception):
    """Base of the tree. ``str(error)`` is one sentence; ``error.remedy`` says what to do next."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    default_remedy: ClassVar[str] = "Run again with --log-level debug and report what it prints."

    def __init__(self, message: str, *, remedy: str | None = None):
        super().__init__(message)
        self.remedy = remedy or self.default_remedy


class ConfigError(EdgefedError):
    code, exit_status, http_status = "config", 2, 400
    default_remedy = "Correct the option; `edgefed COMMAND --help` lists what is allowed."


class UnknownMethod(ConfigError):
    code = "unknown-method"
    default_remedy = "Choose one of the methods that `edgefed serve --help` lists."


class UnknownProfile(ConfigError):
    code = "unknown-profile"
    default_remedy = "Choose one of the profiles that `edgefed bench --list-profiles` prints, or pass a TOML file."


class DeviceNotFound(ConfigError):
    code = "device-not-found"
    default_remedy = "See `edgefed doctor` for the devices of this machine; leave --device out to take the best one."


class ModelError(EdgefedError):
    code, exit_status = "model", 3
    default_remedy = "Pass a local Hugging Face checkpoint folder of a Mixture-of-Experts model, or `tiny`."


class ModelNotFound(ModelError):
    code = "model-not-found"


class UnsupportedArchitecture(ModelError):
    code = "unsupported-architecture"
    default_remedy = (
        "Use a model whose experts follow transformers' experts interface, such as OLMoE, Mixtral, Qwen2-MoE, "
        "Qwen3-MoE, DeepSeek-V3 or GPT-OSS."
    )


class CheckpointError(ModelError):
    code = "checkpoint"
    default_remedy = (
        "Download or write the checkpoint again; config.json and the safetensors files must belong together."
    )


class DataError(EdgefedError):
    code, exit_status = "data", 4
    default_remedy = "Pass a .txt file, or a .jsonl file with one record a line; the README shows the record forms."


class BudgetTooSmall(EdgefedError):
    code, exit_status = "budget-too-small", 5
    default_remedy = (
        "Raise --memory or --experts, shorten --sequence-length or --batch-size on the server, or use a smaller model."
    )


class OutOfMemory(BudgetTooSmall):
    code = "out-of-memory"
    default_remedy = "Close other programs, lower --memory or --experts, or use a smaller model."


class DeviceLost(EdgefedError):
    code, exit_status = "device-lost", 10
    default_remedy = "Look into the kernel's log (dmesg, Xid), reboot or reload the driver, then join again."


class TrainingDiverged(EdgefedError):
    code, exit_status = "training-diverged", 6
    default_remedy = "Lower the learning rate of the run (`edgefed serve --learning-rate`)."


class StorageError(EdgefedError):
    code, exit_status = "storage", 7
    default_remedy = "Check the folder's permissions and its disk."


class DiskFull(StorageError):
    code, http_status = "disk-full", 507
    default_remedy = "Free space on that disk; what was acknowledged is safe and the transfer continues by itself."


class StateLocked(StorageError):
    code = "state-locked"
    default_remedy = "Stop the other process, or give this one its own --state folder."


class StateCorrupt(StorageError):
    code = "state-corrupt"
    default_remedy = "Restore the state folder from a copy, or start a new one with another --state."


class NetworkError(EdgefedError):
    code, exit_status = "network", 8
    default_remedy = "Check the address and the network."


class ServerUnreachable(NetworkError):
    code, http_status = "server-unreachable", 503
    default_remedy = (
        "Check the address, and that `edgefed serve` runs there; a client keeps trying by itself once it has joined."
    )


class PortInUse(NetworkError):
    code = "port-in-use"
    default_remedy = "Choose another --port (0 takes any free one), or stop the process that listens there."


class MissingToken(NetworkError):
    code = "missing-token"
    default_remedy = "Set --token or EDGEFED_TOKEN on both sides, or serve on 127.0.0.1."


class ProtocolError(EdgefedError):
    code, exit_status, http_status = "protocol", 9, 400
    default_remedy = "Use the same edgefed version on both sides."


class MalformedMessage(ProtocolError):
    code = "malformed-message"


class VersionMismatch(ProtocolError):
    code, http_status = "version-mismatch", 426


class Unauthorized(ProtocolError):
    code, http_status = "unauthorized", 401
    default_remedy = (
        "Pass the server's token with --token or EDGEFED_TOKEN; a client's --state folder belongs to one device."
    )


class UnknownClient(ProtocolError):
    code, http_status = "unknown-client", 404
    default_remedy = "Register first: `edgefed join` does so by itself."


class NotFound(ProtocolError):
    code, http_status = "not-found", 404
    default_remedy = "Ask for the current manifest again: the server may have moved on to another round."


class RoundClosed(ProtocolError):
    code, http_status = "round-closed", 410
    default_remedy = "Nothing to do: the client drops this update and takes part in the next round."


class OffsetMismatch(ProtocolError):
    code, http_status = "offset-mismatch", 409
    default_remedy = "Ask for the upload's offset and continue there."


class UpdateConflict(ProtocolError):
    code, http_status = "update-conflict", 409
    default_remedy = "Nothing to do: the first acknowledged update of a round counts."


class UpdateTooLarge(ProtocolError):
    code, http_status = "update-too-large", 413
    default_remedy = "Send only tensors that the manifest marks as trainable."


class InvalidUpdate(ProtocolError):
    code, http_status = "invalid-update", 422
    default_remedy = "Train again from the current global model; the round goes on without this update."


class ChecksumMismatch(ProtocolError):
    code, http_status = "checksum-mismatch", 422
    default_remedy = "Send the file again from the start."


def first_line(error: BaseException, limit: int = 200) -> str:
    """First line with text of an exception's message, at most ``limit`` characters; the type's name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def all_errors() -> dict[str, type[EdgefedError]]:
    """Map each code to its class, the whole tree. Used to turn a server's answer back into an error."""
    found: dict[str, type[EdgefedError]] = {}
    pending: list[type[EdgefedError]] = [EdgefedError]
    while pending:
        kind = pending.pop()
        found[kind.code] = kind
        pending.extend(kind.__subclasses__())
    return found
