"""Codecs of changes: every length, what is lost, the largest values, and bytes that nobody has encoded."""

from __future__ import annotations

import numpy as np
import pytest

from edgefed.kernels.compression import (
    CODECS,
    LARGEST_BLOCK,
    decode,
    decode_reference,
    encode,
    encode_reference,
    native_library,
    problem_of,
)
from edgefed.protocol.frames import COMPRESSIONS

LENGTHS = (1, 2, 3, 63, 255, 256, 257, 1023, 4096, 4097, 9000)
LOST = {"int8": 1e-3, "int4": 0.04, "int2": 0.15, "topk12": 0.7, "topk6": 0.8, "topk3": 0.9, "topk": 0.95}
"""Largest share of the squared norm of normal numbers that is left out."""


def normal(count: int, seed: int = 0) -> np.ndarray:
    return (1e-4 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def decoded(codec, raw: np.ndarray, count: int) -> np.ndarray:
    out = np.full(count, np.nan, dtype=np.float32)
    decode(codec, raw, out)
    return out


def test_every_codec_can_be_asked_for():
    assert set(CODECS) == set(COMPRESSIONS) - {"none", "auto"}
    sizes = [codec.size_bytes(LARGEST_BLOCK) for codec in CODECS.values()]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("count", LENGTHS)
def test_bytes_are_as_announced_and_little_is_lost(name, count):
    codec, values = CODECS[name], normal(count)
    raw = encode(codec, values)
    assert (raw.dtype, raw.shape) == (np.uint8, (codec.size_bytes(count),))
    assert problem_of(codec, raw, count) == ""
    left = values - decoded(codec, raw, count)
    assert np.sum(left**2) <= LOST[name] * np.sum(values**2) + 1e-30
    blocks = [encode(codec, values[at : at + codec.block]) for at in range(0, count, codec.block)]
    np.testing.assert_array_equal(raw, np.concatenate(blocks))  # so a block is read alone


@pytest.mark.parametrize("name", [name for name in CODECS if CODECS[name].top])
def test_the_largest_values_are_sent_and_of_equal_ones_the_first(name):
    codec, values = CODECS[name], normal(4096)
    sent = np.flatnonzero(decoded(codec, encode(codec, values), 4096))
    assert set(sent) == set(np.argsort(-np.abs(values))[: codec.top])
    equal = np.full(4096, -2.0, dtype=np.float32)
    out = decoded(codec, encode(codec, equal), 4096)
    np.testing.assert_array_equal(out, np.where(np.arange(4096) < codec.top, np.float32(-2.0), np.float32(0.0)))


@pytest.mark.parametrize("name", CODECS)
def test_zeros_and_extremes(name):
    codec = CODECS[name]
    np.testing.assert_array_equal(decoded(codec, encode(codec, np.zeros(300, np.float32)), 300), 0)
    values = np.array([1e30, -1e30, 0.0, 1e-38, -1e-45] * 60, dtype=np.float32)
    assert np.isfinite(decoded(codec, encode(codec, values), 300)).all()
    for bad in (np.nan, np.inf, -2e30):
        values[7] = bad
        with pytest.raises(ValueError, match="finite and at most 1e\\+30"):
            encode(codec, values)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 2e30])
def test_a_wrong_scale_is_named(name, scale):
    codec, count = CODECS[name], 2 * CODECS[name].block + 5
    raw = encode(codec, normal(count))
    at = 2 * codec.block_bytes(codec.block)  # the short last block has the number 0 of its own
    raw[at : at + 4] = np.array([scale], "<f4").view(np.uint8)
    assert "scale of block 0" in problem_of(codec, raw, count)
    assert "values have" in problem_of(codec, raw[:-1], count)


def test_wrong_indices_are_named():
    codec = CODECS["topk"]
    raw = encode(codec, normal(4096))
    scales, codes, low, high = codec.parts(4096)
    twice = raw.copy()
    twice[scales + codes : scales + codes + low] = 0  # low bits 0: neighbours with one high part are the same index
    assert "must ascend and be below 4096" in problem_of(codec, twice, 4096)
    for bits in (0, 255):
        wrong = raw.copy()
        wrong[-high:] = bits
        assert "indices, expected 64" in problem_of(codec, wrong, 4096)
    beyond = raw.copy()
    bitmap = np.zeros(8 * high, dtype=np.uint8)
    bitmap[-64:] = 1  # the last bits of the bitmap are beyond the block
    beyond[-high:] = np.packbits(bitmap, bitorder="little")
    assert "must ascend and be below 4096" in problem_of(codec, beyond, 4096)


@pytest.mark.skipif(native_library() is None, reason="the native library is not built")
@pytest.mark.parametrize("name", CODECS)
def test_the_native_codec_is_the_reference(name):
    codec, rng = CODECS[name], np.random.default_rng(5)
    for count in (*LENGTHS, 3 * LARGEST_BLOCK + 77):
        values = np.round(normal(count, count) * 10 ** rng.uniform(3, 6)).astype(np.float32)  # with ties and zeros
        ours, theirs = encode(codec, values), encode_reference(codec, values)
        if codec.bits == 2:  # scales are sums: the order of additions may change their last bit
            found, expected = decoded(codec, ours, count), decoded(codec, theirs, count)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        else:
            np.testing.assert_array_equal(ours, theirs)
        for raw in (ours, theirs):
            reference = np.empty(count, np.float32)
            decode_reference(codec, raw, reference)
            assert decoded(codec, raw, count).tobytes() == reference.tobytes()
    noise = rng.integers(0, 256, codec.size_bytes(4096), dtype=np.uint8)
    decode(codec, noise, np.empty(4096, np.float32))  # invalid bytes write nowhere else
