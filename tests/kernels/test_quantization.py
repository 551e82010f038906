"""Quantized experts: the bytes of bitsandbytes, native against the reference bit for bit, slices, errors."""

from __future__ import annotations

import hashlib
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgefed.costs.step_setup import UNPACKING_BYTES
from edgefed.errors import ConfigError
from edgefed.kernels.dispatch import why_not_native
from edgefed.kernels.quantization import DEQUANTIZED_WEIGHTS, NF4_CODE, dequantize_experts, quantize_experts
from edgefed.native import isa_names, load_native
from edgefed.training.allocation_log import CpuLog

NATIVE = why_not_native()
ISAS = isa_names(load_native()) if NATIVE is None else []
BACKENDS = ["reference", *([f"native:{isa}" for isa in ISAS])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# SHA-256 (16 digits) of what bitsandbytes 0.50.2 makes of `golden_weights` on a CPU: packed nf4, its absmax,
# int8_vectorwise_quant(W.half()), its row absmax. By dtype, rows, columns, blocksize.
GOLDEN = {
    ("float32", 64, 128, 64): ("4b8e99fa5cd27707", "319b748ecc41c8e5", "f54da7addcf2df90", "9464e1c50ec91802"),
    ("float32", 48, 320, 64): ("d45ec537f9aff802", "7b10b396431d77d4", "532da5c4f99266c5", "92bdfad833f5dccd"),
    ("float32", 33, 65, 64): ("7d68e41260362a10", "112c33200ae9cff5", "f403f4478f878589", "31cc4d7bcffc2edc"),
    ("float32", 16, 512, 128): ("72710c4fe5e9c8a8", "796d2edcdee3c487", "4772b879c42f73d2", "d8425d1f16670202"),
    ("bfloat16", 64, 128, 64): ("20e6f70393e9a818", "e8d97592fddae1ff", "27cc6d0e35736b07", "1568a59ecec05faf"),
    ("bfloat16", 48, 320, 64): ("fbf0bec9d7dcc7cb", "40140b645409ca22", "052b71e3e01120f1", "024e32c22298a98a"),
    ("bfloat16", 33, 65, 64): ("ac5f17fda85c7ae2", "242af6492379be40", "0ebaa4eadb65f4ca", "7a64c39d196d488e"),
    ("bfloat16", 16, 512, 128): ("03da93ad8812643a", "1568a59ecec05faf", "6bfb28b938193937", "f6b94453e1c8d74a"),
    ("float16", 64, 128, 64): ("535cf6f538699827", "97efeecf8ad9bc22", "f54da7addcf2df90", "9464e1c50ec91802"),
    ("float16", 48, 320, 64): ("36e9011aeaad3cf3", "5e711931bce496f6", "532da5c4f99266c5", "92bdfad833f5dccd"),
    ("float16", 33, 65, 64): ("8f50a61693bcb6dc", "3a1443491b06789f", "f403f4478f878589", "31cc4d7bcffc2edc"),
    ("float16", 16, 512, 128): ("c0cbf2aebe86de4f", "9464e1c50ec91802", "4772b879c42f73d2", "d8425d1f16670202"),
}
GOLDEN_BYTES = (  # of golden_weights(2, 64), float32
    "07b6837f7b6837f7b6837f7b6837f7b6837e7a6827e7a6827e7a6827e7a5727e"
    "7b5817f7b5817f7a5717f7a4717e7a4707e7a4707e7a4707e7a4707e694707e6"
)


def golden_weights(rows: int, columns: int) -> torch.Tensor:
    index = torch.arange(rows * columns, dtype=torch.int64)
    value = ((index * 2654435761) % 1000003).double() / 1000003 * 2 - 1
    return (value**3 * 0.05).float().reshape(rows, columns)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def random_weights(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    name, _, isa = request.param.partition(":")
    if isa:
        monkeypatch.setenv("EDGEFED_ISA", isa)
    return name


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_the_bytes_are_those_of_bitsandbytes(key, backend):
    dtype, rows, columns, blocksize = key
    weights = golden_weights(rows, columns).to(getattr(torch, dtype))
    nf4 = quantize_experts(weights, "nf4", blocksize=blocksize, backend=backend)
    int8 = quantize_experts(weights, "int8", backend=backend)
    assert (digest(nf4.packed), digest(nf4.absmax), digest(int8.packed), digest(int8.absmax)) == GOLDEN[key]


def test_the_first_bytes(backend):
    found = quantize_experts(golden_weights(2, 64), "nf4", backend=backend)
    assert bytes(found.packed.tolist()).hex() == GOLDEN_BYTES
    assert [value.hex() for value in found.absmax.tolist()] == ["0x1.99999a0000000p-5", "0x1.30c72c0000000p-5"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "blocksize"), [("nf4", 64), ("nf4", 32), ("nf4", 256), ("int8", 64)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (33, 65), (64, 192)])
def test_native_gives_the_bits_of_the_reference(rows, columns, format, blocksize, dtype, backend):
    weights = random_weights(3, rows, columns, dtype=dtype)
    weights[1, 0] = 0
    expected = quantize_experts(weights, format, blocksize=blocksize, backend="reference")
    found = quantize_experts(weights, format, blocksize=blocksize, backend=backend)
    assert torch.equal(found.packed, expected.packed)
    assert torch.equal(found.absmax, expected.absmax)
    for target in DTYPES:
        a, b = (dequantize_experts(expected, target, backend=name) for name in ("reference", backend))
        assert a.dtype == target
        assert torch.equal(a, b)


@pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))
def test_nested_scales_are_decoded_bit_for_bit(monkeypatch):
    """Short last blocks of 256, one expert and a stack, enough of them for several threads."""
    for shape in ((5, 13), (3, 64, 300), (4, 512, 1024)):
        nested = quantize_experts(random_weights(*shape), "nf4", nested=True).nested
        monkeypatch.setenv("EDGEFED_KERNELS", "reference")
        expected = nested.to_float()
        monkeypatch.setenv("EDGEFED_KERNELS", "native")
        assert torch.equal(nested.to_float(), expected)
        assert expected.shape == nested.codes.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(5, 13), (64, 192)])
def test_a_slice_equals_the_slice_quantized_alone(rows, columns, nested, dtype, backend):
    weights = random_weights(4, rows, columns, dtype=dtype)
    for format in ("nf4", "int8") if not nested else ("nf4",):
        stack = quantize_experts(weights, format, nested=nested, backend=backend)
        assert len(stack) == 4
        whole = dequantize_experts(stack, backend=backend)
        for expert in range(4):
            alone = quantize_experts(weights[expert], format, nested=nested, backend=backend)
            assert torch.equal(stack[expert].packed, alone.packed)
            assert torch.equal(stack[expert].scales(), alone.scales())
            assert torch.equal(dequantize_experts(stack[expert], backend=backend), whole[expert])
            assert torch.equal(dequantize_experts(alone, backend=backend), whole[expert])
    with pytest.raises(IndexError, match="4"):
        stack[4]


def test_the_error_is_that_of_the_format(backend):
    """Normal weights: 0.092 of their size in nf4 with blocks of 64, 0.01 in int8, little more when nested."""
    weights = random_weights(2, 256, 256)

    def error(**options):
        values = dequantize_experts(quantize_experts(weights, backend=backend, **options), backend=backend)
        return float((values - weights).norm() / weights.norm())

    assert 0.08 < error(format="nf4") < 0.1
    assert error(format="nf4") < error(format="nf4", nested=True) < error(format="nf4") + 0.005
    assert 0.005 < error(format="int8") < 0.012


def test_code_values_survive_a_round_trip(backend):
    """Every code, exactly: weights that are code values of a block whose absmax is 1."""
    weights = torch.tensor([NF4_CODE * 4], dtype=torch.float32)
    assert torch.equal(dequantize_experts(quantize_experts(weights, "nf4", backend=backend), backend=backend), weights)


def test_sizes_in_bytes():
    weights = random_weights(2, 256, 512, dtype=torch.bfloat16)
    count = weights.numel()
    assert quantize_experts(weights, "nf4").size_bytes * 8 / count == 4.5
    nested = quantize_experts(weights, "nf4", nested=True).size_bytes * 8 / count
    assert 4.125 < nested < 4.13
    assert quantize_experts(weights, "int8").size_bytes == count + 4 * 2 * 256
    assert quantize_experts(weights, "nf4").to("cpu").packed.dtype == torch.uint8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_weights_that_are_not_finite_are_refused(format, dtype, value, backend):
    weights = random_weights(2, 64, 64, dtype=dtype)
    weights[1, 3, 5] = value
    with pytest.raises(ValueError, match="infinite or NaN|infinite, NaN"):
        quantize_experts(weights, format, backend=backend)


def test_int8_refuses_weights_beyond_float16(backend):
    weights = torch.full((2, 64), 1e5)
    with pytest.raises(ValueError, match="float16"):
        quantize_experts(weights, "int8", backend=backend)


@pytest.mark.parametrize(
    ("weights", "options", "match"),
    [
        (torch.zeros(4), dict(format="nf4"), "S, rows, columns"),
        (torch.zeros(4, 4, dtype=torch.float64), dict(format="nf4"), "float64"),
        (torch.zeros(4, 4), dict(format="fp4"), "fp4"),
        (torch.zeros(4, 4), dict(format="nf4", blocksize=48), "48"),
        (torch.zeros(4, 4), dict(format="int8", nested=True), "nested"),
    ],
    ids=["one dimension", "float64", "format", "blocksize", "nested int8"],
)
def test_bad_options_are_refused(weights, options, match):
    with pytest.raises(ValueError, match=match):
        quantize_experts(weights, **options)


def test_a_matching_output_is_used_and_others_are_refused():
    matrix = quantize_experts(random_weights(4, 64), "nf4")
    out = torch.empty(4, 64)
    assert dequantize_experts(matrix, out=out) is out
    assert out.abs().sum() > 0
    for bad in (torch.empty(4, 32), torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(64, 4).T):
        with pytest.raises(ValueError, match="expected out of"):
            dequantize_experts(matrix, out=bad)


def test_an_explicit_backend_that_cannot_run_is_an_error():
    with pytest.raises(ConfigError, match="quantum"):
        quantize_experts(torch.zeros(4, 64), "nf4", backend="quantum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_are_interchangeable_with_bitsandbytes(nested, dtype, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    for rows, columns in ((64, 128), (128, 320), (256, 512)):
        weights = random_weights(rows, columns, dtype=dtype)
        ours = quantize_experts(weights, "nf4", nested=nested, backend=backend)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=nested)
        assert torch.equal(ours.packed, packed.view(-1))
        if nested:
            assert torch.equal(ours.nested.codes, state.absmax)
            assert torch.equal(ours.nested.absmax, state.state2.absmax)
            assert torch.equal(ours.nested.mean, state.offset)
        else:
            assert torch.equal(ours.absmax, state.absmax)
        theirs = functional.dequantize_4bit(packed, state)
        assert torch.equal(dequantize_experts(ours, backend=backend), theirs)
        int8 = quantize_experts(weights, "int8", backend=backend)
        values, absmax, _ = functional.int8_vectorwise_quant(weights.half())
        assert torch.equal(int8.packed, values)
        assert torch.equal(int8.absmax, absmax)
        assert torch.equal(
            dequantize_experts(int8, torch.float32, backend=backend), functional.int8_vectorwise_dequant(values, absmax)
        )
    stack = random_weights(3, 64, 128, dtype=dtype)  # whole blocks: the stack as one tensor
    packed, state = functional.quantize_4bit(stack, quant_type="nf4")
    ours = quantize_experts(stack, "nf4", backend=backend)
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    assert torch.equal(ours.absmax.view(-1), state.absmax)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages, except those of ``inputs``, that are alive at the same time in the block."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.alive += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        tensors = [tensor for ref in self.alive if (tensor := ref()) is not None]
        self.alive = [ref for ref in self.alive if ref() is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.peak = max(self.peak, sum(size for pointer, size in storages.items() if pointer not in self.inputs))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_the_reference_dequantizes_with_at_most_8_bytes_a_weight(format, dtype):
    matrix = quantize_experts(random_weights(1024, DEQUANTIZED_WEIGHTS // 1024, dtype=dtype), format)
    dequantize_experts(matrix, backend="reference")  # the table of codes is made once
    with PeakBytes(matrix.packed, matrix.absmax) as mode:
        dequantize_experts(matrix, torch.bfloat16, backend="reference")
    assert 2 * DEQUANTIZED_WEIGHTS < mode.peak <= 8 * DEQUANTIZED_WEIGHTS


@pytest.mark.parametrize("blocksize", [64, 4096])
@pytest.mark.parametrize("columns", [256, 257])
def test_the_reference_dequantizes_large_matrices_in_parts(blocksize, columns):
    """Matrices larger than one part, with a short last block: the values follow from the definition."""
    rows = DEQUANTIZED_WEIGHTS // 256 + 3
    matrix = quantize_experts(random_weights(2, rows, columns), "nf4", blocksize=blocksize)
    size = rows * columns
    codes = torch.stack([matrix.packed >> 4, matrix.packed & 15], dim=-1).flatten(-2)[:, :size].long()
    scales = matrix.absmax.repeat_interleave(blocksize, dim=-1)[:, :size]
    expected = (torch.tensor(NF4_CODE)[codes] * scales).reshape(2, rows, columns)
    assert torch.equal(dequantize_experts(matrix, backend="reference"), expected)
    with PeakBytes(matrix.packed, matrix.absmax) as mode:
        dequantize_experts(matrix, torch.bfloat16, backend="reference")
    assert mode.peak < 2 * 2 * size + 6.01 * DEQUANTIZED_WEIGHTS, "temporary memory does not grow with the matrix"


@pytest.mark.parametrize("shape", [(512, 1024), (512, 1000)])
@pytest.mark.parametrize("storage", ["nf4", "nf4_dq", "int8"])
def test_the_reference_decodes_in_the_memory_that_is_planned_for_it(storage, shape):
    packed = quantize_experts(torch.randn(shape).bfloat16(), storage[:4].rstrip("_"), nested=storage == "nf4_dq")
    log = CpuLog()
    with log:
        log.mark("decode")
        values = dequantize_experts(packed, backend="reference")
        log.mark("end")
    (span,) = log.spans()
    planned = values.nbytes + UNPACKING_BYTES[storage] * values.numel()
    assert 0.6 * planned < span.peak_bytes <= 1.01 * planned
