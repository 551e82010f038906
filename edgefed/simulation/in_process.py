"""The real aggregator in this process, without HTTP: for simulations, and for clients that others' messages reach.

Rounds, merging, validation and storage are `edgefed.aggregator`'s own; what a client would send over the network is
handed to `Service` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefed import __version__
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.rounds import Phase, RoundPolicy
from edgefed.aggregator.service import Service
from edgefed.aggregator.stopping import RESTORED_ROUND
from edgefed.aggregator.store import has_run
from edgefed.aggregator.validate import MAX_EXAMPLES
from edgefed.disk import hash_file
from edgefed.errors import StateCorrupt
from edgefed.methods.pace import refresh_rounds
from edgefed.methods.registry import make_expert_method, make_method
from edgefed.protocol import PROTOCOL_VERSION
from edgefed.protocol.messages import (
    Assignment,
    DeviceInfo,
    Manifest,
    Register,
    RunConfig,
    UpdateMeta,
    decode_message,
)
from edgefed.runs import import_model

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK = 1 << 20


class DirectAggregator:
    """An open run and its clients, whose requests are calls. A context: leaving it releases the run's folder."""

    def __init__(self, active: ActiveRun):
        self.active = active
        self.service = Service(active)

    def __enter__(self) -> Self:
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

    @property
    def why_stopped(self) -> str:
        """Why the run has fewer rounds than it was to have; "" if it has not."""
        restored = self.active.store.history()[-1].metrics.get(RESTORED_ROUND) if self.finished else None
        if restored is None:
            return ""
        return f"the held-out loss no longer improves: the final model is that of the start of round {restored:.0f}"

    def manifest(self, server_round: int) -> Manifest:
        """The global model at the start of a round."""
        return decode_message(self.service.manifest(str(server_round)), Manifest)

    def blob(self, sha256: str) -> Path:
        """The file of a unit or file."""
        return self.service.blob(sha256)[0]

    def register(
        self, client_id: str, name: str, num_examples: int, memory_bytes: int = 1, device: DeviceInfo | None = None
    ) -> None:
        """Let a client take part, or again. Raises what `Service.register` raises."""
        self.service.register(
            Register(
                protocol_version=PROTOCOL_VERSION,
                client_id=client_id,
                client_key=self.key_of(client_id),
                name=name,
                memory_bytes=memory_bytes,
                expert_share=1.0,
                compute_share=1.0,
                num_examples=num_examples,
                edgefed_version=__version__,
                device=device,
            )
        )

    def joined(self, client_id: str) -> bool:
        """Whether a client still takes part."""
        return self.active.clients[client_id].joined

    def assignment(self, client_id: str) -> Assignment | None:
        """What this client is to do; None: it has done it, or takes no part."""
        reply = self.service.assignment(client_id, self.key_of(client_id))
        return reply if isinstance(reply, Assignment) else None

    def leave(self, client_id: str, reason: str) -> None:
        """The client takes no part any more."""
        self.service.leave(client_id, self.key_of(client_id), reason)

    def deliver(self, meta: UpdateMeta, path: Path) -> None:
        """Upload and commit one update. Raises what `Service.commit` raises."""
        client_id, key = meta.client_id, self.key_of(meta.client_id)
        done = self.service.upload_state(client_id, key, meta.server_round, meta.attempt)
        if done.status != "accepted":
            upload, writer = self.service.open_upload(
                client_id, key, meta.server_round, meta.attempt, done.offset, meta.size_bytes - done.offset
            )
            with path.open("rb") as file:
                file.seek(done.offset)
                while chunk := file.read(_CHUNK):
                    writer.write(chunk)
            self.service.close_upload(upload, writer)
        self.service.commit(client_id, key, meta.server_round, meta.attempt, meta)

    def fold(self) -> None:
        """Aggregate the round, if all of its updates are in."""
        self.active.fold_pending()

    def key_of(self, client_id: str) -> str:
        """Nobody outside of this process can ask; a key is only there because the protocol has one."""
        return f"simulated-{self.active.config.run_id}-{client_id}"


class InProcessAggregator(DirectAggregator):
    """One simulated run and its clients, on a clock that stands still.

    ``folder`` is made into a run of ``model`` if it holds none; a run that is there goes on where it stopped. Raises
    StateCorrupt when it is another run than ``run``. ``clients`` are their ids; ``more`` are fields of `RoundPolicy`.
    """

    def __init__(self, folder: Path, model: str, run: RunConfig, clients: Sequence[str], **more: Any):
        # With min_clients 1 a client that leaves holds nobody up; with clients_per_round those who register after the
        # first one still take part in the first round.
        # Simulated devices do not lie about their examples, which count in full as in the papers.
        policy = RoundPolicy(
            rounds=run.rounds, min_clients=1, clients_per_round=len(clients), max_examples=MAX_EXAMPLES, **more
        )
        if not has_run(folder):
            neurons = make_expert_method(run.method, run.method_options).requirements.neurons
            import_model(model, folder, run, policy, neurons=neurons)
        # Devices keep no files here: what one of them still has of an earlier round is read from the aggregator's.
        refresh = refresh_rounds(make_expert_method(run.method, run.method_options), run.pace)
        super().__init__(ActiveRun(folder, make_method, keep_rounds=1 + refresh, clock=lambda: 0.0))
        try:
            if self.active.config != run:
                raise StateCorrupt(
                    f"the folder {folder} holds a run with other settings",
                    remedy="Choose another `out` folder, or delete it to start again.",
                )
            for name in clients:
                if name not in self.active.clients:
                    self.register(name, name, MAX_EXAMPLES)
        except BaseException:
            self.active.close()
            raise


def describe_update(name: str, server_round: int, path: Path, **facts: Any) -> UpdateMeta:
    """The commit message of the update in ``path``."""
    sha256, size_bytes = hash_file(path)
    return UpdateMeta(
        client_id=name, server_round=server_round, attempt=1, sha256=sha256, size_bytes=size_bytes, **facts
    )
