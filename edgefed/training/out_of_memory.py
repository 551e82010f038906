"""Tells by an exception whether the memory ran out, or whether the GPU is gone, whatever its text is.

torch raises its OutOfMemoryError only where its own allocator notices. On a Jetson and on MIG slices the same thing is
an internal assert (pytorch#128661, #185240), below the allocator it is the driver's or a library's own text, and on a
CPU a plain RuntimeError or a MemoryError. What is not listed here is no lack of memory: shrinking must not hide a bug.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from safetensors import SafetensorError

from edgefed.errors import DeviceLost

T = TypeVar("T")

_OUT_OF_MEMORY = re.compile(
    "|".join(
        (
            r"\bout of memory\b",  # CUDA, HIP, MPS, cudaErrorMemoryAllocation, Triton
            r"cudaErrorMemoryAllocation",
            r"NVML_SUCCESS == r INTERNAL ASSERT FAILED.*CUDACachingAllocator",  # Tegra, MIG: NVML cannot say why
            r"NvMapMemAlloc\w* error 12\b|NvMapMemAlloc\w*[^\n]*\berror 12\b",
            r"NV_ERR_NO_MEMORY",
            r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",
            r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_(?:INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED|ALLOC_FAILED)",
            r"CUSPARSE_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED",
            r"\bstd::bad_alloc\b|^bad allocation$",
            r"unable to mmap \d+ bytes from file .*Cannot allocate memory",
            r"\[Errno 12\] Cannot allocate memory|\(os error 12\)",  # Python; Rust
            r"could not create a memory object",  # oneDNN
        )
    ),
    re.DOTALL,
)

_DEVICE_LOST = re.compile(
    "|".join(
        (
            r"\bGPU is lost\b|GPU_IS_LOST",  # NVML
            r"CUDA error: (?:unspecified launch failure|unknown error|device lost|an illegal instruction)",
            r"cudaErrorLaunchFailure|cudaErrorUnknown\b",
            r"uncorrectable (?:ECC|NVLink) error",
            r"GPU has fallen off the bus|fallen off the bus",
            r"device (?:has been|was) (?:lost|removed)|\bdevice lost\b",
            r"\bXid\b[^\n]*: (?:45|48|62|74|79|94|95|119|120)\b",
            r"CUDA-capable device\(s\) is/are busy or unavailable",
        )
    ),
    re.IGNORECASE,
)


_TELLING = (RuntimeError, OSError, ValueError, SafetensorError)
"""Kinds of error whose text counts. An assertion or a key that happens to hold the words does not."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything that it came from, each once. A context that was suppressed is no cause."""
    pending, seen = [error], set()
    while pending:
        current = pending.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if current.__cause__ is not None:
            pending.append(current.__cause__)
        elif current.__context__ is not None and not current.__suppress_context__:
            pending.append(current.__context__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or an error that it came from, says that memory ran out; on the device or on the host."""
    return any(
        isinstance(each, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(each, _TELLING) and bool(_OUT_OF_MEMORY.search(str(each))))
        for each in _chain(error)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether ``error``, or an error that it came from, says that the GPU cannot be used any more in this process."""
    if is_out_of_memory(error):
        return False
    return any(_DEVICE_LOST.search(f"{type(each).__name__}: {each}") is not None for each in _chain(error))


def device_lost(error: BaseException, device: str) -> DeviceLost:
    """The error of the tree that says so. CUDA's context is unusable after it: this process has to end."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return DeviceLost(
        f"{device} stopped answering: {first[:200]}",
        remedy="Look into the kernel's log (`dmesg | grep -i xid`), check power and cooling, reload the driver or "
        "reboot, then join again: what was acknowledged is safe.",
    )


def free_memory(device: str | torch.device = "cpu") -> None:
    """Give back what no live object holds: Python's cycles, then the free blocks of the allocator.

    Call it outside the ``except`` block: the traceback of the error holds the tensors of the step that failed.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        with contextlib.suppress(RuntimeError):  # it synchronises, and may report the same failure again
            torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks, and the guard of resident memory would ask for more and more.
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def with_smaller_batches(run: Callable[[int], T], batch_size: int, on_retry: Callable[[int], None]) -> T:
    """``run(batch_size)``, with half of it after each out-of-memory; for passes whose result no batch size changes.

    ``on_retry`` hears of each smaller size. Raises what ``run`` raises; out of memory with a batch of 1 passes too.
    """
    while True:
        try:
            return run(batch_size)
        except Exception as error:
            if batch_size <= 1 or not is_out_of_memory(error):
                raise
        free_memory("cuda" if torch.cuda.is_initialized() else "cpu")
        batch_size = max(1, batch_size // 2)
        on_retry(batch_size)
