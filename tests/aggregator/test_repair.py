"""Blobs that the disk has damaged: named, left out, or replaced by the copy of a client."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest
import toy_run
from test_tls import TOKEN, serving
from toy_run import Toy, make_run, register_message

from edgefed.agent.heartbeat import Copies
from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator import repair
from edgefed.errors import NotFound, StateCorrupt, StorageError
from edgefed.protocol import routes
from edgefed.protocol.messages import Heartbeat, Manifest
from edgefed.runs import RunReader

BEAT = Heartbeat(phase="train", fraction=0.5, server_round=1)


def blob_path(folder: Path, sha256: str) -> Path:
    return folder / "blobs" / sha256[:2] / sha256


def flip(path: Path) -> bytes:
    """Change one bit of a file. Returns what it was."""
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 16]) + data[-2:])
    return data


def test_a_client_that_has_a_copy_repairs_what_another_finds_damaged(tmp_path):
    folder = make_run(tmp_path / "state")
    with (
        serving(folder) as server,
        AggregatorClient(server.url, "a", toy_run.KEY + "a", TOKEN) as has,
        AggregatorClient(server.url, "b", toy_run.KEY + "b", TOKEN) as lacks,
    ):
        for client in (has, lacks):
            client.register(register_message(client.client_id))
        unit = has.manifest().units[2]
        has.download(unit.sha256, unit.size_bytes, tmp_path / unit.sha256)
        assert has.heartbeat(BEAT).wanted == ()
        whole = flip(blob_path(folder, unit.sha256))
        with pytest.raises(StorageError, match="waits for a copy"):
            lacks.download(unit.sha256, unit.size_bytes, tmp_path / "other")
        assert has.heartbeat(BEAT).wanted == (unit.sha256,)
        headers = {routes.TOKEN_HEADER: f"Bearer {TOKEN}"}
        path = routes.path_for(routes.BLOB, sha256=unit.sha256)
        for wrong in (b"x", whole + b"x", whole[:-1] + b"x"):  # nobody can put anything else there
            assert httpx.put(server.url + path, content=wrong, headers=headers, trust_env=False).status_code == 422
        Copies(lambda sha256: tmp_path / sha256, has.restore).offer(has.heartbeat(BEAT).wanted)
        until = time.monotonic() + 10
        while has.heartbeat(BEAT).wanted:
            assert time.monotonic() < until
            time.sleep(0.02)
        lacks.download(unit.sha256, unit.size_bytes, tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == whole
        with pytest.raises(NotFound):
            has.restore(unit.sha256, tmp_path / unit.sha256)


def deliver(toy: Toy) -> Manifest:
    """Both clients send the first round. Returns its manifest."""
    toy.join("a", "b")
    for client_id, seed in (("a", 1), ("b", 2)):
        toy.send(toy.update(client_id, seed))
    return toy.manifest("1")


def test_a_round_goes_on_without_a_damaged_unit_and_names_it(state, monkeypatch):
    monkeypatch.setattr(repair, "PATIENCE_S", 0.1)
    healthy = Toy(make_run(state.parent / "healthy"))
    deliver(healthy)
    healthy.run.fold_pending()
    toy = Toy(state, tick_s=None)
    unit = next(u for u in deliver(toy).units if u.kind == "expert")
    flip(blob_path(state, unit.sha256))
    toy.run.fold_pending()
    done = toy.run.status().history[0]
    assert (done.damaged, done.updates) == ((unit.key,), 2)
    assert toy.blobs()[unit.key] == unit.sha256
    assert all(sha == toy.blobs()[key] for key, sha in healthy.blobs().items() if key != unit.key)
    toy.close()
    healthy.close()


def test_a_copy_that_arrives_in_time_leaves_no_trace(state):
    healthy = Toy(make_run(state.parent / "healthy"))
    deliver(healthy)
    healthy.run.fold_pending()
    toy = Toy(state)
    unit = next(u for u in deliver(toy).units if u.kind == "expert")
    whole = flip(blob_path(state, unit.sha256))

    def send() -> None:
        import asyncio

        async def chunks():
            yield whole

        while unit.sha256 not in toy.run.repairs.wanted():
            time.sleep(0.01)
        asyncio.run(toy.run.repairs.receive(unit.sha256, chunks()))

    sender = threading.Thread(target=send)
    sender.start()
    toy.run.fold_pending()
    sender.join()
    assert toy.run.status().history[0].damaged == ()
    assert toy.blobs() == healthy.blobs()
    toy.close()
    healthy.close()


def test_a_run_with_a_lost_blob_starts_and_its_export_names_it(state):
    toy = Toy(state)
    units = toy.manifest().units
    toy.close()
    blob_path(state, units[3].sha256).unlink()
    flip(blob_path(state, units[5].sha256))
    with RunReader(state) as reader, pytest.raises(StateCorrupt, match="2 of") as caught:
        reader.paths(reader.manifest())
    assert repr(units[3].key) in str(caught.value)
    toy = Toy(state)
    assert toy.run.repairs.wanted() == (units[3].sha256,)
    toy.close()
    for unit in units:
        blob_path(state, unit.sha256).unlink(missing_ok=True)
    for path in (state / "blobs").glob("??/*"):
        path.unlink()
    with pytest.raises(StateCorrupt, match="are missing"):
        Toy(state)


def test_the_update_of_a_banned_client_does_not_count(state):
    toy = Toy(state)
    deliver(toy)
    toy.run.access.ban("b")
    toy.run.fold_pending()
    done = toy.run.status().history[0]
    assert [(each.client_id, each.reason) for each in done.set_aside] == [("b", "its client is banned")]
    assert done.updates == 1
    toy.close()
