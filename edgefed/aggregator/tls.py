"""TLS of the server: its own certificate, or a self-signed one that is made at the first start and kept with the run.

A self-signed certificate proves nothing by itself. Its fingerprint is part of the address that clients get
(``https://host:port#sha256:...``), and they accept this certificate and no other.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import ipaddress
import ssl
from pathlib import Path

from edgefed.disk import make_private, write_durably
from edgefed.errors import ConfigError

FOLDER = "tls"
CERTIFICATE_FILE, KEY_FILE = "certificate.pem", "key.pem"
VALID_DAYS = 3650
"""A pinned certificate is replaced by making another one, not by waiting for its end."""


@dataclasses.dataclass(frozen=True)
class ServerTls:
    """``pin``: SHA-256 of a self-signed certificate in hexadecimal, for clients; "" if an authority has signed it."""

    context: ssl.SSLContext
    pin: str


def own_certificate(certificate: Path, key: Path) -> ServerTls:
    """TLS with a certificate chain and key in PEM files. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot use the certificate {certificate} with the key {key}: {error}",
            remedy="Pass PEM files: the certificate chain, and its key without a passphrase.",
        ) from error
    return ServerTls(context, "")


def self_signed_certificate(state_folder: Path, host: str) -> ServerTls:
    """TLS with the run's self-signed certificate, which is made if there is none. Raises StorageError, ConfigError."""
    folder = state_folder / FOLDER
    certificate, key = folder / CERTIFICATE_FILE, folder / KEY_FILE
    if not (certificate.is_file() and key.is_file()):
        certificate_pem, key_pem = make_certificate(host)
        make_private(folder)
        write_durably(key, key_pem)
        write_durably(certificate, certificate_pem)
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
    return dataclasses.replace(own_certificate(certificate, key), pin=hashlib.sha256(der).hexdigest())


def make_certificate(host: str) -> tuple[bytes, bytes]:
    """A new certificate for ``host`` and its key, both PEM: ECDSA on P-256, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edgefed")])
    try:
        subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        subject = x509.DNSName(host)
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of devices differ
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem
