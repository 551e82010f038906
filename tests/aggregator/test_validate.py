"""The door for updates: everything that a client could claim wrongly, by name."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import toy_run
from toy_run import frame_of, make_update, report, trained

from edgefed.aggregator.validate import max_header_bytes, max_update_bytes, update_units, validate_meta, validate_update
from edgefed.errors import InvalidUpdate
from edgefed.kernels.fold import NUMPY


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    toy = toy_run.Toy(toy_run.make_run(tmp_path_factory.mktemp("validate") / "state"))
    yield toy.manifest()
    toy.close()


@pytest.fixture
def check(manifest, tmp_path):
    """Validate tensors, or a raw frame, as client a's update."""

    def run(tensors=None, *, frame=None, **changes):
        update = make_update(manifest, "a", tensors or {}, **changes)
        path = tmp_path / "update"
        path.write_bytes(update.frame if frame is None else frame)
        return validate_update(path, update.meta, manifest.units, manifest.experts_per_layer, NUMPY)

    return run


@pytest.fixture
def tensors(manifest):
    """One expert and one router, correctly trained."""
    return trained([unit for unit in manifest.units if unit.key in ("layer0.expert1", "layer1.router")], 1)


def test_a_correct_update_passes(check, tensors, tmp_path):
    assert check(tensors) == {"layer0.expert1", "layer1.router"} == update_units(tmp_path / "update")
    assert check({}) == frozenset()


def test_unexpected_tensors_are_named(check, tensors):
    up = "layer0.expert1|up"
    shape = tensors[up][1].shape
    cases = {
        "belongs to no part": {"layer9.router|w": tensors[up]},
        "not trained": {"embed|weight": ("BF16", np.zeros((16, 8), np.uint16))},
        "has no tensor 'extra'": {"layer0.expert1|extra": tensors[up]},
        r"no part": {"up": tensors[up]},
        r"shape \[8, 4\], the manifest says \[4, 8\]": {up: ("F32", np.zeros(shape[::-1], np.float32))},
        r"shape \[4, 9\]": {up: ("F32", np.zeros((4, 9), np.float32))},
        "is F16, the manifest says F32": {up: ("F16", np.zeros(shape, np.float16))},
        "is I32": {up: ("I32", np.zeros(shape, np.int32))},
    }
    for words, change in cases.items():
        with pytest.raises(InvalidUpdate, match=words):
            check({**tensors, **change})


def test_an_incomplete_unit_is_refused(check, tensors):
    del tensors["layer0.expert1|down"]
    with pytest.raises(InvalidUpdate, match=r'incomplete.*"down"'):
        check(tensors)


def test_nan_and_infinity_are_found_anywhere(tmp_path):
    # Larger than one scan block, with NaN in the last element.
    toy = toy_run.Toy(toy_run.make_run(tmp_path / "state", hidden=20_000, experts=1))
    manifest = toy.manifest()
    tensors = trained([unit for unit in manifest.units if unit.key == "layer0.expert0"], 1)
    path = tmp_path / "update"
    for value in (np.nan, np.inf, -np.inf):
        tensors["layer0.expert0|down"][1][-1, -1] = value
        update = make_update(manifest, "a", tensors)
        path.write_bytes(update.frame)
        with pytest.raises(InvalidUpdate, match=r"layer0.expert0\|down.*element 79999"):
            validate_update(path, update.meta, manifest.units, manifest.experts_per_layer, NUMPY)
    toy.close()


def test_every_expert_needs_its_report(check, tensors):
    with pytest.raises(InvalidUpdate, match="without a report"):
        check(tensors, experts=(report(0, 2),))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": 0}, {"num_examples": 10**9 + 1}, {"num_tokens": -1}, {"num_tokens": 10**16},
        {"metrics": {"loss": math.nan}}, {"metrics": {"loss": math.inf}}, {"metrics": {"": 1.0}},
        {"metrics": {"x" * 65: 1.0}}, {"metrics": {"a\x1b[2J": 1.0}}, {"metrics": {str(i): 0.0 for i in range(257)}},
        {"experts": (report(2, 0),)}, {"experts": (report(-1, 0),)}, {"experts": (report(0, 3),)},
        {"experts": (report(0, 1), report(0, 1))}, {"experts": (report(0, 1, usage=1.1),)},
        {"experts": (report(0, 1, usage=math.nan),)}, {"experts": (report(0, 1, usage=-0.1),)},
        {"experts": (report(0, 1, importance=math.inf),)}, {"experts": (report(0, 1, importance=-1.0),)},
        {"experts": (report(0, 1, importance=1.01),)}, {"metrics": {"loss": 1.1e15}},
        {"experts": (report(0, 1, importance=math.nan),)}, {"experts": (report(0, 1, steps=-1),)},
        {"experts": (report(0, 1, tokens=-1),)},
    ],
    ids=lambda changes: str(changes)[:70],
)  # fmt: skip
def test_invalid_numbers_are_refused(manifest, changes):
    update = make_update(manifest, "a", {}, **changes)
    with pytest.raises(InvalidUpdate):
        validate_meta(update.meta, manifest.experts_per_layer)


def header(entries: object, data: bytes = b"") -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        header(b"[" * 60_000),
        header(b"\xff\xfe"),
        header([]),
        header({"layer1.router|w": 3}),
        header({"layer1.router|w": {"dtype": "F32", "shape": [-3, 8], "data_offsets": [0, 96]}}, b"\0" * 96),
        header({"layer1.router|w": {"dtype": "F32", "shape": [3, 8], "data_offsets": [0, 95]}}, b"\0" * 95),
        header({"layer1.router|w": {"dtype": "F32", "shape": [3, 8], "data_offsets": [8, 104]}}, b"\0" * 104),
        header({"layer1.router|w": {"dtype": "F32", "shape": [2**39, 2**39], "data_offsets": [0, 96]}}, b"\0" * 96),
        header({"layer1.router|w": {"dtype": "F32", "shape": [True, 8], "data_offsets": [0, 32]}}, b"\0" * 32),
        header({"layer1.router|w": {"dtype": ["F32"], "shape": [3, 8], "data_offsets": [0, 96]}}, b"\0" * 96),
        frame_of({}) + b"trailing",
    ],
    ids=range(15),
)
def test_a_hostile_frame_raises_only_invalid_update(check, frame):
    with pytest.raises(InvalidUpdate):
        check(frame=frame)


def test_the_largest_valid_update_fits_the_limits(manifest):
    trainable = [unit for unit in manifest.units if unit.trainable]
    update = make_update(manifest, "a", trained(trainable, 1))
    assert len(update.frame) <= max_update_bytes(manifest.units)
    assert int.from_bytes(update.frame[:8], "little") <= max_header_bytes(manifest.units)
    values = sum(math.prod(info.shape) for unit in trainable for info in unit.tensors)
    assert max_update_bytes(manifest.units) == 4 * values + max_header_bytes(manifest.units)
