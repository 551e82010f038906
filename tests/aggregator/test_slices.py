"""Slices at the aggregator: neurons are averaged over the clients that sent them, whatever the order of arrival."""

from __future__ import annotations

import numpy as np
import pytest
import toy_run
from toy_run import frame_of, make_update, new_unit

from edgefed.aggregator import fold
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.creation import RunWriter
from edgefed.aggregator.validate import max_header_bytes, max_update_bytes, validate_update
from edgefed.errors import InvalidUpdate
from edgefed.kernels.fold import NUMPY, select_backend
from edgefed.methods.interface import UnitMerge
from edgefed.protocol.messages import NEURON_INDEX, NEURON_TABLE, Manifest

NEURONS, COLUMNS = 12, 9
ROWS = {"a": [0, 1, 2, 5, 6, 11], "b": [1, 2, 3, 4, 5], "c": [11], "d": list(range(12))}
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 7.0, "d": 0.0}
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def values_of(dtype: str, seed: int, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "BF16":
        return rng.integers(0x3E00, 0x4000, shape).astype(np.uint16)
    return rng.standard_normal(shape).astype(DTYPES[dtype])


class Case:
    def __init__(self, folder, dtype="F32", columns=COLUMNS):
        self.old = values_of(dtype, 0, NEURONS, columns)
        bias = values_of(dtype, 1, 4)
        tensors = {NEURON_TABLE: (dtype, self.old), "down_bias": (dtype, bias)}
        with RunWriter(folder) as writer:
            self.unit = writer.add_unit(*new_unit("e0", "expert", 0, 0, True, tensors))
        self.blobs, self.paths, self.sent = BlobStore(folder), {}, {}
        for seed, (client, rows) in enumerate(ROWS.items(), start=10):
            self.sent[client] = values_of(dtype, seed, len(rows), columns)
            update = {
                f"e0|{NEURON_TABLE}": (dtype, self.sent[client]),
                "e0|down_bias": (dtype, values_of(dtype, seed + 50, 4)),
                f"e0|{NEURON_INDEX}": ("I32", np.array(rows, dtype=np.int32)),
            }
            self.paths[client] = folder / client
            self.paths[client].write_bytes(frame_of(update))

    def fold(self, clients="abcd", backend=NUMPY, threads=1):
        plan = {"e0": UnitMerge(tuple((client, WEIGHTS[client]) for client in clients))}
        paths = {client: self.paths[client] for client in clients}
        (changed,) = fold.fold_round([self.unit], plan, paths, self.blobs, backend, threads=threads)
        return changed, toy_run.unit_values(self.blobs.path(changed.sha256))[NEURON_TABLE]


@pytest.mark.parametrize("dtype", ["F32", "F16", "F64"])
def test_each_neuron_is_the_mean_of_those_who_trained_it(tmp_path, dtype):
    case = Case(tmp_path, dtype)
    _, found = case.fold()
    for row in range(NEURONS):
        holders = [client for client in "abc" if row in ROWS[client]]
        if not holders:  # "d" sent it, but did not train it
            assert np.array_equal(found[row], case.old[row])
            continue
        pairs = [(WEIGHTS[client], case.sent[client][ROWS[client].index(row)]) for client in holders]
        expected = toy_run.weighted_mean(pairs)
        tolerance = {"F32": 2e-7, "F16": 2**-10, "F64": 1e-14}[dtype]
        np.testing.assert_allclose(found[row].astype(np.float64), expected, rtol=tolerance, atol=tolerance)


def test_order_of_arrival_blocks_and_backend_change_no_bit(tmp_path, monkeypatch):
    case = Case(tmp_path, "BF16")
    first, _ = case.fold()
    assert case.fold("dcba", threads=3)[0] == first
    assert case.fold(backend=select_backend())[0] == first
    for elements in (COLUMNS, 2 * COLUMNS + 1, 5 * COLUMNS):
        monkeypatch.setattr(fold, "BLOCK_ELEMENTS", elements)
        assert case.fold("cadb")[0] == first


def test_all_neurons_of_all_clients_are_the_mean_of_whole_units(tmp_path):
    """Full slices reduce to FedAvg, bitwise."""
    case = Case(tmp_path)
    clients = {}
    for seed, client in enumerate("ab"):
        whole = values_of("F32", 20 + seed, NEURONS, COLUMNS)
        clients[client] = tmp_path / f"whole-{client}"
        tensors = {f"e0|{NEURON_TABLE}": ("F32", whole), "e0|down_bias": ("F32", values_of("F32", seed, 4))}
        index = {f"e0|{NEURON_INDEX}": ("I32", np.arange(NEURONS, dtype=np.int32))}
        clients[client].write_bytes(frame_of(tensors | index))
        plain = {f"w|{name.partition('|')[2]}": value for name, value in tensors.items()}
        clients[client + "-plain"] = tmp_path / f"plain-{client}"
        renamed = {name.replace(NEURON_TABLE, "matrix"): value for name, value in plain.items()}
        clients[client + "-plain"].write_bytes(frame_of(renamed))
    plan = UnitMerge((("a", 2.0), ("b", 3.0)))
    paths = {client: clients[client] for client in "ab"}
    (sliced,) = fold.fold_round([case.unit], {"e0": plan}, paths, case.blobs, NUMPY)
    with RunWriter(tmp_path / "plain") as writer:
        tensors = {"matrix": ("F32", case.old), "down_bias": ("F32", values_of("F32", 1, 4))}
        unit = writer.add_unit(*new_unit("w", "expert", 0, 0, True, tensors))
    blobs = BlobStore(tmp_path / "plain")
    paths = {client: clients[f"{client}-plain"] for client in "ab"}
    (whole,) = fold.fold_round([unit], {"w": plan}, paths, blobs, NUMPY)
    ours = toy_run.unit_values(case.blobs.path(sliced.sha256))
    theirs = toy_run.unit_values(blobs.path(whole.sha256))
    assert ours[NEURON_TABLE].tobytes() == theirs["matrix"].tobytes()
    assert ours["down_bias"].tobytes() == theirs["down_bias"].tobytes()


@pytest.mark.parametrize(
    ("rows", "width", "problem"),
    [
        ([0, 1, 2], 2, r"neuron table has shape \[2, 9\] and its index \[3\]"),
        ([], 0, "index must name neurons 0..11"),
        ([1, 0], 2, "ascending order, found"),
        ([3, 3], 2, "ascending order, found"),
        ([11, 12], 2, "neurons 0..11"),
        ([-1, 2], 2, "neurons 0..11"),
        (None, 12, f'tensors \\["{NEURON_INDEX}"\\] are missing'),
    ],
)
def test_an_impossible_slice_is_refused_by_name(tmp_path, rows, width, problem):
    case = Case(tmp_path)
    manifest = Manifest(run_id="r", server_round=1, experts_per_layer=(1,), units=(case.unit,), files=())
    tensors = {
        f"e0|{NEURON_TABLE}": ("F32", values_of("F32", 3, width, COLUMNS)),
        "e0|down_bias": ("F32", values_of("F32", 4, 4)),
    }
    if rows is not None:
        tensors[f"e0|{NEURON_INDEX}"] = ("I32", np.array(rows, dtype=np.int32))
    update = make_update(manifest, "a", tensors)
    path = tmp_path / "update"
    path.write_bytes(update.frame)
    with pytest.raises(InvalidUpdate, match=problem):
        validate_update(path, update.meta, manifest.units, (1,), NUMPY)


def test_a_slice_passes_and_a_value_that_is_not_finite_does_not(tmp_path):
    case = Case(tmp_path)
    manifest = Manifest(run_id="r", server_round=1, experts_per_layer=(1,), units=(case.unit,), files=())
    meta = make_update(manifest, "a", {f"e0|{NEURON_TABLE}": ("F32", case.old)}).meta
    for client in ROWS:
        assert validate_update(case.paths[client], meta, manifest.units, (1,), NUMPY) == {"e0"}
        assert case.paths[client].stat().st_size <= max_update_bytes(manifest.units)
    assert max_header_bytes(manifest.units) > 100
    data = bytearray(case.paths["c"].read_bytes())
    at = data.index(case.sent["c"].tobytes())
    data[at : at + 4] = np.float32(np.nan).tobytes()
    case.paths["c"].write_bytes(data)
    with pytest.raises(InvalidUpdate, match="element 0 is not finite"):
        validate_update(case.paths["c"], meta, manifest.units, (1,), NUMPY)
