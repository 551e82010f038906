"""Weighted sums of raw blocks: numpy against an exact oracle, the native library against numpy, bit for bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from edgefed.errors import ConfigError
from edgefed.kernels import fold
from edgefed.native import NativeUnavailable, load_native
from edgefed.protocol.frames import narrow, storage_dtype, widen

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = ["F64", "F32", "F16", "BF16"]
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
EXPONENT = {"F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
SIGN = {"F64": 2**63, "F32": 2**31, "F16": 2**15, "BF16": 2**15}
SIZES = [0, 1, 7, 64, 1001]


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> fold.FoldBackend:
    """The library, compiled here from csrc; fold.cpp with the flag that setup.py uses and without a warning."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    target, own = folder / "_native.so", folder / "fold.o"
    flags = ["-std=c++17", "-fPIC"]
    strict = ["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *strict, "-c", str(CSRC / "fold.cpp"), "-o", str(own)], check=True)
    others = [str(path) for path in sorted(CSRC.glob("*.cpp")) if path.name != "fold.cpp"]  # of no matter here
    link = ["-shared", *(["-pthread", "-ldl"] if sys.platform == "linux" else [])]
    subprocess.run([compiler, *flags, "-O0", *others, str(own), *link, "-o", str(target)], check=True)
    return fold.native_backend(target)


def random_bits(rng: np.random.Generator, dtype: str, count: int) -> np.ndarray:
    """Finite values of any exponent, subnormals and both zeros among them."""
    bits = rng.integers(0, np.iinfo(BITS[dtype]).max, count, BITS[dtype], endpoint=True)
    nonfinite = (bits & BITS[dtype](EXPONENT[dtype])) == EXPONENT[dtype]
    bits[nonfinite] &= BITS[dtype](SIGN[dtype])
    return bits.view(storage_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_sums_as_exact_arithmetic_does(dtype):
    rng = np.random.default_rng(0)
    accumulator, exact = np.zeros(32), [Fraction(0)] * 32
    for weight in (1.0, 0.3, 1e-3):
        raw = narrow(rng.standard_normal(32).astype(np.float32), dtype)
        assert fold.fold_block_reference(accumulator, raw, dtype, weight) == -1
        values = widen(raw, dtype).astype(np.float64)
        exact = [at + Fraction(weight) * Fraction(float(value)) for at, value in zip(exact, values, strict=True)]
    np.testing.assert_allclose(accumulator, [float(at) for at in exact], rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", SIZES)
def test_native_gives_the_bits_of_the_reference(native, dtype, count):
    rng = np.random.default_rng(count)
    ours, theirs = np.zeros(count), np.zeros(count)
    with np.errstate(over="ignore", invalid="ignore"):
        for weight in (0.25, 1 / 3, 17.0):
            raw = random_bits(rng, dtype, count)
            assert native.first_nonfinite(raw, dtype) == fold.first_nonfinite_reference(raw, dtype) == -1
            assert native.fold_block(ours, raw, dtype, weight) == -1
            assert fold.fold_block_reference(theirs, raw, dtype, weight) == -1
            assert ours.tobytes() == theirs.tobytes()
    outs = [np.empty(count, storage_dtype(dtype)) for _ in range(2)]
    native.narrow_block(ours, dtype, outs[0])
    fold.narrow_block_reference(theirs, dtype, outs[1])
    assert outs[0].tobytes() == outs[1].tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_native_rounds_every_kind_of_double_as_numpy_does(native, dtype):
    """Values on, next to and between representable ones; ties; under- and overflow."""
    rng = np.random.default_rng(1)
    grid = widen(random_bits(rng, dtype, 4000), dtype).astype(np.float64)
    neighbours = np.nextafter(grid, np.inf), np.nextafter(grid, -np.inf)
    steps = np.sort(grid)
    ties = (steps[:-1] + steps[1:]) / 2
    if dtype == "F16":  # all of them, and every tie
        steps = np.sort(np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64))
        ties = np.concatenate([(steps[:-1] + steps[1:]) / 2, -(steps[:-1] + steps[1:]) / 2])
    special = np.array(
        [0.0, -0.0, 65519.99, 65520.0, -65520.0, 1e30, 3.5e38, -1e300, 2.0**-25, 2.0**-26, 5e-324, 1e-45]
    )
    values = np.concatenate([grid, *neighbours, ties, np.nextafter(ties, 1), np.nextafter(ties, -1), special])
    outs = [np.empty(values.size, storage_dtype(dtype)) for _ in range(2)]
    native.narrow_block(values, dtype, outs[0])
    fold.narrow_block_reference(values, dtype, outs[1])
    wrong = np.flatnonzero(outs[0].view(BITS[dtype]) != outs[1].view(BITS[dtype]))
    assert wrong.size == 0, [(values[at].hex(), outs[0][at], outs[1][at]) for at in wrong[:5]]


def test_native_widens_every_half_exactly(native):
    raw = np.arange(2**16, dtype=np.uint16)
    raw = raw[(raw & 0x7C00) != 0x7C00].view(np.float16)
    accumulator = np.full(raw.size, -0.0)
    assert native.fold_block(accumulator, raw, "F16", 1.0) == -1
    assert accumulator.tobytes() == raw.astype(np.float64).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_values_that_are_not_finite_are_found_and_nothing_is_added(request, dtype, value, backend):
    chosen = fold.NUMPY if backend == "numpy" else request.getfixturevalue("native")
    raw = narrow(np.ones(1000, np.float32), dtype)
    raw[[617, 800]] = narrow(np.full(2, value, np.float32), dtype)
    accumulator = np.ones(1000)
    assert chosen.fold_block(accumulator, raw, dtype, 1.0) == chosen.first_nonfinite(raw, dtype) == 617
    assert (accumulator == 1.0).all()


def test_native_refuses_arrays_of_the_wrong_layout(native):
    raw = np.ones(8, np.float32)
    for call in (
        lambda: native.fold_block(np.ones(8, np.float32), raw, "F32", 1.0),
        lambda: native.fold_block(np.ones(7), raw, "F32", 1.0),
        lambda: native.fold_block(np.ones(8), raw, "BF16", 1.0),
        lambda: native.fold_block(np.ones(4), raw[::2], "F32", 1.0),
        lambda: native.fold_block(np.ones(16)[::2], raw, "F32", 1.0),
        lambda: native.first_nonfinite(np.ones(8, np.int32), "I32"),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_an_unavailable_requested_backend_is_an_error_and_auto_falls_back(monkeypatch, caplog):
    def missing(path=None):
        raise NativeUnavailable("not built")

    monkeypatch.setattr(fold, "load_native", missing)
    fold.select_backend.cache_clear()
    try:
        with caplog.at_level("INFO"):
            assert fold.select_backend("auto") is fold.select_backend("auto") is fold.NUMPY
        assert [record.message for record in caplog.records] == ["aggregation uses numpy: not built"]
        with pytest.raises(ConfigError, match="fold backend native is unavailable"):
            fold.select_backend("native")
        with pytest.raises(ConfigError, match="quantum"):
            fold.select_backend("quantum")
    finally:
        fold.select_backend.cache_clear()


def test_a_foreign_library_is_refused(tmp_path):
    path = tmp_path / "_native.so"
    path.write_bytes(b"no library")
    with pytest.raises(NativeUnavailable, match="cannot load"):
        load_native(path)
    with pytest.raises(NativeUnavailable):
        load_native(tmp_path / "missing.so")
    with pytest.raises(NativeUnavailable):
        load_native(Path(ctypes.__file__))


def test_the_kernel_needs_no_torch():
    code = "import edgefed.kernels.fold, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
