"""Who and what may come in: pure checks of the small things that a client sends. Updates have `validate`."""

from __future__ import annotations

import hashlib
import re

import msgspec

from edgefed import __version__
from edgefed.errors import MalformedMessage, VersionMismatch
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.messages import DeviceInfo, Register

CLIENT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MIN_KEY_CHARACTERS = 16
MAX_TEXT_CHARACTERS = 256
MAX_NUMBER = 10**9 - 1
MAX_SIZE_BYTES = 2**53
"""Above any memory, and still exact in every JSON reader."""


def check_client_id(client_id: str) -> None:
    """Raise MalformedMessage unless the id is one that may name a file."""
    if CLIENT_ID.fullmatch(client_id) is None:
        raise MalformedMessage(f"client id {client_id[:80]!r} is not 1 to 64 letters, digits, _ or -")


def parse_number(text: str, what: str, most: int = MAX_NUMBER) -> int:
    """A number from an address. Raises MalformedMessage on anything but plain digits up to ``most``."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most):
        raise MalformedMessage(f"{what} is {text[:40]!r}, expected a number from 0 to {most}")
    return int(text)


def digest_bytes(text: str) -> bytes:
    """SHA-256 of a text, which may hold anything that a header can."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def digest(text: str) -> str:
    """SHA-256 in hexadecimal; of a client's key, only this is kept."""
    return digest_bytes(text).hex()


def is_text(text: str, most: int = MAX_TEXT_CHARACTERS) -> bool:
    """Whether a text may go into a log or a terminal: short, and without control characters."""
    return len(text) <= most and text.isprintable()


def check_register(message: Register) -> None:
    """Check a registration, without knowing any other. Raises VersionMismatch, MalformedMessage."""
    if message.protocol_version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the client speaks protocol {message.protocol_version} (edgefed {message.edgefed_version[:32]!r}), "
            f"this server {PROTOCOL_VERSION} (edgefed {__version__})"
        )
    check_client_id(message.client_id)
    wrong = [
        text
        for fine, text in (
            (
                len(message.client_key) >= MIN_KEY_CHARACTERS,
                f"client_key has fewer than {MIN_KEY_CHARACTERS} characters",
            ),
            (is_text(message.client_key), "client_key is too long or not printable"),
            (is_text(message.name), f"name {message.name[:80]!r} is too long or not printable"),
            (is_size(message.memory_bytes), f"memory_bytes is {message.memory_bytes}"),
            (0.0 <= message.expert_share <= 1.0, f"expert_share is {message.expert_share}, expected 0..1"),
            (
                0.0 < message.compute_share <= 1.0,
                f"compute_share is {message.compute_share}, expected above 0, up to 1",
            ),
            (0 <= message.num_examples <= 10**9, f"num_examples is {message.num_examples}"),
        )
        if not fine
    ]
    if message.device is not None:
        wrong += _device_faults(message.device)
    if wrong:
        raise MalformedMessage("; ".join(wrong))


def is_size(size_bytes: int) -> bool:
    """Whether a number can be a memory size."""
    return 0 <= size_bytes <= MAX_SIZE_BYTES


def _device_faults(device: DeviceInfo) -> list[str]:
    values = msgspec.structs.asdict(device)
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    sizes = {name: value for name, value in values.items() if isinstance(value, int)}
    faults = [f"device.{name} is too long or not printable" for name, text in texts.items() if not is_text(text)]
    faults += [f"device.{name} is {size}" for name, size in sizes.items() if not is_size(size)]
    return faults
