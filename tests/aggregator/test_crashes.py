"""kill -9 at every step between the first byte of an update and the next global model: nothing acknowledged is lost."""

from __future__ import annotations

import time

import httpx
import numpy as np
import pytest
from server_process import Client
from toy_run import make_run, make_update, trained, weighted_mean

WEIGHTS = {"a": 10, "b": 30}

PLACES = [
    "before:UploadFolder.promote", "after:UploadFolder.promote", "after:Store.record_update", "before:fold_round",
    "after:BlobBatch.flush", "before:Store.record_fold", "after:Store.record_fold",
    "after:Store.prune:2", "stop:fold_round",
]  # fmt: skip


def persist(client: Client, update) -> None:
    """What an agent does: ask what has arrived, send the rest, commit."""
    offset, status = client.offset(update.meta)
    if status == "partial":
        if offset < len(update.frame):
            client.put(update.meta, update.frame[offset:], offset=offset)
        client.commit(update.meta)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_server_resumes_its_round(tmp_path, start_server, place):
    state = make_run(tmp_path / "state")
    server = start_server(state, die=place, keep_rounds=1)
    clients = {name: Client(server.url, name) for name in "ab"}
    for client in clients.values():
        client.register()
    manifest = clients["a"].manifest()
    units = [unit for unit in manifest.units if unit.trainable]
    tensors = {"a": trained(units, 1), "b": trained(units[:5], 2)}
    updates = {name: make_update(manifest, name, tensors[name], num_examples=WEIGHTS[name]) for name in "ab"}
    acknowledged = set()
    try:
        for name in "ab":
            persist(clients[name], updates[name])
            acknowledged.add(name)
        server.process.wait(10)
    except httpx.HTTPError:
        pass  # it died under our hands
    assert server.process.wait(10) == (0 if place.startswith("stop") else -9)
    assert "Traceback" not in server.log.read_text()

    again = start_server(state, keep_rounds=1)
    clients = {name: Client(again.url, name) for name in "ab"}
    for name in "ab":
        if name in acknowledged:
            assert clients[name].commit(updates[name].meta) is True, "an acknowledged update is never lost"
        elif clients[name].status().history == ():
            persist(clients[name], updates[name])
    new = clients["a"].wait_for_round(2)
    values = clients["a"].values(new, tmp_path)
    for name, (_, ours) in tensors["a"].items():
        pairs = [(10, ours)] + ([(30, tensors["b"][name][1])] if name in tensors["b"] else [])
        expected = weighted_mean(pairs).astype(ours.dtype)
        np.testing.assert_array_max_ulp(values[name], expected, maxulp=1)
    assert clients["a"].status().history[0].updates == 2
    wanted = {unit.sha256 for unit in new.units} | {file.sha256 for file in new.files}
    until = time.monotonic() + 5  # the old blobs go right after the new model is there
    while {path.name for path in (state / "blobs").glob("??/*")} != wanted and time.monotonic() < until:
        time.sleep(0.05)
    assert {path.name for path in (state / "blobs").glob("??/*")} == wanted
    assert not list((state / "blobs" / "tmp").iterdir())
    assert not list((state / "updates").iterdir())


def test_a_server_killed_during_an_upload_keeps_its_bytes(tmp_path, start_server):
    state = make_run(tmp_path / "state", hidden=20_000)
    server = start_server(state)
    for name in "ab":
        Client(server.url, name).register()
    client = Client(server.url, "a")
    manifest = client.manifest()
    update = make_update(manifest, "a", trained([unit for unit in manifest.units if unit.trainable], 1))
    part = state / "uploads" / "a-1-1.part"

    def until_killed():
        for at in range(0, len(update.frame), 65536):
            yield update.frame[at : at + 65536]
            if at > 2 * 10**6 and server.process.poll() is None:
                until = time.monotonic() + 10
                while not (part.exists() and part.stat().st_size > 10**6) and time.monotonic() < until:
                    time.sleep(0.01)
                server.process.kill()
                server.process.wait(10)

    with pytest.raises(httpx.HTTPError):
        client.put(update.meta, until_killed())
    server.process.wait(10)
    arrived = part.stat().st_size
    assert 10**6 < arrived < len(update.frame)
    again = Client(start_server(state).url, "a")
    assert again.offset(update.meta) == (arrived, "partial")
    again.put(update.meta, update.frame[arrived:], offset=arrived)
    assert again.commit(update.meta) is False
