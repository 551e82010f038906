"""One aggregator and several agents as processes of this machine, started, watched and ended together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgefed.agent.transport import AggregatorClient
from edgefed.errors import ProcessFailed, ServerUnreachable
from edgefed.isolation.start import module_command
from edgefed.protocol.messages import Status

START_TIMEOUT_S = 300.0
END_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 15


@dataclasses.dataclass(frozen=True)
class LocalClient:
    """An agent to start.

    Attributes:
        name: Its name.
        data: Its data, as the setting `data` of a client.
        expert_share: Share of the experts that may be resident.
        flags: Further flags of `edgefed join`.
    """

    name: str
    data: str
    expert_share: float = 1.0
    flags: tuple[str, ...] = ()


@dataclasses.dataclass
class _Child:
    label: str
    process: subprocess.Popen[bytes]
    log: Path


class LocalFederation:
    """Runs one federation in ``folder``: ``run/`` (server state), ``clients/NAME/`` and a log per process.

    A context: leaving it ends every process that is still there.
    """

    def __init__(self, folder: Path, serve_flags: Sequence[str], clients: Sequence[LocalClient], *, threads: int = 1):
        self.folder = folder
        self.clients = tuple(clients)
        self._serve_flags = list(serve_flags)
        self._threads = threads
        self._children: list[_Child] = []

    @property
    def run_folder(self) -> Path:
        """The server's state."""
        return self.folder / "run"

    @property
    def _ready_file(self) -> Path:
        return self.folder / "address"

    def client_folder(self, name: str) -> Path:
        """An agent's state."""
        return self.folder / "clients" / name

    def __enter__(self) -> LocalFederation:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.terminate()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=5)
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()

    def run(self, on_status: Callable[[Status], None], *, timeout_s: float, poll_s: float = 0.5) -> Status:
        """Start everything and return the status of the finished run.

        ``on_status`` is called at every poll. Raises ProcessFailed when a process ends badly or time runs out.
        """
        deadline = time.monotonic() + timeout_s
        self.start()
        url = self._server_url()
        for client in self.clients:
            self._start_agent(client, url)
        status = None
        with AggregatorClient(url, "status", "status") as server:
            # Agents compare models after the run, and the server waits for them.
            while status is None or status.state != "finished" or self._agents_run():
                self._check_children()
                if time.monotonic() > deadline:
                    raise ProcessFailed(f"the federation in {self.folder} did not finish within {timeout_s:.0f} s")
                with contextlib.suppress(ServerUnreachable):
                    status = server.status()
                    on_status(status)
                time.sleep(poll_s)
        self._children[0].process.terminate()  # every agent has ended; the server would still wait for a download
        for child in self._children:
            try:
                child.process.wait(timeout=END_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise ProcessFailed(f"{child.label} did not end after the run was finished") from error
        self._check_children()
        return status

    def _agents_run(self) -> bool:
        return any(child.process.poll() is None for child in self._children[1:])

    def start(self) -> None:
        """Start the server and return at once, for a caller with something to do meanwhile; `run` starts the rest."""
        if self._children:
            return
        self._ready_file.unlink(missing_ok=True)
        flags = [
            "--state", str(self.run_folder), "--port", "0", "--ready-file", str(self._ready_file),
            "--exit-when-finished", "--min-clients", str(len(self.clients)), *self._serve_flags,
        ]  # fmt: skip
        self._start("server", ["serve", *flags])

    def _server_url(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready_file.exists():
            self._check_children()
            if time.monotonic() > deadline:
                raise ProcessFailed(f"the server in {self.folder} was not ready within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        return str(json.loads(self._ready_file.read_text())["url"])

    def _start_agent(self, client: LocalClient, url: str) -> None:
        arguments = [
            "join", url, "--data", client.data, "--experts", str(client.expert_share), "--name", client.name,
            "--state", str(self.client_folder(client.name)), "--threads", str(self._threads),
            *client.flags,
        ]  # fmt: skip
        self._start(client.name, arguments)

    def _start(self, label: str, arguments: Sequence[str]) -> None:
        log = self.folder / f"{label}.log"
        # One thread per agent: several agents that each use all cores only wait for each other.
        # The user's own settings (a token, a method) are for real runs, not for this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGEFED_")}
        environment |= {"OMP_NUM_THREADS": str(self._threads), "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*module_command("edgefed"), "--config", os.devnull, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._children.append(_Child(label, process, log))

    def _check_children(self) -> None:
        for child in self._children:
            status = child.process.poll()
            if status:
                tail = child.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                raise ProcessFailed(f"{child.label} ended with status {status}:\n" + "\n".join(tail))


def read_ledger(client_folder: Path) -> list[Mapping[str, Any]]:
    """The rounds of an agent, oldest first, from the ledger in its state folder."""
    return list(_json_lines(client_folder / "ledger.jsonl"))


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
