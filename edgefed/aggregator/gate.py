"""The door of the server: who is let in, the brake on guesses, and a log that strangers cannot fill."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgefed.aggregator.access import OWNER, Access, Credentials
from edgefed.aggregator.connections import is_known, mark_known
from edgefed.aggregator.wire import error_reply
from edgefed.errors import ConfigError, EdgefedError, StaleRequest, Unauthorized, UnknownClient
from edgefed.protocol import routes
from edgefed.protocol.signing import STREAM, parse_signature

CREDENTIALS = "edgefed.credentials"
INVITATION = b"invitation"

MIN_TOKEN_CHARACTERS, MIN_TOKEN_DIFFERENT = 12, 4
FREE_GUESSES = 5
"""Wrong tokens of an address in `GUESS_WINDOW_S` before its next requests on new connections have to wait."""
GUESS_WINDOW_S = 60.0
GUESS_WAIT_S = 1.0
GUESSES_WAITING = 4
"""Requests of one address that wait at once; further ones are refused unseen. So 4 guesses a second at most."""
MAX_ADDRESSES = 4096
LOG_WINDOW_S, LOG_LINES = 60.0, 20
"""Lines of one kind that the log gets in a minute; the next one says how many were left out."""


def check_strength(token: str) -> None:
    """Raise ConfigError for a token that cannot be sent in a header, or that can be guessed."""
    if not token.isascii() or not token.isprintable() or token != token.strip():
        raise ConfigError("invalid token: it must be printable ASCII without spaces at its ends")
    if len(token) < MIN_TOKEN_CHARACTERS or len(set(token)) < MIN_TOKEN_DIFFERENT:
        raise ConfigError(
            f"weak token: it has {len(token)} characters, {len(set(token))} of them different; at least "
            f"{MIN_TOKEN_CHARACTERS} and {MIN_TOKEN_DIFFERENT} are needed",
            remedy='Make one with: python -c "import secrets; print(secrets.token_urlsafe())"',
        )


class GuessBrake:
    """Counts wrong tokens by address. Belongs to one event loop; remembers at most `MAX_ADDRESSES`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._wrong: collections.OrderedDict[str, collections.deque[float]] = collections.OrderedDict()
        self._waiting: collections.Counter[str] = collections.Counter()

    def note_wrong(self, address: str) -> None:
        """Count a wrong token."""
        times = self._wrong.setdefault(address, collections.deque(maxlen=FREE_GUESSES))
        times.append(self._clock())
        self._wrong.move_to_end(address)
        while len(self._wrong) > MAX_ADDRESSES:
            self._wrong.popitem(last=False)

    def brakes(self, address: str) -> bool:
        """Whether requests of this address have to wait before their token is looked at."""
        times = self._wrong.get(address)
        return times is not None and len(times) == FREE_GUESSES and self._clock() - times[0] < GUESS_WINDOW_S

    async def wait(self, address: str) -> bool:
        """Wait for the next look at a token. Returns False, at once, if too many of this address wait already."""
        if self._waiting[address] >= GUESSES_WAITING:
            return False
        self._waiting[address] += 1
        try:
            await asyncio.sleep(GUESS_WAIT_S)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]
        return True


class Gate:
    """Lets requests in that show the server's token, the signature of an admitted device, or a valid invitation.

    `routes.OPEN` needs nothing. Runs before routing, so paths leak nothing, and before a body is read. An invitation
    opens REGISTER and what can be read, so that a device can look at the run before it joins. Wrong credentials are
    counted; see `GuessBrake`. Without a token every request counts as the owner's, but a signature is still checked.
    The scope of a request that passes has its `Credentials` under `CREDENTIALS`.
    """

    def __init__(self, app: ASGIApp, token: str | None, access: Access, run_id: str):
        self._app, self._access, self._run_id = app, access, run_id
        self._token = None if token is None else token.encode()
        self._brake = GuessBrake()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http" or scope["path"] in routes.OPEN:
            await self._app(scope, receive, send)
            return
        address = address_of(scope)
        if not is_known(scope) and self._brake.brakes(address) and not await self._brake.wait(address):
            response = error_reply(Unauthorized("too many wrong tokens from this address; try again in a second"))
            response.status_code, response.headers["retry-after"] = 429, "1"
        else:
            try:
                check_browser(scope, has_token=self._token is not None)
                scope[CREDENTIALS], digest = self._check(scope)
            except StaleRequest as error:
                response = error_reply(error)
                response.headers[routes.TIME_HEADER] = str(self._access.time_ms)
            except EdgefedError as error:
                if isinstance(error, Unauthorized):
                    self._brake.note_wrong(address)
                logging.getLogger(__name__).warning("refused a request from %s: %s", address, error)
                response = error_reply(error)
            else:
                if scope[CREDENTIALS] is not OWNER:
                    mark_known(scope)
                await self._app(scope, receive if digest in ("", STREAM) else _checked(receive, digest), send)
                return
        response.headers["connection"] = "close"
        await response(scope, receive, send)

    def _check(self, scope: Scope) -> tuple[Credentials, str]:
        """What a request has shown, and the digest of its body, "" if it is not signed.

        Raises Unauthorized, StaleRequest, UnknownClient (the server does not know the device any more).
        """
        headers = dict(scope["headers"])
        scheme, _, secret = headers.get(routes.TOKEN_HEADER.encode(), b"").partition(b" ")
        scheme = scheme.lower()  # RFC 9110 (11.1): in either case
        has_token = self._token is None or (scheme == b"bearer" and hmac.compare_digest(secret, self._token))
        joins = scope["path"] == routes.REGISTER
        signed = headers.get(routes.SIGNATURE_HEADER.encode())
        signature = None if signed is None else parse_signature(signed.decode("latin-1"))
        device = None if signature is None else self._access.device_of(signature.public_key)
        if signature is None or (device is None and not joins):
            if has_token:
                return OWNER if self._token is None else Credentials(token=True), ""
            if scheme == INVITATION and (joins or scope["method"] == "GET"):
                return Credentials(invitation=self._access.check_invitation(secret.decode("latin-1"))), ""
            if signature is not None:
                raise UnknownClient("this run does not know the device, or has removed it")
            raise Unauthorized("missing or wrong token: this server needs one")
        target = scope["raw_path"].decode("latin-1")
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        self._access.check_signature(signature, "" if joins else self._run_id, scope["method"], target)
        if signature.digest == STREAM and scope["method"] != "PUT":
            raise Unauthorized("the body of this request must be signed")
        invitation = ""
        if device is not None:
            self._access.check_banned(device.client_id)
        elif scheme == INVITATION:
            invitation = self._access.check_invitation(secret.decode("latin-1"))
        elif not has_token:
            raise Unauthorized(
                "wrong token" if secret else "this device needs a token or an invitation to join",
                remedy="Set `token` or EDGEFED_TOKEN, or ask for a join link (`edgefed invite`).",
            )
        return Credentials(has_token, signature.public_key, invitation), signature.digest


def _checked(receive: Receive, digest: str) -> Receive:
    """``receive``, which raises Unauthorized at the end of a body that is not the one that was signed."""
    found, refused = hashlib.sha256(), False

    async def checked() -> Message:
        nonlocal refused
        if refused:  # nothing is left to drain
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await receive()
        if message["type"] == "http.request":
            found.update(message.get("body", b""))
            refused = not message.get("more_body", False) and found.hexdigest() != digest
            if refused:
                raise Unauthorized("the body of this request is not the one that was signed")
        return message

    return checked


def credentials_of(scope: Scope) -> Credentials:
    """What a request has shown to the gate."""
    found: Credentials = scope.get(CREDENTIALS, OWNER)
    return found


def check_browser(scope: Scope, *, has_token: bool) -> None:
    """Refuse what a page of another site makes a browser on this machine ask. Raises Unauthorized.

    Without a token the address must not have a domain name that is not this machine's: a site could let its own name
    point here.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
    foreign = origin not in ("", f"http://{host}", f"https://{host}")
    if foreign or headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Unauthorized("a page of another site asks for this", remedy="Open the address of the server itself.")
    if has_token or not host:
        return
    own = False
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        own = not {".", ":"} & {*name} or name.endswith(".localhost") or name == socket.gethostname().lower()
        own = own or ipaddress.ip_address(name).is_loopback
    if not own:
        raise Unauthorized(
            f"a server without a token has no address {host[:80]!r}", remedy="Use 127.0.0.1, or set `token`."
        )


def address_of(scope: Scope) -> str:
    """The network that a request comes from: an IPv4 address, or 64 bits of an IPv6 address."""
    text = str((scope.get("client") or [""])[0])
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text[:64]
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class LogLimiter(logging.Filter):
    """Lets `LOG_LINES` lines of one kind (logger and message without its values) through in `LOG_WINDOW_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, str], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        now, kind = self._clock(), (record.name, str(record.msg)[:200])
        begun, count = self._kinds.get(kind, (now, 0.0))
        if now - begun >= LOG_WINDOW_S:
            if count > LOG_LINES:
                record.msg = f"{record.msg} ({count - LOG_LINES:.0f} more such lines were left out)"
            begun, count = now, 0.0
        if len(self._kinds) > MAX_ADDRESSES:
            self._kinds.clear()
        self._kinds[kind] = [begun, count + 1]
        return count < LOG_LINES
