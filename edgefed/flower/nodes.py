"""Flower's nodes as clients of a run, and the parts of the model that go to and from them."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from typing import TYPE_CHECKING

from edgefed.aggregator.access import owner_token
from edgefed.aggregator.active_run import ActiveRun
from edgefed.flower import records
from edgefed.flower.tasks import Introduction
from edgefed.protocol.frames import map_tensor, read_header, update_name, widen
from edgefed.protocol.messages import FileInfo, Manifest, UnitInfo
from edgefed.simulation.in_process import DirectAggregator

if TYPE_CHECKING:
    from flwr.app import ArrayRecord


@dataclasses.dataclass
class Node:
    """One SuperNode.

    Attributes:
        sent: Type of the message that it has not answered, or "".
        missing: Blobs that it has asked for.
        known: It is a client of the run.
        failures: In a row.
        attempt: Of its update in the current round.
        num_examples: As registered.
        resident: Blobs that it keeps for its next round.
        introduction: Its answer to the first message.
        given_up: Why it is asked no more, or "".
    """

    node_id: int
    sent: str = ""
    missing: tuple[str, ...] = ()
    known: bool = False
    failures: int = 0
    attempt: int = 0
    num_examples: int = 0
    resident: frozenset[str] = frozenset()
    introduction: Introduction | None = None
    given_up: str = ""

    @property
    def client_id(self) -> str:
        """The node as a client of the run."""
        return f"flower-{self.node_id}"


class FlowerAggregator(DirectAggregator):
    """The aggregator of the ServerApp."""

    def __init__(self, active: ActiveRun):
        super().__init__(active)
        self._secret = owner_token(active.store.folder).encode()

    def key_of(self, client_id: str) -> str:
        """Only the owner of the run can compute it: the run may be served over HTTP later."""
        return hmac.new(self._secret, client_id.encode(), hashlib.sha256).hexdigest()


def expected_blobs(node: Node, aggregator: FlowerAggregator, manifest: Manifest, message_bytes: int) -> tuple[str, ...]:
    """Hashes of what the node will ask for: new versions of what it keeps; at first, what every device needs.

    That is all but experts, or the whole model where one message can hold it: each question costs a ClientApp.
    """
    if not node.resident:
        everything: list[UnitInfo | FileInfo] = [*manifest.files, *manifest.units]
        small = sum(item.size_bytes for item in everything) <= message_bytes
        return tuple(
            item.sha256 for item in everything if small or not isinstance(item, UnitInfo) or item.kind != "expert"
        )
    before = aggregator.active.store.manifest(manifest.server_round - 1)
    kept = {} if before is None else {unit.key for unit in before.units if unit.sha256 in node.resident}
    return tuple(unit.sha256 for unit in manifest.units if unit.key in kept and unit.sha256 not in node.resident)


def trainable_arrays(aggregator: FlowerAggregator) -> ArrayRecord:
    """The trainable tensors of the current model, named UNIT|TENSOR; bfloat16 as float32."""
    app, arrays = records.flower(), {}
    for unit in aggregator.manifest(aggregator.server_round).units:
        if unit.trainable:
            path = aggregator.blob(unit.sha256)
            for name, entry in read_header(path).items():
                arrays[update_name(unit.key, name)] = app.Array(widen(map_tensor(path, entry), entry.info.dtype))
    return app.ArrayRecord(arrays)
