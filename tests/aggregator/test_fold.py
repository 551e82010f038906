"""Folding files: block boundaries, threads and open files change no bit; a wrong plan or a changed file is an error."""

from __future__ import annotations

import numpy as np
import pytest
import toy_run
from toy_run import frame_of, new_unit, trained, weighted_mean

from edgefed.aggregator import fold, update_files
from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.creation import RunWriter
from edgefed.kernels.fold import NUMPY, select_backend
from edgefed.methods.interface import UnitMerge

CLIENTS = ("a", "b", "c")
ROWS = {"a": [1.0, 0.0, 0.5, 0.0, 2.0], "b": [3.0, 0.0, 0.0, 0.0, 1.0], "c": [0.0, 0.0, 0.25, 7.0, 0.5]}


class Case:
    """Five-row routers of every dtype, and what three clients made of them."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        floats = rng.standard_normal((5, 13), dtype=np.float32)
        self.new = [
            new_unit("f32", "router", 0, -1, True, {"w": ("F32", floats), "bias": ("F32", floats[:, 0].copy())}),
            new_unit("f16", "dense", -1, -1, True, {"w": ("F16", floats.astype(np.float16))}),
            new_unit("bf16", "router", 1, -1, True, {"w": ("BF16", (floats.view(np.uint32) >> 16).astype(np.uint16))}),
            new_unit(
                "f64", "dense", -1, -1, True, {"w": ("F64", floats.astype(np.float64)), "none": ("F64", np.empty(0))}
            ),
        ]
        with RunWriter(folder) as writer:
            self.units = [writer.add_unit(*new) for new in self.new]
        self.blobs = BlobStore(folder)
        self.tensors = {}
        self.paths = {}
        for seed, client in enumerate(CLIENTS):
            tensors = trained(self.units, seed)
            bits = rng.integers(0x3E00, 0x4000, (5, 13)).astype(np.uint16)
            tensors["bf16|w"] = ("BF16", bits)
            self.tensors[client] = tensors
            self.paths[client] = folder / client
            self.paths[client].write_bytes(frame_of(dict(reversed(tensors.items()))))  # any order in the file will do

    def plan(self) -> dict[str, UnitMerge]:
        scalar = UnitMerge(tuple((client, weight) for client, weight in zip(CLIENTS, (1.0, 0.0, 3.0), strict=True)))
        rows = UnitMerge(tuple((client, np.array(ROWS[client])) for client in CLIENTS))
        return {"f32": rows, "f16": scalar, "bf16": rows, "f64": scalar}

    def fold(self, plan=None, backend=NUMPY, **options):
        return fold.fold_round(self.units, plan or self.plan(), self.paths, self.blobs, backend, **options)

    def values(self, changed) -> dict[str, np.ndarray]:
        return {
            f"{unit.key}|{name}": values
            for unit in changed
            for name, values in toy_run.unit_values(self.blobs.path(unit.sha256)).items()
        }


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def test_every_dtype_and_kind_of_weight_matches_the_closed_form(case):
    values = case.values(case.fold())
    for name, tolerance in (("f16|w", {"rtol": 2**-11, "atol": 0}), ("f64|w", {"rtol": 1e-14, "atol": 1e-15})):
        expected = weighted_mean([(1.0, case.tensors["a"][name][1]), (3.0, case.tensors["c"][name][1])])
        np.testing.assert_allclose(values[name].astype(np.float64), expected, **tolerance)
    old = {f"{unit.key}|{name}": raw for unit, tensors in case.new for name, (_, raw) in tensors.items()}
    for name in ("f32|w", "f32|bias", "bf16|w"):
        for row in range(5):
            holders = [c for c in CLIENTS if ROWS[c][row]]
            if not holders:
                assert np.array_equal(values[name][row], old[name][row])
            elif name != "bf16|w":
                expected = weighted_mean(
                    [(ROWS[c][row], np.atleast_1d(case.tensors[c][name][1][row])) for c in holders]
                )
                np.testing.assert_array_max_ulp(np.atleast_1d(values[name][row]), expected.astype(np.float32))
            elif len(holders) == 1:
                assert np.array_equal(values[name][row], case.tensors[holders[0]][name][1][row]), "one holder: copied"
    assert values["f64|none"].shape == (0,)


@pytest.mark.parametrize("block", [1, 7, 13, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_threads_and_open_files_change_no_bit(case, monkeypatch, block, threads):
    expected = [unit.sha256 for unit in case.fold()]
    assert len(set(expected)) == 4
    monkeypatch.setattr(fold, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(update_files, "MAX_OPEN_FILES", 2)
    assert [unit.sha256 for unit in case.fold(threads=threads)] == expected
    assert [unit.sha256 for unit in case.fold(backend=select_backend("auto"), threads=threads)] == expected


def test_weights_of_zero_change_nothing(case):
    plan = {unit.key: UnitMerge(tuple((client, 0.0) for client in CLIENTS)) for unit in case.units}
    assert case.fold(plan) == []
    assert case.fold({unit.key: UnitMerge(()) for unit in case.units}) == []


def test_the_mean_of_equal_updates_is_bitwise_equal_to_them(case):
    same = dict(case.tensors["a"])
    same["f32|w"] = ("F32", np.full((5, 13), -0.0, np.float32))
    for path in case.paths.values():
        path.write_bytes(frame_of(same))
    weights = UnitMerge(tuple(zip(CLIENTS, (0.1, 0.7, 1 / 3), strict=True)))
    values = case.values(case.fold({key: weights for key in ("f32", "f16", "bf16")}))
    for name, raw in values.items():
        assert raw.tobytes() == same[name][1].tobytes(), name


@pytest.mark.parametrize(
    ("key", "weights", "words"),
    [
        ("nothing", (("a", 1.0),), "not trainable"),
        ("f32", (("d", 1.0),), "did not upload"),
        ("f32", (("a", -1.0), ("b", 2.0)), "finite numbers from 0"),
        ("f32", (("a", float("nan")),), "finite numbers from 0"),
        ("f32", (("a", np.ones((5, 1))),), "scalar or"),
        ("f32", (("a", np.ones(5)), ("b", 1.0)), "different kinds"),
        ("f32", (("a", np.ones(5)), ("b", np.ones(4))), "different kinds"),
    ],
)
def test_an_invalid_merge_plan_is_refused(case, key, weights, words):
    with pytest.raises(ValueError, match=words):
        case.fold({key: UnitMerge(weights)})
    assert not list((case.blobs.root / "tmp").iterdir())


def test_an_update_changed_on_disk_is_an_error(case):
    tensors = dict(case.tensors["c"])
    tensors["f64|w"][1][4, 12] = np.nan
    case.paths["c"].write_bytes(frame_of(tensors))
    with pytest.raises(update_files.UpdateDamaged, match="changed while"):
        case.fold()
    assert not list((case.blobs.root / "tmp").iterdir())


def test_a_cancelled_fold_leaves_no_files(case):
    with pytest.raises(fold.FoldCancelled):
        case.fold(cancelled=lambda: True)
    assert not list((case.blobs.root / "tmp").iterdir())
