"""Encoded changes at the aggregator: they count as the values that they stand for, and bad ones are refused by name."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import toy_run
from toy_run import frame_of, make_update, new_unit

from edgefed.aggregator import fold
from edgefed.aggregator.blobs import BlobStore, ChangeCache
from edgefed.aggregator.creation import RunWriter
from edgefed.aggregator.validate import validate_update
from edgefed.errors import InvalidUpdate, NotFound
from edgefed.kernels.compression import CODECS, decode, encode
from edgefed.kernels.fold import NUMPY, select_backend
from edgefed.methods.interface import UnitMerge
from edgefed.protocol.changes import encode_blob_change, to_steps
from edgefed.protocol.frames import narrow, update_name, widen, write_frame
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, Manifest

HIDDEN = 2500  # a tensor has 10,000 values: more than one block of every codec, and a short last one
SIZES = {"a": 1.0, "b": 2.0, "c": 300.0}


def changes(manifest: Manifest, values: toy_run.Tensors, seed: int, codec: str, size: float = 1.0):
    """An update of random changes, encoded; and raw, as the values that it stands for."""
    rng, sent, plain = np.random.default_rng(seed), {}, {}
    for unit in (unit for unit in manifest.units if unit.trainable):
        for info in unit.tensors:
            name, old = f"{unit.key}|{info.name}", values[f"{unit.key}|{info.name}"]
            change = (size * 0.01 * rng.standard_normal(old.size)).astype(np.float32)
            raw = encode(CODECS[codec], change)
            decode(CODECS[codec], raw, change)
            new = widen(old, info.dtype).astype(np.float32).reshape(-1) + change
            sent[f"{name}|{codec}"] = ("U8", raw)
            plain[name] = (info.dtype, narrow(new, info.dtype).reshape(info.shape))
    return sent, plain


def play(folder, codec: str, *, plain: bool = False, order="abc", **policy) -> toy_run.Tensors:
    """The model after a round in which each client sends changes."""
    rules = {"min_clients": 3, "rounds": 1, **policy}
    toy = toy_run.Toy(toy_run.make_run(folder / "state", hidden=HIDDEN, experts=1, **rules))
    toy.join("a", "b", "c")
    manifest, values = toy.manifest(), toy.values()
    for client in order:
        both = changes(manifest, values, ord(client), codec, SIZES[client])
        toy.send(make_update(manifest, client, both[plain], num_examples=ord(client) - 90))
    toy.run.fold_pending()
    status = toy.service.status().history[0]
    assert not status.set_aside
    sent = {name.removeprefix("bytes_up_"): size for name, size in status.metrics.items() if name.startswith("bytes")}
    sizes = {unit.key: sum(math.prod(info.shape) for info in unit.tensors) for unit in manifest.units if unit.trainable}
    if plain:
        assert "upload_ratio" not in status.metrics
        assert sent == {"experts": 3 * 4 * 4 * 5000 * 2, "routers": 3 * 4 * 2 * 2 * 2500, "dense": 3 * 2 * 2500}
    else:
        encoded = {
            kind: 3 * sum(CODECS[codec].size_bytes(math.prod(info.shape)) for unit in units for info in unit.tensors)
            for kind, units in (
                ("experts", [unit for unit in manifest.units if unit.kind == "expert"]),
                ("routers", [unit for unit in manifest.units if unit.kind == "router"]),
                ("dense", [unit for unit in manifest.units if unit.trainable and unit.kind == "dense"]),
            )
        }
        assert sent == {**encoded, "changes": sum(encoded.values())}
        whole = 3 * (4 * sum(sizes.values()) - 2 * sizes["norm"])  # F16
        assert status.metrics["upload_ratio"] == pytest.approx(whole / sum(encoded.values()))
    result = toy.values()
    toy.close()
    return result


@pytest.mark.parametrize(
    ("codec", "policy"),
    [("int8", {}), ("int2", {}), ("topk", {}), ("topk3", {"clip": 2.0}), ("int4", {"robust": "median"})],
)
def test_changes_count_as_the_values_that_they_stand_for(tmp_path, codec, policy):
    found, expected = play(tmp_path / "encoded", codec, **policy), play(tmp_path / "plain", codec, plain=True, **policy)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        tolerance = 2**-9 if values.dtype == np.float16 else 2e-6
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance)


def test_neither_order_nor_block_size_nor_backend_changes_a_bit(tmp_path, monkeypatch):
    first = play(tmp_path / "first", "topk3")
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", 4096 + 17)
    for number, order in enumerate(itertools.islice(itertools.permutations("abc"), 1, 6, 2)):
        again = play(tmp_path / str(number), "topk3", order=order)
        assert {name: values.tobytes() for name, values in again.items()} == {
            name: values.tobytes() for name, values in first.items()
        }


def test_a_late_change_moves_the_current_model(tmp_path):
    folder = toy_run.make_run(tmp_path / "state", hidden=HIDDEN, rounds=6, min_clients=2, quorum=1, max_staleness=2)
    toy = toy_run.Toy(folder)
    toy.join("a", "b")
    manifest, base = toy.manifest(), toy.values()
    sent, plain = changes(manifest, base, 1, "int4")
    toy.send(toy.update("a", 5))
    toy.run.fold_pending()
    before = toy.values()
    toy.send(make_update(manifest, "b", sent))
    toy.run.fold_pending()
    after = toy.values()
    for name, (_, values) in plain.items():
        expected = before[name] + (values.astype(np.float64) - base[name]) / np.sqrt(2)
        tolerance = 4e-3 if values.dtype == np.float16 else 1e-6
        np.testing.assert_allclose(after[name], expected, rtol=tolerance, atol=tolerance)
    toy.close()


@pytest.mark.parametrize("policy", [{}, {"download_compression": "int4"}], ids=["mean", "int4"])
def test_no_change_makes_a_float16_model_infinite(tmp_path, policy):
    toy = toy_run.Toy(toy_run.make_run(tmp_path / "state", rounds=2, **policy))
    toy.join("a", "b")
    manifest, before = toy.manifest(), toy.values()["norm|weight"]
    assert before.dtype == np.float16
    for client in "ab":
        change = encode(CODECS["int8"], np.full(before.size, 1e30, np.float32))
        toy.send(make_update(manifest, client, {"norm|weight|int8": ("U8", change)}))
    toy.run.fold_pending()
    assert (toy.values()["norm|weight"] == 65504).all()
    toy.close()


@pytest.mark.parametrize("backend", [NUMPY, select_backend()], ids=lambda backend: backend.name)
def test_the_neurons_of_a_slice_move_where_they_are(tmp_path, backend):
    old = np.random.default_rng(0).standard_normal((50, 30)).astype(np.float32)
    with RunWriter(tmp_path) as writer:
        unit = writer.add_unit(*new_unit("e0", "expert", 0, 0, True, {NEURON_TABLE: ("F32", old)}))
    rows = {"a": np.arange(0, 50, 3), "b": np.arange(20, 50)}
    sums, counts, paths = np.zeros_like(old, dtype=np.float64), np.zeros((50, 1)), {}
    for seed, (client, own) in enumerate(rows.items()):
        change = np.random.default_rng(seed).standard_normal((len(own), 30)).astype(np.float32)
        raw = encode(CODECS["int8"], change.reshape(-1))
        decode(CODECS["int8"], raw, change.reshape(-1))
        sums[own] += change
        counts[own] += 1
        tensors = {
            update_name("e0", NEURON_TABLE, "int8"): ("U8", raw),
            update_name("e0", NEURON_INDEX): ("I32", own.astype(np.int32)),
        }
        paths[client] = tmp_path / client
        update = make_update(manifest_of(unit), client, tensors)
        paths[client].write_bytes(update.frame)
        assert validate_update(paths[client], update.meta, [unit], (1,), backend) == {"e0"}
    blobs, plan = BlobStore(tmp_path), {"e0": UnitMerge((("a", 1.0), ("b", 1.0)))}
    (changed,) = fold.fold_round([unit], plan, paths, blobs, backend, threads=1)
    found = toy_run.unit_values(blobs.path(changed.sha256))[NEURON_TABLE]
    np.testing.assert_allclose(found, old + sums / np.maximum(counts, 1), rtol=1e-6, atol=1e-6)


def test_a_change_is_found_once_for_all_devices(tmp_path):
    asked, rng = [], np.random.default_rng(3)
    values = rng.standard_normal(20_000).astype(np.float32)
    for number in range(3):
        write_frame(tmp_path / str(number), {"w": ("F32", values)})
        values = (values + to_steps(rng.standard_normal(20_000) * 1e-3, 7)).astype(np.float32)

    def find(name: str):
        asked.append(name)
        if not (tmp_path / name).exists():
            raise NotFound(name)
        return tmp_path / name, 0

    cache = ChangeCache(find, limit_bytes=12_000)
    first = cache.between("0", "1")
    assert first == cache.between("0", "1") == encode_blob_change(tmp_path / "0", tmp_path / "1")
    assert asked == ["0", "1"]
    assert cache.between("9", "1") is None
    assert cache.between("1", "2")
    asked.clear()
    assert cache.between("0", "1") == first
    assert asked == ["0", "1"], "there is room for one"


def manifest_of(unit) -> Manifest:
    return Manifest(run_id="r", server_round=1, experts_per_layer=(1,), units=(unit,), files=())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A manifest, and a correct update of one expert by each codec."""
    toy = toy_run.Toy(toy_run.make_run(tmp_path_factory.mktemp("run") / "state", hidden=HIDDEN, experts=1))
    manifest = toy.manifest()
    updates = {
        codec: {
            name: value
            for name, value in changes(manifest, toy.values(), 1, codec)[0].items()
            if name.startswith("layer0.expert0|")
        }
        for codec in CODECS
    }
    toy.close()
    return manifest, updates


def refused(served, tmp_path, codec, edit, words):
    manifest, updates = served
    tensors = {name: (dtype, raw.copy()) for name, (dtype, raw) in updates[codec].items()}
    edit(tensors)
    update = make_update(manifest, "a", tensors)
    path = tmp_path / "update"
    path.write_bytes(frame_of(tensors))
    with pytest.raises(InvalidUpdate, match=words):
        validate_update(path, update.meta, manifest.units, manifest.experts_per_layer, NUMPY)


UP = "layer0.expert0|up"


def test_a_bomb_and_other_bad_frames_are_refused_before_they_are_read(served, tmp_path):
    def replace(name, value, old=f"{UP}|topk"):
        return lambda tensors: (tensors.pop(old), tensors.update({name: value}))

    wrong = ("U8", np.zeros(40, np.uint8))
    for edit, words in (
        (replace(f"{UP}|topk", wrong), r"is U8 of shape \[40\], expected U8 of \[222\]"),
        (replace(f"{UP}|topk", ("U8", np.zeros((2, 40), np.uint8))), r"shape \[2, 40\]"),
        (replace(f"{UP}|topk", ("F32", np.zeros(222, np.float32))), "is F32 of shape"),
        (replace(f"{UP}|zip", wrong), "unknown codec 'zip', expected one of int8"),
        (replace(f"{UP}|topk|topk", wrong), r"unknown codec 'topk\|topk'"),
        (replace("embed|weight|topk", wrong), "not trained in this run"),
        (replace("layer0.expert0|none|topk", wrong), "has no tensor 'none'"),
        (lambda tensors: tensors.update({UP: ("F32", np.zeros((4, HIDDEN), np.float32))}), "is there twice"),
        (lambda tensors: tensors.pop(f"{UP}|topk"), r'incomplete.*"up"'),
    ):
        refused(served, tmp_path, "topk", edit, words)


@pytest.mark.parametrize("codec", CODECS)
def test_bad_scales_and_indices_are_refused_by_name(served, tmp_path, codec):
    for scale in (np.nan, np.inf, -1.0, 1e31):

        def poison(tensors, scale=scale):
            raw = tensors[f"{UP}|{codec}"][1]
            raw[CODECS[codec].block_bytes(CODECS[codec].block) :][:4] = np.array([scale], "<f4").view(np.uint8)

        refused(
            served, tmp_path, codec, poison, rf"'{UP.replace('|', '.')}.{codec}', values from 0 on: scale of block 1"
        )
    if codec.startswith("topk"):

        def unsort(tensors):
            tensors[f"{UP}|{codec}"][1][-8:] = 255

        refused(served, tmp_path, codec, unsort, r"indices, expected \d+")
