"""Blobs and updates through object storage: moto's S3 server, real aggregator processes, the agent's own transport."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from s3_server import S3Server, find_python
from toy_run import KEY, Toy, make_run, make_update, register_message, trained, unit_values, weighted_mean

from edgefed.agent.backoff import is_transient
from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.bucket import Bucket
from edgefed.aggregator.uploads import UploadName
from edgefed.errors import ConfigError, EdgefedError, ObjectStorageError

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("obstore") is None or find_python() is None, reason="needs obstore and moto[server]"
    ),
]
WEIGHTS = {"a": 10, "b": 30}
BLOBS, PIECE_BYTES = "s3://runs/team", 4096


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _environment(s3, monkeypatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    httpx.put(f"{s3.url}/runs")
    s3.log.write_text("")


@contextlib.contextmanager
def clients_of(url: str, names: str = "ab") -> Iterator[dict[str, AggregatorClient]]:
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(AggregatorClient(url, name, KEY + name)) for name in names}
        for name, client in clients.items():
            client.register(register_message(name))
        yield clients


def patiently(request, timeout_s: float = 20.0):
    """What the agent's `Retry` does."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return request()
        except EdgefedError as error:
            if not is_transient(error, joined=True) or time.monotonic() > until:
                raise
            time.sleep(0.1)


def updates_of(client: AggregatorClient, folder: Path) -> dict:
    manifest = client.manifest()
    units = [unit for unit in manifest.units if unit.trainable]
    updates = {
        name: make_update(manifest, name, trained(units, seed), num_examples=WEIGHTS[name])
        for name, seed in (("a", 1), ("b", 2))
    }
    for name, update in updates.items():
        (folder / name).write_bytes(update.frame)
    return updates


def deliver(client: AggregatorClient, update, folder: Path) -> None:
    meta = update.meta
    path = folder / meta.client_id
    patiently(lambda: (client.upload(meta.server_round, meta.attempt, path), client.commit(meta)))


def model_of(client: AggregatorClient, server_round: int, folder: Path) -> dict[str, np.ndarray]:
    until = time.monotonic() + 20
    while (manifest := client.manifest()).server_round < server_round:
        assert time.monotonic() < until, f"round {server_round} did not come"
        time.sleep(0.05)
    values = {}
    folder.mkdir()
    for unit in manifest.units:
        patiently(lambda unit=unit: client.download(unit.sha256, unit.size_bytes, folder / unit.sha256))
        values |= {f"{unit.key}|{name}": array for name, array in unit_values(folder / unit.sha256).items()}
    return values


def check_mean(model: dict[str, np.ndarray], client: AggregatorClient) -> None:
    units = [unit for unit in client.manifest().units if unit.trainable and unit.kind != "router"]
    trainable = [unit for unit in client.manifest().units if unit.trainable]
    own = {"a": trained(trainable, 1), "b": trained(trainable, 2)}
    for unit in units:
        for info in unit.tensors:
            key = f"{unit.key}|{info.name}"
            mean = weighted_mean([(WEIGHTS[name], own[name][key][1]) for name in "ab"])
            np.testing.assert_allclose(model[key].astype(np.float64), mean, rtol=1e-3)


def test_a_round_moves_nothing_but_messages_through_the_server(tmp_path, start_server, s3):
    state = make_run(tmp_path / "state", hidden=64)
    server = start_server(state, blobs=BLOBS, piece_bytes=PIECE_BYTES)
    with clients_of(server.url) as clients:
        updates = updates_of(clients["a"], tmp_path)
        for name in "ab":
            deliver(clients[name], updates[name], tmp_path)
        check_mean(model_of(clients["a"], 2, tmp_path / "model"), clients["a"])
        units = clients["a"].manifest().units
    pieces = s3.requests("PUT", "/updates/")
    assert {status for status, _, _ in pieces} == {200}
    assert len(pieces) == 2 * -(-updates["a"].meta.size_bytes // PIECE_BYTES) > 2
    reads = {path.rpartition("/")[2] for _, path, more in s3.requests("GET", "/blobs/")}
    assert {unit.sha256 for unit in units} <= reads
    assert {more for _, _, more in [*s3.requests("GET"), *pieces] if "EDGEFED" in more} == set()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    "place",
    ["before:Bucket.collect", "after:Bucket.collect", "before:Store.record_update", "after:Store.record_update",
     "before:Bucket.publish", "after:Bucket.publish", "after:Store.record_fold"],
)  # fmt: skip
def test_a_killed_server_loses_nothing(tmp_path, start_server, s3, place):
    state = make_run(tmp_path / "state", hidden=64)
    server = start_server(state, blobs=BLOBS, piece_bytes=PIECE_BYTES, die=place)
    with clients_of(server.url) as clients, contextlib.suppress(EdgefedError):
        updates = updates_of(clients["a"], tmp_path)
        for name in "ab":
            meta = updates[name].meta
            clients[name].upload(1, 1, tmp_path / name)
            clients[name].commit(meta)
    assert server.process.wait(20) == -9
    sent = len(s3.requests("PUT", "/updates/"))
    again = start_server(state, blobs=BLOBS, piece_bytes=PIECE_BYTES)
    with clients_of(again.url) as clients:
        for name in "ab":
            if not clients[name].status().history:
                deliver(clients[name], updates[name], tmp_path)
        check_mean(model_of(clients["b"], 2, tmp_path / "model"), clients["b"])
    pieces = -(-updates["a"].meta.size_bytes // PIECE_BYTES)
    assert sent in (pieces, 2 * pieces)
    assert len(s3.requests("PUT", "/updates/")) == 2 * pieces, "no piece is sent twice"
    assert "Traceback" not in again.log.read_text()


def test_expired_urls_are_renewed(tmp_path, start_server, s3):
    state = make_run(tmp_path / "state", hidden=64)
    server = start_server(state, blobs=BLOBS, piece_bytes=PIECE_BYTES, blob_url_s=1)
    with clients_of(server.url) as clients:
        updates = updates_of(clients["a"], tmp_path)
        slow = []

        def dawdle(n: int) -> None:  # after the first piece, the other URLs are too old
            slow.append(n)
            if len(slow) == 1:
                time.sleep(2.1)

        clients["a"].upload(1, 1, tmp_path / "a", on_bytes=dawdle)
        assert clients["a"].commit(updates["a"].meta).repeated is False
        refused = [status for status, _, _ in s3.requests("PUT", "/updates/") if status == 403]
        assert len(refused) == 1
        deliver(clients["b"], updates["b"], tmp_path)
        check_mean(model_of(clients["b"], 2, tmp_path / "model"), clients["b"])


def test_a_lost_bucket_is_reported_and_filled_again(tmp_path, start_server, s3):
    state = make_run(tmp_path / "state", hidden=64)
    server = start_server(state, blobs=BLOBS, piece_bytes=PIECE_BYTES)
    with clients_of(server.url) as clients:
        updates = updates_of(clients["a"], tmp_path)
        deliver(clients["a"], updates["a"], tmp_path)
        httpx.post(f"{s3.url}/moto-api/reset")
        with pytest.raises(ObjectStorageError, match="NoSuchBucket"):
            clients["b"].upload(1, 1, tmp_path / "b")
        unit = clients["a"].manifest().units[0]
        with pytest.raises(ObjectStorageError, match="NoSuchBucket"):
            clients["a"].download(unit.sha256, unit.size_bytes, tmp_path / "blob")
        httpx.put(f"{s3.url}/runs")
        deliver(clients["b"], updates["b"], tmp_path)
        check_mean(model_of(clients["b"], 2, tmp_path / "model"), clients["b"])
    assert "Traceback" not in server.log.read_text()


def test_the_fold_waits_for_the_bucket(tmp_path, start_server, s3):
    state = make_run(tmp_path / "state", hidden=64)
    server = start_server(state, blobs=BLOBS, piece_bytes=PIECE_BYTES)
    with clients_of(server.url) as clients:
        updates = updates_of(clients["a"], tmp_path)
        deliver(clients["a"], updates["a"], tmp_path)
        clients["b"].upload(1, 1, tmp_path / "b")
        state_b = clients["b"].upload_state(1, 1)
        assert state_b.offset == updates["b"].meta.size_bytes
        clients["b"].commit(updates["b"].meta)
        httpx.post(f"{s3.url}/moto-api/reset")
        time.sleep(1.0)
        status = clients["a"].status()
        assert (status.server_round, status.state) in ((1, "aggregating"), (2, "training"))
        httpx.put(f"{s3.url}/runs")
        check_mean(model_of(clients["b"], 2, tmp_path / "model"), clients["b"])


def test_what_is_wrong_with_an_update_is_found_before_it_is_acknowledged(tmp_path, s3, monkeypatch):
    monkeypatch.setattr("edgefed.aggregator.bucket.PIECE_BYTES", PIECE_BYTES)
    toy = Toy(make_run(tmp_path / "state", hidden=64), bucket=lambda run_id: Bucket(BLOBS, run_id))
    try:
        toy.join("a", "b")
        update = toy.update("a", 1)

        def put(data: bytes) -> None:
            for number, url in enumerate(toy.service.upload_state("a", KEY + "a", 1, 1).urls):
                if piece := data[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]:
                    assert httpx.put(url, content=piece).status_code == 200

        put(update.frame[:-10])
        with pytest.raises(EdgefedError, match="have arrived in the object storage"):
            toy.commit(update.meta)
        toy.run.bucket.delete_update(UploadName("a", 1, 1))
        put(update.frame[:-4] + b"\0\0\0\1")
        with pytest.raises(EdgefedError, match="SHA-256"):
            toy.commit(update.meta)
        assert toy.service.upload_state("a", KEY + "a", 1, 1).offset == 0, "the wrong bytes are deleted"
        put(update.frame)
        assert toy.commit(update.meta).repeated is False
    finally:
        toy.close()


def test_a_blob_that_the_state_folder_has_lost_holds_no_round_up(tmp_path, s3):
    bucket = Bucket(BLOBS, "run")
    (tmp_path / "here").write_bytes(b"x")
    bucket.publish(["lost", "here"], lambda name: tmp_path / name, threading.Event())
    assert httpx.get(bucket.blob_url("here")).content == b"x"
    assert httpx.get(bucket.blob_url("lost")).status_code == 404


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("s3://nowhere/prefix", ObjectStorageError, "NoSuchBucket"),
        ("ftp://host/prefix", ConfigError, "invalid object storage"),
        ("memory:///", ConfigError, "makes no signed URLs"),
    ],
)
def test_a_server_without_its_bucket_does_not_start(tmp_path, s3, url, error, said):
    with pytest.raises(error, match=said):
        Toy(make_run(tmp_path / "state"), bucket=lambda run_id: Bucket(url, run_id))
    Toy(tmp_path / "state").close()  # the folder is free again
