"""Devices download the neurons that they hold: resumed, verified, and from whole blobs where these are here."""

from __future__ import annotations

import httpx
import msgspec
import numpy as np
import pytest
import toy_run
from server_process import ServerProcess
from toy_run import new_unit

from edgefed.agent.cache import BlobCache
from edgefed.agent.transport import AggregatorClient
from edgefed.aggregator.creation import create_run
from edgefed.aggregator.rounds import RoundPolicy
from edgefed.errors import ChecksumMismatch, NotFound
from edgefed.protocol.frames import map_tensor, read_header
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE
from edgefed.protocol.slices import SliceFile, UnitSlice, decode_rows, encode_rows, slice_unit

NEURONS, COLUMNS = 100, 700
ROWS = [0, 1, 2, 17, 40, 41, 99]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one sliced expert and one router: (folder, the table)."""
    folder = tmp_path_factory.mktemp("slices") / "state"
    rng = np.random.default_rng(0)
    table = rng.standard_normal((NEURONS, COLUMNS), dtype=np.float32)
    tensors = {NEURON_TABLE: ("F32", table), "bias": ("F32", rng.standard_normal(5, dtype=np.float32))}
    units = [
        new_unit("e0", "expert", 0, 0, True, tensors),
        new_unit("r0", "router", 0, -1, True, {"w": ("F32", rng.standard_normal((1, 4), dtype=np.float32))}),
    ]
    config = folder.parent / "config.json"
    config.write_text("{}")
    create_run(folder, toy_run.run_config(2), RoundPolicy(rounds=2, min_clients=2), units, [config])
    return folder, table


@pytest.fixture(scope="module")
def server(run):
    process = ServerProcess(run[0])
    yield process
    process.kill()


def check(path, table, rows=ROWS):
    entries = read_header(path)
    assert np.array_equal(map_tensor(path, entries[NEURON_TABLE]), table[rows])
    assert map_tensor(path, entries[NEURON_INDEX]).tolist() == rows
    assert entries["bias"].info.shape == (5,)


def test_only_the_rows_move_and_a_transfer_resumes(run, server, tmp_path):
    with AggregatorClient(server.url) as client:
        units = {unit.key: unit for unit in client.manifest().units}
        item, cache = slice_unit(units["e0"], ROWS), BlobCache(tmp_path, client)
        before, moved = client.bytes_down, []
        files = cache.ensure([item, units["r0"]], moved.append)
        check(files[item.sha256], run[1])
        assert files[item.sha256].stat().st_size == item.size_bytes
        assert sum(moved) == client.bytes_down - before == item.size_bytes + units["r0"].size_bytes
        assert item.size_bytes < 0.08 * units["e0"].size_bytes
        assert cache.bytes_to_download([item]) == 0
        content = files[item.sha256].read_bytes()
        for arrived in (1, 700, len(content) // 2, len(content) - 1):
            files[item.sha256].unlink(missing_ok=True)
            (tmp_path / f"{item.sha256}.part").write_bytes(content[:arrived])
            before = client.bytes_down
            assert cache.ensure([item])[item.sha256].read_bytes() == content
            assert client.bytes_down - before == len(content) - arrived
        files[item.sha256].unlink()
        (tmp_path / f"{item.sha256}.part").write_bytes(b"x" * (len(content) // 2))  # damaged on this disk
        assert cache.ensure([item])[item.sha256].read_bytes() == content
        (tmp_path / f"{item.sha256}.part").write_bytes(b"x" * len(content))  # complete, never verified
        files[item.sha256].unlink()
        assert cache.ensure([item])[item.sha256].read_bytes() == content


def test_impossible_slices_are_refused_by_name(run, server, tmp_path):
    with AggregatorClient(server.url) as client:
        units = {unit.key: unit for unit in client.manifest().units}
        path, e0, r0 = tmp_path / "slice", units["e0"], units["r0"]
        for unit, rows, problem in (
            (e0, "%%", "not base64"),
            (e0, "AAAA", "not those of a table of 100"),
            (e0, "", "not those of a table of 100"),
            (r0, "gA==", "has no neurons"),
        ):
            reply = httpx.get(f"{server.url}/v1/blobs/{unit.sha256}", params={"rows": rows}, trust_env=False)
            assert reply.status_code == 400
            assert problem in reply.json()["message"]
        with pytest.raises(NotFound):
            client.download_slice(slice_unit(msgspec.structs.replace(e0, sha256="0" * 64), ROWS), path)


def test_a_slice_is_cut_from_a_whole_blob_without_a_download(run, tmp_path):
    folder, table = run
    blob = max((folder / "blobs").glob("[0-9a-f][0-9a-f]/*"), key=lambda path: path.stat().st_size)

    class Nothing:
        def download(self, *arguments):
            raise AssertionError("nothing is missing")

        download_slice = download

    infos = tuple(entry.info for entry in read_header(blob).values())
    unit = toy_run.UnitInfo(
        key="e0", kind="expert", layer=0, expert=0, trainable=True, tensors=infos, sha256=blob.name,
        size_bytes=blob.stat().st_size,
    )  # fmt: skip
    cache, item = BlobCache(tmp_path, Nothing()), slice_unit(unit, ROWS)
    (tmp_path / blob.name).write_bytes(blob.read_bytes())
    assert cache.bytes_to_download([item]) == 0
    check(cache.ensure([item])[item.sha256], table)
    assert cache.prune([item.sha256]) == unit.size_bytes
    check(cache.ensure([item])[item.sha256], table)


def test_a_server_that_sends_another_slice_is_not_believed(run, server, tmp_path, monkeypatch):
    with AggregatorClient(server.url) as client:
        unit = next(unit for unit in client.manifest().units if unit.key == "e0")
        whole = slice_unit(unit, range(NEURONS))
        wrong = UnitSlice(unit=unit, rows=whole.rows)
        path = tmp_path / "slice"
        monkeypatch.setattr(UnitSlice, "size_bytes", property(lambda self: 1000))  # as an older server would send more
        with pytest.raises(ChecksumMismatch, match="another slice"):
            client.download_slice(wrong, path)
        assert list(tmp_path.iterdir()) == []


def test_rows_survive_the_url_and_the_file_reads_in_any_pieces(run):
    rng = np.random.default_rng(1)
    for count in (1, 7, 8, 9, 1000):
        rows = np.flatnonzero(rng.random(count) < 0.5)
        rows = rows if len(rows) else np.array([count - 1])
        assert decode_rows(encode_rows(rows, count), count).tolist() == rows.tolist()
    blob = max((run[0] / "blobs").glob("[0-9a-f][0-9a-f]/*"), key=lambda path: path.stat().st_size)
    with SliceFile(blob, encode_rows(ROWS, NEURONS)) as file:
        whole = file.read(1 << 30)
        assert len(whole) == file.size_bytes
        for size in (1, 999, 4096):
            file.seek(0)
            pieces = []
            while piece := file.read(size):
                pieces.append(piece)
            assert b"".join(pieces) == whole
        file.seek(5000)
        assert file.read(100) == whole[5000:5100]
