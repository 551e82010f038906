"""The aggregator of a simulation: the real one, in this process, without HTTP, on a clock that stands still.

Rounds, merging, validation and storage are `edgefed.aggregator`'s own; what a client would send over the network is
handed to `Service` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgefed import __version__
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.rounds import Phase, RoundPolicy
from edgefed.aggregator.service import Service
from edgefed.aggregator.store import has_run
from edgefed.aggregator.validate import MAX_EXAMPLES
from edgefed.disk import hash_file
from edgefed.errors import StateCorrupt
from edgefed.methods.registry import make_expert_method, make_method
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.messages import Assignment, Manifest, Register, RunConfig, UpdateMeta, decode_message
from edgefed.runs import import_in_subprocess

_CHUNK = 1 << 20


class InProcessAggregator:
    """One run and its clients. A context: leaving it releases the run's folder.

    ``folder`` is made into a run of ``model`` if it holds none; a run that is there goes on where it stopped. Raises
    StateCorrupt when it is another run than ``run``. ``clients`` are their ids.
    """

    def __init__(self, folder: Path, model: str, run: RunConfig, clients: Sequence[str]):
        # With min_clients 1 a client that leaves holds nobody up; with clients_per_round those who register after the
        # first one still take part in the first round.
        policy = RoundPolicy(rounds=run.rounds, min_clients=1, clients_per_round=len(clients))
        if not has_run(folder):
            neurons = make_expert_method(run.method, run.method_options).requirements.neurons
            import_in_subprocess(model, folder, run, policy, neurons=neurons)
        # Devices keep no files here: what one of them still has of an earlier round is read from the aggregator's.
        refresh = make_expert_method(run.method, run.method_options).refresh_rounds
        self.active = ActiveRun(folder, make_method, keep_rounds=1 + refresh, clock=lambda: 0.0)
        self.service = Service(self.active)
        try:
            if self.active.config != run:
                raise StateCorrupt(
                    f"the folder {folder} holds a run with other settings",
                    remedy="Choose another `out` folder, or delete it to start again.",
                )
            self._register(clients)
        except BaseException:
            self.active.close()
            raise

    def _register(self, clients: Sequence[str]) -> None:
        for name in clients:
            if name in self.active.clients:
                continue
            self.service.register(
                Register(
                    protocol_version=PROTOCOL_VERSION,
                    client_id=name,
                    client_key=self._key_of(name),
                    name=name,
                    memory_bytes=1,
                    expert_share=1.0,
                    compute_share=1.0,
                    num_examples=MAX_EXAMPLES,
                    edgefed_version=__version__,
                )  # fmt: skip
            )

    def __enter__(self) -> InProcessAggregator:
        return self

    def __exit__(self, *_: object) -> None:
        self.active.close()

    @property
    def server_round(self) -> int:
        """The current round."""
        return self.active.state.server_round

    @property
    def finished(self) -> bool:
        """The run is over."""
        return self.active.state.phase is Phase.FINISHED

    def manifest(self, server_round: int) -> Manifest:
        """The global model at the start of a round."""
        return decode_message(self.service.manifest(str(server_round)), Manifest)

    def blob(self, sha256: str) -> Path:
        """The file of a unit or file."""
        return self.service.blob(sha256)[0]

    def joined(self, name: str) -> bool:
        """Whether a client still takes part."""
        return self.active.clients[name].joined

    def assignment(self, name: str) -> Assignment | None:
        """What this client is to do; None: it has done it, or takes no part."""
        reply = self.service.assignment(name, self._key_of(name))
        return reply if isinstance(reply, Assignment) else None

    def leave(self, name: str, reason: str) -> None:
        """The client takes no part any more."""
        self.service.leave(name, self._key_of(name), reason)

    def deliver(self, meta: UpdateMeta, path: Path) -> None:
        """Upload and commit one update. Raises what `Service.commit` raises."""
        name, key = meta.client_id, self._key_of(meta.client_id)
        done = self.service.upload_state(name, key, meta.server_round, meta.attempt)
        if done.status != "accepted":
            upload, writer = self.service.open_upload(
                name, key, meta.server_round, meta.attempt, done.offset, meta.size_bytes - done.offset
            )
            with path.open("rb") as file:
                file.seek(done.offset)
                while chunk := file.read(_CHUNK):
                    writer.write(chunk)
            self.service.close_upload(upload, writer)
        self.service.commit(name, key, meta.server_round, meta.attempt, meta)

    def fold(self) -> None:
        """Aggregate the round, if all of its updates are in."""
        self.active.fold_pending()

    def _key_of(self, name: str) -> str:
        """Nobody outside of this process can ask; a key is only there because the protocol has one."""
        return f"simulated-{self.active.config.run_id}-{name}"


def describe_update(name: str, server_round: int, path: Path, **facts: Any) -> UpdateMeta:
    """The commit message of the update in ``path``."""
    sha256, size_bytes = hash_file(path)
    return UpdateMeta(
        client_id=name, server_round=server_round, attempt=1, sha256=sha256, size_bytes=size_bytes, **facts
    )
