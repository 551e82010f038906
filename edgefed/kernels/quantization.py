"""Experts in 4 or 8 bits, in the bytes of bitsandbytes 0.50.

    nf4   blocks of `blocksize` consecutive weights of the row-major matrix: a 4-bit code of w / absmax of the block,
          two in a byte, the first in its upper half. The code is the nearest of 16 quantiles of the normal distribution
          (QLoRA, arXiv 2305.14314, appendix E). w' = code value * absmax.
    int8  rows: q = round(127 w / absmax of the row) of w rounded to float16 (LLM.int8, arXiv 2208.07339).
          w' = q * absmax / 127.

``nested`` also stores the absmax of nf4 in 8 bits (double quantization, QLoRA section 3): absmax minus its mean over
the expert, in blocks of 256, as an 8-bit dynamic float (arXiv 1511.04561).

A stack (S, rows, columns) is quantized expert by expert, so that a slice of the result equals the result of the slice,
bit for bit. bitsandbytes quantizes a stack as one flat tensor, which gives the same bytes if an expert is a whole
number of blocks (nested: of 256 blocks; its mean is over the whole stack, so those bytes differ).

Two peculiarities of its CPU library: it looks up a nested code in a table of 65536 steps, so it is not always the
nearest one (kept here, for the same bytes); and its nf4 dequantizer reads the wrong absmax if a row is not a whole
number of blocks (avoided here; its generic implementation is right).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch

from edgefed.kernels import gpu_quantization
from edgefed.kernels.dispatch import choose, run_best
from edgefed.kernels.verdicts import Case
from edgefed.native import dtype_code, isa_code, load_native

Format = Literal["nf4", "int8"]

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DEQUANTIZED_WEIGHTS = 2**20
"""Weights that the reference dequantizes at a time: even, and a multiple of every blocksize."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PER_127 = 7.874015718698502e-3
_TINY = 1e-38
_LOOKUP_STEPS = 65536


@dataclasses.dataclass(frozen=True, eq=False)
class NestedScales:
    """absmax (S, blocks) in 8 bits. ``absmax`` (S, blocks of 256) float32, ``mean`` (S,) float32."""

    codes: torch.Tensor
    absmax: torch.Tensor
    mean: torch.Tensor

    def to_float(self) -> torch.Tensor:
        """Return the absmax, (S, blocks) float32.

        Every call decodes it: the result takes four times the memory of the codes.
        """
        if choose("quantize_experts", self.codes.device.type) == "native":
            return _unnest_native(self)
        values = _dynamic_code(self.codes.device)[self.codes.to(torch.int64)]  # (S, blocks)
        scales = self.absmax.repeat_interleave(NESTED_BLOCKSIZE, dim=-1)[..., : values.shape[-1]]
        return values * scales + self.mean.unsqueeze(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix (rows, columns), or a stack (S, rows, columns) of them, in 4 or 8 bits, made by `quantize_experts`.

    ``packed`` is uint8 (..., ceil(rows * columns / 2)) or int8 (..., rows, columns); ``absmax`` is float32
    (..., blocks) or (..., rows), None if ``nested``; ``dtype`` is the dtype before and after.
    """

    format: Format
    packed: torch.Tensor
    absmax: torch.Tensor | None
    shape: tuple[int, ...]
    blocksize: int
    dtype: torch.dtype
    nested: NestedScales | None = None

    def __len__(self) -> int:
        if len(self.shape) != 3:
            raise TypeError("a single quantized matrix has no length; a stack of them has")
        return self.shape[0]

    def __getitem__(self, expert: int) -> QuantizedMatrix:
        """Return one matrix of a stack, as views."""
        if not 0 <= expert < len(self):
            raise IndexError(f"expert {expert} is out of range: the stack has {len(self)} experts")
        nested = self.nested
        return dataclasses.replace(
            self,
            packed=self.packed[expert],
            absmax=None if self.absmax is None else self.absmax[expert],
            shape=self.shape[1:],
            nested=None
            if nested is None
            else NestedScales(nested.codes[expert], nested.absmax[expert], nested.mean[expert]),
        )

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self.packed.device

    @property
    def size_bytes(self) -> int:
        """Total size of its tensors."""
        tensors = [self.packed, self.absmax]
        if self.nested is not None:
            tensors += [self.nested.codes, self.nested.absmax, self.nested.mean]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def scales(self) -> torch.Tensor:
        """Return the absmax in float32, (..., blocks) or (..., rows); decoded if nested."""
        if self.absmax is not None:
            return self.absmax
        if self.nested is None:
            raise ValueError("a quantized matrix needs absmax or nested scales")
        return self.nested.to_float()

    def to(self, device: torch.device | str) -> QuantizedMatrix:
        """Copy it to another device."""
        nested = self.nested
        return dataclasses.replace(
            self,
            packed=self.packed.to(device),
            absmax=None if self.absmax is None else self.absmax.to(device),
            nested=None
            if nested is None
            else NestedScales(nested.codes.to(device), nested.absmax.to(device), nested.mean.to(device)),
        )


def quantize_experts(
    weights: torch.Tensor, format: Format, *, blocksize: int = 64, nested: bool = False, backend: str = "auto"
) -> QuantizedMatrix:
    """Quantize weights in 4 or 8 bits, without gradients.

    Args:
        weights: (rows, columns) or (S, rows, columns), float32, float16 or bfloat16.
        format: "nf4" or "int8".
        blocksize: nf4: number of weights that share an absmax, one of BLOCKSIZES.
        nested: nf4: quantize the absmax as well.
        backend: "reference", "native" (CPU), "triton" or "cuda" (GPU), or "auto".

    Raises ValueError for other shapes, dtypes or options, and if a weight is not finite (int8: beyond float16).

    """
    if weights.ndim not in (2, 3) or weights.dtype not in _DTYPES:
        raise ValueError(f"expected (S, rows, columns) of a float type, found {tuple(weights.shape)} {weights.dtype}")
    if format not in ("nf4", "int8"):
        raise ValueError(f"invalid format {format!r}, expected nf4 or int8")
    if format == "nf4" and blocksize not in BLOCKSIZES:
        raise ValueError(f"invalid blocksize {blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    if format == "int8" and nested:
        raise ValueError("nested scales need the format nf4, found int8")
    weights = weights.detach().contiguous()
    stack = weights if weights.ndim == 3 else weights.unsqueeze(0)

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name in ("native", "reference"):
            return (_quantize_native if name == "native" else _quantize_reference)(stack, format, blocksize)
        return gpu_quantization.quantize(name, stack, format, blocksize)

    packed, absmax = run_best(
        "quantize_experts", str(weights.device), backend, run, case=lambda: _case(weights.dtype, format)
    )
    scales = _nest(absmax) if nested else None
    if weights.ndim == 2:
        packed, absmax = packed[0], absmax[0]
        if scales is not None:
            scales = NestedScales(scales.codes[0], scales.absmax[0], scales.mean[0])
    return QuantizedMatrix(
        format,
        packed,
        None if nested else absmax,
        tuple(weights.shape),
        blocksize if format == "nf4" else weights.shape[-1],
        weights.dtype,
        scales,
    )


def dequantize_experts(
    matrix: QuantizedMatrix,
    dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the values, of ``matrix.shape``, in ``dtype`` (by default the original one).

    ``out``: a contiguous tensor to write to. Raises ValueError if its shape or dtype does not match.
    """
    dtype = dtype or matrix.dtype
    if out is None:
        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    elif tuple(out.shape) != matrix.shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"expected out of {matrix.shape} {dtype}, found {tuple(out.shape)} {out.dtype}")
    if dtype not in _DTYPES:
        raise ValueError(f"expected float32, float16 or bfloat16, found {dtype}")
    if out.numel() == 0:
        return out

    def run(name: str) -> None:
        if name == "native":
            _dequantize_native(matrix, out)
        elif name == "reference":
            _dequantize_reference(matrix, out)
        else:
            gpu_quantization.dequantize(name, matrix.packed, matrix.scales(), matrix.format, matrix.blocksize, out)

    run_best("quantize_experts", str(matrix.device), backend, run, case=lambda: _case(dtype, matrix.format))
    return out


def _case(dtype: torch.dtype, format: str) -> Case:
    return Case("quantize_experts", str(dtype).removeprefix("torch."), format)


# --- the specification ------------------------------------------------------------------------------------------


def _quantize_reference(stack: torch.Tensor, format: Format, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize (S, rows, columns) to packed and absmax, each with a first dimension S."""
    if not torch.isfinite(stack).all():
        raise ValueError("a weight is infinite or NaN")
    if format == "int8":
        half = stack.to(torch.float16)
        if not torch.isfinite(half).all():
            raise ValueError("a weight is too large for float16, which int8 is computed from")
        absmax = half.abs().amax(dim=-1).float()  # (S, rows)
        factor = torch.where(absmax > 0, absmax.reciprocal() * 127.0, 0.0)  # two roundings, as torch does 127 / absmax
        return torch.round(half.float() * factor.unsqueeze(-1)).to(torch.int8), absmax
    experts, size = stack.shape[0], stack.shape[1] * stack.shape[2]
    flat = stack.reshape(experts, size).float()
    whole = size - size % blocksize
    blocks = flat[:, :whole].reshape(experts, -1, blocksize)
    absmax = blocks.abs().amax(dim=-1)  # (S, blocks)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(-1)).reshape(experts, whole)
    if whole < size:  # a short last block is divided by its absmax, which differs in the last bit
        last = flat[:, whole:].abs().amax(dim=-1, keepdim=True).clamp(min=_TINY)
        absmax, scaled = torch.cat([absmax, last], dim=1), torch.cat([scaled, flat[:, whole:] / last], dim=1)
    code = torch.tensor(NF4_CODE, device=stack.device)
    bounds = (code[:-1] + code[1:]) / 2
    codes = torch.bucketize(scaled.clamp(-1, 1), bounds).to(torch.uint8)  # the number of bounds below
    if size % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)  # the code of zero
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def _dequantize_reference(matrix: QuantizedMatrix, out: torch.Tensor) -> None:
    """Write the values, computed in float32, to ``out``. Temporary memory is bounded (nf4), or 4 bytes a weight."""
    scales = matrix.scales()
    if matrix.format == "int8":
        values = matrix.packed.float()
        out.copy_(values.mul_(scales.unsqueeze(-1)).mul_(_PER_127))
        return
    size = matrix.shape[-2] * matrix.shape[-1]
    flat = matrix.packed.reshape(-1, matrix.packed.shape[-1]), scales.reshape(-1, scales.shape[-1])
    for packed, absmax, target in zip(*flat, out.view(-1, size), strict=True):
        for begin in range(0, size, DEQUANTIZED_WEIGHTS):
            end = min(begin + DEQUANTIZED_WEIGHTS, size)
            codes, blocks = packed[begin // 2 : (end + 1) // 2], absmax[begin // matrix.blocksize :]
            target[begin:end].copy_(_nf4_values(codes, blocks, end - begin, matrix.blocksize))


def _nf4_values(packed: torch.Tensor, absmax: torch.Tensor, size: int, blocksize: int) -> torch.Tensor:
    """Return the first ``size`` float32 values of packed codes, with 6 bytes a weight at its peak."""
    values = _nf4_pairs(packed.device).index_select(0, packed.int()).view(torch.float32)[:size]
    whole = size // blocksize
    values[: whole * blocksize].view(-1, blocksize).mul_(absmax[:whole].unsqueeze(-1))
    values[whole * blocksize :].mul_(absmax[whole : whole + 1])  # a short last block
    return values


@functools.lru_cache(maxsize=8)
def _nf4_pairs(device: torch.device) -> torch.Tensor:
    """Return the two float32 values of each of the 256 bytes, the upper half's first, as one int64 each: (256,)."""
    code = torch.tensor(NF4_CODE, device=device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=-1).view(torch.int64).flatten()


@functools.lru_cache(maxsize=8)
def _dynamic_code(device: torch.device) -> torch.Tensor:
    """Return the 256 values of a signed 8-bit dynamic float (arXiv 1511.04561), ascending, float32.

    A value is one of seven powers of ten times a fraction, linear between 0.1 and 1, that has more bits for larger
    powers.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _nest(absmax: torch.Tensor) -> NestedScales:
    """Quantize absmax (S, blocks) to 8 bits."""
    code = _dynamic_code(absmax.device)
    bounds = (code[:-1] + code[1:]) / 2
    grid = torch.arange(_LOOKUP_STEPS, dtype=torch.float32, device=absmax.device) * (2.0 / (_LOOKUP_STEPS - 1)) - 1.0
    nearest = torch.bucketize(grid, bounds).to(torch.uint8)
    experts, blocks = absmax.shape
    means = torch.stack([row.mean() for row in absmax])  # one expert at a time, as bitsandbytes sums
    centred = torch.nn.functional.pad(absmax - means.unsqueeze(-1), (0, -blocks % NESTED_BLOCKSIZE))
    pieces = centred.reshape(experts, -1, NESTED_BLOCKSIZE)
    largest = pieces.abs().amax(dim=-1)  # (S, blocks of 256)
    scaled = pieces * torch.where(largest > 0, 1.0 / largest, 0.0).unsqueeze(-1)
    steps = ((scaled + 1.0) * ((_LOOKUP_STEPS - 1) / 2) + 0.5).to(torch.int64).clamp(0, _LOOKUP_STEPS - 1)
    return NestedScales(nearest[steps].reshape(experts, -1)[:, :blocks].contiguous(), largest, means)


# --- native -----------------------------------------------------------------------------------------------------


def _quantize_native(stack: torch.Tensor, format: Format, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    library = load_native()
    isa, threads, dtype = isa_code(library), torch.get_num_threads(), dtype_code(stack.dtype)
    experts, rows, columns = stack.shape
    size = rows * columns
    if format == "int8":
        packed = torch.empty(stack.shape, dtype=torch.int8)
        absmax = torch.empty(experts, rows)
        error = library.ef_quantize_int8(
            stack.data_ptr(), dtype, experts * rows, columns, packed.data_ptr(), absmax.data_ptr(), isa, threads
        )
        _check_result(error, f"row {(error - 1) % max(rows, 1)} of expert {(error - 1) // max(rows, 1)}")
        return packed, absmax
    packed = torch.empty(experts, (size + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(experts, -(-size // blocksize))
    # Experts of whole blocks are one flat tensor.
    together = size % blocksize == 0
    for first in range(1 if together else experts):
        error = library.ef_quantize_nf4(
            stack[first].data_ptr(), dtype, stack.numel() if together else size, blocksize, packed[first].data_ptr(),
            absmax[first].data_ptr(), isa, threads,
        )  # fmt: skip
        _check_result(error, f"block {error - 1}")
    return packed, absmax


def _check_result(error: int, place: str = "") -> None:
    if error > 0:
        raise ValueError(f"a weight is infinite, NaN or too large for float16, in {place}")
    if error == -4:
        raise MemoryError("out of memory in the native quantizer")
    if error:
        raise RuntimeError(f"the native quantizer failed with code {error}")


def _unnest_native(nested: NestedScales) -> torch.Tensor:
    codes, absmax, mean = nested.codes.contiguous(), nested.absmax.contiguous(), nested.mean.contiguous()
    out, values = torch.empty(codes.shape, dtype=torch.float32), _dynamic_code(codes.device)
    blocks = codes.shape[-1]
    error = load_native().ef_unnest_scales(
        codes.data_ptr(), absmax.data_ptr(), mean.data_ptr(), values.data_ptr(), mean.numel(), blocks,
        NESTED_BLOCKSIZE, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _check_result(error)
    return out


def _dequantize_native(matrix: QuantizedMatrix, out: torch.Tensor) -> None:
    library = load_native()
    isa, threads, dtype = isa_code(library), torch.get_num_threads(), dtype_code(out.dtype)
    packed, scales = matrix.packed.contiguous(), matrix.scales().contiguous()
    if matrix.format == "int8":
        rows = scales.numel()
        error = library.ef_dequantize_int8(
            packed.data_ptr(), scales.data_ptr(), rows, matrix.shape[-1], out.data_ptr(), dtype, isa, threads
        )
        _check_result(error)
        return
    size = matrix.shape[-2] * matrix.shape[-1]
    if len(matrix.shape) == 2 or size % matrix.blocksize == 0:
        pieces = [(packed, scales, out)]
    else:
        pieces = list(zip(packed, scales, out, strict=True))
    for piece, absmax, target in pieces:
        error = library.ef_dequantize_nf4(
            piece.data_ptr(), absmax.data_ptr(), target.numel(), matrix.blocksize, target.data_ptr(), dtype, isa,
            threads,
        )  # fmt: skip
        _check_result(error)
