"""The server process: a socket, a service, and the loop that watches the time and folds closed rounds.

    run_server(ServerConfig(state_folder=...), on_ready=print)

runs until SIGINT or SIGTERM, `AggregatorServer.stop`, or the end of the run (``exit_when_finished``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gc
import ipaddress
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from edgefed.aggregator.access import owner_token
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.app import Endpoints, Work, build_app
from edgefed.aggregator.bucket import URL_S, Bucket
from edgefed.aggregator.connections import ConnectionGuard, ConnectionLimits, connection_limits, guarded_protocol
from edgefed.aggregator.fold import FoldCancelled
from edgefed.aggregator.gate import LogLimiter, check_strength
from edgefed.aggregator.members import follow_access
from edgefed.aggregator.polls import ASK_S, Bell
from edgefed.aggregator.service import Service
from edgefed.aggregator.tls import ServerTls, own_certificate, self_signed_certificate
from edgefed.disk import disk_errors
from edgefed.errors import ConfigError, MissingToken, NetworkError, PortInUse, StateCorrupt, StorageError
from edgefed.methods.interface import Method
from edgefed.methods.registry import make_method
from edgefed.protocol import routes
from edgefed.protocol.messages import RoundStatus, RunConfig

logger = logging.getLogger(__name__)

TICK_S = 0.25
FOLD_RETRY_S = 5.0
SHUTDOWN_S = 1
"""How long transfers may continue after a stop; they are resumable."""
KEEP_ALIVE_S = 75
"""An idle connection stays open for longer than a client waits between two requests."""
BACKLOG = 512
COLLECTION_THRESHOLDS = (10_000, 20, 100)
"""Of `gc.set_threshold`. Python's own are (700, 10, 10)."""
LIMITED_LOGGERS = (
    "edgefed.aggregator.connections", "edgefed.aggregator.gate", "edgefed.aggregator.service",
    "edgefed.aggregator.update_requests", "edgefed.aggregator.wire", "uvicorn.error", "asyncio",
)  # fmt: skip
"""What strangers and clients can make the server log."""


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How to serve the run in ``state_folder``. ``port`` 0 takes any free one.

    ``ready_file``: written as soon as the server answers, JSON {"url", "port", "pid"}. ``exit_when_finished``: end once
    every client has heard that the run is over, or left, and has been quiet for ``finish_grace_s``; otherwise continue
    to serve the final model. ``keep_rounds``: manifests that stay downloadable, 0 for all. ``policy_changes``: fields
    of `RoundPolicy` (min_clients, quorum, deadline_s, clients_per_round, client_timeout_s) that replace those of the
    run.
    """

    state_folder: Path
    host: str = routes.DEFAULT_HOST
    port: int = routes.DEFAULT_PORT
    token: str | None = None
    ready_file: Path | None = None
    exit_when_finished: bool = False
    finish_grace_s: float = 5.0
    keep_rounds: int = 2
    fold_backend: str = "auto"
    policy_changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    on_round: Callable[[RunConfig, RoundStatus], None] = lambda run, status: None
    """Called with each round that was aggregated."""
    certificate: Path | None = None
    """PEM file with the server's certificate chain, ``certificate_key`` with its key. None: a self-signed one, unless
    only this machine can reach the server, or with ``plain_http``."""
    certificate_key: Path | None = None
    plain_http: bool = False
    invite_only: bool = False
    """A new client needs an invitation (`edgefed invite`). The token opens only what can be read; None makes one."""
    blobs: str | None = None
    """Object storage that clients download from and upload to, such as s3://bucket/prefix (`aggregator.bucket`)."""
    blob_url_s: float = URL_S
    limits: ConnectionLimits | None = None
    """None: what the file descriptors of this process allow."""


def run_server(
    config: ServerConfig,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    make_method: Callable[[str, dict[str, Any]], Method] = make_method,
) -> None:
    """Serve a run until it is stopped. ``on_ready`` gets the URL once the server answers.

    Raises MissingToken, PortInUse, NetworkError, ConfigError, StateLocked, StateCorrupt, StorageError before it serves;
    later, the error that made aggregation impossible. The state folder stays consistent in every case.
    """
    AggregatorServer(config, on_ready=on_ready, make_method=make_method).run()


class AggregatorServer:
    """A server with a bound socket and an open run; `run` serves. `stop` may be called from another thread."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        on_ready: Callable[[str], None] = lambda url: None,
        make_method: Callable[[str, dict[str, Any]], Method] = make_method,
    ):
        check_token(config.host, config.token, invite_only=config.invite_only)
        self._config, self._on_ready = config, on_ready
        self._failure: BaseException | None = None
        self._bell = Bell()
        self._guard = ConnectionGuard(config.limits or connection_limits())
        self._tls = make_tls(config)
        self._socket = bind(config.host, config.port)

        def open_bucket(run_id: str) -> Bucket:
            return Bucket(config.blobs or "", run_id, url_s=config.blob_url_s)

        try:
            self.active = ActiveRun(
                config.state_folder,
                make_method,
                keep_rounds=config.keep_rounds,
                fold_backend=config.fold_backend,
                on_change=self._bell.ring,
                tick_s=TICK_S,
                policy_changes=config.policy_changes,
                on_round=config.on_round,
                bucket=open_bucket if config.blobs else None,
            )
        except BaseException:
            self._socket.close()
            raise
        token = config.token or (owner_token(config.state_folder) if config.invite_only else None)
        service = Service(self.active, invite_only=config.invite_only)
        app, self.endpoints = build_app(service, self._bell, token, self._around)
        self._server = _Server(
            uvicorn.Config(
                app, http=guarded_protocol(self._guard, self._tls.context if self._tls else None),
                log_config=None, access_log=False, lifespan="on", ws="none", server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_S, timeout_keep_alive=KEEP_ALIVE_S, backlog=BACKLOG,
            ),
            started=self._announce,
            stopping=self.active.stop_waiting,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """Address of the server for this machine."""
        host, port = self._socket.getsockname()[:2]
        address = ipaddress.ip_address(host)
        if address.is_unspecified:
            address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
        scheme = "https" if self._tls else "http"
        return f"{scheme}://[{address}]:{port}" if address.version == 6 else f"{scheme}://{address}:{port}"

    @property
    def join_url(self) -> str:
        """The address for clients: `url`, with the fingerprint of a self-signed certificate."""
        return self.url + (f"#sha256:{self._tls.pin}" if self._tls and self._tls.pin else "")

    def _address_of_others(self) -> str:
        """`join_url` as other machines reach it: with the address of this machine where all of its are served."""
        host, port = self._socket.getsockname()[:2]
        if not ipaddress.ip_address(host).is_unspecified:
            return self.join_url
        local = ipaddress.ip_address(host_address())
        shown = f"[{local}]" if local.version == 6 else str(local)
        return f"{'https' if self._tls else 'http'}://{shown}:{port}{self.join_url[len(self.url) :]}"

    def run(self) -> None:
        """Serve until stopped. Raises the error that made aggregation impossible."""
        limiter, limited = LogLimiter(), [logging.getLogger(name) for name in LIMITED_LOGGERS]
        for each in limited:
            each.addFilter(limiter)
        logging.getLogger("uvicorn.error").addFilter(_in_own_words)
        try:
            with rare_collections():
                self._server.run(sockets=[self._socket])
        finally:
            self.active.close()
            self._socket.close()
            for each in limited:
                each.removeFilter(limiter)
            logging.getLogger("uvicorn.error").removeFilter(_in_own_words)
        if self._failure is not None:
            raise self._failure

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the server."""
        return self._server.signal == signal.SIGINT

    def stop(self) -> None:
        """End a running server; from any thread."""
        self._server.should_exit = True

    def _announce(self) -> None:
        url, config = self.join_url, self._config
        self.active.access.save_address(self._address_of_others())
        logger.info("serving %s at %s", config.state_folder, url)
        if config.ready_file is not None:
            facts = {"url": url, "port": self._socket.getsockname()[1], "pid": os.getpid()}
            temporary = config.ready_file.with_name(config.ready_file.name + ".tmp")
            with disk_errors(f"write {config.ready_file}"):
                temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
                os.replace(temporary, config.ready_file)
        self._on_ready(url)

    @contextlib.asynccontextmanager
    async def _around(self, endpoints: Endpoints) -> AsyncIterator[None]:
        """Tick while the application runs."""
        watch = endpoints.polls.watch_forever(min(ASK_S, endpoints.service.heartbeat_s))
        works = (self._tick_forever(endpoints), self._guard.sweep_forever(), watch)
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            for _ in range(20):  # cancelled transfers close their files in threads that end after this
                if not endpoints.transfers:
                    break
                await asyncio.sleep(0.05)

    async def _tick_forever(self, endpoints: Endpoints) -> None:
        try:
            while True:
                ring = self._bell.listen()
                try:
                    await endpoints.run(follow_access, self.active)
                    await endpoints.run(self.active.tick)
                    if self.active.fold_due:
                        # In another thread pool: folding takes long, and requests must not wait for it.
                        await self._fold(endpoints)
                        continue
                except StorageError as error:
                    if isinstance(error, StateCorrupt):
                        raise
                    logger.error("%s; trying again in %.0f s", error, FOLD_RETRY_S)
                    await asyncio.sleep(FOLD_RETRY_S)
                leaving = self._config.exit_when_finished and not (endpoints.transfers or self._server.should_exit)
                if leaving and self.active.all_heard(self._config.finish_grace_s):
                    logger.info("every client knows that the run is finished: the server ends")
                    self.stop()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ring.wait(), TICK_S)
        except FoldCancelled as notice:
            logger.info("%s", notice)
        except Exception as error:  # an error of the method or of files on disk: repeating would not help
            self._failure = error
            self.stop()

    async def _fold(self, endpoints: Endpoints) -> None:
        """Fold, and tick meanwhile: clients that fall silent must be noticed."""
        folding = asyncio.ensure_future(endpoints.run(self.active.fold_pending, work=Work.COMMIT))
        try:
            while not folding.done():
                await asyncio.wait([folding], timeout=TICK_S)
                await endpoints.run(self.active.tick)
        finally:
            await folding  # also when the server stops, which ends it


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python look for reference cycles less often, and not among the objects that exist already.

    A look at all objects of a server with a thousand connections stops it for more than 0.1 s.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _in_own_words(record: logging.LogRecord) -> bool:
    """Replace what uvicorn says at the end about requests in progress: ending them is not an error here."""
    if record.msg.startswith("Cancel "):
        logger.info("requests in progress end here; clients repeat them once the server is back")
        return False
    return True


class _Server(uvicorn.Server):
    """uvicorn with two hooks; it does not raise a signal again after a clean end."""

    def __init__(self, config: uvicorn.Config, *, started: Callable[[], None], stopping: Callable[[], None]):
        super().__init__(config)
        self._announce, self._stopping = started, stopping
        self.signal: int | None = None
        """The signal that ended the server."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._announce()

    async def main_loop(self) -> None:
        await super().main_loop()
        self._stopping()  # before uvicorn waits for open requests: long polls are among them

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # The second one does not wait for transfers and threads. What was acknowledged is on disk.
            os._exit(128 + sig)
        self.signal = sig
        self.should_exit = True


def make_tls(config: ServerConfig) -> ServerTls | None:
    """TLS as the configuration asks for; None for plain HTTP. Raises ConfigError, StorageError."""
    if (config.certificate is None) != (config.certificate_key is None):
        raise ConfigError("`certificate` and `certificate_key` belong together")
    if config.certificate is not None and config.certificate_key is not None:
        return own_certificate(config.certificate, config.certificate_key)
    if config.plain_http or is_local(config.host):
        return None
    return self_signed_certificate(config.state_folder, config.host)


def host_address() -> str:
    """The address of this machine in its network, as its routes say; nothing is sent. 127.0.0.1 without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: an address that nobody has
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server on ``host``. Raises NetworkError."""
    return all(ipaddress.ip_address(address[0].split("%")[0]).is_loopback for _, address in resolve(host, 0))


def check_token(host: str, token: str | None, *, invite_only: bool = False) -> None:
    """Raise MissingToken if other machines could reach a server without a token, ConfigError for a weak one.

    With ``invite_only`` a server makes a token of its own (`access.owner_token`).
    """
    if token:
        check_strength(token)
        return
    if not invite_only and not is_local(host):
        raise MissingToken(f"other machines can reach a server on {host!r}, and it has no token")


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    """Addresses to bind for a host name. Raises NetworkError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise NetworkError(f"cannot serve on {host!r}: {error}") from error
    return [(family, address) for family, _, _, _, address in found]


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket. Raises PortInUse, NetworkError, ConfigError."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"invalid port {port}: expected 0..65535")
    family, address = resolve(host, port)[0]
    # asyncio disables Nagle's algorithm only if the protocol is given; otherwise answers wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows this option would allow two servers on one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # only now is the port certainly ours
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"port {port} on {host} is in use") from error
        raise NetworkError(f"cannot serve on {host}:{port}: {error}") from error
    return listener
