"""Which experts the clients of a run hold and train: the answer of GET coverage."""

from __future__ import annotations

from edgefed.protocol.messages import Message


class ClientExperts(Message, frozen=True):
    """Experts of one client in the last round that it contributed to.

    ``resident``: for each layer the experts that it held, ascending. ``trained``: for each of these the share of its
    neurons in the update, 0..1; 1 for a whole expert or its adapter, 0 for one that stayed frozen.
    """

    server_round: int
    resident: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[float, ...], ...]


class ExpertCoverage(Message, frozen=True):
    """How the experts are covered, up to the last aggregated round; 0 before the first. Tables are (layer, expert).

    ``updates``: updates of that round with the expert. ``neurons``: share of its neurons that at least one of them
    trained, 0..1. ``trained_in``: the last round that trained it, 0 if none has. ``clients``: by client id.
    """

    server_round: int
    experts_per_layer: tuple[int, ...]
    updates: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[float, ...], ...]
    trained_in: tuple[tuple[int, ...], ...]
    clients: dict[str, ClientExperts]
