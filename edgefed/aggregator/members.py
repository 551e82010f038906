"""Clients that a run lets go: removed or banned by its owner, or gone without a contribution when room is needed."""

from __future__ import annotations

import logging

from edgefed.aggregator import rounds
from edgefed.aggregator.active_run import ActiveRun
from edgefed.aggregator.status import client_label
from edgefed.errors import ServerFull, UnknownClient

logger = logging.getLogger(__name__)


def follow_access(run: ActiveRun) -> None:
    """Let clients go that `edgefed clients` has removed or banned since the last call. Raises StorageError."""
    with run.lock:
        if run.access.refresh():
            removed = run.access.removals
            for client_id in (*removed, *(d.client_id for d in run.access.devices.values() if d.banned)):
                _let_go(run, client_id, "removed" if client_id in removed else "banned")
            for client_id in removed:
                # A record that the round in progress needs goes with the next removal, or stays as one that has left.
                if client_id in run.clients and run.store.find_update(run.state.server_round, client_id) is None:
                    forget_clients(run, [client_id])
                run.access.note_removed(client_id)


def _let_go(run: ActiveRun, client_id: str, why: str) -> None:
    client = run.clients.get(client_id)
    if client is None or not client.joined:
        return
    run.note_left(client)
    run.store.save_clients([client])
    run.apply(rounds.ClientLeft(run.clock(), client_id))
    run.uploads.discard_of({client_id}, UnknownClient(f"client {client_id!r} was {why}"))
    logger.warning("%s was %s", client_label(client), why)


def make_room_for_client(run: ActiveRun) -> None:
    """Forget clients that are gone and never contributed, if there are too many. Call with the lock.

    Raises ServerFull if everyone is here or has contributed.
    """
    if len(run.clients) < run.policy.max_clients:
        return
    gone = [c.client_id for c in run.clients.values() if not c.rounds_done and (not c.joined or run.lost(c))]
    if not gone:
        raise ServerFull(f"this server takes {run.policy.max_clients} clients, and has as many")
    forget_clients(run, gone)
    logger.warning("%d clients that are gone and never contributed are forgotten", len(gone))


def forget_clients(run: ActiveRun, client_ids: list[str]) -> None:
    """Delete the records of clients. Call with the lock."""
    run.store.delete_clients(client_ids)
    for client_id in client_ids:
        del run.clients[client_id]
        run.presence.pop(client_id, None)
        run.apply(rounds.ClientLeft(run.clock(), client_id))
