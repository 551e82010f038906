"""Every error that edgefed raises on purpose, in one tree.

    EdgefedError
    |- ConfigError            a setting is invalid or missing
    |  |- UnknownMethod       no federated method has this name
    |  |- UnknownProfile      no device profile has this name
    |  `- DeviceNotFound      this machine has no such device
    |- ModelError             the model cannot be used
    |  |- ModelNotFound       no checkpoint was found
    |  |- UnsupportedArchitecture   transformers loads the model, but edgefed cannot separate its experts
    |  `- CheckpointError     tensors are missing or do not match the configuration
    |- DataError              the training text cannot be used
    |- BudgetTooSmall         the device cannot hold one expert per layer
    |  `- OutOfMemory          memory ran out and no fallback is left
    |- DeviceLost             the GPU stopped responding
    |- TrainingDiverged       the loss or a weight is NaN or infinite
    |- ProcessFailed          a child process of a local federation failed
    |- StorageError           a file or disk operation failed
    |  |- DiskFull            no space for a blob, an update or a checkpoint
    |  |- StateLocked         another process uses this state folder
    |  `- StateCorrupt        the state folder was changed or damaged
    |- NetworkError           a network operation failed
    |  |- ServerUnreachable   no server answers at this address
    |  |- ObjectStorageError  the object storage does not answer, or refuses
    |  |- PortInUse           another process listens on this port
    |  `- MissingToken        a server that other machines can reach needs a token
    `- ProtocolError          client and server do not agree
       |- MalformedMessage    a message is not of the expected form
       |- VersionMismatch     client and server use different protocol versions
       |- Unauthorized        the token, invitation, signature or client key is wrong
       |- StaleRequest        a signed request is too old, or was received before
       |- IdentityInUse       two processes use the identity of one client
       |- ServerFull          the server has as many clients as it takes
       |- UnknownClient       the client is not registered with this run
       |- NotFound            the blob, round or upload does not exist
       |- RoundClosed         the round is over, the update came too late
       |- OffsetMismatch      the upload must continue at another offset
       |- UpdateConflict      another update of this client was already accepted
       |- UpdateTooLarge      the update has more bytes than the trainable model
       |- InvalidUpdate       the update has an unknown tensor, a wrong shape or dtype, or NaN
       `- ChecksumMismatch    the received bytes differ from those sent

Each class has a ``code`` (stable, for programs), an ``exit_status`` (of the command line), an ``http_status`` (of the
aggregator) and a default ``remedy``. The message says what is wrong and what was found, the remedy what to do.

Messages and remedies name settings in backticks, as parameters of the Python API: `memory`, `expert_storage=full`.
The command line shows these as flags: --memory, --expert-storage full.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class EdgefedError(Exception):
    """Base of the tree. ``str(error)`` is one sentence; ``remedy`` says what to do next.

    ``offset``: with OffsetMismatch, the byte at which the upload must continue.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    default_remedy: ClassVar[str] = "Run again with `log_level=debug` and report the output."

    received_status: int = 0
    """HTTP status that the error arrived with; 0 if it arose in this process."""
    retry_after: str = ""
    """The ``Retry-After`` header that came with it."""
    foreign: bool = False
    """Whether something else than an edgefed server answered: a proxy, a login page, an untrusted certificate."""

    def __init__(self, message: str, *, remedy: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy or self.default_remedy
        self.offset = offset


class ConfigError(EdgefedError):
    """A setting is invalid or missing."""

    code, exit_status, http_status = "config", 2, 400
    default_remedy = "Correct the setting; the help of the command lists the allowed values."


class UnknownMethod(ConfigError):
    """No federated method has this name."""

    code = "unknown-method"
    default_remedy = "Choose a method that the message lists, or pass your own class as module:Class or file.py:Class."


class UnknownProfile(ConfigError):
    """No device profile has this name."""

    code = "unknown-profile"
    default_remedy = "Choose one of the profiles that `edgefed bench` lists (`list_profiles`), or pass a TOML file."


class DeviceNotFound(ConfigError):
    """This machine has no such device."""

    code = "device-not-found"
    default_remedy = (
        "Run `edgefed doctor` to see the devices of this machine, or leave out `device` to use the best one."
    )


class ModelError(EdgefedError):
    """The model cannot be used."""

    code, exit_status = "model", 3
    default_remedy = "Pass a local Hugging Face checkpoint folder of a Mixture-of-Experts model, or `tiny`."


class ModelNotFound(ModelError):
    """No checkpoint was found."""

    code = "model-not-found"


class UnsupportedArchitecture(ModelError):
    """Transformers loads the model, but edgefed cannot separate its experts."""

    code = "unsupported-architecture"
    default_remedy = (
        "Use a model whose experts follow transformers' experts interface, such as OLMoE, Mixtral, Qwen2-MoE, "
        "Qwen3-MoE, DeepSeek-V3 or GPT-OSS."
    )


class CheckpointError(ModelError):
    """Tensors are missing or do not match the configuration."""

    code = "checkpoint"
    default_remedy = (
        "Download or write the checkpoint again; config.json and the safetensors files must belong together."
    )


class DataError(EdgefedError):
    """The training text cannot be used."""

    code, exit_status = "data", 4
    default_remedy = (
        "Pass text as .txt, .jsonl, .json, .csv or .parquet, or a folder; the documentation shows the record formats."
    )


class BudgetTooSmall(EdgefedError):
    """The device cannot hold one expert per layer."""

    code, exit_status = "budget-too-small", 5
    default_remedy = (
        "Raise `memory` or `experts`, lower `sequence_length` or `batch_size` on the server, or use a smaller model."
    )


class OutOfMemory(BudgetTooSmall):
    """Memory ran out and no fallback is left."""

    code = "out-of-memory"
    default_remedy = "Close other programs, lower `memory` or `experts`, or use a smaller model."


class DeviceLost(EdgefedError):
    """The GPU stopped responding."""

    code, exit_status = "device-lost", 10
    default_remedy = "Check the kernel log (dmesg, Xid), reboot or reload the driver, then join again."


class TrainingDiverged(EdgefedError):
    """The loss or a weight is NaN or infinite."""

    code, exit_status = "training-diverged", 6
    default_remedy = "Lower `learning_rate` on the server."


class ProcessFailed(EdgefedError):
    """A child process of a local federation failed; the message ends with the last lines of its log."""

    code, exit_status = "process-failed", 11
    default_remedy = "Read the logs that the federation's folder keeps for each process."


class StorageError(EdgefedError):
    """A file or disk operation failed."""

    code, exit_status = "storage", 7
    default_remedy = "Check the permissions of the folder and its disk."


class DiskFull(StorageError):
    """No space for a blob, an update or a checkpoint."""

    code, http_status = "disk-full", 507
    default_remedy = "Free space on this disk. Acknowledged data is safe. A transfer goes on; run other commands again."


class StateLocked(StorageError):
    """Another process uses this state folder."""

    code = "state-locked"
    default_remedy = "Stop the other process, or give this one its own `state` folder."


class StateCorrupt(StorageError):
    """The state folder was changed or damaged."""

    code = "state-corrupt"
    default_remedy = "Restore the state folder from a copy, or start with another `state` folder."


class NetworkError(EdgefedError):
    """A network operation failed."""

    code, exit_status = "network", 8
    default_remedy = "Check the address and the network."


class ServerUnreachable(NetworkError):
    """No server answers at this address."""

    code, http_status = "server-unreachable", 503
    default_remedy = (
        "Check the address, and that `edgefed serve` runs there. A client that has joined keeps retrying by itself."
    )


class ObjectStorageError(NetworkError):
    """The object storage that holds blobs and updates does not answer, or refuses."""

    code, http_status = "object-storage", 502
    default_remedy = (
        "Check that the bucket exists, and the server's credentials and endpoint. Nothing is lost: clients and server "
        "try again by themselves."
    )


class PortInUse(NetworkError):
    """Another process listens on this port."""

    code = "port-in-use"
    default_remedy = "Choose another `port` (0 takes any free one), or stop the process that uses it."


class MissingToken(NetworkError):
    """A server that other machines can reach needs a token."""

    code = "missing-token"
    default_remedy = "Set `token` or EDGEFED_TOKEN on both sides, set `invite_only`, or serve on 127.0.0.1."


class ProtocolError(EdgefedError):
    """Client and server do not agree."""

    code, exit_status, http_status = "protocol", 9, 400
    default_remedy = "Use the same edgefed version on both sides."


class MalformedMessage(ProtocolError):
    """A message is not of the expected form."""

    code = "malformed-message"


class VersionMismatch(ProtocolError):
    """Client and server use different protocol versions."""

    code, http_status = "version-mismatch", 426


class Unauthorized(ProtocolError):
    """The token, invitation, signature or client key is wrong."""

    code, http_status = "unauthorized", 401
    default_remedy = (
        "Set `token` or EDGEFED_TOKEN to the server's token. The `state` folder of a client belongs to one device."
    )


class StaleRequest(ProtocolError):
    """A signed request is too old, or was received before."""

    code, http_status = "stale-request", 425
    default_remedy = "No action needed: the client repeats it by the server's clock."


class IdentityInUse(ProtocolError):
    """Two processes use the identity of one client, for example from a copied state folder."""

    code, http_status = "identity-in-use", 409
    default_remedy = "Stop one of the two, or give this device an identity of its own with `new_identity`."


class ServerFull(ProtocolError):
    """The server has as many clients as it takes."""

    code, http_status = "server-full", 503
    default_remedy = "Wait until others have left, or raise `max_clients` on the server."


class UnknownClient(ProtocolError):
    """The client is not registered with this run."""

    code, http_status = "unknown-client", 404
    default_remedy = "Register first. `edgefed join` does so by itself."


class NotFound(ProtocolError):
    """The blob, round or upload does not exist."""

    code, http_status = "not-found", 404
    default_remedy = "Request the current manifest: the server may have started another round."


class RoundClosed(ProtocolError):
    """The round is over, the update came too late."""

    code, http_status = "round-closed", 410
    default_remedy = "No action needed: the client drops this update and takes part in the next round."


class OffsetMismatch(ProtocolError):
    """The upload must continue at another offset."""

    code, http_status = "offset-mismatch", 409
    default_remedy = "Request the offset of the upload and continue there."


class UpdateConflict(ProtocolError):
    """Another update of this client was already accepted."""

    code, http_status = "update-conflict", 409
    default_remedy = "No action needed: the first accepted update of a round counts."


class UpdateTooLarge(ProtocolError):
    """The update has more bytes than the trainable model."""

    code, http_status = "update-too-large", 413
    default_remedy = "Send only tensors that the manifest marks as trainable."


class InvalidUpdate(ProtocolError):
    """The update has an unknown tensor, a wrong shape or dtype, or NaN."""

    code, http_status = "invalid-update", 422
    default_remedy = "Train again from the current global model. The round continues without this update."


class ChecksumMismatch(ProtocolError):
    """The received bytes differ from those sent."""

    code, http_status = "checksum-mismatch", 422
    default_remedy = "Send the file again from the start."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'flux'?`` for a name like one of ``known``; empty if none is similar. To append to a sentence."""
    import difflib

    lower = {choice.lower(): choice for choice in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


def first_line(error: BaseException, limit: int = 200) -> str:
    """First line with text of an exception's message, at most ``limit`` characters; the type's name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:limit]


def all_errors() -> dict[str, type[EdgefedError]]:
    """Map each code of the tree to its class. Turns a server's reply back into an error."""
    found: dict[str, type[EdgefedError]] = {}
    pending: list[type[EdgefedError]] = [EdgefedError]
    while pending:
        kind = pending.pop()
        found[kind.code] = kind
        pending.extend(kind.__subclasses__())
    return found
