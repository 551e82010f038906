"""The warm process of a device: it keeps the model loaded while Flower starts a ClientApp for each message.

    ClientApp -> JSON line on a loopback socket -> RoundWorker

STATE/flower.json has the port and a secret, readable by the device's owner only; STATE/flower.log what the process
says. The process ends with the run, or after it has heard nothing for a while. A ClientApp that finds none starts one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

from edgefed.disk import make_private, write_durably
from edgefed.errors import ConfigError, EdgefedError, MalformedMessage, ProcessFailed, all_errors
from edgefed.flower.tasks import Introduction, RoundReply, RoundTask, describe
from edgefed.isolation.start import module_command
from edgefed.protocol.messages import ErrorReply, Message, decode_message, encode_message
from edgefed.protocol.routes import MAX_MESSAGE_BYTES

logger = logging.getLogger("edgefed.flower")

ADDRESS_FILE, LOG_FILE = "flower.json", "flower.log"
IDLE_S = 900.0
"""Seconds without a request after which the process ends."""
START_S = 300.0
"""Longest time for loading torch and the data."""
CONNECT_S = 5.0
LOG_TAIL_LINES = 15
T = TypeVar("T")


class _Address(Message, frozen=True):
    """STATE/flower.json. ``settings``: hash of the device's settings."""

    port: int
    secret: str
    settings: str


class _Request(Message, frozen=True):
    secret: str
    kind: str
    task: RoundTask | None = None


# --- the side of the ClientApp --------------------------------------------------------------------------------------


class DeviceProcess:
    """The process of the device in ``state``, started with ``settings`` (fields of `edgefed.Client`) if there is none.

    Raises ConfigError if ``settings`` has a data set as an object. Each method raises ProcessFailed if the process does
    not start, or dies twice during the request, and the error of the device's settings or data.
    """

    def __init__(self, state: Path, settings: dict[str, Any]):
        if not isinstance(data := settings.get("data", ""), str):
            raise ConfigError(
                f"`data` of a ClientApp must be a path, found {type(data).__name__}: another process reads it",
                remedy="Write the data set to a file first, such as dataset.to_json('data.jsonl').",
            )
        self._state = make_private(state)
        self._settings = json.dumps(settings, sort_keys=True)
        self._digest = hashlib.sha256(self._settings.encode()).hexdigest()

    def introduce(self) -> Introduction:
        """What the server learns of this device."""
        return self._ask("introduce", Introduction)

    def work(self, task: RoundTask) -> RoundReply:
        """See `RoundWorker.work`."""
        return self._ask("work", RoundReply, task)

    def end(self) -> None:
        """Let the process end, if it is there."""
        if (address := self._address()) is not None:
            with contextlib.suppress(OSError, MalformedMessage):
                _exchange(address, "end", None)
            (self._state / ADDRESS_FILE).unlink(missing_ok=True)

    def _ask(self, kind: str, reply: type[T], task: RoundTask | None = None) -> T:
        for again in (False, True):
            address = self._address()
            if address is not None and address.settings != self._digest:
                self.end()
                address = None
            try:
                return decode_message(_exchange(address or self._start(), kind, task), reply)
            except (OSError, MalformedMessage) as error:
                (self._state / ADDRESS_FILE).unlink(missing_ok=True)
                if again:
                    raise ProcessFailed(f"the device's process died: {error}{self._tail()}") from error
                logger.info("the device's process does not answer (%s): starting another one", error)
        raise AssertionError("not reached")

    def _address(self) -> _Address | None:
        try:
            return decode_message((self._state / ADDRESS_FILE).read_bytes(), _Address)
        except (OSError, MalformedMessage):
            return None

    def _start(self) -> _Address:
        with (self._state / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                module_command("edgefed.flower.device_process"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None, "a pipe was asked for"
        assert process.stdout is not None, "a pipe was asked for"
        with process.stdin, process.stdout:
            process.stdin.write(self._settings.encode())
            process.stdin.close()
            said = process.stdout.readline()  # "ready", or the error that ended it; "" if it was killed
        if said != b"ready\n":
            process.wait()
        if said.startswith(b"{"):
            error = decode_message(said, ErrorReply)
            raise all_errors().get(error.code, ProcessFailed)(error.message, remedy=error.remedy)
        address = self._address()
        if said != b"ready\n" or address is None:
            raise ProcessFailed(f"the device's process did not start{self._tail()}")
        return address

    def _tail(self) -> str:
        path = self._state / LOG_FILE
        lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:] if path.exists() else []
        return f"; the end of {path}:\n" + "\n".join(lines)


def _exchange(address: _Address, kind: str, task: RoundTask | None) -> bytes:
    """One request and its answer, without its newline. Raises OSError; an answer that is cut off is one, too."""
    with socket.create_connection(("127.0.0.1", address.port), timeout=CONNECT_S) as connection:
        connection.settimeout(None)  # a round takes as long as it takes; a process that dies closes the connection
        connection.sendall(encode_message(_Request(secret=address.secret, kind=kind, task=task)) + b"\n")
        return _read_line(connection)


def _read_line(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        line = file.readline(MAX_MESSAGE_BYTES + 1)
    if not line.endswith(b"\n"):
        raise ConnectionError("the connection was closed")
    return line[:-1]


# --- the process ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Read settings from stdin, load, say "ready" on stdout, and serve. An error of the settings goes to stdout."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    settings = json.loads(sys.stdin.buffer.read())
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    try:
        from edgefed.api.client import Client
        from edgefed.flower.round_worker import RoundWorker

        client = Client(**settings)
        with RoundWorker(client) as worker, socket.create_server(("127.0.0.1", 0)) as listener:
            address = _Address(port=listener.getsockname()[1], secret=secrets.token_hex(16), settings=digest)
            path = client.state / ADDRESS_FILE
            write_durably(path, encode_message(address))
            with out:
                out.write(b"ready\n")
            try:
                _serve(listener, worker.introduce, worker.work, address.secret)
            finally:
                with contextlib.suppress(OSError):  # another process may have taken its place
                    if path.read_bytes() == encode_message(address):
                        path.unlink()
    except EdgefedError as error:
        logger.error("%s %s", error, error.remedy)
        if out.closed:
            raise SystemExit(error.exit_status) from error
        with out:
            out.write(encode_message(describe(error)) + b"\n")


def _serve(listener: socket.socket, introduce: Any, work: Any, secret: str) -> None:
    """Answer one request at a time until one says "end", or none came for `IDLE_S`."""
    listener.settimeout(IDLE_S)
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            logger.info("no request for %.0f s: the process ends", IDLE_S)
            return
        with connection:
            connection.settimeout(CONNECT_S)
            try:
                request = decode_message(_read_line(connection), _Request)
            except (OSError, MalformedMessage) as error:
                logger.warning("invalid request: %s", error)
                continue
            if not hmac.compare_digest(request.secret, secret):
                logger.warning("a request with another secret is refused")
                continue
            if request.kind == "end":
                reply: object = {}
            elif request.kind == "work" and request.task is not None:
                reply = work(request.task)
            else:
                reply = introduce()
            with contextlib.suppress(OSError):  # the ClientApp was killed; the next one asks again
                connection.sendall(encode_message(reply) + b"\n")
            if request.kind == "end":
                return


if __name__ == "__main__":
    main()
