"""Backends of a GPU on the CPU, for rehearsals: the CUDA kernels in the tests' emulator, Triton in its interpreter.

Imported by the stages of `gpu_session.py` and by the processes of their proofs. EDGEFED_REHEARSAL names the folder of
the session, in which the emulated library is built once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from edgefed.kernels import cuda_experts, cuda_kernels, dispatch
from edgefed.kernels.cuda_library import load_cuda

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))


def emulated_library() -> Path:
    """Build the CUDA kernels for this CPU, once per session; a minute."""
    folder = Path(os.environ["EDGEFED_REHEARSAL"])
    library = folder / "libcuda_emulated.so"
    if not library.exists():
        from cuda_rig import build_emulated

        build_emulated(folder)
    return library


def register() -> None:
    """Make "cuda" and "triton" backends of the CPU that need proof."""
    kernels = cuda_kernels.CudaKernels(load_cuda(emulated_library()), emulated=True)
    for module in (cuda_kernels, cuda_experts):
        module.cuda_kernels = lambda: kernels  # type: ignore[attr-defined]
    for operation in dispatch.OPERATIONS:
        dispatch.register_backend(operation, "cuda", "cpu", lambda device: None, before="native", needs_proof=True)
        if can_interpret():
            dispatch.register_backend(
                operation, "triton", "cpu", lambda device: None, before="native", needs_proof=True
            )


def can_interpret() -> bool:
    """Whether Triton's interpreter is here and can run loops with bounds from memory (3.7)."""
    from edgefed.triton_kernels.availability import triton_version, version_numbers

    return triton_version() is not None and version_numbers() >= (3, 7)


torch.set_num_threads(1)
register()
