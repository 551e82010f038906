"""Signatures of requests. Each device has an Ed25519 key (RFC 8032), and signs what it asks for.

The header `routes.SIGNATURE_HEADER` has five words:

    PUBLIC_KEY  MILLISECONDS  NONCE  DIGEST  SIGNATURE

SIGNATURE is over the lines of `_signed_text`: the run, the method, the target as sent (path and query), the time, the
nonce, and the digest of the body: its SHA-256, or `STREAM` for an upload, whose hash is in the signed commit that
follows. Time and nonce make each request unique, so a recorded one cannot be sent again. Bytes are base64url without
padding. The functions that sign and verify load `cryptography` when they are used.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import re
import secrets

from edgefed.errors import MalformedMessage

CONTEXT = "edgefed-request-1"
STREAM = "stream"
KEY_BYTES = 32
NONCE_BYTES = 12
_HEADER = re.compile(r"([\w-]{43}) (\d{1,15}) ([\w-]{16}) ([0-9a-f]{64}|stream) ([\w-]{86})", re.ASCII)
_PUBLIC_KEY = re.compile(r"[\w-]{43}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The words of a signature header. ``milliseconds`` since the epoch, by the device's clock."""

    public_key: str
    milliseconds: int
    nonce: str
    digest: str
    signature: str


def new_key() -> str:
    """A new private key: 32 random bytes in hexadecimal."""
    return secrets.token_hex(KEY_BYTES)


def public_key(key: str) -> str:
    """The public key of a private one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return _encode(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key)).public_key().public_bytes_raw())


def is_public_key(text: str) -> bool:
    """Whether a text has the form of a public key."""
    return _PUBLIC_KEY.fullmatch(text) is not None


def body_digest(body: bytes) -> str:
    """What a signature says of a body that is known before it is sent."""
    return hashlib.sha256(body).hexdigest()


class Signer:
    """Signs the requests of one device. Thread-safe."""

    def __init__(self, key: str) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        self._private = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key))
        self.public_key = public_key(key)

    def header(self, run_id: str, method: str, target: str, milliseconds: int, digest: str) -> str:
        """The signature header of one request; ``run_id`` is "" before the device has joined."""
        nonce = _encode(secrets.token_bytes(NONCE_BYTES))
        text = _signed_text(run_id, method, target, milliseconds, nonce, digest)
        return f"{self.public_key} {milliseconds} {nonce} {digest} {_encode(self._private.sign(text))}"


def parse_signature(header: str) -> Signature:
    """The words of a header. Raises MalformedMessage."""
    found = _HEADER.fullmatch(header)
    if found is None:
        raise MalformedMessage("invalid signature header: expected key, milliseconds, nonce, digest and signature")
    key, milliseconds, nonce, digest, signature = found.groups()
    return Signature(key, int(milliseconds), nonce, digest, signature)


def is_genuine(signature: Signature, run_id: str, method: str, target: str) -> bool:
    """Whether the owner of the key has signed this request."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    text = _signed_text(run_id, method, target, signature.milliseconds, signature.nonce, signature.digest)
    try:
        key = Ed25519PublicKey.from_public_bytes(_decode(signature.public_key))
        key.verify(_decode(signature.signature), text)
    except (InvalidSignature, ValueError, binascii.Error):
        return False
    return True


def _signed_text(run_id: str, method: str, target: str, milliseconds: int, nonce: str, digest: str) -> bytes:
    return "\n".join((CONTEXT, run_id, method, target, str(milliseconds), nonce, digest)).encode("latin-1", "replace")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
