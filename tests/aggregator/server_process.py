"""A server in a process of its own, and a client that speaks to it with httpx."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import httpx
import toy_run

from edgefed.protocol import routes
from edgefed.protocol.messages import (
    AssignmentReply,
    Manifest,
    Status,
    UpdateMeta,
    decode_error,
    decode_message,
    encode_message,
)

SCRIPT = Path(__file__).with_name("serve_toy.py")
START_S, STOP_S = 20.0, 10.0


class ServerProcess:
    """Started and answering when constructed. ``die``: see serve_toy."""

    def __init__(self, state: Path, **options: object):
        self._ready = state.parent / f"ready-{time.monotonic_ns()}.json"
        self._log = (state.parent / "server.log").open("ab")
        arguments = {"state_folder": str(state), "ready_file": str(self._ready), **options}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(arguments)], stderr=self._log, stdout=self._log
        )
        until = time.monotonic() + START_S
        while not self._ready.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no server: {(state.parent / 'server.log').read_text()[-2000:]}")
            time.sleep(0.02)
        facts = json.loads(self._ready.read_text())
        assert facts["pid"] == self.process.pid
        self.url: str = facts["url"]
        self.log = state.parent / "server.log"

    def kill(self) -> None:
        """SIGKILL, as by a power cut; nothing when it has ended already."""
        self.process.kill()
        self.process.wait(STOP_S)
        self._log.close()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.terminate()
        return self.process.wait(STOP_S)


class Client:
    """One client over HTTP. An error reply is raised as the error that it names. Closed when the test ends."""

    opened: ClassVar[list[Client]] = []

    def __init__(
        self, url: str, client_id: str, *, token: str | None = None, key: str | None = None, verify: bool = True
    ):
        self.client_id = client_id
        headers = {routes.CLIENT_KEY_HEADER: key or toy_run.KEY + ascii(client_id).strip("'")}
        if token is not None:
            headers[routes.TOKEN_HEADER] = f"Bearer {token}"
        self.http = httpx.Client(base_url=url, headers=headers, timeout=15.0, trust_env=False, verify=verify)
        self.opened.append(self)

    @classmethod
    def close_all(cls) -> None:
        while cls.opened:
            cls.opened.pop().http.close()

    def request(self, verb: str, template: str, *, expect: tuple[int, ...] = (200,), **arguments) -> httpx.Response:
        values = arguments.pop("values", {})
        path = routes.path_for(template, client_id=self.client_id, **values)
        response = self.http.request(verb, path, **arguments)
        if response.status_code not in expect:
            raise decode_error(response.content)
        return response

    def register(self, **changes: object) -> httpx.Response:
        message = toy_run.register_message(self.client_id, **changes)
        return self.request("POST", routes.REGISTER, content=encode_message(message))

    def assignment(self, wait_s: float = 0.0) -> object:
        response = self.request("GET", routes.ASSIGNMENT, params={"wait_s": wait_s})
        return decode_message(response.content, AssignmentReply)

    def manifest(self, which: object = "latest") -> Manifest:
        response = self.request("GET", routes.MANIFEST, values={"server_round": which})
        return decode_message(response.content, Manifest)

    def blob(self, sha256: str, **arguments) -> httpx.Response:
        return self.request("GET", routes.BLOB, values={"sha256": sha256}, expect=(200, 206), **arguments)

    def status(self) -> Status:
        return decode_message(self.request("GET", routes.STATUS).content, Status)

    def offset(self, meta: UpdateMeta) -> tuple[int, str]:
        reply = self.request("GET", routes.UPLOAD, values=place(meta)).json()
        return reply["offset"], reply["status"]

    def put(self, meta: UpdateMeta, content: object, offset: int = 0, **arguments) -> int:
        response = self.request(
            "PUT", routes.UPLOAD, values=place(meta), params={"offset": offset}, content=content, **arguments
        )
        return response.json()["offset"]

    def commit(self, meta: UpdateMeta) -> bool:
        """Returns whether the update had been accepted before."""
        response = self.request("POST", routes.COMMIT, values=place(meta), content=encode_message(meta))
        return response.json()["repeated"]

    def send(self, update: toy_run.Update) -> bool:
        self.put(update.meta, update.frame)
        return self.commit(update.meta)

    def wait_for_round(self, server_round: int, timeout_s: float = 10.0) -> Manifest:
        """The manifest of a round, as soon as there is one."""
        until = time.monotonic() + timeout_s
        while (manifest := self.manifest()).server_round < server_round:
            assert time.monotonic() < until, f"round {server_round} did not come"
            time.sleep(0.05)
        return manifest

    def values(self, manifest: Manifest, folder: Path) -> dict:
        """Every tensor of a model, downloaded."""
        values = {}
        for unit in manifest.units:
            path = folder / unit.sha256
            path.write_bytes(self.blob(unit.sha256).content)
            values.update({f"{unit.key}|{name}": array for name, array in toy_run.unit_values(path).items()})
        return values


def place(meta: UpdateMeta) -> dict[str, int]:
    return {"server_round": meta.server_round, "attempt": meta.attempt}
