"""The native library's products of experts, called with tensors. Only this module turns tensors into pointers.

rows    dot products that decode the weights on the fly: few rows of x, limited by the weights' bytes
tiles   decoded bfloat16 weights and register tiles: many rows, limited by arithmetic (AVX-512 BF16, AMX)
torch   the matrix dequantized into a buffer, and torch's product: everything else
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from edgefed.kernels.row_sizes import multiply_rows, pad_rows
from edgefed.native import DTYPE_CODES, ISA_CODES, ExpertGroup, dtype_code, isa_code, load_native

ROWS, ROWS_INT8, TILES, TILES_INT8, TORCH = 0, 1, 2, 3, 4
ROWS_LIMIT = {DTYPE_CODES["nf4"]: 16, DTYPE_CODES["int8"]: 24, DTYPE_CODES["bfloat16"]: 16}
"""Rows of x up to which ``rows`` is faster than ``tiles``, by the format of the weights.

Measured with 2048 x 2048 matrices on an EPYC Genoa (benchmarks/bench_masked_experts.py --crossover): decoding a panel
takes as long as 16 (nf4) to 30 (int8) rows; for dense bfloat16 both are equal from 16 rows on.
"""
ROWS_LIMIT_INT8_EXACT, ROWS_LIMIT_INT8 = 4, 12
"""With x in 8 bits: up to 4 rows the weights' bytes are the limit, so rounding x gains nothing."""
ROWS_LIMIT_AMX = {DTYPE_CODES["nf4"]: 2, DTYPE_CODES["int8"]: 3, DTYPE_CODES["bfloat16"]: 1}
"""The same with AMX, where decoding a matrix takes as long as 2 to 3 rows, and 16 rows as long as one.

Processor time of 2048 x 2048 matrices on a Xeon (fourth generation), 64 rows of NF4: 0.8 ms, AVX-512 7.1, torch 4.2.
"""
ROWS_LIMIT_WITHOUT_TILES = 32
"""Higher, because without ``tiles`` the alternative writes out the whole matrix."""


class Matrix(NamedTuple):
    """One weight: the indices of its tensors in the call's list, and their format. ``shape`` is the stored shape."""

    data: int
    scale: int
    code: int
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype


Buffers = dict[tuple[tuple[int, int], torch.dtype], torch.Tensor]


# --- grouped products -------------------------------------------------------------------------------------------


def can_run(matrix: Matrix, dtype: torch.dtype, transposed: bool, kernel: int) -> bool:
    """Return whether this kernel multiplies x of ``dtype`` with this matrix on this processor."""
    columns, outputs = matrix.shape if transposed else matrix.shape[::-1]
    isa = isa_code(load_native())
    return _can(matrix.code, matrix.blocksize, dtype_code(dtype), outputs, columns, transposed, kernel, isa)


@functools.lru_cache(maxsize=4096)
def _can(code: int, blocksize: int, dtype: int, n: int, k: int, transposed: bool, kernel: int, isa: int) -> bool:
    return bool(load_native().ef_can_matmul(code, blocksize, dtype, n, k, transposed, kernel, isa))


def choose_kernel(matrix: Matrix, rows: int, dtype: torch.dtype, transposed: bool, int8: bool, isa: int) -> int:
    """Choose the kernel for ``rows`` rows of x of ``dtype`` times this matrix (transposed: x W, else x W^T)."""
    rows = min(rows, ROWS_LIMIT_WITHOUT_TILES + 1)  # more rows change nothing
    return _choose_kernel(matrix.code, matrix.blocksize, matrix.shape, rows, dtype, transposed, int8, isa)


@functools.lru_cache(maxsize=4096)
def _choose_kernel(
    code: int, blocksize: int, shape: tuple[int, int], rows: int, dtype: torch.dtype, transposed: bool, int8: bool,
    isa: int,
) -> int:  # fmt: skip
    columns, outputs = shape if transposed else shape[::-1]
    facts = (code, blocksize, dtype_code(dtype), outputs, columns, transposed)
    tiles = _can(*facts, TILES, isa)
    amx = isa == ISA_CODES["amx"]
    if int8 and rows > ROWS_LIMIT_INT8_EXACT and not amx:  # with AMX, rounding x saves nothing
        if rows <= ROWS_LIMIT_INT8 and _can(*facts, ROWS_INT8, isa):
            return ROWS_INT8
        if _can(*facts, TILES_INT8, isa):
            return TILES_INT8
    limit = (ROWS_LIMIT_AMX if amx else ROWS_LIMIT).get(code, 0) if tiles else ROWS_LIMIT_WITHOUT_TILES
    if rows <= limit and _can(*facts, ROWS, isa):
        return ROWS
    return TILES if tiles else TORCH


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data, None for None."""
    return None if tensor is None else tensor.data_ptr()


def check_result(error: int) -> None:
    """Raise MemoryError or RuntimeError for a negative result of the native library."""
    if error == -4:
        raise MemoryError("out of memory in the native experts")
    if error < 0:
        raise RuntimeError(f"the native experts failed with code {error}")


def dense(matrix: Matrix, tensors: list[torch.Tensor], buffers: Buffers) -> torch.Tensor:
    """Return the matrix as a dense tensor: itself, or dequantized into a reused buffer."""
    data = tensors[matrix.data]
    if matrix.scale < 0:
        return data
    key = (matrix.shape, matrix.dtype)
    if key not in buffers:
        buffers[key] = torch.empty(matrix.shape, dtype=matrix.dtype)
    out, scale, library = buffers[key], tensors[matrix.scale].contiguous(), load_native()
    isa, threads, data = isa_code(library), torch.get_num_threads(), data.contiguous()
    if matrix.code == DTYPE_CODES["nf4"]:
        error = library.ef_dequantize_nf4(
            data.data_ptr(), scale.data_ptr(), out.numel(), matrix.blocksize, out.data_ptr(), dtype_code(out.dtype),
            isa, threads,
        )  # fmt: skip
    else:
        error = library.ef_dequantize_int8(
            data.data_ptr(), scale.data_ptr(), *matrix.shape, out.data_ptr(), dtype_code(out.dtype), isa, threads
        )
    check_result(error)
    return out


def grouped_product(
    entries: list[tuple[Matrix, int, int]],
    tensors: list[torch.Tensor],
    x: torch.Tensor,
    x_rows: torch.Tensor | None,
    num_rows: int,
    transposed: bool,
    int8: bool,
) -> torch.Tensor:
    """Compute Y (num_rows, out): for each (matrix, begin, end), rows begin .. end of x or x[x_rows] times the matrix.

    ``transposed``: x W, else x W^T. Rows outside all entries are undefined.
    """
    library = load_native()
    isa, threads = isa_code(library), torch.get_num_threads()
    outputs = entries[0][0].shape[1 if transposed else 0]
    inputs = entries[0][0].shape[0 if transposed else 1]
    y = torch.empty(num_rows, outputs, dtype=x.dtype)
    by_kernel: dict[int, list[tuple[Matrix, int, int]]] = {}
    for matrix, begin, end in entries:
        kernel = choose_kernel(matrix, end - begin, x.dtype, transposed, int8, isa)
        by_kernel.setdefault(kernel, []).append((matrix, begin, end))
    buffers: Buffers = {}
    for matrix, begin, end in by_kernel.pop(TORCH, ()):
        weight = dense(matrix, tensors, buffers)
        rows, index = (x[begin:end], None) if x_rows is None else (x, x_rows[begin:end])
        multiply_rows(rows, index, weight if transposed else weight.t(), y[begin:end])
    for kernel, group in by_kernel.items():
        structs = (ExpertGroup * len(group))()
        alive: list[torch.Tensor | None] = []  # until the call returns
        for at, (matrix, begin, end) in enumerate(group):
            data = tensors[matrix.data].contiguous()
            scale = None if matrix.scale < 0 else tensors[matrix.scale].contiguous()
            alive += (data, scale)
            structs[at] = ExpertGroup(
                data.data_ptr(), pointer(scale), begin, end - begin, matrix.code, matrix.blocksize
            )  # fmt: skip
        check_result(
            library.ef_grouped_matmul(
                ctypes.byref(structs),
                len(group),
                x.data_ptr(),
                pointer(x_rows),
                y.data_ptr(),
                dtype_code(x.dtype),
                outputs,
                inputs,
                transposed,
                kernel,
                isa,
                threads,
            )  # fmt: skip
        )
    return y


def combine(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Compute Y (T, H) in ``dtype``: the float32 sum over k of weights (T, K) times rows (P, H) at place (T, K)."""
    rows = rows.to(dtype).contiguous()
    y = torch.empty(place.shape[0], rows.shape[1], dtype=dtype)
    factor = None if weights is None else weights.float().contiguous()
    check_result(
        load_native().ef_combine(
            rows.data_ptr(),
            place.data_ptr(),
            pointer(factor),
            y.data_ptr(),
            dtype_code(dtype),
            place.shape[0],
            place.shape[1],
            rows.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
    )
    return y


def outer(a: torch.Tensor, b: torch.Tensor, b_rows: torch.Tensor | None) -> torch.Tensor:
    """Compute sum_p a[p] b[p]^T, (M, N), of a (P, M) and b (P, N) or b[b_rows]."""
    library = load_native()
    isa = isa_code(library)
    has_kernel = isa in (ISA_CODES["avx512_bf16"], ISA_CODES["amx"])
    if a.dtype == torch.bfloat16 and has_kernel and b.shape[1] % 64 == 0:
        out = torch.empty(a.shape[1], b.shape[1], dtype=a.dtype)
        a, b = a.contiguous(), b.contiguous()
        error = library.ef_outer_bf16(
            a.data_ptr(), b.data_ptr(), pointer(b_rows), out.data_ptr(), a.shape[0], a.shape[1], b.shape[1], isa,
            torch.get_num_threads(),
        )  # fmt: skip
        check_result(error)
        return out
    return torch.mm(pad_rows(a).t(), pad_rows(b, b_rows))


def sort_pairs(slot_indices: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Sort pairs by slot and drop those of slot -1.

    Returns the order (P,) of the remaining pairs, the place (T, K) of each pair in it or -1, and the counts by slot.
    Raises IndexError for a slot >= num_slots.
    """
    slots = slot_indices.to(torch.int64).contiguous()
    order = torch.empty(slots.numel(), dtype=torch.int64)
    place = torch.empty_like(slots)
    counts = (ctypes.c_int64 * max(num_slots, 1))()
    kept = load_native().ef_sort_pairs(
        slots.data_ptr(), slots.numel(), num_slots, order.data_ptr(), place.data_ptr(), ctypes.byref(counts)
    )
    if kept == -5:
        raise IndexError(f"slot {int(slots.max())} is out of range: there are {num_slots} slots")
    check_result(kept)
    return order[:kept], place, list(counts)[:num_slots]


def swiglu(up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * value, (P, I), of up (P, 2I), in float32 with one rounding."""
    library = load_native()
    act = torch.empty(up.shape[0], up.shape[1] // 2, dtype=up.dtype)
    check_result(
        library.ef_swiglu(
            up.data_ptr(), act.data_ptr(), dtype_code(up.dtype), *act.shape, isa_code(library), torch.get_num_threads()
        )
    )
    return act


def swiglu_backward(
    up: torch.Tensor, d: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return act (P, I), the gradient of up (P, 2I) for weights (P,) times d (P, I), and d . act (P,) in float32."""
    library = load_native()
    act, d_up, d_weights = torch.empty_like(d), torch.empty_like(up), torch.empty(up.shape[0])
    error = library.ef_swiglu_backward(
        up.data_ptr(), d.data_ptr(), weights.data_ptr(), act.data_ptr(), d_up.data_ptr(), d_weights.data_ptr(),
        dtype_code(up.dtype), *act.shape, isa_code(library), torch.get_num_threads(),
    )  # fmt: skip
    check_result(error)
    return act, d_up, d_weights
