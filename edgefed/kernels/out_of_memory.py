"""Classify exceptions: out of memory, or a lost GPU. Also frees memory and retries with smaller batches.

torch raises OutOfMemoryError only if its own allocator notices. On a Jetson and on MIG slices the same condition is an
internal assert (pytorch#128661, #185240); below the allocator it is the message of the driver or a library; on a CPU
it is a RuntimeError or a MemoryError. An error that is not listed here does not count: a smaller plan must not hide a
bug.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

from safetensors import SafetensorError

from edgefed.errors import DeviceLost
from edgefed.hardware.memory import trim_memory

if TYPE_CHECKING:
    import torch

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


_WITH_MESSAGE = (RuntimeError, OSError, ValueError, SafetensorError)
"""Types of error whose message counts. An assertion or a key that contains the words by chance does not."""


def _tells_by_message(error: BaseException) -> bool:
    return isinstance(error, _WITH_MESSAGE) or type(error).__module__.startswith("triton")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes and contexts, each once; without suppressed contexts."""
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
    """Whether ``error`` or one of its causes means that memory ran out, on the device or the host."""
    return any(
        isinstance(each, MemoryError)
        or type(each).__name__ == "OutOfMemoryError"  # torch's; this module is used without torch
        or (_tells_by_message(each) and bool(_OUT_OF_MEMORY.search(str(each))))
        for each in _chain(error)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether ``error`` or one of its causes means that this process can no longer use the GPU."""
    if is_out_of_memory(error):
        return False
    return any(_DEVICE_LOST.search(f"{type(each).__name__}: {each}") is not None for each in _chain(error))


def device_lost(error: BaseException, device: str) -> DeviceLost:
    """Return a `DeviceLost` for ``error``. CUDA's context is unusable after it: this process has to end."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return DeviceLost(
        f"{device} stopped answering: {first[:200]}",
        remedy="Check the kernel log (`dmesg | grep -i xid`), power and cooling; reload the driver or reboot, then "
        "join again. Acknowledged updates are safe.",
    )


def free_memory(device: str | torch.device = "cpu") -> None:
    """Free unreachable Python objects, then return the allocator's free blocks.

    Call it outside the ``except`` block: the error's traceback keeps the tensors of the failed step alive.
    """
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        with contextlib.suppress(RuntimeError):  # it synchronizes, and may report the same failure again
            torch.cuda.empty_cache()
    else:
        trim_memory()


def with_smaller_batches(run: Callable[[int], T], batch_size: int, on_retry: Callable[[int], None]) -> T:
    """Call ``run(batch_size)``, with half the batch size after each out-of-memory error.

    Only for computations that do not depend on the batch size. ``on_retry`` is called with each smaller size. Raises
    what ``run`` raises, including an out-of-memory error with a batch of 1.
    """
    while True:
        try:
            return run(batch_size)
        except Exception as error:
            if batch_size <= 1 or not is_out_of_memory(error):
                raise
        import torch

        is_initialized = cast(Callable[[], bool], torch.cuda.is_initialized)
        free_memory("cuda" if is_initialized() else "cpu")
        batch_size = max(1, batch_size // 2)
        on_retry(batch_size)
