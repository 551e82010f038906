"""State folders: making a run, blobs, locks, and databases that are not ours."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sqlite3

import msgspec
import numpy as np
import pytest
import toy_run
from toy_run import NewUnit, make_run, new_unit, new_units, run_config

from edgefed.aggregator import blobs as blobs_module
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.creation import RunWriter
from edgefed.aggregator.rounds import Phase, RoundPolicy
from edgefed.aggregator.store import LOCK_NAME, Store, has_run
from edgefed.errors import CheckpointError, ConfigError, DiskFull, StateCorrupt, StateLocked, StorageError

POLICY = RoundPolicy(rounds=2)


# --- creation ---------------------------------------------------------------------------------------------------


def test_a_new_run_contains_the_imported_model(state):
    store = Store(state)
    manifest = store.manifest(1)
    blobs = BlobStore(state)
    assert store.run == run_config()
    assert manifest.run_id == "run-1"
    assert manifest.experts_per_layer == (3, 3)
    units = new_units(np.random.default_rng(0))
    assert [unit.key for unit in manifest.units] == [unit.key for unit, _ in units]
    for info, (_, tensors) in zip(manifest.units, units, strict=True):
        content = blobs.path(info.sha256).read_bytes()
        assert hashlib.sha256(content).hexdigest() == info.sha256
        assert len(content) == info.size_bytes
        for name, values in toy_run.unit_values(blobs.path(info.sha256)).items():
            assert np.array_equal(values, tensors[name][1])
            assert values.dtype == tensors[name][1].dtype
    (file,) = manifest.files
    assert file.name == "config.json"
    assert b"toy" in blobs.path(file.sha256).read_bytes()
    store.close()


def test_an_incomplete_import_is_refused_and_can_be_repeated(tmp_path):
    folder = tmp_path / "state"
    with pytest.raises(RuntimeError), RunWriter(folder) as writer:  # noqa: PT012  the error leaves the import half-way
        writer.add_unit(*new_units(np.random.default_rng(0))[0])
        raise RuntimeError("the importer died")
    assert not has_run(folder)
    assert not list((folder / "blobs" / "tmp").iterdir())
    with pytest.raises(StorageError, match="no run"):
        Store(folder)
    (folder / "edgefed.db.new").write_bytes(b"half a database")
    make_run(folder)
    with pytest.raises(ConfigError, match="already"):
        make_run(folder)


def unit(**changes) -> NewUnit:
    values = np.zeros((2, 2), np.float32)
    facts = {
        "key": "u",
        "kind": "dense",
        "layer": -1,
        "expert": -1,
        "trainable": True,
        "tensors": {"w": ("F32", values)},
    }
    return new_unit(**{**facts, **changes})


@pytest.mark.parametrize(
    "wrong",
    [
        [unit(), unit()], [unit(kind="other")], [unit(key="a|b")], [unit(key="")], [unit(tensors={})],
        [unit(tensors={"a|b": ("F32", np.zeros(1, np.float32))})],
        [unit(tensors={"w": ("BF16", np.zeros(1, np.float32))})],
        [unit(tensors={"w": ("I64", np.zeros(1, np.int64))})], [unit(kind="expert", layer=0)], [unit(expert=1)],
        [unit(kind="expert", layer=1, expert=0)], [unit(kind="expert", layer=0, expert=1)],
    ],
    ids=range(12),
)  # fmt: skip
def test_invalid_units_are_refused(tmp_path, wrong):
    with pytest.raises(CheckpointError), RunWriter(tmp_path / "state") as writer:  # noqa: PT012  any of the steps may refuse
        for new in wrong:
            writer.add_unit(*new)
        writer.finish(run_config(), POLICY)
    assert not has_run(tmp_path / "state")


def test_a_frozen_unit_may_contain_integers(tmp_path):
    with RunWriter(tmp_path / "state") as writer:
        writer.add_unit(*unit(trainable=False, tensors={"ids": ("I64", np.arange(4))}))
        with pytest.raises(ConfigError, match="rounds"):
            writer.finish(run_config(), RoundPolicy(rounds=9))
        writer.finish(run_config(), POLICY)
    assert has_run(tmp_path / "state")


# --- locks and damage -------------------------------------------------------------------------------------------


def test_a_run_can_be_read_but_not_changed_while_it_is_served(state):
    owner = Store(state)
    reader = Store(state, read_only=True)
    owner.save_round(1, Phase.TRAINING, ["a"])
    assert reader.current_round().phase is Phase.TRAINING
    assert reader.manifest(1) == owner.manifest(1)
    with pytest.raises(StorageError, match="readonly"):
        reader.save_round(1, Phase.WAITING, [])
    reader.close()
    with pytest.raises(StateLocked):  # the reader released nothing that was not its own
        Store(state)
    owner.close()


def test_a_run_folder_has_one_writer(state):
    store = Store(state)
    with pytest.raises(StateLocked):
        Store(state)
    with pytest.raises(StateLocked):
        RunWriter(state)
    if os.name != "nt":
        (state / LOCK_NAME).unlink()  # by somebody who takes it for a leftover
        with pytest.raises(StateLocked):
            Store(state)
    store.close()
    Store(state).close()


@pytest.mark.parametrize("damage", ["text", "foreign", "newer", "page", "fact", "truncated"])
def test_a_damaged_database_is_refused(state, damage):
    path = state / "edgefed.db"
    if damage == "text":
        path.write_text("this is no database\n" * 1000)
    elif damage == "foreign":
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE run (name, value)")
    elif damage == "newer":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 2")
    elif damage == "page":
        content = bytearray(path.read_bytes())
        content[4096:8192] = b"\xa5" * 4096
        path.write_bytes(content)
    elif damage == "fact":
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE run SET value = '{}' WHERE name = 'config'")
    else:
        path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(StateCorrupt, match="edgefed.db"):
        Store(state)
    with pytest.raises(StateCorrupt):  # and the lock was released
        Store(state)


def test_the_manifest_of_every_kept_round_can_be_rebuilt(state):
    store = Store(state)
    first = store.manifest(1)
    changed = [msgspec.structs.replace(u, sha256=f"{i:064x}", size_bytes=7) for i, u in enumerate(first.units[2:4])]
    status = toy_run_status(1)
    store.record_fold(status, changed, store.current_round().phase, [], store.coverage(), [])
    second = store.manifest(2)
    assert [u for u in second.units if u in changed] == changed
    assert [u for u in second.units if u not in changed] == [
        u for u in first.units if u.key not in {c.key for c in changed}
    ]
    assert store.manifest(1) == first
    assert store.manifest(3) is None
    assert store.manifest(0) is None
    assert store.history() == (status,)
    old = {u.sha256 for u in first.units if u.key in {c.key for c in changed}}
    assert store.prune(2) == []
    assert set(store.prune(1)) == old
    assert store.manifest(1) is None
    assert store.manifest(2) == second
    store.close()


def toy_run_status(server_round: int):
    from edgefed.protocol.messages import RoundStatus

    return RoundStatus(
        server_round=server_round,
        participants=2,
        updates=2,
        seconds=1.0,
        uploaded_bytes=0,
        experts_changed=0,
        metrics={},
    )


# --- blobs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 65, "a" * 63 + "/", "a" * 64 + "\n"]
)
def test_only_a_hash_is_a_blob_name(tmp_path, name):
    with pytest.raises(ValueError, match="invalid SHA-256"):
        BlobStore(tmp_path).path(name)


def test_blobs_are_named_by_their_content_and_written_once(tmp_path):
    blobs = BlobStore(tmp_path)
    with blobs.batch() as batch:
        names = [batch.put([b"part ", bytes([i % 3])])[0] for i in range(200)]
    assert len(set(names)) == 3
    assert all(blobs.has(name) for name in names)
    assert names[0] == hashlib.sha256(b"part \0").hexdigest()
    assert blobs.put([b"part \0"]) == (names[0], 6)
    assert blobs.delete_unreferenced([names[1]]) == 2
    assert blobs.has(names[1])
    assert not blobs.has(names[0])
    assert blobs.delete([names[0]]) == 0


@pytest.mark.parametrize("step", ["write_all", "sync_file", "sync_folder"])
def test_a_failed_batch_leaves_no_incomplete_blob(tmp_path, monkeypatch, step):
    blobs = BlobStore(tmp_path)

    def no_room(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(blobs_module, step, no_room)
        with pytest.raises(DiskFull, match="quota"):
            blobs.put([b"content"])
    assert not list((tmp_path / "blobs" / "tmp").iterdir())
    name, _ = blobs.put([b"content"])
    assert blobs.path(name).read_bytes() == b"content"


def test_a_folder_that_cannot_be_created_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunWriter(tmp_path / "file" / "state")
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    with pytest.raises(StorageError):
        Store(tmp_path / "none")
