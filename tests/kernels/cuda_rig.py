"""The CUDA kernels for tests: compiled for the CPU by g++ with the emulator beside this file, and the installed library
where there is a GPU. `pytest tests/kernels/test_cuda_*.py` on a machine with a GPU runs every test on both.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from edgefed.kernels.cuda_kernels import CudaKernels, cuda_kernels
from edgefed.kernels.cuda_library import load_cuda, why_not_cuda

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "csrc").glob("cuda_*.cu"))


class Rig:
    """``kernels`` and the device that they run on."""

    def __init__(self, kernels: CudaKernels, device: str):
        self.kernels = kernels
        self.device = torch.device(device)
        self.emulated = kernels.emulated

    def capability(self) -> int:
        if self.emulated:
            return 80
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    def pretend(self, *, capability: int = 80, falling: bool = False) -> None:
        """Set the emulator's compute capability, and whether blocks and threads run in descending order."""
        self.kernels.library.ef_emulator_capability(ctypes.c_int(capability))
        self.kernels.library.ef_emulator_order(ctypes.c_int(falling))


def build_emulated(folder: Path) -> Path:
    """Compile csrc/cuda_*.cu for this CPU. Skips the test without g++ or away from a checkout."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux to compile the CUDA kernels for the CPU with")
    if not SOURCES:
        pytest.skip("the CUDA sources are not beside the tests")
    # Fortified, longjmp refuses to go from one stack to another, which is what fibres do.
    flags = [
        "-U_FORTIFY_SOURCE",
        "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
        "-Wno-unknown-pragmas", "-Wno-unused-function", f"-I{HERE / 'cuda_emulator'}", f"-I{SOURCES[0].parent}",
    ]  # fmt: skip

    def compile(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, SOURCES))
    library = folder / "libcuda_emulated.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


def make_rig(where: str, folder: Path) -> Rig:
    if where == "emulated":
        return Rig(CudaKernels(load_cuda(build_emulated(folder)), emulated=True), "cpu")
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("EDGEFED_REQUIRE_GPU") == "1" else pytest.skip)("no GPU that torch can use")
    reason = why_not_cuda(torch.cuda.current_device())
    if reason is not None:
        pytest.fail(f"there is a GPU, but {reason}")
    return Rig(cuda_kernels(), "cuda")
