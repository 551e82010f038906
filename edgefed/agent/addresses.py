"""The way to a server: its address, the proxy in front of it, and the certificates to trust.

httpx would read the environment by itself, but it fails with a traceback for values that it does not support, and it
sends loopback requests through a proxy. Here an invalid value is a ConfigError that names its variable, and a value
that does not concern the server is ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import importlib.util
import ipaddress
import re
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import httpx

from edgefed.errors import ConfigError, ServerUnreachable
from edgefed.protocol import routes

MAX_LABEL_CHARACTERS = 63
SCHEME_TIMEOUT_S = 3.0
SYSTEM_PROXY = "the proxy settings of the system"


@dataclasses.dataclass(frozen=True)
class JoinLink:
    """A server's address and what its fragment says: ``https://host:port#sha256:HEX,invite:ID.SECRET``.

    ``pin``: SHA-256 of the server's certificate, or "". ``invitation``: ``ID.SECRET``, or "".
    """

    address: str
    pin: str = ""
    invitation: str = ""


def parse_link(text: str) -> JoinLink:
    """Take a join link apart. Raises ConfigError for an invalid fingerprint or invitation, or one without https."""
    address, mark, fragment = text.strip().partition("#")
    if not mark:
        return JoinLink(text)
    remedy = "Pass the whole address that `edgefed serve` or `edgefed invite` prints, in quotes."
    found = {}
    for part in fragment.split(","):
        name, _, value = part.partition(":")
        form = {"sha256": r"[0-9a-fA-F]{64}", "invite": r"[0-9a-f]{8}\.[\w-]{32}"}.get(name)
        if form is None or name in found or re.fullmatch(form, value, re.ASCII) is None:
            what = {"sha256": "fingerprint", "invite": "invitation"}.get(name, "part after #")
            shown = "" if name == "invite" else f": {part[:80]!r}"
            raise ConfigError(f"invalid {what} in the server's address{shown}", remedy=remedy)
        found[name] = value
    if "sha256" in found and not address.startswith("https://"):
        raise ConfigError("invalid fingerprint in the server's address: it is not https", remedy=remedy)
    return JoinLink(address, found.get("sha256", "").lower(), found.get("invite", ""))


def check_base_url(text: str) -> str:
    """Normalise ``text`` to scheme://host[:port].

    Raises ConfigError if it is not http or https, or has an invalid host, a path, a query or a password.
    """
    remedy = f"Pass the address that `edgefed serve` prints, such as http://192.168.1.5:{routes.DEFAULT_PORT}."
    if "://" not in text:
        raise ConfigError(f"the server's address must begin with http:// or https://, found {text!r}", remedy=remedy)
    try:
        url = httpx.URL(text.strip())
        host, port = url.host, url.port  # decodes an international name, which may be invalid
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"invalid address {text!r}: {error}", remedy=remedy) from error
    if url.scheme not in ("http", "https"):
        raise ConfigError(f"the server's address must begin with http:// or https://, found {text!r}", remedy=remedy)
    if problem := _authority_problem(url, host, port):
        raise ConfigError(f"invalid address {text!r}: {problem}", remedy=remedy)
    if url.userinfo:  # a secret, so the message does not repeat it
        raise ConfigError("the server's address contains a user name or password; use `token`", remedy=remedy)
    if url.path != "/" or url.query or url.fragment:
        raise ConfigError(f"the server's address must end after host and port, found {text!r}", remedy=remedy)
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _authority_problem(url: httpx.URL, host: str, port: int | None) -> str:
    """Why no connection to the host and port of ``url`` can be made; empty if one can.

    httpx accepts such addresses, and fails with a traceback when it connects.
    """
    if "%" in host and ":" in host:
        return "link-local addresses with a zone are not supported; use another address, or the name"
    if not host or "%" in host or (port is not None and not 0 < port < 65536):
        return "a host is required, and a port must be in 1..65535"
    labels = url.raw_host.decode("ascii").removesuffix(".").split(".")
    if _ip_address(host) is None and any(not 0 < len(label) <= MAX_LABEL_CHARACTERS for label in labels):
        return f"each part of a host name must have 1 to {MAX_LABEL_CHARACTERS} letters"
    return ""


# --- proxies ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A proxy and the variable that names it. ``url`` may contain a password; `describe` does not."""

    url: httpx.URL
    variable: str

    def describe(self) -> str:
        """Text for a message: address without a password, and variable."""
        return f"the proxy {self.url.scheme}://{self.url.netloc.decode('ascii')} of {self.variable}"


def find_proxy(base_url: str, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy for requests to ``base_url``, from http_proxy, https_proxy, all_proxy and no_proxy, in either case.

    None for loopback addresses and for what no_proxy excludes. Without a variable, the settings of macOS or Windows
    apply. Raises ConfigError for an invalid or unsupported proxy.
    """
    url = httpx.URL(base_url)
    if is_loopback(url.host) or _excluded(url, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
        return None
    for name in (f"{url.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if value := environ.get(variable, "").strip():
                return _parse_proxy(value, variable)
    system = urllib.request.getproxies().get(url.scheme)
    if system is None or urllib.request.proxy_bypass(url.host):
        return None
    return _parse_proxy(system, SYSTEM_PROXY)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    address = _ip_address(host)
    if address is not None:
        # Connecting to the unspecified address, 0.0.0.0 or ::, reaches this machine.
        mapped = getattr(address, "ipv4_mapped", None) or address
        return bool(mapped.is_loopback or mapped.is_unspecified)
    name = host.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost")


def is_public(host: str) -> bool:
    """Whether a host has only addresses of the public internet. Raises ServerUnreachable if it has none."""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise ServerUnreachable(f"the name {host} cannot be resolved: {error}") from error
    addresses = [ipaddress.ip_address(text) for text in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)


def _parse_proxy(value: str, variable: str) -> Proxy:
    remedy = f"Correct or unset {variable}, or add the server to NO_PROXY."
    try:
        url = httpx.URL(value if "://" in value else f"http://{value}")
        host, port, scheme = url.host, url.port, url.scheme
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(
            f"invalid proxy in {variable}: {error}",
            remedy=f"{remedy} Special characters of a password must be percent-encoded.",
        ) from error
    if problem := _authority_problem(url, host, port):
        raise ConfigError(f"invalid proxy in {variable}: {problem}", remedy=remedy)
    if scheme in ("socks", "socks5", "socks5h"):
        if importlib.util.find_spec("socksio") is None:
            raise ConfigError(
                f"{variable} names a SOCKS proxy, for which a package is missing",
                remedy=f"Run `pip install 'httpx[socks]'`. {remedy}",
            )
        return Proxy(url.copy_with(scheme="socks5h" if scheme == "socks5h" else "socks5"), variable)
    if scheme not in ("http", "https"):
        raise ConfigError(f"unsupported kind of proxy in {variable}: {scheme}://", remedy=remedy)
    return Proxy(url, variable)


def _excluded(url: httpx.URL, no_proxy: str) -> bool:
    """Whether no_proxy excludes a server: ``*``, names and their subdomains, addresses, networks, each with a port."""
    host, port = url.host.lower().removesuffix("."), url.port or {"http": 80, "https": 443}[url.scheme]
    address = _ip_address(host)
    for entry in (part.lower() for part in re.split(r"[,\s]+", no_proxy) if part):
        name, entry_port = _split_port(entry.rpartition("://")[2])
        if entry_port not in (None, port):
            continue
        network = _ip_network(name)
        if address is not None and network is not None and address.version == network.version and address in network:
            return True
        suffix = name.removeprefix("*").removeprefix(".").removesuffix(".")
        if name == "*" or (suffix and (host == suffix or host.endswith(f".{suffix}"))):
            return True
    return False


def _split_port(entry: str) -> tuple[str, int | None]:
    bracketed = re.fullmatch(r"\[(.*)\](?::(\d{1,5}))?", entry)
    plain = bracketed or re.fullmatch(r"([^:]*):(\d{1,5})", entry)
    if plain is None:
        return entry, None
    return plain[1], int(plain[2]) if plain[2] else None


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _ip_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


# --- certificates -----------------------------------------------------------------------------------------------


def trusted_certificates(environ: Mapping[str, str]) -> ssl.SSLContext | bool:
    """The authorities of SSL_CERT_FILE or SSL_CERT_DIR; True for the usual ones.

    Raises ConfigError if the variable names a file or folder that is missing or has no certificates.
    """
    for variable, is_file in (("SSL_CERT_FILE", True), ("SSL_CERT_DIR", False)):
        value = environ.get(variable)
        if not value:
            continue
        path, remedy = Path(value), f"Correct {variable}, or unset it to trust the usual authorities."
        if not (path.is_file() if is_file else path.is_dir()):
            kind = "file" if is_file else "folder"
            raise ConfigError(f"{variable} names a {kind} that does not exist: {value}", remedy=remedy)
        try:
            if is_file:
                return ssl.create_default_context(cafile=value)
            return ssl.create_default_context(capath=value)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"{variable}: no certificates in {value}: {error}", remedy=remedy) from error
    return True


def check_scheme(base_url: str, timeout_s: float = SCHEME_TIMEOUT_S) -> None:
    """Raise ConfigError if whatever listens at ``base_url`` speaks HTTP where the address says https, or the reverse.

    Connects once, directly. A server that does not answer in either way is left to the caller.
    """
    url = httpx.URL(base_url)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        with socket.create_connection((url.host, port), timeout_s) as connection:
            if url.scheme == "https":
                connection.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
                if connection.recv(5) == b"HTTP/":
                    raise ConfigError(
                        f"the server at {base_url} speaks plain HTTP, the address says https",
                        remedy=f"Pass the address that `edgefed serve` prints, which begins with http://{url.host}. "
                        "If it must not be plain HTTP, ask whoever runs the server.",
                    )
            else:
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.wrap_socket(connection).close()
                raise ConfigError(
                    f"the server at {base_url} speaks HTTPS, the address says http",
                    remedy="Pass the whole address that `edgefed serve` prints, in quotes: "
                    "https://host:port#sha256:...",
                )
    except OSError:  # ssl.SSLError and time-outs, too
        return


def pinned_context(fingerprint: str) -> ssl.SSLContext:
    """A context that accepts the one certificate with this SHA-256, whoever signed it, and under any host name."""

    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            found = hashlib.sha256(self.getpeercert(binary_form=True) or b"").hexdigest()
            if not hmac.compare_digest(found, fingerprint):
                error = ssl.SSLCertVerificationError("the server has another certificate")
                error.verify_message = f"its fingerprint is {found}, the address says {fingerprint}"
                raise error

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint is checked instead
    context.sslsocket_class = PinnedSocket
    return context
