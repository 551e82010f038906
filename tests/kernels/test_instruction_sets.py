"""All instruction sets compute the same, without torch: on this processor, and on an emulated aarch64 for NEON."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
DRIVER = Path(__file__).with_name("compare_instruction_sets.cpp")


def build(compiler: list[str], target: Path, *more: str) -> None:
    """The program, from the sources of the native part, each with the flags that setup.py gives it."""
    objects = []
    for source in (*sorted(CSRC.glob("*.cpp")), DRIVER):
        flags = ["-ffp-contract=off"] if source.name in ("fold.cpp", "quantize.cpp") else []
        objects.append(str(target.with_name(source.stem + ".o")))
        subprocess.run(
            [*compiler, "-std=c++17", "-O2", f"-I{CSRC}", *flags, "-c", str(source), "-o", objects[-1]], check=True
        )
    subprocess.run([*compiler, *objects, *more, "-o", str(target)], check=True)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="written for Linux compilers")
def test_every_instruction_set_of_this_processor(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "compare"
    build(compiler.split(), program, "-pthread", "-ldl")
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_neon_on_an_emulated_processor(tmp_path):
    """EDGEFED_AARCH64_CXX and EDGEFED_QEMU_AARCH64 name the tools if they are not on the path."""
    compiler = os.environ.get("EDGEFED_AARCH64_CXX") or shutil.which("aarch64-linux-gnu-g++")
    emulator = (
        os.environ.get("EDGEFED_QEMU_AARCH64") or shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    )
    if compiler is None:
        pytest.skip("no compiler for aarch64 (Debian: g++-aarch64-linux-gnu)")
    program = tmp_path / "compare"
    build([compiler], program, "-static", "-pthread")
    if emulator is None:
        pytest.skip("compiled for aarch64; no qemu-aarch64 to run it (Debian: qemu-user)")
    result = subprocess.run([emulator, program], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout
    assert "instruction set 10 compared" in result.stdout
