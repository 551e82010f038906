"""Errors that mean out of memory or a lost GPU: messages of torch, CUDA, Tegra and libraries, and similar ones."""

from __future__ import annotations

import pytest
import torch

from edgefed.errors import DeviceLost, OutOfMemory
from edgefed.kernels.failures import is_fault_of_backend
from edgefed.kernels.out_of_memory import (
    device_lost,
    free_memory,
    is_device_lost,
    is_out_of_memory,
    with_smaller_batches,
)

OUT_OF_MEMORY = {
    "cuda": "CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 101.44 "
    "MiB is free. Including non-PyTorch memory, this process has 7.16 GiB memory in use.",
    "cuda error": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "cuda driver": "CUDA driver error: out of memory",
    "hip": "HIP out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 15.98 GiB",
    "mps": "MPS backend out of memory (MPS allocated: 5.35 GB, other allocations: 3.70 GB, max allowed: 9.07 GB).",
    "tegra assert": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/opt/torch/c10/cuda/CUDACachingAllocator.cpp":1131, '
    "please report a bug to PyTorch.",
    "tegra assert, newer": "NVML_SUCCESS == r INTERNAL ASSERT FAILED at "
    '"../c10/cuda/CUDACachingAllocator.cpp":838, please report a bug to PyTorch. ',
    "tegra nvmap": "NvMapMemAllocInternalTagged: 1075072515 error 12",
    "tegra nvmap, older": "NvMapMemAlloc failed: error 12",
    "driver": "NVRM: nvCheckOkFailedNoLog: Check failed: Out of memory [NV_ERR_NO_MEMORY] (0x00000051)",
    "driver, bare": "NvRmMemInitNvmap failed: NV_ERR_NO_MEMORY",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cudnn": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cudnn 9": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver": "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cpu": "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)",
    "cpu, windows": "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 1073741824 bytes.",
    "c++": "std::bad_alloc",
    "onednn": "could not create a memory object",
    "triton": "Triton Error [CUDA]: out of memory",
    "mmap": "unable to mmap 1048576 bytes from file </x/model.safetensors>: Cannot allocate memory (12)",
}

DEVICE_LOST = {
    "launch": "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
    "nvml": "GPU is lost",
    "unknown": "CUDA error: unknown error\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    "bus": "NVRM: Xid (PCI:0000:01:00): 79, pid=1234, GPU has fallen off the bus.",
    "ecc": "CUDA error: uncorrectable ECC error encountered",
    "busy": "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "lost": "the CUDA device was lost",
    "name": "cudaErrorLaunchFailure",
}

NEITHER = {
    "a shape": "mat1 and mat2 shapes cannot be multiplied (4x8 and 16x4)",
    "an index": "index 12 is out of bounds for dimension 0 with size 12",
    "device assert": "CUDA error: device-side assert triggered",
    "cublas": "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
    "another assert": 'x == y INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":838, please report',
    "assert elsewhere": 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/driver_api.cpp":12, please report',
    "another nvmap error": "NvMapMemAllocInternalTagged: 1075072515 error 22",
    "a word": "memory format option is only supported by strided tensors",
    "a bad option": "PYTORCH_CUDA_ALLOC_CONF: memory_limit is no option",
    "disk": "[Errno 28] No space left on device",
    "missing kernel": "CUDA error: no kernel image is available for execution on the device",
    "expected": "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
}


@pytest.mark.parametrize("text", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_out_of_memory_in_all_its_texts(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_device_lost(RuntimeError(text))
    assert not is_fault_of_backend(RuntimeError(text)), "no kernel is at fault where memory is short"


@pytest.mark.parametrize("text", DEVICE_LOST.values(), ids=DEVICE_LOST)
def test_a_lost_gpu_in_its_texts(text):
    assert is_device_lost(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", NEITHER.values(), ids=NEITHER)
def test_other_errors_are_neither(text):
    assert not is_out_of_memory(RuntimeError(text))
    assert not is_device_lost(RuntimeError(text))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("anything"), OSError(12, "Cannot allocate memory")], ids=repr
)
def test_the_kinds_that_need_no_text(error):
    assert is_out_of_memory(error)


def test_a_text_in_an_error_of_another_kind_is_not_out_of_memory():
    assert not is_out_of_memory(KeyError("CUDA out of memory"))
    assert not is_out_of_memory(AssertionError("std::bad_alloc"))
    assert is_fault_of_backend(KeyError("CUDA out of memory"))


def test_errors_of_triton_are_told_by_their_text():
    kind = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
    assert not is_fault_of_backend(kind("Triton Error [CUDA]: out of memory"))
    assert is_fault_of_backend(kind("out of resource: shared memory"))


def test_causes_and_contexts_count_but_not_suppressed_ones():
    def wrapped(*, suppress):
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except RuntimeError as cause:
                if suppress:
                    raise ValueError("the loss is odd") from None
                raise ValueError("the loss is odd") from cause
        except ValueError as error:
            return error

    assert is_out_of_memory(wrapped(suppress=False))
    assert not is_out_of_memory(wrapped(suppress=True))
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first  # a cycle does not hang
    assert not is_out_of_memory(first)


def test_a_real_failed_allocation_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_lost_device_is_named_with_a_remedy():
    error = device_lost(RuntimeError("CUDA error: unspecified launch failure\nmore"), "cuda:1")
    assert isinstance(error, DeviceLost)
    assert str(error).startswith("cuda:1 stopped answering: CUDA error: unspecified")
    assert "dmesg" in error.remedy
    assert "\n" not in str(error)
    assert str(device_lost(RuntimeError(), "cuda:0")) == "cuda:0 stopped answering: RuntimeError"


def test_batches_are_halved_until_they_fit():
    tried, reported = [], []

    def run(size):
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return size * 10

    assert with_smaller_batches(run, 9, reported.append) == 20
    assert tried == [9, 4, 2]
    assert reported == [4, 2]


def test_other_errors_and_a_single_row_that_does_not_fit_are_raised():
    def always(size):
        raise MemoryError

    with pytest.raises(MemoryError):
        with_smaller_batches(always, 4, lambda size: None)
    sizes = []

    def broken(size):
        sizes.append(size)
        raise ValueError("not memory")

    with pytest.raises(ValueError, match="not memory"):
        with_smaller_batches(broken, 4, lambda size: None)
    assert sizes == [4]


def test_out_of_memory_of_edgefed_is_final():
    """`OutOfMemory` is raised when no fallback is left, so there is nothing to recover from."""
    assert not is_out_of_memory(OutOfMemory("memory ran out while training, and nothing is left to give up"))


def test_freeing_memory_never_fails():
    free_memory("cpu")
    free_memory(torch.device("meta"))
