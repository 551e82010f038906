"""The functions of csrc/edgefed_cuda.h, called with tensors. They do not wait for the device unless stated.

All work is queued on the current stream of the tensors' device. T tokens, K experts a token, T*K pairs, S slots;
positions are the places of pairs sorted by slot. The number of pairs that remain without the dropped ones is known only
on the device, so buffers have T*K rows, and the rows beyond that number are undefined.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import torch

from edgefed.kernels.cuda_library import CudaLowRank, CudaMatrix, error_text, load_cuda
from edgefed.native import dtype_code

_NO_ERROR = -1
"""Place of an error in quantization, initially the largest uint64."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A weight (rows, columns) on the device, dense or packed with its absmax. ``code`` is of enum EfFormat.

    ``factor``: see `LowRank`.
    """

    data: torch.Tensor
    code: int
    scale: torch.Tensor | None = None
    blocksize: int = 0
    bias: torch.Tensor | None = None
    alpha: float = 1.0
    factor: torch.Tensor | None = None


Matrices = ctypes.Array[CudaMatrix]
"""The operands of a product by slot, as `matrix_table` makes them. It has addresses only: the tensors must stay."""


def matrix_table(operands: Sequence[Operand | None]) -> Matrices:
    """Return the table of ``operands`` by slot; None skips the slot's rows."""
    table = (CudaMatrix * len(operands))()
    for slot, operand in enumerate(operands):
        if operand is not None:
            table[slot] = CudaMatrix(
                operand.data.data_ptr(), _pointer(operand.scale), _pointer(operand.bias), _pointer(operand.factor),
                operand.code, operand.blocksize, operand.alpha, 0,
            )  # fmt: skip
    return table


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Adds ``low`` F^T to a product, ``transposed`` ``low`` F, for slots with a factor F (out, R), transposed (R, out).

    ``low`` (T*K, R) by position; ``dtype`` of the factors, that of ``low`` or float32.
    """

    low: torch.Tensor
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class SortedPairs:
    """The pairs of a layer by slot; see ef_cuda_sort_pairs. ``place`` is (T, K), the others one-dimensional; int32."""

    order: torch.Tensor
    tokens: torch.Tensor
    place: torch.Tensor
    work: torch.Tensor
    num_slots: int

    @property
    def num_pairs(self) -> int:
        """T*K, dropped pairs included."""
        return self.place.numel()

    def begins(self) -> torch.Tensor:
        """Return the begin of each slot's positions, (S + 1,); the last is the number of pairs that are not dropped."""
        return self.work[: self.num_slots + 1]


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=1)
def cuda_kernels() -> CudaKernels:
    """Return the kernels of the installed library. Raises NativeUnavailable."""
    return CudaKernels(load_cuda())


class CudaKernels:
    """The functions of one library. ``emulated``: library and tensors are on the CPU (for tests)."""

    def __init__(self, library: ctypes.CDLL, *, emulated: bool = False):
        self.library = library
        self.emulated = emulated

    def _call(self, name: str, like: torch.Tensor, *arguments: object) -> None:
        """Call a function that ends in (device, stream), for the device of ``like``."""
        function = getattr(self.library, name)
        if self.emulated:
            code = function(*arguments, 0, None)
        elif like.is_cuda:
            device = like.device
            stream = torch.cuda.current_stream(device).cuda_stream
            if device.index == torch.cuda.current_device():
                code = function(*arguments, device.index, stream)
            else:
                with torch.cuda.device(device):
                    code = function(*arguments, device.index, stream)
        else:
            raise ValueError(f"expected a CUDA tensor, found one on {like.device}")
        if code != 0:
            raise RuntimeError(f"{name} failed: {error_text(self.library, code)}")

    # --- experts --------------------------------------------------------------------------------------------------

    def sort_pairs(self, slot_indices: torch.Tensor, num_slots: int) -> SortedPairs:
        """Sort the pairs of slot_indices (T, K) by slot and drop those < 0. A slot >= S aborts the device."""
        slots = slot_indices.to(torch.int64).contiguous()
        pairs = slots.numel()

        def ints(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=slots.device)

        result = SortedPairs(
            ints(pairs), ints(pairs), ints(*slots.shape), ints(self.library.ef_cuda_work_size(num_slots)), num_slots
        )
        scratch = ints(self.library.ef_cuda_sort_scratch(pairs, num_slots))
        self._call(
            "ef_cuda_sort_pairs", slots, slots.data_ptr(), pairs, num_slots, max(slots.shape[1], 1),
            result.order.data_ptr(), result.tokens.data_ptr(), result.place.data_ptr(), result.work.data_ptr(),
            scratch.data_ptr(),
        )  # fmt: skip
        return result

    def grouped_matmul(
        self,
        matrices: Matrices,
        pairs: SortedPairs,
        x: torch.Tensor,
        x_rows: torch.Tensor | None,
        outputs: int,
        *,
        transposed: bool,
        kernel: int,
        low_rank: LowRank | None = None,
        add_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute Y (T*K, outputs): each position's row of x or x[x_rows] times its slot's W^T (``transposed``: W).

        ``add_to``: add to this y instead of a new one.
        """
        x = x.contiguous()
        y = torch.empty(pairs.num_pairs, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
        term = None
        if low_rank is not None:
            low = low_rank.low
            term = ctypes.byref(CudaLowRank(low.data_ptr(), low.shape[1], dtype_code(low_rank.dtype)))
        self._call(
            "ef_cuda_grouped_matmul", x, ctypes.byref(matrices), len(matrices), pairs.work.data_ptr(), pairs.num_pairs,
            x.data_ptr(), _pointer(x_rows), y.data_ptr(), dtype_code(x.dtype), outputs, x.shape[1], transposed,
            add_to is not None, term, kernel,
        )  # fmt: skip
        return y

    def grouped_outer(
        self,
        wanted: Sequence[float | None],
        pairs: SortedPairs,
        a: torch.Tensor,
        b: torch.Tensor,
        b_rows: torch.Tensor | None,
        *,
        dtype: torch.dtype | None = None,
        together: bool = False,
    ) -> list[torch.Tensor | None]:
        """Compute, by slot, alpha * sum_p a[p] b[p]^T, (M, N), of a (T*K, M) and b (T*K, N) or b[b_rows].

        ``wanted`` by slot: alpha, or None for no result. A slot without pairs gives zeros. ``dtype`` of the results:
        that of a, or float32; ``together``: in one storage, for small ones.
        """
        a, b = a.contiguous(), b.contiguous()
        dtype, shape = dtype or a.dtype, (a.shape[1], b.shape[1])
        results: list[torch.Tensor | None]
        if together:
            count = sum(alpha is not None for alpha in wanted)
            parts = iter(torch.empty(count, *shape, dtype=dtype, device=a.device).unbind(0))
            results = [None if alpha is None else next(parts) for alpha in wanted]
        else:
            results = [None if alpha is None else torch.empty(shape, dtype=dtype, device=a.device) for alpha in wanted]
        targets = (ctypes.c_void_p * max(len(wanted), 1))(*map(_pointer, results))
        alphas = (ctypes.c_float * max(len(wanted), 1))(*(0.0 if alpha is None else alpha for alpha in wanted))
        self._call(
            "ef_cuda_grouped_outer", a, ctypes.byref(targets), ctypes.byref(alphas), len(wanted),
            pairs.work.data_ptr(), a.data_ptr(), b.data_ptr(), _pointer(b_rows), dtype_code(a.dtype),
            dtype_code(dtype), *shape,
        )  # fmt: skip
        return results

    def combine(self, rows: torch.Tensor, pairs: SortedPairs, weights: torch.Tensor | None) -> torch.Tensor:
        """Compute Y (T, H): the ordered float32 sum over k of weights (T, K) float32 times rows at place (T, K)."""
        tokens, top_k = pairs.place.shape
        y = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
        self._call(
            "ef_cuda_combine", rows, rows.data_ptr(), pairs.place.data_ptr(), _pointer(weights), y.data_ptr(),
            dtype_code(rows.dtype), tokens, top_k, rows.shape[1],
        )  # fmt: skip
        return y

    def spread(self, y: torch.Tensor, pairs: SortedPairs, weights: torch.Tensor) -> torch.Tensor:
        """Compute rows (T*K, H): the token's row of y (T, H) times the pair's weight, float32 (T, K)."""
        y = y.contiguous()
        rows = torch.empty(pairs.num_pairs, y.shape[1], dtype=y.dtype, device=y.device)
        self._call(
            "ef_cuda_spread", y, y.data_ptr(), pairs.order.data_ptr(), pairs.tokens.data_ptr(), weights.data_ptr(),
            pairs.work.data_ptr(), pairs.num_slots, rows.data_ptr(), dtype_code(y.dtype), pairs.num_pairs, y.shape[1],
        )  # fmt: skip
        return rows

    def pair_dots_(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        b_rows: torch.Tensor | None,
        pairs: SortedPairs,
        weights: torch.Tensor | None,
        dots: torch.Tensor,
    ) -> None:
        """Compute dots (T, K) = <a, b> of each pair, a (T*K, N), b (T*K, N) or b[b_rows], then a *= weights."""
        self._call(
            "ef_cuda_pair_dots", a, a.data_ptr(), b.data_ptr(), _pointer(b_rows), pairs.order.data_ptr(),
            _pointer(weights), pairs.work.data_ptr(), pairs.num_slots, dots.data_ptr(), dtype_code(a.dtype),
            pairs.num_pairs, a.shape[1],
        )  # fmt: skip

    def swiglu(self, gate_up: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
        """Compute silu(g) * u, (T*K, I), of the two halves of gate_up (T*K, 2I)."""
        hidden = torch.empty(
            gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device
        )  # fmt: skip
        self._call(
            "ef_cuda_swiglu", gate_up, gate_up.data_ptr(), pairs.work.data_ptr(), pairs.num_slots, hidden.data_ptr(),
            dtype_code(gate_up.dtype), *hidden.shape,
        )  # fmt: skip
        return hidden

    def swiglu_backward_(
        self, gate_up: torch.Tensor, d: torch.Tensor, pairs: SortedPairs, weights: torch.Tensor, *, keeps_hidden: bool
    ) -> torch.Tensor:
        """Replace gate_up (T*K, 2I) by its gradient, and return that of the weights, (T, K) float32.

        d (T*K, I) is the gradient of silu(g) * u without the gate weights, float32 (T, K). ``keeps_hidden``: replace it
        by silu(g) * u.
        """
        dots = torch.zeros_like(weights)
        self._call(
            "ef_cuda_swiglu_backward", d, gate_up.data_ptr(), d.data_ptr(), pairs.order.data_ptr(), weights.data_ptr(),
            pairs.work.data_ptr(), pairs.num_slots, gate_up.data_ptr(), d.data_ptr() if keeps_hidden else None,
            dots.data_ptr(), dtype_code(d.dtype), *d.shape,
        )  # fmt: skip
        return dots

    # --- router statistics ----------------------------------------------------------------------------------------

    def router_statistics(
        self,
        statistics: torch.Tensor,
        router: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        kind: int = 0,
        received: torch.Tensor | None = None,
    ) -> None:
        """Add one batch to ``statistics`` (6 or 7, E), contiguous float64, as `edgefed.kernels.router_statistics`.

        The order of additions is fixed. ``kind`` is an index of its GATE_KINDS. An index outside the experts aborts the
        device.
        """
        if statistics.dtype != torch.float64 or not statistics.is_contiguous():
            raise ValueError(f"expected contiguous float64 statistics, found {statistics.dtype}")
        router, indices, weights = router.contiguous(), indices.to(torch.int64).contiguous(), weights.contiguous()
        if weights.dtype not in (router.dtype, torch.float32):
            weights = weights.float()
        tokens, experts = router.shape
        received = None if received is None else received.float().contiguous()
        size = self.library.ef_cuda_statistics_scratch(tokens, experts)
        partials = torch.empty(size, dtype=torch.float64, device=router.device)
        self._call(
            "ef_cuda_router_statistics", router, statistics.data_ptr(), router.data_ptr(), dtype_code(router.dtype),
            kind, indices.data_ptr(), weights.data_ptr(), dtype_code(weights.dtype),
            None if received is None else received.data_ptr(), tokens, experts, indices.shape[1], partials.data_ptr(),
        )  # fmt: skip

    # --- quantization ---------------------------------------------------------------------------------------------

    def quantize(self, stack: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize (S, rows, columns), contiguous, to packed and absmax, each with a first dimension S.

        Waits for the device once, to raise ValueError if a weight is not finite (int8: beyond float16).
        """
        experts, rows, columns = stack.shape
        size, device, dtype = rows * columns, stack.device, dtype_code(stack.dtype)
        error = torch.full((1,), _NO_ERROR, dtype=torch.int64, device=device)
        if format == "int8":
            packed = torch.empty(stack.shape, dtype=torch.int8, device=device)
            absmax = torch.empty(experts, rows, device=device)
            self._call(
                "ef_cuda_quantize_int8", stack, stack.data_ptr(), dtype, experts * rows, columns, packed.data_ptr(),
                absmax.data_ptr(), error.data_ptr(),
            )  # fmt: skip
        else:
            packed = torch.empty(experts, (size + 1) // 2, dtype=torch.uint8, device=device)
            absmax = torch.empty(experts, -(-size // blocksize), device=device)
            together = size % blocksize == 0  # experts of whole blocks are one flat tensor
            for first in range(1 if together else experts):
                self._call(
                    "ef_cuda_quantize_nf4", stack, stack[first].data_ptr() if experts else None, dtype,
                    stack.numel() if together else size, blocksize, packed[first:].data_ptr(),
                    absmax[first:].data_ptr(), error.data_ptr(),
                )  # fmt: skip
        place = int(error.item())
        if place != _NO_ERROR:
            where = f"row {place % max(rows, 1)} of expert {place // max(rows, 1)}" if format == "int8" else "a block"
            raise ValueError(f"a weight is infinite, NaN or too large for float16, in {where}")
        return packed, absmax

    def dequantize(
        self, packed: torch.Tensor, scales: torch.Tensor, format: str, blocksize: int, out: torch.Tensor
    ) -> None:
        """Write the values of a matrix or stack to ``out``, contiguous, (rows, columns) or (S, rows, columns)."""
        packed, scales, dtype = packed.contiguous(), scales.contiguous(), dtype_code(out.dtype)
        if format == "int8":
            self._call(
                "ef_cuda_dequantize_int8", out, packed.data_ptr(), scales.data_ptr(), scales.numel(), out.shape[-1],
                out.data_ptr(), dtype,
            )  # fmt: skip
            return
        size = out.shape[-2] * out.shape[-1]
        together = out.ndim == 2 or size % blocksize == 0
        pieces = [(packed, scales, out)] if together else list(zip(packed, scales, out, strict=True))
        for codes, absmax, values in pieces:
            self._call(
                "ef_cuda_dequantize_nf4", out, codes.data_ptr(), absmax.data_ptr(), values.numel(), blocksize,
                values.data_ptr(), dtype,
            )  # fmt: skip
